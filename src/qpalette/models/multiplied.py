"""What multiplies in a model: the kind of each tensor, and how much of each kind is packed.

Told by names and shapes alone, so that nothing which a quantizer has passed over can hide: a matrix of a layer that no
table knows is a linear, and a stack of matrices is experts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpalette.core.records import TILE
from qpalette.core.text import count
from qpalette.models.experts import EXPERT
from qpalette.models.kinds import linear_kind
from qpalette.models.model_class import text_config
from qpalette.storage.tied import EMBEDDING, OUTPUT_HEAD

LINEARS, EXPERTS, HEAD, TIED, EMBEDDINGS, OTHERS = KINDS = (
    *("linears", "experts", "head", "tied embedding"),  # these multiply, for every token
    "embedding",  # rows are looked up
    "other parts",  # vision, audio, layers beyond the decoder's (multi-token prediction)
)
MULTIPLIED = KINDS[:4]
ENOUGH = 0.9  # of what multiplies; below, a word is said
NAMED = 3  # of what stays, in that word

_EMBEDDING_LIKE = re.compile(r"embed|(^|\.)w[tp]e\.|position_bias|relative_attention")
_LAYER = re.compile(r"\b(?:layers|layer|blocks|block|h)\.(\d+)\.")
_TOWER = re.compile(r"vision|visual|audio|image|multi_modal|(^|\.)mm_")  # a projector multiplies for tokens, too
_MTP = re.compile(r"(^|\.)mtp\.")


@dataclass(frozen=True)
class Share:
    """Weights of one kind, and how many of them are packed."""

    packed: int
    weights: int

    @property
    def fraction(self) -> float:
        return self.packed / self.weights if self.weights else 1.0

    def __str__(self) -> str:
        """Rounded down: 100 % is all."""
        return f"{int(1000 * self.fraction) / 10:g} %"


@dataclass(frozen=True)
class Shares:
    """By kind, of KINDS those that there are; and what stays of all that multiplies, largest first."""

    kinds: Mapping[str, Share]
    staying: Mapping[str, int]  # what repeats over layers -> weights

    @property
    def multiplied(self) -> Share:
        """Of all that multiplies."""
        found = [share for kind, share in self.kinds.items() if kind in MULTIPLIED]
        return Share(sum(share.packed for share in found), sum(share.weights for share in found))

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {share}" for kind, share in self.kinds.items())
        return f"{self.multiplied} of what multiplies ({kinds})"

    def warning(self) -> str | None:
        """What stays and how to pack it, when less than ENOUGH of what multiplies is packed."""
        if self.multiplied.fraction >= ENOUGH:
            return None
        first = list(self.staying.items())[:NAMED]
        names = ", ".join(f"{name} ({count(weights)} weights)" for name, weights in first)
        more = f" and {len(self.staying) - NAMED} more" if len(self.staying) > NAMED else ""
        optional = [name for name, _ in first if EMBEDDING.fullmatch(name) or OUTPUT_HEAD.fullmatch(name)]
        way_out = (
            f"; pack it too with --also {optional[0]} (also=['{optional[0]}'])"
            if optional
            else "; `qpalette inspect` says why"
        )
        return f"only {self.multiplied} of what multiplies is packed: {names}{more} stays as it is{way_out}"


def shares_of(config: Mapping[str, Any], packed: Mapping[str, int], kept: Mapping[str, tuple[int, ...]]) -> Shares:
    """Of a model of this config: linear -> weights, of those that are `packed`, and tensor -> shape, of what is not."""
    names = [*packed, *(name.removesuffix(".weight") for name in kept)]
    tied = not any(OUTPUT_HEAD.fullmatch(name) for name in names)
    layers = text_config(config).get("num_hidden_layers")
    inside: Counter[str] = Counter()
    everything: Counter[str] = Counter()
    staying: Counter[str] = Counter()
    for name, weights in packed.items():
        kind = _kind_of(f"{name}.weight", (TILE, TILE), tied, layers) or LINEARS
        inside[kind] += weights
        everything[kind] += weights
    for name, shape in kept.items():
        stays = _kind_of(name, shape, tied, layers)
        if stays is not None:
            everything[stays] += math.prod(shape)
        if stays in MULTIPLIED:
            staying[linear_kind(name.removesuffix(".weight"))] += math.prod(shape)
    kinds = {kind: Share(inside[kind], everything[kind]) for kind in KINDS if everything[kind]}
    return Shares(kinds, dict(staying.most_common()))


def _kind_of(name: str, shape: tuple[int, ...], tied: bool, layers: object) -> str | None:
    """None for what is no matrix to multiply by: vectors, convolutions, tables of a few columns."""
    linear = name.removesuffix(".weight")
    if len(shape) not in (2, 3) or min(shape[-2:]) < TILE:
        return None
    layer = _LAYER.search(name)
    beyond = layer is not None and isinstance(layers, int) and int(layer[1]) >= layers
    if _TOWER.search(name) or _MTP.search(name) or beyond:
        return OTHERS
    if OUTPUT_HEAD.fullmatch(linear):
        return HEAD
    if EMBEDDING.fullmatch(linear):
        return TIED if tied else EMBEDDINGS
    if _EMBEDDING_LIKE.search(name):
        return EMBEDDINGS
    if len(shape) == 3 or EXPERT.fullmatch(linear):
        return EXPERTS
    return LINEARS if name.endswith("weight") else None
