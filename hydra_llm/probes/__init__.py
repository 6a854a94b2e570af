"""Asks nodes and GPUs what is true now."""
