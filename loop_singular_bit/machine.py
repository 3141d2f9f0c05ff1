"""Facts of the machine, for reports: from Linux's /proc, or what the platform knows without it."""

from __future__ import annotations

import os
from pathlib import Path


def processor_name() -> str:
    """Model name, with family and model number: cloud machines give one name to several generations."""
    import platform

    facts = processor_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def processor_facts() -> dict[str, str]:
    """/proc/cpuinfo of the first core, by key; empty where there is none."""
    return _key_values(Path("/proc/cpuinfo"))


def memory_bytes() -> int | None:
    """All of the machine's; None where nobody says."""
    return _memory_line("MemTotal")


def available_memory_bytes(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the machine, or the control group that limits this process, has left; None where nobody says."""
    available = _memory_line("MemAvailable")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such files, or a limit of "max"
        return available
    left = limit - used + int(statistics["file"])
    return left if available is None else min(available, left)


def usable_cpus() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_line(key: str) -> int | None:
    value = _key_values(Path("/proc/meminfo")).get(key)
    return None if value is None else int(value.split()[0]) * 1024


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
