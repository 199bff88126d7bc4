"""Training: steps, optimizers, resuming, and validation during a run."""
