"""Facts of the machine, for reports: from Linux's /proc, or what the platform knows without it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """Model name, with family and model number: cloud machines give one name to several generations."""
    facts = processor_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def processor_facts() -> dict[str, str]:
    """/proc/cpuinfo of the first core, by key; empty where there is none."""
    return _key_values(Path("/proc/cpuinfo"))


def memory_mb(key: str) -> int | None:
    """A line of /proc/meminfo, such as MemAvailable, in units of 10^6 bytes; None where there is none."""
    value = _key_values(Path("/proc/meminfo")).get(key)
    return None if value is None else int(value.split()[0]) * 1024 // 10**6


def usable_cpus() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key_values(path: Path) -> dict[str, str]:
    """The first value of each key in a file of `key : value` lines; empty where it cannot be read."""
    values: dict[str, str] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return values
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    return values
