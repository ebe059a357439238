"""Hugging Face transformers: `from_pretrained`, `generate`, `save_pretrained` and `dequantize` on quantized models.

Importing this module registers the method "qpalette" in transformers' tables; `import qpalette` sees to it. Only those
hooks are used that are the same in every release from 5.16 on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from qpalette.core.records import LinearRecord
from qpalette.formats.packed import FORMAT_VERSION, METHOD, QuantizationFormat
from qpalette.formats.reader import open_artifact
from qpalette.integrations.on_load import Config, devices_of, ordinary_torch, quantize_first
from qpalette.models.model_class import Modules
from qpalette.nn import PackedModule, QuantEmbedding, QuantExperts, QuantLinear, TiedHead, fuse_norms, join_launches
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

    def __init__(self, quantization_config: QPaletteConfig | Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
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
            with ordinary_torch():
                fields = quantize_first(self.quantization_config, checkpoint_files, device_map)
                self.quantization_config, self.pre_quantized = QPaletteConfig(**fields), True
                self.validate_environment(device_map=device_map)
        records = self.quantization_config.records
        stored = _check_files(Path(checkpoint_files[0]).parent, records) if checkpoint_files else set()
        found = _locate(model, records)
        tied = dict(getattr(model, "all_tied_weights_keys", {}))
        heads = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in tied.items()}
        experts: dict[str, dict[str, LinearRecord]] = {}
        for name, place in found.items():
            if place.module in heads:
                raise ArtifactError(f"linear '{name}' is packed, but config.json ties its weight to the embeddings")
            if place.expert:
                experts.setdefault(place.module, {})[place.expert] = records[name]
            else:
                _swap(model, place.module, records[name], multiplied=place.module in heads.values())
        for module_name, packed in experts.items():
            model.set_submodule(module_name, QuantExperts(model.get_submodule(module_name), packed, module_name))
        swapped = {place.module for place in found.values()}
        _share_packed_embeddings(model, {head: source for head, source in heads.items() if source in swapped}, stored)
        # A base model names its modules without the prefix; what it saves must be named alike.
        linears, prefix = self.quantization_config.linears, f"{model.base_model_prefix}."
        self.quantization_config.linears = {
            place.name if place.name in (name.removeprefix(prefix), prefix + name) else name: linears[name]
            for name, place in found.items()
        }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in _modules_of_kind(model, PackedModule).items():
            module.check_values(name)
            module.prepare()
        join_launches(model)
        fuse_norms(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        before = model.dtype
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or before
        for kind in (QuantExperts, PackedModule):
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


class _Place(NamedTuple):
    """Where a packed linear goes: a module, or "3.gate_proj" and the like in a module that holds all experts."""

    module: str
    expert: str = ""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.expert}".rstrip(".")


def _locate(model: Any, records: Mapping[str, LinearRecord]) -> dict[str, _Place]:
    """The place of each packed linear, by its name in the checkpoint.

    Raises ArtifactError when the model has no such module, or one that cannot be packed.
    """
    modules = Modules(model)
    headless = not hasattr(model, model.base_model_prefix)
    found = {}
    for name, record in records.items():
        if (holder := modules.find_experts(name)) is not None:
            found[name] = _Place(holder, ".".join(name.split(".")[-2:]))
        elif (module_name := modules.find(name)) is not None:
            _check_module(name, modules.all[module_name], record)
            found[name] = _Place(module_name)
        elif not headless or name.startswith(f"{model.base_model_prefix}."):  # else a head, which this class lacks
            raise ArtifactError(f"{type(model).__name__} has no module '{name}', which config.json says is packed")
    return found


def _check_module(name: str, module: nn.Module, record: LinearRecord) -> None:
    if not isinstance(module, nn.Linear | nn.Embedding):
        kinds = "an nn.Linear or an nn.Embedding"
        raise ArtifactError(f"module '{name}' is a {type(module).__name__}, but only {kinds} can be packed")
    shape = tuple(module.weight.shape)
    if shape != (record.out_features, record.in_features):
        raise ArtifactError(
            f"linear '{name}' is {shape[0]} x {shape[1]} in the model, but {record.out_features} x "
            f"{record.in_features} in quantization_config"
        )


def _swap(model: Any, name: str, record: LinearRecord, multiplied: bool) -> None:
    """Put a packed module in the place of `name`; `multiplied` when an output head is tied to it."""
    old = model.get_submodule(name)
    dtype, device = old.weight.dtype, old.weight.device
    if isinstance(old, nn.Embedding):
        new: PackedModule = QuantEmbedding(record, _factor(name, old), multiplied, dtype, device)
    else:
        new = QuantLinear(record, old.bias is not None, dtype, device)
    model.set_submodule(name, new.train(old.training))


def _factor(name: str, embedding: nn.Embedding) -> float:
    """What the class multiplies its rows by. Raises ArtifactError for a class that may do something else to them."""
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    factor = getattr(embedding, "scalar_embed_scale", None)
    if factor is None:
        raise ArtifactError(f"embedding '{name}' is a {type(embedding).__name__}, which is not known here")
    return float(factor)


def _share_packed_embeddings(model: Any, sources: Mapping[str, str], stored: Collection[str]) -> None:
    """Replace heads by ones that use the packed embedding they are tied to: `sources` maps their names.

    A head with a weight of its own among the `stored` tensors keeps it. transformers ties parameters, and a packed
    embedding has none: it must not look for them.
    """
    if not sources:
        return
    for head, source in sources.items():
        if f"{head}.weight" not in stored:
            model.set_submodule(head, TiedHead(model.get_submodule(source)))
    tied = model.all_tied_weights_keys
    kept = {target: source for target, source in tied.items() if target.removesuffix(".weight") not in sources}
    model.all_tied_weights_keys = model._tied_weights_keys = kept


def _untie(model: Any) -> None:
    """After dequantizing: heads become ordinary linears again, tied as the class says."""
    heads = _modules_of_kind(model, TiedHead)
    if not heads:
        return
    del model._tied_weights_keys
    for name, head in heads.items():
        model.set_submodule(name, nn.Linear(head.in_features, head.out_features, bias=False, device="meta"))
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _modules_of_kind(model: Any, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


register()
