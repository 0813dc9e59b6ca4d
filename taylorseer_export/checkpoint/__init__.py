"""Checkpoints: where weights and configs come from, in whatever layout, read one tensor at a time."""
