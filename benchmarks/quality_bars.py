"""What other quantizers reach on the bundled model, measured once with the same protocol: the bars to compare with."""

from __future__ import annotations

from typing import NamedTuple


class Bar(NamedTuple):
    """Bits per weight of the linears, mean KL divergence in nats and perplexity ratio of one method."""

    name: str
    bits: float
    kl_divergence: float
    perplexity_ratio: float


# Measured by us on 2026-11-21: ggml 0.21.0 (C interface, with importance matrix where it says so), GPTQ as published
# with act-order, on the linears of examples/books-llama-7m; 64 windows of 512 tokens of its training books for
# calibration, 40 windows of 512 tokens of the two held-out books for the figures. Standard errors about 2 %.
BARS = (
    Bar("ggml Q1_0", 1.125, 1.7554, 4.854),
    Bar("ggml IQ1_S imatrix", 1.5625, 0.3469, 1.277),
    Bar("ggml IQ2_XXS imatrix", 2.0625, 0.1682, 1.141),
    Bar("GPTQ 2 bit g128 act-order", 2.141, 0.2277, 1.177),
    Bar("GPTQ 2 bit g64 act-order", 2.281, 0.1846, 1.141),
    Bar("ggml IQ2_XS imatrix", 2.3125, 0.1209, 1.088),
    Bar("ggml IQ2_S imatrix", 2.5625, 0.0836, 1.068),
    Bar("ggml IQ3_XXS imatrix", 3.0625, 0.0403, 1.026),
    Bar("GPTQ 3 bit g128 act-order", 3.148, 0.0371, 1.026),
    Bar("GPTQ 3 bit g64 act-order", 3.297, 0.0307, 1.023),
    Bar("GPTQ 4 bit g128 act-order", 4.156, 0.0080, 1.004),
    Bar("GPTQ 4 bit g64 act-order", 4.312, 0.0064, 1.003),
    Bar("ggml Q4_K imatrix", 4.5, 0.0063, 1.007),
)


def best_bar(bits: float) -> Bar:
    """The least KL divergence at that many bits or fewer."""
    return min((bar for bar in BARS if bar.bits <= bits), key=lambda bar: bar.kl_divergence)
