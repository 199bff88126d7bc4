"""Context modules between backbone and head, one per file."""
