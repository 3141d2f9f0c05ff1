"""`loop-singular-bit env`: what a report of a problem needs to say about the machine."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

from .machine import available_memory_bytes, memory_bytes, processor_facts, processor_name, usable_cpus

HELP = "versions, instruction sets, threads and memory, for reports of problems"

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy")
_RELEVANT_FLAGS = (
    "f16c fma avx2 avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512vbmi avx512_bf16 amx_tile amx_int8 "
    "asimd asimddp i8mm sve"
).split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_OK, print_json

    facts = environment()
    if parsed.json:
        print_json(facts)
    else:
        width = max(len(name) for name in facts) + 2
        for name, value in facts.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{name.replace('_', ' '):{width}}{'-' if text is None or text == '' else text}")
    return EXIT_OK


def environment() -> dict[str, Any]:
    """Facts by name; sizes in units of 10^6 bytes. An operator library that does not load is reported, not raised."""
    from importlib import metadata

    import torch

    from . import __version__

    facts: dict[str, Any] = {"loop_singular_bit": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    try:
        from . import ops

        facts["isa"], facts["supported_isas"] = ops.isa(), ops.supported_isas()
    except (ImportError, RuntimeError, ValueError) as error:
        facts["isa"], facts["supported_isas"] = f"not available: {error}", []
    facts["isa_forced"] = os.environ.get("LOOP_SINGULAR_BIT_ISA")
    processor = processor_facts()
    flags = set((processor.get("flags") or processor.get("Features") or "").split())
    facts |= {
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cpu_flags": [flag for flag in _RELEVANT_FLAGS if flag in flags],
        "cpus": usable_cpus(),
        "torch_threads": torch.get_num_threads(),
        "ram_mb": _megabytes(memory_bytes()),
        "ram_available_mb": _megabytes(available_memory_bytes()),
    }
    return facts


def _megabytes(value: int | None) -> int | None:
    return None if value is None else value // 10**6
