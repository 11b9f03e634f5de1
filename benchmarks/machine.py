"""What a measurement was taken on."""

import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

from convert.files import cores

_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe() -> dict[str, Any]:
    """Date, processor, cores that this process may use, memory, and how busy the machine is."""
    processor = _processor()
    flags = processor.get("flags", "").split()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": processor.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _TELLING_FLAGS if flag in flags],
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def peak_memory() -> int | None:
    """Bytes that this process had in memory at most, mapped files included; None where the system has no /proc.

    Not getrusage: its peak starts from that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _processor() -> dict[str, str]:
    """What /proc/cpuinfo says about the first processor; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {}
    first = info.read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
