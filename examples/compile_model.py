"""Compile a quantized model into one graph and train a LoRA adapter on top of it."""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop_singular_bit import LoopSingularBitConfig

directory = Path(__file__).parent / "books-llama-7m"
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(
    directory, quantization_config=LoopSingularBitConfig(preset="b4"), dtype=torch.float32
)

inputs = tokenizer("It was a bright cold morning in the harbour", return_tensors="pt")
compiled = torch.compile(model.forward, fullgraph=True)
with torch.no_grad():
    difference = (compiled(**inputs).logits - model(**inputs).logits).abs().max()
print(f"compiled and eager logits differ by at most {difference:.2e}")

adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
adapted.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
for step in range(5):
    loss = adapted(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
with tempfile.TemporaryDirectory() as folder:
    adapted.save_pretrained(folder)
    print(sorted(path.name for path in Path(folder).iterdir()))
