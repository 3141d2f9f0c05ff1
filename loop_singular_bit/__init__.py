"""Linear layers as sign planes, scales and a few sparse outliers: 1.2 to 4.5 bits per weight, with CPU kernels.

Importing the package imports neither torch nor Transformers: names load on first use, and the Transformers integration
registers itself when Transformers' quantizers are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loop_singular_bit import transformers_registration

__version__ = "0.1.0"

_HOMES = {
    "CompressionBenchmark": "benchmark",
    "LoopCompressor": "compressor",
    "LoopSingularBitConfig": "transformers_integration",
    "OutlierPreservingQuantizer": "quantization.outlier_preserving_quantizer",
    "PackedEmbedding": "packed_linear",
    "PackedLayout": "packed_weight",
    "PackedLinear": "packed_linear",
    "PackedWeight": "packed_weight",
    "QualityValidator": "validation",
    "QuantizationConfig": "quantization.quantize_model",
    "StreamingManager": "streaming",
    "evaluate_language_model": "language_model_evaluation",
    "evaluate_tasks": "task_evaluation",
    "get_system_info": "streaming",
    "list_models": "local_models",
    "load_compressed_model": "streaming",
    "move_to_huge_pages": "huge_pages",
    "quantize_model": "quantization.quantize_model",
    "quantize_weight": "quantization.quantize_weight",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from loop_singular_bit.benchmark import CompressionBenchmark as CompressionBenchmark
    from loop_singular_bit.compressor import LoopCompressor as LoopCompressor
    from loop_singular_bit.huge_pages import move_to_huge_pages as move_to_huge_pages
    from loop_singular_bit.language_model_evaluation import evaluate_language_model as evaluate_language_model
    from loop_singular_bit.local_models import list_models as list_models
    from loop_singular_bit.packed_linear import PackedEmbedding as PackedEmbedding
    from loop_singular_bit.packed_linear import PackedLinear as PackedLinear
    from loop_singular_bit.packed_weight import PackedLayout as PackedLayout
    from loop_singular_bit.packed_weight import PackedWeight as PackedWeight
    from loop_singular_bit.quantization.outlier_preserving_quantizer import (
        OutlierPreservingQuantizer as OutlierPreservingQuantizer,
    )
    from loop_singular_bit.quantization.quantize_model import QuantizationConfig as QuantizationConfig
    from loop_singular_bit.quantization.quantize_model import quantize_model as quantize_model
    from loop_singular_bit.quantization.quantize_weight import quantize_weight as quantize_weight
    from loop_singular_bit.streaming import StreamingManager as StreamingManager
    from loop_singular_bit.streaming import get_system_info as get_system_info
    from loop_singular_bit.streaming import load_compressed_model as load_compressed_model
    from loop_singular_bit.task_evaluation import evaluate_tasks as evaluate_tasks
    from loop_singular_bit.transformers_integration import LoopSingularBitConfig as LoopSingularBitConfig
    from loop_singular_bit.validation import QualityValidator as QualityValidator


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loop_singular_bit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"loop_singular_bit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


transformers_registration.install()
