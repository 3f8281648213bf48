"""Asking models: prompts as files, what they score, how they get better. Torch-free but for local.py."""
