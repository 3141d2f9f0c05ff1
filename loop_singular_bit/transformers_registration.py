"""Registers the Transformers and PEFT integrations the moment those libraries are imported, whichever comes first.

Importing this module imports neither torch nor Transformers nor PEFT: a finder on `sys.meta_path` waits for the two
modules that hold the registries and imports our integration right after each has been executed; an integration
registers itself when it is imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Module that holds the registry -> (the module of ours that uses it, what is lost without it).
_REGISTRIES = {
    "transformers.quantizers.auto": ("loop_singular_bit.transformers_integration", "loading packed checkpoints"),
    "peft.tuners.lora.model": ("loop_singular_bit.peft_integration", "LoRA on packed layers"),
}


def install() -> None:
    """Registers with the libraries that are imported already and waits for the others; calling it again is harmless."""
    if not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
    for registry in _REGISTRIES:
        # A module that is still being executed is in sys.modules too; registering would find it half empty.
        module = sys.modules.get(registry)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _register(registry)


class _RegistryFinder:
    """Finds the registry modules as the other finders do and has `_register` called after their code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = None if finder is self or find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                _call_after_execution(spec, fullname)
                return spec
        return None


def _call_after_execution(spec: ModuleSpec, registry: str) -> None:
    loader = spec.loader
    if loader is None:
        return
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _register(registry)

    # On the instance, so that the loader keeps its type and everything else it can do (source, resources).
    loader.exec_module = execute_and_register  # type: ignore[method-assign]


def _register(registry: str) -> None:
    integration, purpose = _REGISTRIES[registry]
    try:
        # When the integration itself was imported first, it is what is importing the registry: then this does nothing.
        importlib.import_module(integration)
    except ImportError as error:
        # Somebody else's `import transformers` must not fail because a version of it moved a name we need.
        library = registry.partition(".")[0]
        warnings.warn(
            f"loop_singular_bit could not register with {library}: {error}. Without it {purpose} does not work.",
            RuntimeWarning,
            stacklevel=2,
        )
