"""What other programs load: entry points, like the commands."""
