"""Training data: files to tokens, tokens to full rows, rows to batches on devices. See docs/data.md."""
