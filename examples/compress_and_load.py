"""Compress a checkpoint on disk, then load it with Transformers and generate.

python examples/compress_and_load.py [SOURCE] [DESTINATION]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from loop_singular_bit import LoopCompressor

source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "books-llama-7m"
destination = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp()) / "packed"

compressor = LoopCompressor(preset="b4", target_ram_mb=None)  # this process holds Transformers too
results = compressor.compress_model(source, destination)
summary = results["compression_summary"]
print(f"{summary['layers_compressed']} layers, {summary['average_compression_ratio']:.2f}x smaller than in bfloat16")
print(f"peak RSS {summary['max_ram_usage_mb']:.0f} MB; targets: {compressor.validate_compression()}")

tokenizer = AutoTokenizer.from_pretrained(destination)
model = AutoModelForCausalLM.from_pretrained(destination)
inputs = tokenizer("The old sailor looked at the", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
print(tokenizer.decode(output[0], skip_special_tokens=True))
