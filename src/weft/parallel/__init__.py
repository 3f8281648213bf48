"""Every way to cut a model, one file each, applied to a plain model from outside by `weave()`."""
