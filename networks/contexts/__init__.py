"""Context modules, which networks put between backbone and head; one a file."""
