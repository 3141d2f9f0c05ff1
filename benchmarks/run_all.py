"""Run every benchmark and put what it printed into the README, between `<!-- bench: NAME -->` markers.

    python benchmarks/run_all.py [NAME...] [--no-write]

Each benchmark prints a Markdown table on standard output; this script adds the machine, the command and the date.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from measured_on import provenance

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

BENCHMARKS = {
    "packed_linear": ["benchmarks/bench_packed_linear.py", "--quick"],
    "activation_precision": ["benchmarks/bench_activation_precision.py"],
    "quantize": ["benchmarks/bench_quantize.py"],
    "presets": ["benchmarks/bench_presets.py"],
    "sentence_embeddings": ["benchmarks/bench_sentence_embeddings.py", "--planes", "2", "3", "4", "--passages", "160"],
}


def section(name: str, command: list[str]) -> str:
    shown = "python " + " ".join(command)
    print(f"\n$ {shown}", flush=True)
    result = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    print(result.stdout, flush=True)
    return f"{provenance(shown)}\n\n{result.stdout.strip()}"


def replace_section(text: str, name: str, body: str) -> str:
    pattern = re.compile(rf"(<!-- bench: {name} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no section <!-- bench: {name} -->")
    return pattern.sub(lambda match: f"{match.group(1)}{body}\n{match.group(2)}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which ones (default: all of {', '.join(BENCHMARKS)})")
    parser.add_argument("--no-write", action="store_true", help="print only, leave the README as it is")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    for name in arguments.names or BENCHMARKS:
        body = section(name, BENCHMARKS[name])
        if not arguments.no_write:
            README.write_text(replace_section(README.read_text(), name, body))


if __name__ == "__main__":
    main()
