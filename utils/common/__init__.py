"""What everything else may use: errors, files, flags, commands, progress, differences of versions."""
