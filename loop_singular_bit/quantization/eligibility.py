"""Which weights are worth packing; the same answer for a model in memory and for a checkpoint that is streamed."""

from __future__ import annotations

from loop_singular_bit.packed_weight import MAX_IN_FEATURES

MIN_FEATURES = 32
MIN_EMBEDDINGS = 1024


def linear_skip_reason(out_features: int, in_features: int) -> str | None:
    """Why a linear weight [out_features, in_features] is better left alone; None when it is worth packing."""
    if in_features > MAX_IN_FEATURES:
        return f"{in_features} input features: the format holds at most {MAX_IN_FEATURES}"
    if min(out_features, in_features) < MIN_FEATURES:
        return f"tiny: {out_features} x {in_features}, packing needs at least {MIN_FEATURES} features on both sides"
    return None


def embedding_skip_reason(num_embeddings: int, embedding_dim: int) -> str | None:
    """Why an embedding [num_embeddings, embedding_dim] is better left alone; None when it is worth packing.

    Tables of positions and token types are small and every token passes through them.
    """
    if embedding_dim > MAX_IN_FEATURES:
        return f"embedding_dim {embedding_dim}: the format holds at most {MAX_IN_FEATURES}"
    if embedding_dim < MIN_FEATURES:
        return f"tiny: embedding_dim {embedding_dim}, packing needs at least {MIN_FEATURES}"
    if num_embeddings < MIN_EMBEDDINGS:
        return f"small: {num_embeddings} embeddings, packing starts at {MIN_EMBEDDINGS}"
    return None
