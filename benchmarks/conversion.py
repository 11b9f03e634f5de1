"""The converter beside the least that any converter must do: read every byte, hash it, write it."""

import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import config_of, write_random
from benchmarks.machine import say
from benchmarks.worker import ROOT

_SHARD_BYTES = 10**9
_BASELINE, _SYNCED = "sha256sum + cp", "sha256sum + cp + sync"


def measure(folder: Path, gigabytes: float, max_host_memory: str, repeats: int) -> dict[str, Any]:
    """Converts a random checkpoint from and to Hugging Face.

    Args:
      folder: an empty one, with room for three checkpoints.
      gigabytes: size of the checkpoint, in 10^9 bytes.
      max_host_memory: as the converter takes it.
      repeats: measurements of each kind.

    Returns:
      The report: what was measured, on what, and "results", one entry per line of the table.

    Raises:
      RuntimeError: if what came back is not, byte for byte, what was there at first.
    """
    hf, converted, back, copy = (folder / name for name in ("hf", "converted", "back", "copy"))
    config = config_of(gigabytes * 1e9)
    say("writing a checkpoint of random weights")
    nbytes = write_random(hf, config, "bfloat16", _SHARD_BYTES)

    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    for turn in range(repeats):
        say(f"converting, {turn + 1} of {repeats}")
        limit = ["--max-host-memory", max_host_memory, "--json"]
        jobs = {
            "from-hf": ["from-hf", hf, converted, *limit],
            "to-hf": ["to-hf", converted, back, "--shard-size", _SHARD_BYTES, *limit],
        }
        hashing_and_copying = _timed(lambda: _hash_and_copy(hf, copy))
        seconds[_BASELINE].append(hashing_and_copying)
        seconds[_SYNCED].append(hashing_and_copying + _timed(os.sync))
        for name, arguments in jobs.items():
            begin = time.perf_counter()
            peak = _convert(arguments)
            seconds[name].append(time.perf_counter() - begin)
            if peak is not None:
                peaks[name].append(peak)
            os.sync()  # the next measurement shall not wait for the disk on this one's behalf
        _check_equal(hf, back)
        for done in (copy, converted, back):
            shutil.rmtree(done)
    baseline = statistics.median(seconds[_BASELINE])
    return {
        "benchmark": "convert",
        "model_bytes": nbytes,
        "max_host_memory": max_host_memory,
        "repeats": repeats,
        "results": [
            {
                "measure": name,
                "median_seconds": statistics.median(samples),
                "times_baseline": statistics.median(samples) / baseline,
                "peak_memory": max(peaks[name], default=None),
                "samples": samples,
            }
            for name, samples in seconds.items()
        ],
    }


def _timed(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _hash_and_copy(source: Path, destination: Path) -> None:
    files = sorted(path for path in source.iterdir())
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cp", "-r", source, destination], check=True)


def _convert(arguments: list[Any]) -> int | None:
    """Runs one conversion to its end; the peak memory of its process."""
    command = [sys.executable, "-m", "benchmarks.measure_convert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"the converter ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_memory"]


def _check_equal(a: Path, b: Path) -> None:
    names = [path.name for path in a.iterdir()]
    _, different, missing = filecmp.cmpfiles(a, b, names, shallow=False)
    if different or missing:
        raise RuntimeError(f"converting there and back changed {', '.join(different + missing)}")
