"""`qwen2-jax convert` with --json, and after its report a line with the peak memory of the process."""

import json
import sys

from benchmarks.machine import peak_memory
from convert.cli import main

if __name__ == "__main__":
    status = main(sys.argv[1:])
    print(json.dumps({"peak_memory": peak_memory()}))
    raise SystemExit(status)
