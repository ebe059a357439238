"""Streams of a key-value cache as items beside the linears: each gets a code, and its bytes count with theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qpalette.core.errors import InputError
from qpalette.kvcache import (
    EXACT,
    PAGE,
    SHAPED,
    WHITE,
    CacheCode,
    CachePlan,
    Exact,
    VectorFormat,
    bucket,
    cache_palette,
    pages_of,
    parse_code,
)
from qpalette.plan.problem import Floats

KEYS, VALUES = KINDS = ("keys", "values")
CONTEXT = "context"  # in the provenance of a plan with a cache: the tokens that it was planned for
EXACT_BYTES = 2  # of a number of an exact token
RING_BYTES = 8  # of a place of the window, that says which token is there
FLOAT_BYTES = 4


@dataclass(frozen=True)
class SensitiveStream:
    """All keys, or all values, of one layer; `sensitivity` is d(loss) / d(distortion)."""

    layer: int
    kind: str
    heads: int
    dim: int
    sensitivity: float

    @property
    def name(self) -> str:
        return f"cache.{self.layer}.{self.kind}"

    @property
    def numbers(self) -> int:
        """That a token adds."""
        return self.heads * self.dim


@dataclass(frozen=True)
class CacheSpace:
    """`streams` of `batch` sequences of `context` tokens each, of which the first `exact.sinks` are exact, too. `most`:
    the model's own context, None where it is not known."""

    streams: tuple[SensitiveStream, ...]
    context: int
    batch: int
    exact: Exact = EXACT
    most: int | None = None

    @cached_property
    def palette(self) -> tuple[CacheCode, ...]:
        """What every stream can be coded in."""
        return tuple(code for code in cache_palette() if all(stream.dim % code.width == 0 for stream in self.streams))

    def bits(self, stream: SensitiveStream, code: CacheCode) -> int:
        """Codes, scales and padding, whole pages of a cache as `generate` makes it."""
        tokens = pages_of(bucket(self.context, self.most), self.exact) * PAGE * self.batch
        vector = 8 * (VectorFormat(code, stream.dim, unbiased=False).code_bytes + 1)
        return tokens * stream.heads * vector

    def options(self, stream: SensitiveStream) -> tuple[Floats, list[int]]:
        """Loss and bits of each code of the palette."""
        loss = np.array([stream.sensitivity * code.distortion for code in self.palette])
        return loss, [self.bits(stream, code) for code in self.palette]

    @property
    def fixed_bytes(self) -> int:
        """What the cache takes besides: exact tokens, transforms of keys, whose errors are shaped."""
        return self._exact_bytes + self._transform_bytes(SHAPED)

    def bytes_of(self, plan: CachePlan) -> int:
        """Of all, in the codes of a plan with these exact tokens. Raises SpecError for one of other layers."""
        layers = len(self._keys)
        names = [plan.of_layer(stream.layer, layers)[KINDS.index(stream.kind)] for stream in self.streams]
        bits = sum(self.bits(stream, parse_code(name)) for stream, name in zip(self.streams, names, strict=True))
        return bits // 8 + self._exact_bytes + self._transform_bytes(plan.transform)

    @property
    def _exact_bytes(self) -> int:
        exact = self.batch * (self.exact.sinks + self.exact.window) * EXACT_BYTES
        return sum(exact * stream.numbers + RING_BYTES * self.exact.window for stream in self.streams)

    def _transform_bytes(self, transform: str) -> int:
        """Of each head's keys: A, its inverse and a mean, and where errors are shaped feedback and a gain."""
        if transform == WHITE:  # a constant of the code
            return 0
        matrices, gains = (3, 1) if transform == SHAPED else (2, 0)
        return sum(
            FLOAT_BYTES * (stream.numbers * (matrices * stream.dim + 1) + gains * stream.heads) for stream in self._keys
        )

    @property
    def _keys(self) -> list[SensitiveStream]:
        return [stream for stream in self.streams if stream.kind == KEYS]

    def plan(self, codes: Mapping[str, str]) -> CachePlan:
        """By the names of the streams."""
        keys, values = (tuple(codes[stream.name] for stream in self.streams if stream.kind == kind) for kind in KINDS)
        return CachePlan(keys, values, exact=self.exact)


def even_streams(layers: int, heads: int, dim: int, tokens: int) -> tuple[SensitiveStream, ...]:
    """Where every number of `tokens` tokens counts alike: nothing is known of the model."""
    even = float(tokens * heads * dim)
    return tuple(SensitiveStream(layer, kind, heads, dim, even) for layer in range(layers) for kind in KINDS)


def streams_to_json(streams: Sequence[SensitiveStream]) -> list[dict[str, Any]]:
    """For the file of sensitivities."""
    return [dict(vars(stream)) for stream in streams]


def streams_of(content: Any, source: str) -> tuple[SensitiveStream, ...]:
    """From the file of sensitivities. Raises InputError naming `source`."""
    fields = {"layer", "kind", "heads", "dim", "sensitivity"}
    if not isinstance(content, list) or not all(
        isinstance(entry, dict) and entry.keys() == fields for entry in content
    ):
        raise InputError(f"{source}: streams must be a list of objects of {', '.join(sorted(fields))}")
    found = tuple(SensitiveStream(**entry) for entry in content)
    for index, stream in enumerate(found):
        whole = all(type(number) is int for number in (stream.layer, stream.heads, stream.dim))
        named = (stream.layer, stream.kind) == (index // 2, KINDS[index % 2])
        value = stream.sensitivity
        if not (whole and named and stream.heads > 0 and stream.dim > 0 and type(value) in (int, float)):
            raise InputError(f"{source}: stream {index} must be {KINDS[index % 2]} of layer {index // 2}, in numbers")
        if not 0 <= value < math.inf:
            raise InputError(f"{source}: the sensitivity of {stream.name} must be at least 0, got {value!r}")
    return found
