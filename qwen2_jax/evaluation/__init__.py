"""How good a model is: scores and answers for benchmarks, needles found in long prompts, and loss by position."""
