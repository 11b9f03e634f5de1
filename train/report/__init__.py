"""What one sees of a run: one reporter, and outputs that it passes every record on to."""
