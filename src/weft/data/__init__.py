"""The data room: text in, indexed token files out, and the loader that reads them back in a fixed order. Torch-free."""
