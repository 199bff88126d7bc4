"""Choice of devices, precision, and memory."""
