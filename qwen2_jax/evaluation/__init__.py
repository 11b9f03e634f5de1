"""What a model still knows far from where it reads: needles found in long prompts, and loss by position."""
