"""The files of a run: snapshots, logs and results."""
