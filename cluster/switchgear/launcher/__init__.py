"""Who starts the rank processes: `Launcher` and its backends, one file each."""
