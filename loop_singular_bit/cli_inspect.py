"""`loop-singular-bit inspect`: the modules of a packed checkpoint as a tree, with bits and where the bytes go."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.tree import Tree

HELP = "show the tensors of a packed checkpoint, bits per weight, and the shares of signs, scales and outliers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="packed checkpoint")
    parser.add_argument("--all", action="store_true", help="show every layer, also those that look like the one before")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw errors and bits by layer (with matplotlib)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(parsed: argparse.Namespace) -> int:
    from .checkpoint_inspection import inspect_checkpoint
    from .cli import EXIT_OK, make_console, print_json

    facts = inspect_checkpoint(parsed.directory)
    if parsed.plot is not None:
        from .plots import plot_report

        plot_report(parsed.directory, parsed.plot)
    if parsed.json:
        print_json(facts)
        return EXIT_OK
    console = make_console()
    console.print(_tree(facts, fold=not parsed.all))
    for line in _summary(facts):
        console.print(line, markup=False)
    return EXIT_OK


def _summary(facts: dict[str, Any]) -> list[str]:
    bits = facts["bits_per_weight"]
    figures = ", ".join(f"{name} {value:.3f}" for name, value in bits.items() if value is not None)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in facts["shares"].items())
    lines = [
        f"bits per weight: {figures}; per parameter of the whole file {facts['bits_per_parameter']:.3f}",
        f"{facts['bytes']:,} bytes: {shares}",
    ]
    return lines + [f"tied: {head} uses {owner}" for head, owner in facts["tied_modules"].items()]


@dataclass
class _Node:
    """A module: what it is if something is stored under its own name, and the modules inside."""

    label: str = ""
    children: dict[str, _Node] = field(default_factory=dict)


def _tree(facts: dict[str, Any], fold: bool) -> Tree:
    from rich.tree import Tree

    root = _Node()
    labels = {module["name"]: _module_label(module) for module in facts["modules"]}
    labels |= {tensor["name"]: _kept_label(tensor) for tensor in facts["kept_tensors"]}
    for name, label in labels.items():
        node = root
        for part in name.split("."):
            node = node.children.setdefault(part, _Node())
        node.label = label
    tree = Tree(f"{facts['path']}: preset {facts['preset']}, format {facts['format_version']}", highlight=False)
    _grow(tree, root, fold)
    return tree


def _grow(tree: Tree, node: _Node, fold: bool) -> None:
    items = list(node.children.items())
    position = 0
    while position < len(items):
        name, child = items[position]
        last = position
        while fold and name.isdigit() and last + 1 < len(items) and items[last + 1][1] == child:
            last += 1
        title = name if last == position else f"{name} to {items[last][0]}, each"
        while not child.label and len(child.children) == 1:
            ((inner, child),) = child.children.items()
            title += f".{inner}"
        _grow(tree.add(f"{title}  {child.label}".rstrip(), highlight=False), child, fold)
        position = last + 1


def _module_label(module: dict[str, Any]) -> str:
    parts = module["part_bytes"]
    signs = parts["signs"] / module["bytes"]
    outliers = sum(parts[name] for name in ("outlier_columns", "outlier_deltas", "outlier_scales")) / module["bytes"]
    return (
        f"{module['kind']} {module['out_features']} x {module['in_features']}: {module['planes']} planes, "
        f"{module['outliers']} outliers a row, {module['bits_per_weight']:.3f} bits per weight, "
        f"{module['bytes']:,} bytes "
        f"(signs {100 * signs:.0f} %, scales {100 * (1 - signs - outliers):.0f} %, outliers {100 * outliers:.0f} %)"
    )


def _kept_label(tensor: dict[str, Any]) -> str:
    shape = " x ".join(map(str, tensor["shape"])) or "scalar"
    return f"{tensor['dtype']} {shape}, {tensor['bytes']:,} bytes"
