"""Devices: which to use, in which precision, with how much memory."""
