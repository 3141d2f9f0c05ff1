"""Seeds, and the instruction sets of this machine as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loop_singular_bit import ops


def pytest_configure() -> None:
    # Tensors here are small: threads that wait for each other would take most of the time. Tests of threads set more.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ops.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with the kernels of each instruction set that this machine has."""
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


def pytest_report_header() -> str:
    return f"loop_singular_bit instruction sets: {', '.join(ops.supported_isas())}"
