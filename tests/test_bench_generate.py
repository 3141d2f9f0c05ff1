"""The benchmark of the native runtime runs and reports what it says it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_reports_each_back_end_with_its_memory(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench_generate.py", "--prompt-tokens", "20", "--new-tokens", "2"]
    command += ["--back-ends", "resident,direct", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| resident |" in done.stdout and "| direct |" in done.stdout and "| weights, 2 buffers |" in done.stdout
    resident, direct = json.loads((tmp_path / "figures.json").read_text())
    assert resident["read_bytes"] == 0 < direct["read_bytes"]
    assert direct["peak_resident_bytes"] <= direct["plan"]["total_bytes"] <= direct["plan"]["budget_bytes"]


def test_a_hollow_checkpoint_runs_without_being_written(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/make_checkpoint.py", str(tmp_path / "model"), "--packed", "--hollow"]
    subprocess.run([*command, "--shape", "small", "--layers", "1"], check=True, cwd=ROOT, capture_output=True)
    program = (
        "from loop_singular_bit import load_compressed_model\n"
        f"print(list(load_compressed_model({str(tmp_path / 'model')!r}).generate_tokens([1, 2], 3)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    # All weights are 0, so that all logits are, and the first token wins.
    assert done.stdout == "[0, 0, 0]\n", done.stderr
