"""Products and attention of our own, for CPUs and GPUs; torch's own stand in wherever they cannot be."""
