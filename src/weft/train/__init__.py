"""The trainer: optimizer, step, loop, log and view."""
