"""From linears, a palette and a latency profile to the arrays of a problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from qpalette.codes import FAMILIES, Quantizer
from qpalette.codes.trellis import EFFORT
from qpalette.core.errors import InputError, SpecError
from qpalette.core.records import SIGNS
from qpalette.formats.parts import packed_bits
from qpalette.plan.problem import Block, Problem, Segment, Variant
from qpalette.plan.profile import LatencyProfile, fastest_kernel
from qpalette.plan.sensitivities import SensitiveLinear, Sensitivities
from qpalette.plan.streams import CacheSpace, SensitiveStream
from qpalette.plan.tiers import tiers_of

FUSIONS = ("none", "same", "free")
EXPERTS = ("shared", "tiers", "free")
STREAMS = ("alike", "free")
MOST_FUSED = 4  # linears of one group; partitions grow fast, and no known layer has more
BITS, MEMORY, SECONDS = "bits", "memory", "seconds"
_EXPERT = re.compile(r"\bexperts\.(\d+)\b")

CountBits = Callable[[Fraction, int, int], int]


class Candidate(NamedTuple):
    """One member of a palette."""

    spec: str
    rate: Fraction  # of the codes alone
    distortion: float


class Limits(NamedTuple):
    """Hard limits: stored bits of all linears; the same with those of all streams of a cache; and predicted seconds per
    token, constants included. None: no limit."""

    bits: int | None = None
    seconds: float | None = None
    memory: int | None = None


def is_expert(name: str) -> bool:
    """Whether a linear is one of many experts, of which a token takes a few."""
    return _EXPERT.search(name) is not None


def stored_bits(rate: Fraction, out_features: int, in_features: int, diagonal: str = SIGNS) -> int:
    """Codes, scales, the input's diagonal and padding."""
    return packed_bits(rate, out_features, in_features, diagonal).total


class Quick(NamedTuple):
    """The part of a palette that alone is chosen from where the loss is then at most `allowed` times the least."""

    palette: tuple[Candidate, ...]
    allowed: float


@dataclass(frozen=True)
class Space:
    """What may be chosen: a palette, how bits are counted, and with a profile how launches are fused.

    `fusion`: "none" launches each linear alone; "same" lets siblings share a launch when they share a spec (the
    published restriction); "free" gives each segment of a launch its own spec. A fused launch of several specs costs,
    for each segment, the time measured for the launch when all of it has that segment's spec, times the segment's share
    of the weights: exact where the specs agree, linear between. All segments of a launch use one kind of kernel.

    `experts`: those of a layer share their specs, linear by linear ("shared"), share them with experts that are about
    as sensitive ("tiers", see tiers.py), or have their own ("free").

    `streams` of a cache: all share a code ("alike"), or each has its own ("free"). The latter promises less loss and
    does not keep it, as errors of a few bits are too large for the theory: at equal bytes it lost 1.5 to 2.4 times what
    was predicted, one code 1.2 to 1.7 times, and less in four cases of six (benchmarks/joint.py).

    Raises SpecError for another fusion, another way with experts or streams, an empty palette, or a batch below 1.
    """

    palette: tuple[Candidate, ...]
    profile: LatencyProfile | None = None
    batch: int = 1
    fusion: str = "free"
    experts: str = "tiers"
    streams: str = "alike"
    count_bits: CountBits = stored_bits
    cache: CacheSpace | None = None  # streams that are chosen for, too
    quick: Quick | None = None

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise SpecError(f"'{self.fusion}' is no fusion: choose {', '.join(FUSIONS)}")
        if self.experts not in EXPERTS:
            raise SpecError(f"'{self.experts}' is no way with experts: choose {', '.join(EXPERTS)}")
        if self.streams not in STREAMS:
            raise SpecError(f"'{self.streams}' is no way with streams of a cache: choose {', '.join(STREAMS)}")
        if not self.palette:
            raise SpecError("the palette is empty: name at least one quantizer")
        if self.batch < 1:
            raise SpecError(f"the batch must be at least 1, got {self.batch}")
        if self.profile is not None and self.batch not in self.profile.batches:
            known = ", ".join(map(str, self.profile.batches))
            raise InputError(f"the profile of {self.profile.device} has no batch of {self.batch}: it has {known}")


def palette_of(effort: str = "standard", families: Sequence[str] = ()) -> tuple[Candidate, ...]:
    """Every registered quantizer at `effort`, of `families` if named. Raises SpecError for unknown names."""
    if effort not in EFFORT:
        raise SpecError(f"'{effort}' is not an effort: choose {', '.join(EFFORT)}")
    if unknown := [name for name in families if name not in FAMILIES]:
        raise SpecError(f"'{unknown[0]}' is no family of quantizers: choose {', '.join(FAMILIES)}")
    members = [q.with_effort(effort) for name in families or FAMILIES for q in FAMILIES[name].palette()]
    return tuple(map(candidate_of, members))


def candidate_of(quantizer: Quantizer) -> Candidate:
    return Candidate(quantizer.name, quantizer.rate, quantizer.claimed_distortion)


def build_problem(sensitivities: Sensitivities, space: Space, limits: Limits) -> Problem:
    """The problem of `limits`, its resources in the order bits, memory, seconds where they are limited.

    Options that another one beats in everything are left out. Raises InputError when the profile lacks every spec of a
    linear, and SpecError when there is no linear.
    """
    if not sensitivities.linears:
        raise SpecError("there is no linear to quantize: check include and exclude")
    limited = {BITS: limits.bits, MEMORY: limits.memory, SECONDS: limits.seconds}
    if limits.seconds is not None:
        if space.profile is None:
            raise InputError("a limit on time needs a latency profile")
        limited[SECONDS] = max(0.0, limits.seconds - constant_seconds(sensitivities, space))
    values = {name: float(limit) for name, limit in limited.items() if limit is not None}
    builder = _Builder(space, list(values))
    blocks = [block for units in _units_by_group(sensitivities, space) for block in builder.blocks(units)]
    if space.cache is not None:
        blocks += [_stream_block(space.cache, streams, builder.resources) for streams in _together(space)]
    return Problem(blocks, list(values), list(values.values()))


def _together(space: Space) -> list[tuple[SensitiveStream, ...]]:
    """Streams that share a code."""
    assert space.cache is not None
    streams = space.cache.streams
    return [streams] if space.streams == "alike" else [(stream,) for stream in streams]


def _stream_block(cache: CacheSpace, streams: Sequence[SensitiveStream], resources: Sequence[str]) -> Block:
    losses, stored = zip(*map(cache.options, streams), strict=True)
    loss, bits = np.sum(losses, axis=0), np.sum(stored, axis=0, dtype=float)
    costs = np.array([[amount if name == MEMORY else 0.0 for name in resources] for amount in bits])
    costs = costs.reshape(len(bits), len(resources))
    kept = _undominated(np.column_stack([loss, costs]))
    specs, names = (cache.palette[i].name for i in kept), (stream.name for stream in streams)
    return (Variant((Segment(tuple(names), tuple(specs), loss[kept], costs[kept]),)),)


def constant_seconds(sensitivities: Sensitivities, space: Space) -> float:
    """What a step costs besides these linears; 0 without a profile."""
    if space.profile is None:
        return 0.0
    shapes = {(linear.shape.out_features, linear.shape.in_features) for linear in sensitivities.linears}
    return space.profile.constant(space.batch, shapes)


class _Unit(NamedTuple):
    """Linears of one shape that share a spec: one, or the same linear of several experts of a layer."""

    linears: tuple[SensitiveLinear, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.linears[0].shape.out_features, self.linears[0].shape.in_features

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(linear.name for linear in self.linears)

    @property
    def sensitivity(self) -> float:
        return sum(linear.sensitivity for linear in self.linears)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1] * len(self.linears)


def _units_by_group(sensitivities: Sensitivities, space: Space) -> list[list[_Unit]]:
    groups: dict[str, dict[tuple[str, tuple[int, int]], list[SensitiveLinear]]] = {}
    labels = _labels(sensitivities, space.experts)
    for linear in sensitivities.linears:
        shape = (linear.shape.out_features, linear.shape.in_features)
        group, name = (_labelled(each, labels) for each in (linear.group, linear.name))
        groups.setdefault(group, {}).setdefault((name, shape), []).append(linear)
    return [[_Unit(tuple(linears)) for linears in units.values()] for units in groups.values()]


def _labels(sensitivities: Sensitivities, experts: str) -> dict[str, str]:
    """Expert ("model.layers.0.mlp.experts.3") -> what stands for its number in names of those who share its specs;
    nothing where none are shared."""
    total: dict[str, float] = {}
    for linear in sensitivities.linears if experts != "free" else ():
        if found := _EXPERT.search(linear.name):
            expert = linear.name[: found.end()]
            total[expert] = total.get(expert, 0.0) + linear.sensitivity
    if experts == "shared":
        return dict.fromkeys(total, "*")
    layers: dict[str, list[str]] = {}
    for expert in total:
        layers.setdefault(expert.rpartition(".")[0], []).append(expert)
    return {
        expert: f"*{tier}"
        for members in layers.values()
        for expert, tier in zip(members, tiers_of([total[expert] for expert in members]), strict=True)
    }


def _labelled(name: str, labels: dict[str, str]) -> str:
    found = _EXPERT.search(name)
    label = None if found is None else labels.get(name[: found.end()])
    return name if found is None or label is None else f"{name[: found.start(1)]}{label}{name[found.end() :]}"


class _Options(NamedTuple):
    """What a segment's choices have in common whatever its sensitivity."""

    specs: tuple[str, ...]
    distortion: np.ndarray  # [options]
    costs: np.ndarray  # [options, resources]


class _Builder:
    def __init__(self, space: Space, resources: Sequence[str]) -> None:
        self.space, self.resources = space, tuple(resources)
        self.options = lru_cache(maxsize=None)(self._options)

    def blocks(self, units: list[_Unit]) -> Iterator[Block]:
        """One block for a group that may fuse; one for each unit otherwise."""
        if SECONDS in self.resources and any(is_expert(name) for unit in units for name in unit.names):
            raise InputError("a limit on time does not know yet which experts a token takes: give bits or a size")
        fuses = SECONDS in self.resources and self.space.fusion != "none" and 1 < len(units) <= MOST_FUSED
        if not fuses:
            for unit in units:
                yield (self._alone([unit]),)
            return
        yield tuple(variant for parts in _partitions(units) for variant in self._variants(parts))

    def _alone(self, units: list[_Unit]) -> Variant:
        segments = []
        for unit in units:
            options = self.options((unit.shape,), len(unit.linears))
            if not options.specs:
                out, inputs = unit.shape
                raise InputError(f"the profile has no launch of {unit.names[0]} ({out} x {inputs}) in this palette")
            segments.append(_segment([unit], options))
        return Variant(tuple(segments), tuple(unit.names for unit in units) if SECONDS in self.resources else ())

    def _variants(self, parts: list[list[_Unit]]) -> Iterator[Variant]:
        """The ways to launch `parts`, each of which is one launch; a fused one takes any of the device's kernels."""
        alone = self._alone([part[0] for part in parts if len(part) == 1]) if min(map(len, parts)) == 1 else None
        ways: list[tuple[Segment, ...]] = [alone.segments if alone else ()]
        for part in (part for part in parts if len(part) > 1):
            ways = [way + more for way in ways for more in self._fused(part)]
        for segments in ways:
            yield Variant(segments, tuple(tuple(n for unit in part for n in unit.names) for part in parts))

    def _fused(self, part: list[_Unit]) -> Iterator[tuple[Segment, ...]]:
        shapes = tuple(unit.shape for unit in part)
        if self.space.fusion == "same":
            options = self.options(shapes, 1)
            if options.specs:
                yield (_segment(part, options),)
            return
        assert self.space.profile is not None
        weights = sum(unit.weights for unit in part)
        for kernel in self.space.profile.seconds(shapes, self.space.batch):
            found = [self.options(shapes, 1, unit.shape, unit.weights / weights, kernel) for unit in part]
            if all(options.specs for options in found):
                yield tuple(_segment([unit], options) for unit, options in zip(part, found, strict=True))

    def _options(
        self,
        launch: tuple[tuple[int, int], ...],
        times: int,
        segment: tuple[int, int] | None = None,
        share: float = 1.0,
        kernel: str | None = None,
    ) -> _Options:
        """Choices of one spec for `launch`, or for one `segment` of it that takes `share` of its time."""
        seconds: dict[str, float] = {}
        if SECONDS in self.resources:
            assert self.space.profile is not None
            measured = self.space.profile.seconds(launch, self.space.batch)
            seconds = fastest_kernel(measured if kernel is None else {kernel: measured.get(kernel, {})})
        rows = []
        for candidate in self.space.palette:
            if SECONDS in self.resources and candidate.spec not in seconds:
                continue
            shapes = launch if segment is None else (segment,)
            bits = times * sum(self.space.count_bits(candidate.rate, *shape) for shape in shapes)
            costs = {
                BITS: bits,
                MEMORY: bits,
                SECONDS: times * share * seconds.get(candidate.spec, 0.0),
            }
            rows.append((candidate, [float(costs[name]) for name in self.resources]))
        if not rows:
            return _Options((), np.zeros(0), np.zeros((0, len(self.resources))))
        distortion = np.array([candidate.distortion for candidate, _ in rows])
        matrix = np.array([costs for _, costs in rows])
        kept = _undominated(np.column_stack([distortion, matrix]))
        return _Options(tuple(rows[i][0].spec for i in kept), distortion[kept], matrix[kept])


def _segment(units: list[_Unit], options: _Options) -> Segment:
    loss = sum(unit.sensitivity for unit in units) * options.distortion
    return Segment(tuple(name for unit in units for name in unit.names), options.specs, loss, options.costs)


def _undominated(figures: np.ndarray) -> np.ndarray:
    """Rows of `figures` [options, columns] that no other row beats; of equal rows the first."""
    no_worse = (figures[:, None] <= figures[None]).all(-1)
    better = no_worse & ((figures[:, None] < figures[None]).any(-1))
    first = no_worse & no_worse.T & (np.arange(len(figures))[:, None] < np.arange(len(figures))[None])
    return np.flatnonzero(~(better | first).any(0))


def _partitions(units: list[_Unit]) -> Iterator[list[list[_Unit]]]:
    """Every way to cut `units` into launches."""
    if not units:
        yield []
        return
    first, rest = units[0], units[1:]
    for parts in _partitions(rest):
        yield [[first], *parts]
        for index, part in enumerate(parts):
            yield [*parts[:index], [first, *part], *parts[index + 1 :]]
