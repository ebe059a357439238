"""peft: LoRA adapters on packed linears. Importing this module teaches peft their class; `autoload` sees to it."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer, model
from torch import nn

from qpalette.core.errors import UnsupportedError
from qpalette.nn import QuantLinear


class PackedLora(layer.Linear):
    """An adapter beside a packed linear, whose codes stay as they are: gradients pass through it.

    Raises UnsupportedError for what would need the weight itself: merging, and adapters that begin with it (PiSSA,
    DoRA and the like).
    """

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            "an adapter cannot be merged into packed weights: dequantize the model first (model.dequantize())"
        )


def _dispatch(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, layer.BaseTunerLayer) else target
    if not isinstance(base, QuantLinear) or options.get("parameter_name") is not None:
        return _default(target, adapter_name, config, **options)
    options.pop("parameter_name", None)
    if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
        raise UnsupportedError("this kind of adapter begins with the weight, which is packed: use plain LoRA")
    return PackedLora(target, adapter_name, config=config, **options)


_default = model.dispatch_default
model.dispatch_default = _dispatch  # type: ignore[assignment]
