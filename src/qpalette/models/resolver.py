"""From the tensors of a checkpoint to the matrices that the class multiplies by: the one way from name to module.

transformers itself says which parameter a tensor becomes (`names.py`), and the class, built without weights and run
once without values (`forward.py`), what it does with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qpalette.core.errors import CheckpointError
from qpalette.core.records import TILE, LinearShape
from qpalette.models.experts import EXPERT, expert_linear
from qpalette.models.forward import Seen, forward_on_meta, is_linear
from qpalette.models.model_class import model_of, text_config
from qpalette.models.names import Names, Unit
from qpalette.storage.base import Checkpoint

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NO_CLASS = "transformers has no class for this config"
NOT_LANGUAGE = re.compile(
    r"vision|visual|audio|image|speech|multi_modal|(^|[._])(mm|vit|vq)[._]|codec|merger|projector|connector|downsampl"
    r"|language_projection|qformer|perceiver|resampler|aligner|protein|vocoder|t2u"
)
HEADS = re.compile(r"(^|\.)(lm_head|output_layer|embed_out|score|classifier|proj_out)(\.|$)")
GATE = re.compile(r"(^|[._])(gate|router|wg|classifier)(\.\w+)?$")
EXPERT_COUNT = re.compile(r"(num|n)_(\w+_)?experts|zero_expert_num")
MTP = re.compile(r"(^|\.)mtp\.")
LAYER = re.compile(r"\b(?:layers|layer|blocks|block|h)\.(?P<index>\d+)\.")
WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")  # of torch.compile, DistributedDataParallel, peft


@dataclass(frozen=True)
class Place:
    """A linear's matrix in a model: a parameter, or an expert's part of one that holds those of all."""

    module: str
    parameter: str = "weight"
    expert: int | None = None
    part: int = 0  # of `parts` of equal height, one above the other
    parts: int = 1
    transposed: bool = False  # the parameter holds in_features x out_features

    @property
    def path(self) -> str:
        return f"{self.module}.{self.parameter}"

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This linear's [out_features, in_features] view of the parameter, or of a tensor like it."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        matrix = matrix.T if self.transposed else matrix
        height = matrix.shape[0] // self.parts
        return matrix[self.part * height : (self.part + 1) * height]


@dataclass(frozen=True)
class Held:
    """One linear that can be packed: where its weight is stored, and where it goes."""

    linear: LinearShape
    place: Place
    unit: Unit
    tensor: str  # of the checkpoint: the first that its weight is in
    order: int  # in which the class calls the modules

    @property
    def stands_alone(self) -> bool:
        """Whether one tensor holds its weight, as it is, and nothing else."""
        return self.tensor == f"{self.linear.name}.weight" and not self.place.transposed


@dataclass
class Resolved:
    """All tensors of a checkpoint, sorted."""

    model: Any | None
    linears: dict[str, Held] = field(default_factory=dict)
    embeddings: dict[str, Held] = field(default_factory=dict)  # and the output head: packed where it is asked for
    reasons: dict[str, str] = field(default_factory=dict)  # of tensors with two dimensions or more, why they are not
    seen: Seen = field(default_factory=Seen)

    @property
    def input_embedding(self) -> nn.Module | None:
        """Of the tokens; None where a class does not say."""
        try:
            return None if self.model is None else self.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            return None

    def held(self, linear: str) -> Held:
        """Raises KeyError for a name that is no linear of the checkpoint."""
        return self.linears.get(linear) or self.embeddings[linear]


_known: WeakKeyDictionary[Checkpoint, Resolved] = WeakKeyDictionary()


_forwards: WeakKeyDictionary[nn.Module, Seen] = WeakKeyDictionary()  # by models of `model_of`


def _seen_by(model: Any) -> Seen:
    """Of the first forward: some classes do a thing only once."""
    if model not in _forwards:
        _forwards[model] = forward_on_meta(model)
    return _forwards[model]


def resolve(checkpoint: Checkpoint) -> Resolved:
    """What each tensor of `checkpoint` is, found once. Raises CheckpointError for the names of a wrapped model."""
    if checkpoint not in _known:
        _known[checkpoint] = _Sorting(checkpoint).result()
    return _known[checkpoint]


def places_of(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Where each linear, expert or embedding of a checkpoint is in `model`, by its name there; those that the model
    does not have are left out."""
    known, wanted = Names(model), list(names)
    modules, parameters = dict(model.named_modules()), model.state_dict()
    found: dict[str, Place] = {}
    for unit in known.units(f"{name}.weight" for name in wanted):
        if unit.converter is None or unit.of_experts:
            found |= {name.removesuffix(".weight"): place for name, place in _places_of_unit(unit, modules).items()}
    for name in wanted:
        if name not in found and (place := _place_by_path(name, known, modules, parameters)) is not None:
            found[name] = place
    return found


def _place_by_path(name: str, known: Names, modules: Mapping[str, nn.Module], parameters: Any) -> Place | None:
    """Of a linear that has the class's own name: its tensor held something else as well."""
    if expert := EXPERT.fullmatch(name):
        for holder in (expert["experts"], expert["experts"].removesuffix(".experts")):
            path = known.renamed(f"{holder}.{expert['leaf']}")[0]
            if path in parameters and parameters[path].ndim == 3:
                return _place(path, modules, int(expert["index"]))
    return _place(f"{name}.weight", modules) if name in modules else None


def _places_of_unit(unit: Unit, modules: Mapping[str, nn.Module]) -> dict[str, Place]:
    if not unit.of_experts:
        return {unit.all_tensors[0]: _place(unit.parameters[0], modules)}
    return {
        tensor: _place(unit.parameters[0], modules, index, part, len(unit.tensors))
        for part, tensors in enumerate(unit.tensors)
        for index, tensor in _numbered(tensors)
    }


def _numbered(tensors: Iterable[str]) -> Iterable[tuple[int, str]]:
    """Experts by their own numbers: the checkpoint may lack some."""
    for tensor in tensors:
        expert = EXPERT.match(tensor)
        if expert:
            yield int(expert["index"]), tensor


def _place(
    path: str, modules: Mapping[str, nn.Module], expert: int | None = None, part: int = 0, parts: int = 1
) -> Place:
    name, _, leaf = path.rpartition(".")
    return Place(name, leaf, expert, part, parts, holds_transposed(modules[name]))


def holds_transposed(module: Any) -> bool:
    """Whether its parameters are in_features x out_features."""
    if is_conv1d(module) or getattr(module, "is_transposed", False):
        return True
    first, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    stacks = [each for each in (first, down) if isinstance(each, torch.Tensor) and each.ndim == 3]
    return len(stacks) == 2 and stacks[0].shape[2] == 2 * stacks[1].shape[1] != 2 * stacks[1].shape[2]


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, whose weight is in_features x out_features."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def holds_experts(module: nn.Module) -> bool:
    """Whether the weights of all experts are parameters of `module`, [experts, rows, columns] each, computed as usual:
    what `use_experts_implementation` of transformers marks, no norm after the experts."""
    if not hasattr(module, "has_gate") or getattr(module, "has_post_expert_norm", False):
        return False
    first = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    weights = (first, getattr(module, "down_proj", None))
    return all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights)


class _Sorting:
    """`resolve` of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors, self.config = checkpoint.tensors, checkpoint.config
        self.model = model_of(checkpoint.config)
        self.found = Resolved(self.model)

    def result(self) -> Resolved:
        if self.model is None:
            self.found.reasons = {name: NO_CLASS for name, info in self.tensors.items() if len(info.shape) > 1}
            return self.found
        self.found.seen = _seen_by(self.model)
        self.modules, self.parameters = dict(self.model.named_modules()), self.model.state_dict()
        self.head = self.model.get_output_embeddings()
        decoder = getattr(self.model, "get_decoder", lambda: None)()
        self.decoder = next((f"{name}." for name, module in self.modules.items() if module is decoder and name), "\0")
        units = Names(self.model).units(self.tensors)
        _check_wrapped(self.tensors, units)
        for unit in units:
            reason = self._take(unit)
            for tensor in unit.all_tensors:
                if reason is not None and len(self.tensors[tensor].shape) > 1:
                    self.found.reasons[tensor] = reason
        taken = {tensor for unit in units for tensor in unit.all_tensors}
        for name, info in self.tensors.items():
            if name not in taken and len(info.shape) > 1:
                self.found.reasons[name] = self._why_unknown(name)
        return self.found

    def _take(self, unit: Unit) -> str | None:
        """Puts the linears of a unit among those found, or says why there are none."""
        dtypes = {self.tensors[tensor].dtype for tensor in unit.all_tensors}
        if strange := dtypes - set(FLOATS):
            return f"stored as {strange.pop()}"
        why = [self._why_not(parameter) for parameter in unit.parameters]
        if reason := next((each for each in why if each is not None and each not in (EMBEDDING, HEAD)), None):
            return reason
        if unit.of_experts:
            held = [self._held_expert(unit, *each) for each in _places_of_unit(unit, self.modules).items()]
        else:
            held = [each for parameter in unit.parameters for each in self._held(unit, parameter)]
        if not held or (reason := self._misfit(unit, held)):
            return reason if held else "of another shape than the model class has"
        chosen = self.found.linears if why[0] is None else self.found.embeddings
        chosen |= {each.linear.name: each for each in held}
        return why[0]

    def _misfit(self, unit: Unit, held: list[Held]) -> str | None:
        if unit.converter is None and self.tensors[held[0].tensor].shape != self._shape(held[0].place.path):
            return "of another shape than the model class has"
        smallest = min(min(each.linear.out_features, each.linear.in_features) for each in held)
        return f"smaller than {TILE} x {TILE}" if smallest < TILE else None

    def _shape(self, parameter: str) -> tuple[int, ...]:
        return tuple(self.parameters[parameter].shape)

    def _held_expert(self, unit: Unit, tensor: str, place: Place) -> Held:
        shape = LinearShape(tensor.removesuffix(".weight"), *self.tensors[tensor].shape)
        return Held(shape, place, unit, tensor, self._order(place.module))

    def _held(self, unit: Unit, parameter: str) -> list[Held]:
        tensor, place = unit.all_tensors[0], _place(parameter, self.modules)
        shape, order = self._shape(parameter), self._order(place.module)
        rows, columns = reversed(shape[-2:]) if place.transposed else shape[-2:]
        plain = unit.converter is None and tensor.endswith(f".{place.parameter}")
        name = tensor.removesuffix(f".{place.parameter}") if plain else place.module
        if len(shape) == 2:
            return [Held(LinearShape(name, rows, columns), place, unit, tensor, order)]
        return [
            Held(
                LinearShape(expert_linear(name, index, place.parameter), rows, columns),
                _place(parameter, self.modules, index),
                *(unit, tensor, order),
            )
            for index in range(shape[0])
        ]

    def _order(self, module: str) -> int:
        return self.found.seen.inputs.get(module, (len(self.found.seen.inputs), 0))[0]

    def _why_not(self, parameter: str) -> str | None:
        """Why a parameter of the class is no linear to quantize; None when it is one."""
        path, _, leaf = parameter.rpartition(".")
        module, shape = self.modules.get(path), self._shape(parameter)
        if NOT_LANGUAGE.search(parameter) and not parameter.startswith(self.decoder):
            return "not the language model"
        if len(shape) < 2:
            return f"{len(shape)} dimensions, or no weight"
        if isinstance(module, nn.Embedding):
            return EMBEDDING
        if module is self.head or (is_linear(module) and HEADS.search(path) and not LAYER.search(path)):  # type: ignore[arg-type]
            return HEAD
        if "norm" in leaf or "norm" in type(module).__name__.lower():
            return "norm"
        if len(shape) == 3 and self._stacks_experts(module, shape):
            return None
        if len(shape) != 2 or leaf != "weight":
            return f"{len(shape)} dimensions, or no weight"
        if not is_linear(module) and not is_conv1d(module):  # type: ignore[arg-type]
            router = any(word in type(module).__name__ for word in ("Router", "Gate", "Gating"))
            return "router or gate" if router else f"a {type(module).__name__}, not an nn.Linear"
        if path in self.found.seen.computed_outside:
            return "its class computes with the weight itself"
        return "router or gate" if self._is_router(path, shape) else None

    def _stacks_experts(self, module: Any, shape: tuple[int, ...]) -> bool:
        if isinstance(module, nn.modules.conv._ConvNd):
            return False
        return holds_experts(module) or shape[0] in self._expert_counts()

    def _is_router(self, path: str, shape: tuple[int, ...]) -> bool:
        parents = [self.modules[path.rsplit(".", up)[0]] for up in range(1, path.count(".") + 1)][:2]
        if any("Router" in type(parent).__name__ for parent in parents):
            return True
        return shape[0] in self._expert_counts() and bool(GATE.search(path))

    def _expert_counts(self) -> set[int]:
        """How many experts a layer has: those that compute nothing counted, too, and not."""
        config = vars(self.model.config.get_text_config())  # type: ignore[union-attr]
        counts = [value for key, value in config.items() if type(value) is int and EXPERT_COUNT.fullmatch(key)]
        return {*counts, sum(counts)}

    def _why_unknown(self, name: str) -> str:
        layer, layers = LAYER.search(name), text_config(self.config).get("num_hidden_layers")
        if MTP.search(name):
            return "multi-token-prediction head"
        if layer and isinstance(layers, int) and int(layer["index"]) >= layers:
            return "a layer beyond the decoder's (multi-token prediction)"
        return "no module of the model class"


EMBEDDING, HEAD = "embedding", "output head"


def _check_wrapped(tensors: Iterable[str], units: list[Unit]) -> None:
    names = list(tensors)
    if units or not names:
        return
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in names):
            raise CheckpointError(
                f"every tensor's name begins with '{prefix}': it was saved from a wrapped model. Save the model inside "
                f"the wrapper, or rename the tensors"
            )
