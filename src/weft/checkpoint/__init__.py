"""Checkpoints: tensors on disk by region, written in place by whoever holds them; safetensors and JSON only."""
