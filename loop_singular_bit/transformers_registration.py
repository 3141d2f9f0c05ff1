"""Registers the Transformers integration when Transformers' quantizers are imported."""

from __future__ import annotations


def install() -> None:
    """Placeholder until the import hook lands."""
