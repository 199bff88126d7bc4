"""The program behind run_local.sh."""
