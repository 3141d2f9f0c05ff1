"""`make demo`: compress the bundled language model, measure what was lost, and let both versions write.

Every figure printed here is measured in this run.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "books-llama-7m"
HELD_OUT = sorted((ROOT / "text" / "held_out").glob("*.txt"))
PACKED = ROOT.parent / "demo" / "books-llama-7m-b2"
PROMPT = "The old sailor looked at the"
NEW_TOKENS = 100


def run(*arguments: str) -> None:
    shown = [
        str(Path(word).relative_to(ROOT.parent)) if word.startswith(str(ROOT.parent)) else word for word in arguments
    ]
    print(f"\n$ loop-singular-bit {shlex.join(shown)}\n", flush=True)
    subprocess.run([sys.executable, "-m", "loop_singular_bit", *arguments], check=True)


def write(directory: Path) -> tuple[str, float]:
    """Greedy text from PROMPT and decode speed in tokens per second (prompt included in neither)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import loop_singular_bit  # noqa: F401  registers the packed format with Transformers

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options = {"do_sample": False, "repetition_penalty": 1.2, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**inputs, max_new_tokens=8, **options)
    started = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)
    seconds = time.perf_counter() - started
    return tokenizer.decode(output[0], skip_special_tokens=True), NEW_TOKENS / seconds


def main() -> None:
    run("compress", str(MODEL), str(PACKED), "--preset", "b2", "--overwrite")
    run("evaluate", str(PACKED), "--against", str(MODEL), "--text", *map(str, HELD_OUT))
    for label, directory in (("original (bfloat16 file)", MODEL), ("compressed", PACKED)):
        text, tokens_per_second = write(directory)
        print(f"\n--- {label}: {NEW_TOKENS} greedy tokens, {tokens_per_second:.0f} tokens/s\n{text}")
    print(
        f"\nThe compressed model is in {PACKED.relative_to(ROOT.parent)}/. Two bits without calibration cost quality, "
        "as measured above; `--preset b4` costs far less."
    )


if __name__ == "__main__":
    main()
