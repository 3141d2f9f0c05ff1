"""Quantize one weight and use it: what is stored, what is lost, and a product with activations."""

import torch

from loop_singular_bit import quantize_weight

torch.manual_seed(0)
weight = torch.randn(1024, 4096) * 0.02

packed = quantize_weight(weight, preset="b4")
for name, tensor in packed.tensors().items():
    print(f"{name:16} {tensor.dtype!s:14} {tuple(tensor.shape)}")

error = (packed.dequantize() - weight).norm() / weight.norm()
print(f"{packed.bits_per_weight:.3f} bits per weight, relative error {error:.4f}")

x = torch.randn(3, 4096)
y = packed.linear(x)
expected = torch.nn.functional.linear(x, packed.dequantize())
print(
    f"linear: {tuple(y.shape)}, differs from the dequantized product by {(y - expected).norm() / expected.norm():.5f}"
)
