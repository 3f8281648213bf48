"""A run in the settings of other systems, and back. Torch-free."""
