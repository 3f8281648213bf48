"""Exact: one process of a layout, built and run for a step on tensors that take no memory."""
