"""A step, computed: a model, its cache, the fastest way of so many tokens, and the tokens chosen."""
