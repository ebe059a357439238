"""Which tensors are linears to quantize, and which of them read the same input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from qpalette.core.errors import CheckpointError
from qpalette.core.records import TILE, LinearGroup, LinearShape
from qpalette.models.model_class import (
    EXPERT,
    FIRST,
    NOT_LANGUAGE,
    modules_of_class,
    text_config,
    unstack,
    why_not_packable,
)
from qpalette.models.weights import tensor_of
from qpalette.storage.base import Checkpoint, TensorInfo
from qpalette.storage.tied import EMBEDDING, OUTPUT_HEAD

# Group name in a decoder layer -> the linears that read its input, in the order in which a launch holds them.
SPLIT = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
# The checkpoint itself holds q/k/v and gate/up as one matrix.
FUSED: dict[str, tuple[str, ...]] = {name: (name,) for name in SPLIT}
ARCHITECTURES: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": SPLIT,
    "mistral": SPLIT,
    "mixtral": SPLIT,  # experts are known by their names, in every architecture
    "qwen2": SPLIT,
    "qwen3": SPLIT,
    "qwen3_moe": SPLIT,
    "gemma3": SPLIT,
    "gemma3_text": SPLIT,
    "gpt_oss": SPLIT,
    "olmo2": SPLIT,
    "phi3": FUSED,
}
TRANSPOSED = frozenset(("gpt2", "openai-gpt", "imagegpt"))  # their Conv1D weights are in x out

DECODER_LAYER = re.compile(r"(?P<layer>(?:(?:model|language_model)\.)*layers\.(?P<index>\d+))\.(?P<rest>.+)")
ANY_LAYER = re.compile(r".*?\b(?:layers|layer|blocks|block|h)\.(?P<index>\d+)\.(?P<rest>.+)")

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# (what a name looks like, why it stays as it is), first match wins
LEFT_ALONE = (
    (re.compile(r"(^|\.)mtp\."), "multi-token-prediction head"),
    (NOT_LANGUAGE, "not the language model"),
    (re.compile(r"embed|(^|\.)(wte|wpe)\.|position_bias|relative_attention"), "embedding"),
    (re.compile(r"(^|\.)(lm_head|output_layer|score|classifier)\."), "output head"),
    (re.compile(r"(^|\.)(gate|router|wg|\w+_gate)\.|\.router\."), "router or gate"),
    (re.compile(r"norm"), "norm"),
)


@dataclass(frozen=True)
class Grouping:
    """What is quantized, and what is carried over as it is; together every tensor of the checkpoint."""

    groups: tuple[LinearGroup, ...]  # in layer order
    untouched: tuple[str, ...]  # tensor names, in file order
    reasons: Mapping[str, str]  # for each untouched tensor of two dimensions or more
    optional: tuple[LinearGroup, ...] = ()  # of the untouched, what can be quantized too: embeddings, output head

    @property
    def all_groups(self) -> tuple[LinearGroup, ...]:
        """Everything that a plan may name."""
        return self.groups + self.optional


def find_groups(
    checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = (), also: Sequence[str] = ()
) -> Grouping:
    """Sort every tensor of `checkpoint` into groups of linears (weights out_features x in_features) or the rest.

    `include` and `exclude` are glob patterns over linear names (no ".weight"): with `include`, only what matches one
    is quantized; what matches an `exclude` never is. Embeddings and the output head are optional: they stay as they
    are unless a pattern of `also` matches their name or its last part, such as "lm_head" or "embed_tokens", and no
    `exclude` their name. A tied head is the embedding, under both names. Architectures without a table give groups of
    one linear each: what the model class in transformers has as nn.Linear or as experts, or, without such a class,
    every matrix of a layer. The first linears of all experts in a layer read the same input, and are one group.

    Raises CheckpointError when linears that share an input disagree about its size, or a pattern of `also` or `exclude`
    matches nothing.
    """
    reasons: dict[str, str] = {}
    linears: list[LinearShape] = []
    for info in checkpoint.tensors.values():
        stack = unstack(checkpoint.config, info.name, info.shape) if info.dtype in FLOATS else []
        reason = (None if stack else _why_not(info, checkpoint.config)) or _filtered(info.name, include, exclude)
        if reason is None:
            linears += stack or [LinearShape(info.name.removesuffix(".weight"), *info.shape)]
        elif len(info.shape) >= 2:
            reasons[info.name] = reason
    groups = _in_groups(linears, ARCHITECTURES.get(_model_type(checkpoint.config), {}))
    chosen, optional = _choose(_optional(checkpoint), also, exclude)
    names = [info.name.removesuffix(".weight") for info in checkpoint.tensors.values()]
    _check_named(exclude, [*names, *(linear.name for linear in linears)])
    groups += chosen
    reasons = {name: reason for name, reason in reasons.items() if name not in {f"{g.name}.weight" for g in chosen}}
    grouped = {tensor_of(checkpoint, linear.name) for group in groups for linear in group.linears}
    untouched = tuple(name for name in checkpoint.tensors if name not in grouped)
    return Grouping(groups, untouched, reasons, optional)


def _optional(checkpoint: Checkpoint) -> dict[LinearGroup, tuple[str, ...]]:
    """Embeddings and output head, each a group of its own, with the names that a pattern may match."""
    matrices = {
        info.name.removesuffix(".weight"): info.shape
        for info in checkpoint.tensors.values()
        if info.name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOATS and min(info.shape) >= TILE
    }
    language = {name: shape for name, shape in matrices.items() if not NOT_LANGUAGE.search(name)}
    configs = (checkpoint.config, text_config(checkpoint.config))
    tied = any(config.get("tie_word_embeddings") for config in configs)
    heads = [] if tied else [name for name in language if OUTPUT_HEAD.fullmatch(name)]
    found: dict[LinearGroup, tuple[str, ...]] = {}
    for name in [*filter(EMBEDDING.fullmatch, language), *heads]:
        last = name.rpartition(".")[2]
        names = (name, last) if heads else (name, last, "lm_head")
        found[LinearGroup(name, (LinearShape(name, *language[name]),))] = names
    return found


def _choose(
    optional: Mapping[LinearGroup, tuple[str, ...]], also: Sequence[str], exclude: Sequence[str]
) -> tuple[tuple[LinearGroup, ...], tuple[LinearGroup, ...]]:
    """(those that a pattern of `also` matches and none of `exclude`, the others)."""
    for pattern in also:
        if not any(fnmatchcase(name, pattern) for names in optional.values() for name in names):
            known = ", ".join(group.name for group in optional) or "none here"
            raise CheckpointError(f"'{pattern}' matches no embedding and no output head; these could be named: {known}")
    chosen = [
        group
        for group, names in optional.items()
        if any(fnmatchcase(name, pattern) for name in names for pattern in also)
        and not any(fnmatchcase(group.name, pattern) for pattern in exclude)
    ]
    return tuple(chosen), tuple(group for group in optional if group not in chosen)


def _check_named(exclude: Sequence[str], names: Sequence[str]) -> None:
    """A name with a slip in it would leave in what was to be left out."""
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(f"'{pattern}' leaves nothing out: no linear of the checkpoint has such a name")


def _model_type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", ""))


def _why_not(info: TensorInfo, config: Mapping[str, Any]) -> str | None:
    """Why a tensor is no linear to quantize; None when it is one."""
    if len(info.shape) != 2 or not info.name.endswith(".weight"):
        return f"{len(info.shape)} dimensions, or no weight"
    if info.dtype not in FLOATS:
        return f"stored as {info.dtype}"
    table = ARCHITECTURES.get(_model_type(config))
    match = (DECODER_LAYER.fullmatch if table else ANY_LAYER.fullmatch)(info.name.removesuffix(".weight"))
    if reason := next((why for pattern, why in LEFT_ALONE if pattern.search(info.name)), None):
        return reason
    if match is None:
        return "not in a numbered layer"
    layers = text_config(config).get("num_hidden_layers")
    if isinstance(layers, int) and int(match["index"]) >= layers:
        return "a layer beyond the decoder's (multi-token prediction)"
    if min(info.shape) < TILE:
        return f"smaller than {TILE} x {TILE}"
    if _model_type(config) in TRANSPOSED:
        return "stored transposed (Conv1D)"
    linear = info.name.removesuffix(".weight")
    if table:
        known = EXPERT.fullmatch(linear) or any(match["rest"] in members for members in table.values())
        return None if known else f"no linear of the {_model_type(config)} table"
    modules = modules_of_class(config)
    return why_not_packable(modules, linear, info.shape) if modules else None


def _filtered(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    linear = name.removesuffix(".weight")
    if include and not any(fnmatchcase(linear, pattern) for pattern in include):
        return "not included"
    if any(fnmatchcase(linear, pattern) for pattern in exclude):
        return "excluded"
    return None


def _in_groups(linears: Iterable[LinearShape], table: Mapping[str, tuple[str, ...]]) -> tuple[LinearGroup, ...]:
    """Gather by the table; layers in numeric order, groups and members in the table's."""
    members: dict[_Place, list[tuple[int, LinearShape]]] = {}
    for linear in linears:
        place, rank = _place_of(linear.name, table)
        members.setdefault(place, []).append((rank, linear))
    return tuple(
        _group(place.group, [linear for _, linear in sorted(members[place], key=lambda member: member[0])])
        for place in sorted(members, key=lambda place: place.key)
    )


class _Place(NamedTuple):
    group: str
    key: tuple[tuple[int, int, str], ...]  # of sorting: (a number, or nothing, or a word) at each level


def _place_of(name: str, table: Mapping[str, tuple[str, ...]]) -> tuple[_Place, int]:
    """The group of a linear, and its rank there."""
    expert, match = EXPERT.fullmatch(name), DECODER_LAYER.fullmatch(name) if table else None
    if expert is not None:
        first = next((leaves for leaves in FIRST if expert["leaf"] in leaves), None)
        if first is None:
            return _Place(name, _natural(name)), 0
        group = f"{expert['experts']}.gate_up_proj"
        return _Place(group, _natural(group)), len(first) * int(expert["index"]) + first.index(expert["leaf"])
    if match is not None:
        group = next(group for group, members in table.items() if match["rest"] in members)
        key = (*_natural(match["layer"]), (0, list(table).index(group), ""))
        return _Place(f"{match['layer']}.{group}", key), table[group].index(match["rest"])
    return _Place(name, _natural(name)), 0


def _group(name: str, linears: list[LinearShape]) -> LinearGroup:
    if len({linear.in_features for linear in linears}) > 1:
        shapes = ", ".join(f"{linear.name} {linear.out_features} x {linear.in_features}" for linear in linears)
        raise CheckpointError(f"{name}: its linears must read the same input, but have {shapes}; check the checkpoint")
    return LinearGroup(name, tuple(linears))


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which layer 10 comes after layer 9; numbers and words never meet at one place."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))
