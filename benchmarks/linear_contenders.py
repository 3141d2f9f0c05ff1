"""What bench_packed_linear.py times: packed weights, and what else multiplies with few bits on a CPU.

Every contender holds copies of its weight that together exceed every cache. Optional libraries take part when they are
installed: pip install 'loop-singular-bit[benchmarks]'.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loop_singular_bit import PackedLinear, PackedWeight, move_to_huge_pages  # noqa: E402

OPS = torch.ops.loop_singular_bit
# Plane scales in units of the format's grid.
PLANE_LEVELS = {1: (126,), 2: (84, 42), 3: (72, 36, 18), 4: (66, 33, 18, 9)}
GROUP = 128
CODE_SCALE = 0.01


class Contender(ABC):
    """One way to multiply with a weight [out_features, in_features].

    Attributes:
        name: as printed.
        stored_bytes: of one weight.
        bound: relative error that is accepted of a product with Gaussian activations.
    """

    name: str
    bound: float

    def __init__(self, out_features: int, in_features: int, cycled_bytes: int) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.stored_bytes = 0
        self.make(cycled_bytes)

    @abstractmethod
    def make(self, cycled_bytes: int) -> None:
        """Makes as many copies of a random weight as have `cycled_bytes`."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The first weight, float32 [out_features, in_features]."""

    @abstractmethod
    def prepared(self, input: torch.Tensor, threads: int) -> Callable[[], tuple[int, Any]]:
        """A function that multiplies `input` (float32) with the weights whose turn it is, by torch's threads or its
        own; it returns their number, and the first product."""

    def error(self, tokens: int, threads: int) -> float:
        """Relative error of the first product."""
        input = torch.randn(tokens, self.in_features)
        expected = F.linear(input.double(), self.dense().double())
        _, product = self.prepared(input, threads)()
        return float((torch.as_tensor(product).double() - expected).norm() / expected.norm())


class _Cycled(Contender):
    """A contender that is a function of a tuple of tensors."""

    def make(self, cycled_bytes: int) -> None:
        first = self.weight()
        self.stored_bytes = sum(tensor.numel() * tensor.element_size() for tensor in first)
        copies = math.ceil(cycled_bytes / self.stored_bytes)
        self.weights = [first] + [tuple(tensor.clone() for tensor in first) for _ in range(copies - 1)]
        self.turn = 0

    @abstractmethod
    def weight(self) -> tuple[torch.Tensor, ...]: ...

    @abstractmethod
    def multiply(self, input: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor: ...

    def prepared(self, input: torch.Tensor, threads: int) -> Callable[[], tuple[int, Any]]:
        input = self.converted(input)

        def call() -> tuple[int, Any]:
            self.turn = (self.turn + 1) % len(self.weights)
            return 1, self.multiply(input, *self.weights[self.turn])

        return call

    def converted(self, input: torch.Tensor) -> torch.Tensor:
        return input.bfloat16()


class Packed(_Cycled):
    """Our own: `planes` sign planes, 1 % int8 outliers, row and column scales."""

    def __init__(self, planes: int, precision: str, *shape: int) -> None:
        self.planes = planes
        self.precision = precision
        self.name = f"b{planes}"
        self.bound = {"int8": 0.02, "int16": 5e-3, "exact": 5e-3}[precision]
        super().__init__(*shape)

    def weight(self) -> tuple[torch.Tensor, ...]:
        tiles, words, outliers = -(-self.out_features // 32), -(-self.in_features // 32), -(-self.in_features // 100)
        unit = (1 + torch.rand(tiles, 1, 32)) * 2**-13
        levels = torch.tensor(PLANE_LEVELS[self.planes], dtype=torch.float32).reshape(1, self.planes, 1)
        edges = torch.arange(outliers + 1) * self.in_features // outliers
        span = (edges[1:] - edges[:-1]).reshape(1, outliers, 1)
        columns = edges[:-1].reshape(1, outliers, 1) + (torch.rand(tiles, outliers, 32) * span).long()
        return (
            torch.randint(-(2**31), 2**31 - 1, (tiles, self.planes, words, 32), dtype=torch.int32),
            (levels * unit).half(),
            columns.to(torch.uint16),
            torch.randint(-127, 128, (tiles, outliers, 32), dtype=torch.int8),
            torch.full((tiles, 32), 2**-10, dtype=torch.float16),
            (0.5 + torch.rand(self.in_features)).half(),
        )

    def make(self, cycled_bytes: int) -> None:
        super().make(cycled_bytes)
        shape = (self.out_features, self.in_features)
        # The memory in which `quantize_model` and `from_pretrained` leave the weights of a model.
        model = nn.ModuleList(
            PackedLinear.from_packed_weight(PackedWeight(*tensors[:5], *shape, tensors[5])) for tensors in self.weights
        )
        self.weights.clear()
        move_to_huge_pages(model)
        self.weights = [linear.packed_weight.op_tensors()[:6] for linear in model]

    def multiply(self, input: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        return OPS.packed_linear(input, *weight, None, None, self.out_features, activation_precision=self.precision)

    def dense(self) -> torch.Tensor:
        return OPS.dequantize(*self.weights[0], None, self.out_features, self.in_features, dtype=torch.float32)


class Dense(_Cycled):
    bound = 0.01

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        self.dtype = dtype
        self.name = f"F.linear {str(dtype).removeprefix('torch.')}"
        super().__init__(*shape)

    def weight(self) -> tuple[torch.Tensor, ...]:
        return (torch.randn(self.out_features, self.in_features).to(self.dtype),)

    def converted(self, input: torch.Tensor) -> torch.Tensor:
        return input.to(self.dtype)

    def multiply(self, input: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        return F.linear(input, weight[0])

    def dense(self) -> torch.Tensor:
        return self.weights[0][0].float()


class TorchInt4(_Cycled):
    name = f"PyTorch int4 (groups of {GROUP})"
    bound = 0.02

    def weight(self) -> tuple[torch.Tensor, ...]:
        self.codes = torch.randint(0, 16, (self.out_features, self.in_features), dtype=torch.int32)
        scales = torch.zeros(self.in_features // GROUP, self.out_features, 2, dtype=torch.bfloat16)
        scales[..., 0] = CODE_SCALE
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.codes, 1), scales

    def multiply(self, input: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(input, weight[0], GROUP, weight[1])

    def dense(self) -> torch.Tensor:
        return (self.codes - 8) * torch.tensor(CODE_SCALE).bfloat16().float()


class BitsAndBytes(Contender):
    """Linear4bit in bfloat16, as its users have it: it repacks its weight where it has a kernel for that."""

    name = "bitsandbytes nf4 (groups of 64)"
    bound = 0.02

    def make(self, cycled_bytes: int) -> None:
        # It looks for a kernel on the Hugging Face Hub, and says at length that it found none.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import bitsandbytes

        self.library = bitsandbytes
        linear = bitsandbytes.nn.Linear4bit(
            self.in_features, self.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        weight = torch.randn(self.out_features, self.in_features).bfloat16()
        linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=64)
        linear = linear.to("cpu").eval()
        self.reference = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
        self.stored_bytes = linear.weight.nbytes + linear.weight.quant_state.absmax.numel() * 4
        self.linears = [linear]
        for _ in range(math.ceil(cycled_bytes / self.stored_bytes) - 1):
            self.linears.append(copy.deepcopy(linear))
        for each in self.linears:
            each(torch.randn(1, self.in_features).bfloat16())
        self.turn = 0

    def prepared(self, input: torch.Tensor, threads: int) -> Callable[[], tuple[int, Any]]:
        input = input.bfloat16()

        def call() -> tuple[int, Any]:
            self.turn = (self.turn + 1) % len(self.linears)
            return 1, self.linears[self.turn](input)

        return call

    def dense(self) -> torch.Tensor:
        return self.reference.reshape(self.out_features, self.in_features)


class OnnxRuntime(Contender):
    """MatMulNBits with int8 activations (accuracy_level 4), its fastest setting.

    A call of the Python interface runs a model of many such nodes, each with a weight of its own (equal ones would be
    merged): its overhead does not count.
    """

    bound = 0.02

    def __init__(self, bits: int, *shape: int) -> None:
        self.bits = bits
        self.name = f"ONNX Runtime {bits} bit (groups of {GROUP})"
        self.sessions: dict[tuple[int, int], list[Any]] = {}
        super().__init__(*shape)

    def make(self, cycled_bytes: int) -> None:
        columns = (self.in_features // GROUP, GROUP * self.bits // 8)
        self.codes = torch.randint(0, 256, (self.out_features, *columns), dtype=torch.uint8)
        self.scales = torch.full((self.out_features, columns[0]), CODE_SCALE)
        self.stored_bytes = self.codes.nbytes + self.scales.nbytes
        self.copies = math.ceil(cycled_bytes / self.stored_bytes)

    def model(self, nodes: int) -> bytes:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        codes, scales = self.codes.numpy(), self.scales.numpy()
        assert nodes <= 256  # as many are different
        graph = helper.make_graph(
            [
                helper.make_node(
                    "MatMulNBits",
                    ["input", f"codes{i}", f"scales{i}"],
                    [f"output{i}"],
                    domain="com.microsoft",
                    K=self.in_features,
                    N=self.out_features,
                    bits=self.bits,
                    block_size=GROUP,
                    accuracy_level=4,
                )
                for i in range(nodes)
            ],
            "linears",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["tokens", self.in_features])],
            [
                helper.make_tensor_value_info(f"output{i}", TensorProto.FLOAT, ["tokens", self.out_features])
                for i in range(nodes)
            ],
            [
                tensor
                for i in range(nodes)
                for tensor in (
                    numpy_helper.from_array(codes ^ (i % 256), f"codes{i}"),
                    numpy_helper.from_array(scales, f"scales{i}"),
                )
            ],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return onnx.ModelProto.SerializeToString(helper.make_model(graph, opset_imports=opsets, ir_version=10))

    def prepared(self, input: torch.Tensor, threads: int) -> Callable[[], tuple[int, Any]]:
        nodes = min(max(8, 256 // len(input)), self.copies)
        if (nodes, threads) not in self.sessions:
            import onnxruntime

            self.sessions.clear()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            # Its threads spin on after a call, at the expense of whoever comes next.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            model = self.model(nodes)
            self.sessions[nodes, threads] = [
                onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
                for _ in range(math.ceil(self.copies / nodes))
            ]
            for session in self.sessions[nodes, threads]:
                session.run(None, {"input": input.numpy()})  # allocates
        sessions = self.sessions[nodes, threads]
        feed = {"input": input.numpy()}
        turn = 0

        def call() -> tuple[int, Any]:
            nonlocal turn
            turn = (turn + 1) % len(sessions)
            return nodes, sessions[turn].run(None, feed)[0]

        return call

    def dense(self) -> torch.Tensor:
        codes = self.codes.reshape(self.out_features, -1)
        shifts = range(0, 8, self.bits)
        values = torch.stack([(codes >> shift) & (2**self.bits - 1) for shift in shifts], dim=-1)
        return (values.reshape(self.out_features, -1).float() - 2 ** (self.bits - 1)) * CODE_SCALE


def our_contenders(shape: tuple[int, int], precision: str, cycled_bytes: int) -> list[Contender]:
    """Packed weights, and the bfloat16 linear that they are compared with."""
    packed = [Packed(planes, precision, *shape, cycled_bytes) for planes in range(1, 5)]
    return [*packed, Dense(torch.bfloat16, *shape, cycled_bytes)]


def peers(shape: tuple[int, int], cycled_bytes: int) -> list[Contender]:
    """What a user of a CPU could take instead; of optional libraries those that are installed."""
    lines: list[Contender] = [Dense(torch.float32, *shape, cycled_bytes), TorchInt4(*shape, cycled_bytes)]
    if importlib.util.find_spec("onnxruntime") is not None and importlib.util.find_spec("onnx") is not None:
        lines += [OnnxRuntime(bits, *shape, cycled_bytes) for bits in (2, 4)]
    if importlib.util.find_spec("bitsandbytes") is not None:
        lines.append(BitsAndBytes(*shape, cycled_bytes))
    return lines


def verify(precision: str, threads: int) -> float:
    """Raises SystemExit when a contender is further from its dense product than accepted; the largest error."""
    largest = 0.0
    shape = (512, 1024)
    for contender in [*our_contenders(shape, precision, 1), *peers(shape, 1)]:
        for tokens in (1, 8, 33):
            error = contender.error(tokens, threads)
            largest = max(largest, error)
            if not error <= contender.bound:
                raise SystemExit(f"{contender.name}, {tokens} tokens: relative error {error:.2e} > {contender.bound}")
    return largest
