"""Swap the linear layers of a model that is already in memory: any nn.Module, from Hugging Face or not."""

import torch
from torch import nn

from loop_singular_bit import QuantizationConfig, quantize_model

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256))
x = torch.randn(8, 256)
before = model(x)

report = quantize_model(model, QuantizationConfig(preset="b4"))
for record in report.replaced:
    print(record)
for name, reason in report.skipped:
    print(f"kept {name}: {reason}")

after = model(x)
print(model)
print(f"output changed by {(after - before).norm() / before.norm():.4f} (relative)")
