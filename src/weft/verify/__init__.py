"""Proofs: a layout computes what one process does, a resume what an unbroken run does, an export what its source is."""
