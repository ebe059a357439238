"""Hugging Face transformers: `from_pretrained`, `generate`, `save_pretrained` and `dequantize` on quantized models.

Importing this module registers the method "qpalette" in transformers' tables; `import qpalette` sees to it. Only those
hooks are used that are the same in every release from 5.16 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qpalette.core.errors import ArtifactError
from qpalette.core.mapped import MappedFiles
from qpalette.core.records import LinearRecord
from qpalette.formats.packed import FORMAT_VERSION, METHOD, QuantizationFormat
from qpalette.formats.reader import open_artifact
from qpalette.integrations.on_load import Config, devices_of, ordinary_surroundings, quantize_first
from qpalette.models.names import saved_names
from qpalette.nn import (
    PackedModule,
    QuantExperts,
    StackedExperts,
    TiedHead,
    TiedLinear,
    fuse_norms,
    join_launches,
    pack_modules,
)
from qpalette.runtime import select


class QPaletteConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json, checked: attributes are its plain JSON fields.

    Raises ArtifactError naming the field that is wrong.
    """

    linears: dict[str, dict[str, Any]]

    def __init__(self, **fields: Any) -> None:
        parsed = QuantizationFormat.parse({"quant_method": METHOD, "format_version": FORMAT_VERSION, **fields})
        vars(self).update(parsed.to_dict())

    @property
    def records(self) -> dict[str, LinearRecord]:
        """Linear name -> how to decode it."""
        return QuantizationFormat.parse(self.to_dict()).records


class QPaletteQuantizer(HfQuantizer):
    """Swaps the named linears for packed ones before the weights are read. The kernels are not chosen here: see
    the variable QPALETTE_BACKEND."""

    quantization_config: QPaletteConfig
    _modules: dict[str, str]  # linear's name in the checkpoint -> its module

    def __init__(self, quantization_config: QPaletteConfig | Config, **kwargs: Any) -> None:
        from transformers import PreTrainedModel

        super().__init__(quantization_config, **kwargs)
        self._tie_weights = PreTrainedModel.tie_weights  # transformers takes it away while it builds the model
        if not self.pre_quantized and not isinstance(quantization_config, Config):
            raise ArtifactError(
                "the model is not quantized, and this quantization_config is that of another: to quantize while "
                "loading, give qpalette.Config(bits=4)"
            )

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises UnsupportedError with every backend's reason when a spec cannot run on one of the devices."""
        if not self.pre_quantized:
            return  # which specs there are is known when it is
        specs = {entry["spec"] for entry in self.quantization_config.linears.values()}
        for device in devices_of(device_map):
            for spec in sorted(specs):
                select("linear", spec, device)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        if isinstance(self.quantization_config, Config):
            with ordinary_surroundings(self._tie_weights):
                fields = quantize_first(self.quantization_config, checkpoint_files, device_map)
                self.quantization_config, self.pre_quantized = QPaletteConfig(**fields), True
                self.validate_environment(device_map=device_map)
        records = self.quantization_config.records
        stored = _check_files(Path(checkpoint_files[0]).parent, records) if checkpoint_files else set()
        self._modules = pack_modules(model, records, stored)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = MappedFiles()
        for name, module in _modules_of_kind(model, PackedModule).items():
            module.check_values(name)
            loaded = module.qp_codes
            module.prepare()
            if module.qp_codes is not loaded and loaded.device.type == "cpu" and loaded.is_contiguous():
                files.let_go(loaded.data_ptr(), loaded.nbytes)
        # Saved by this class, tensors have its names; a base model's, for one, lack a prefix.
        linears, saved = self.quantization_config.linears, saved_names(model, self._modules.values())
        self.quantization_config.linears = {saved[module]: linears[name] for name, module in self._modules.items()}
        join_launches(model)
        fuse_norms(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        before = model.dtype
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or before
        for kind in (QuantExperts, StackedExperts, PackedModule):
            for name, module in _modules_of_kind(model, kind).items():
                model.set_submodule(name, module.dequantize(wanted))
        _untie(model)
        for parameter in model.parameters():  # not buffers: rotary frequencies must stay float32
            if parameter.dtype == before:
                parameter.data = parameter.data.to(wanted)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are, and `PackedModule.fit` gives parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Put both classes into transformers' tables, once; registering a name twice is an error there."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(QPaletteConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QPaletteQuantizer)


def _check_files(directory: Path, records: Mapping[str, LinearRecord]) -> set[str]:
    """The names of all stored tensors. transformers fills one that is missing with random numbers; here it is an
    error."""
    artifact = open_artifact(directory)
    if dict(artifact.records) != dict(records):
        raise ArtifactError(f"the config given is not that of {directory}: their quantization_config differ")
    return set(artifact.stored)


def _untie(model: Any) -> None:
    """After dequantizing: what shared a packed module becomes an ordinary one again, tied as the class says."""
    tied = _modules_of_kind(model, TiedHead) | _modules_of_kind(model, TiedLinear)
    if not tied:
        return
    del model._tied_weights_keys
    for name, module in tied.items():
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.register_parameter("bias", getattr(module, "bias", None))
        model.set_submodule(name, linear)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _modules_of_kind(model: Any, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


register()
