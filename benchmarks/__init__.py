"""Speed and memory beside PyTorch, measured in one run: `python -m benchmarks`, `python -m benchmarks convert`."""
