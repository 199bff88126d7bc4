"""Weights and snapshots: what files hold, and how it gets into a network."""
