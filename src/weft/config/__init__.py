"""The typed tree of settings: frozen, unknown keys refused, read from TOML. Torch-free."""
