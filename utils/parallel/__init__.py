"""Processes, replicas in threads, and worker processes."""
