"""Packed modules in the place of a model's own, before any weight is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qpalette.core.errors import ArtifactError
from qpalette.core.records import LinearRecord
from qpalette.models.experts import EXPERT
from qpalette.models.forward import is_linear
from qpalette.models.resolver import Place, holds_experts, is_conv1d, places_of
from qpalette.nn.packed_module import PackedModule
from qpalette.nn.quant_embedding import QuantEmbedding, TiedHead, TiedLinear
from qpalette.nn.quant_experts import QuantExperts
from qpalette.nn.quant_linear import QuantLinear
from qpalette.nn.stacked_experts import pack_stacks


@dataclass
class _Experts:
    records: dict[str, LinearRecord] = field(default_factory=dict)  # by "3.gate_proj" and the like
    places: dict[str, Place] = field(default_factory=dict)


def pack_modules(model: Any, records: Mapping[str, LinearRecord], stored: Collection[str] = ()) -> dict[str, str]:
    """Swap the modules of `records` in `model` for packed ones; linear's name in the checkpoint -> that of its module.

    `stored` are the names of all tensors of the checkpoint: a head with a weight of its own among them keeps it,
    however the config ties it. Linears of a head that this class lacks are left out. Raises ArtifactError when the
    model has no such module, or one that cannot be packed.
    """
    places = places_of(model, records)
    _check_found(model, records, places)
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    sharing = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in tied.items()}
    experts: dict[str, _Experts] = {}
    for name, place in places.items():
        if place.module in sharing:
            raise ArtifactError(f"linear '{name}' is packed, but config.json ties its weight to another")
        if place.expert is None:
            _swap(model, name, place, records[name], multiplied=place.module in sharing.values())
        else:
            of_module, key = experts.setdefault(place.module, _Experts()), _key(name)
            of_module.records[key], of_module.places[key] = records[name], place
    for module_name, packed in experts.items():
        module = model.get_submodule(module_name)
        if holds_experts(module):
            model.set_submodule(module_name, QuantExperts(module, packed.records, packed.places, module_name))
        else:
            pack_stacks(module, packed.records, packed.places, module_name)
    swapped = {place.module for place in places.values() if place.expert is None}
    _share(model, {target: source for target, source in sharing.items() if source in swapped}, stored)
    return {name: packed_path(name, place) for name, place in places.items()}


def packed_path(name: str, place: Place) -> str:
    """The packed module of a linear, given its name in the checkpoint and where its weight was."""
    if place.expert is None:
        return place.module
    inside = place.module if EXPERT.fullmatch(f"{place.module}.{_key(name)}") else f"{place.module}.experts"
    return f"{inside}.{_key(name)}"


def _key(name: str) -> str:
    """ "3.gate_proj" of an expert's linear."""
    return ".".join(name.split(".")[-2:])


def _check_found(model: Any, records: Mapping[str, LinearRecord], places: Mapping[str, Place]) -> None:
    headless = not hasattr(model, model.base_model_prefix)
    for name, record in records.items():
        if name in places and places[name].expert is None:
            _check_module(name, model.get_submodule(places[name].module), places[name], record)
        elif name not in places and (not headless or name.startswith(f"{model.base_model_prefix}.")):
            raise ArtifactError(f"{type(model).__name__} has no module '{name}', which config.json says is packed")


def _check_module(name: str, module: Any, place: Place, record: LinearRecord) -> None:
    if not (is_linear(module) or is_conv1d(module) or isinstance(module, nn.Embedding)):
        kinds = "an nn.Linear, a Conv1D or an nn.Embedding"
        raise ArtifactError(f"module '{name}' is a {type(module).__name__}, but only {kinds} can be packed")
    shape = tuple(reversed(module.weight.shape)) if place.transposed else tuple(module.weight.shape)
    if shape != (record.out_features, record.in_features):
        raise ArtifactError(
            f"linear '{name}' is {shape[0]} x {shape[1]} in the model, but {record.out_features} x "
            f"{record.in_features} in quantization_config"
        )


def _swap(model: Any, name: str, place: Place, record: LinearRecord, multiplied: bool) -> None:
    """Put a packed module in its place; `multiplied` when an output head is tied to it."""
    old = model.get_submodule(place.module)
    dtype, device = old.weight.dtype, old.weight.device
    if isinstance(old, nn.Embedding):
        new: PackedModule = QuantEmbedding(record, factor_of(name, old), multiplied, dtype, device)
    else:
        new = QuantLinear(record, old.bias is not None, dtype, device, place.transposed)
    model.set_submodule(place.module, new.train(old.training))


def factor_of(name: str, embedding: nn.Embedding) -> float:
    """What the class multiplies its rows by. Raises ArtifactError for a class that may do something else to them."""
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    factor = getattr(embedding, "scalar_embed_scale", None)
    if factor is None:
        raise ArtifactError(f"embedding '{name}' is a {type(embedding).__name__}, which is not known here")
    return float(factor)


def _share(model: Any, sources: Mapping[str, str], stored: Collection[str]) -> None:
    """Replace modules by ones that use the packed module they are tied to: `sources` maps their names.

    transformers ties parameters, and a packed module has none: it must not look for them.
    """
    if not sources:
        return
    for target, source in sources.items():
        if f"{target}.weight" not in stored:
            old, packed = model.get_submodule(target), model.get_submodule(source)
            shared = TiedLinear if isinstance(packed, QuantLinear) else TiedHead
            model.set_submodule(target, shared(packed, getattr(old, "bias", None)))
    tied = model.all_tied_weights_keys
    kept = {target: source for target, source in tied.items() if target.removesuffix(".weight") not in sources}
    model.all_tied_weights_keys = model._tied_weights_keys = kept
