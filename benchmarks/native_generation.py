"""One native line of bench_generate.py, as a process of its own that imports little beside the runtime.

    python benchmarks/native_generation.py '{"kind": "direct", "model": ..., "target_ram_mb": ...}'

Prints seconds, bytes and the plan as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loop_singular_bit.local_models import weight_files
from loop_singular_bit.streaming import StreamingManager, get_system_info

_FIRST_PROMPT_TOKENS = 16


def use_realtime(wanted: bool) -> None:
    """For this process's present threads and those they start."""
    if wanted:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(1))


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Runs with the options of a line; `kind` is a back end, of mmap with "cold" or "warm" behind it."""
    directory = Path(options["model"])
    back_end, _, state = options["kind"].partition(" ")
    budget = options["target_ram_mb"]
    if back_end == "resident":
        budget = None
    elif budget is None:
        budget = 1.1 * get_system_info(directory)["models"][0]["smallest_budget_mb"]
    if state == "cold":
        drop_from_cache(weight_files(directory))
    use_realtime(options["realtime"])
    manager = StreamingManager(
        directory,
        budget,
        None,
        back_end=back_end,
        context_length=options["context_length"],
        cache_type=options["cache_type"],
        threads=options["threads"],
    )
    prompt = [1 + i * 37 % (manager.vocabulary_size - 1) for i in range(options["prompt_tokens"])]
    start = options["spawned"]
    if state == "warm" or back_end == "resident":
        list(manager.generate_tokens(prompt[:2], 2))
        start = time.monotonic()
    model = manager._model
    model.start(prompt[:_FIRST_PROMPT_TOKENS], {})
    model.next()
    first = time.monotonic() - start
    model.start(prompt, {})
    begin = time.perf_counter()
    model.next()
    prefill = time.perf_counter() - begin
    seconds, read = [], manager.statistics()["bytes_read"]
    for _ in range(options["new_tokens"] - 1):
        if state == "cold":
            drop_from_cache(weight_files(directory))
        begin = time.perf_counter()
        model.next()
        seconds.append(time.perf_counter() - begin)
    statistic = manager.statistics()
    return {
        "seconds_to_first_token": first,
        "prefill_tokens_per_second": len(prompt) / prefill,
        "token_seconds": seconds,
        "read_bytes": 0 if state == "warm" else (statistic["bytes_read"] - read) / len(seconds),
        "peak_resident_bytes": statistic["peak_resident_bytes"],
        "plan": manager.plan,
    }


def drop_from_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
