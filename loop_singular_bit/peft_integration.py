"""LoRA adapters on packed layers with PEFT: the packed weight stays frozen, the adapter trains beside it.

PEFT chooses an adapter class by the type of the layer it wraps. Importing this module teaches that choice about
`PackedLinear`, so that `peft.get_peft_model` works on a packed model as on any other; `import
loop_singular_bit` is enough.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

_MERGE_REFUSAL = (
    "a LoRA adapter cannot be merged into a packed weight: its planes would have to be quantized again, and what the "
    "adapter learned would be lost in their rounding. Keep the adapter beside the packed model (save_pretrained saves "
    "it alone), or merge it into the original weights and compress the result"
)


class PackedLoraLinear(torch.nn.Module, LoraLayer):
    """A `PackedLinear` plus low-rank adapters: y = packed(x) + scaling * B(A(dropout(x))).

    Adapter weights are float32 whatever the model's dtype, unless PEFT is told otherwise; activations keep their dtype.
    Gradients reach the adapters and the input, never the packed weight.

    Raises:
        ValueError: for LoRA variants that need the dense weight (DoRA, PiSSA, OLoRA, LoftQ and their like), and on
            `merge`, because merging would quantize the weight again.
    """

    def __init__(
        self,
        base_layer: torch.nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **_: Any,
    ) -> None:
        initialization = config.init_lora_weights
        if initialization not in (True, False, "gaussian", "eva"):
            raise ValueError(
                f"init_lora_weights={initialization!r} needs the dense weight, which a packed layer does not have; "
                "use True, False, 'gaussian' or 'eva'"
            )
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[Any, Any]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Does nothing: an adapter on a packed weight is never merged."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The dense [out_features, in_features] change of the weight that `adapter` stands for."""
        down: Any = self.lora_A[adapter]
        up: Any = self.lora_B[adapter]
        return (up.weight @ down.weight) * self.scaling[adapter]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._forward_with_one_adapter_per_sample(x, result, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                result = result + self._adapter_output(adapter, x).to(result.dtype)
        return result

    def _adapter_output(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        down: Any = self.lora_A[adapter]
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, down.weight.dtype)
        return self.lora_B[adapter](down(self.lora_dropout[adapter](x))) * self.scaling[adapter]

    def _forward_with_one_adapter_per_sample(
        self, x: torch.Tensor, result: torch.Tensor, adapter_names: list[str]
    ) -> torch.Tensor:
        result = result.clone()
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.lora_A:
                samples = [index for index, name in enumerate(adapter_names) if name == adapter]
                result[samples] += self._adapter_output(adapter, x[samples]).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def register() -> None:
    """Lets PEFT's LoRA accept `PackedLinear` as a target; calling it again is harmless."""
    create = LoraModel._create_new_module
    prepare = LoraModel._prepare_model
    if getattr(create, "accepts_packed_linear", False):
        return

    def create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: torch.nn.Module, **kwargs: Any
    ) -> torch.nn.Module:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if _is_packed_linear(base_layer) and kwargs.get("parameter_name") is None:
            return PackedLoraLinear(target, adapter_name, config=lora_config, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs)

    def prepare_model(self: LoraModel, peft_config: LoraConfig, model: torch.nn.Module) -> None:
        prepare(self, peft_config, model)
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            packed = _packed_linear_names(model)
            if packed:
                _maybe_include_all_linear_layers(peft_config, model)
                peft_config.target_modules = sorted({*(peft_config.target_modules or ()), *packed})

    create_new_module.accepts_packed_linear = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)  # type: ignore[method-assign]
    LoraModel._prepare_model = prepare_model  # type: ignore[method-assign]


def _packed_linear_names(model: torch.nn.Module) -> set[str]:
    """Packed linears that "all-linear" stands for: not the output head, nor what lies inside an adapter already."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    inside_adapters = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name
        for name, module in model.named_modules()
        if _is_packed_linear(module) and module is not head and not name.startswith(inside_adapters)
    }


def _is_packed_linear(module: torch.nn.Module) -> bool:
    # Whoever has a packed layer has imported its module; importing it here would load the operators for everybody.
    packed_linear = sys.modules.get("loop_singular_bit.packed_linear")
    return packed_linear is not None and isinstance(module, packed_linear.PackedLinear)


register()
