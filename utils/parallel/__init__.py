"""Distributed processes, replicas in threads, and worker processes."""
