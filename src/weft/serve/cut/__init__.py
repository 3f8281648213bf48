"""One model, served by several processes."""
