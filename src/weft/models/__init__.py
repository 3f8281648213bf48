"""Plain single-device PyTorch modules. No collective, no mesh, no rank in here."""
