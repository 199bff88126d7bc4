"""Shared basics: errors, files, flags, commands, messages, progress, system limits, differences between versions."""
