"""What run_local.sh does."""
