"""What a run leaves in its folder: snapshots, logs, results."""
