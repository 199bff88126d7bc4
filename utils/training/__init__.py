"""Training: the step, its optimizer, how a run goes on, and what is looked at meanwhile."""
