"""Measured seconds of launches: plain data, from any benchmark of any device. Some come with the package."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpalette.core.errors import InputError

PROFILE_VERSION = 1
SPREAD = 0.03  # plans for an H100 took 0.98 to 1.02 of what its profile predicts (benchmarks/results/plan_latency.json)
SHIPPED = Path(__file__).with_name("profiles")
Shape = tuple[int, int]  # out_features, in_features


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its segments (spec, out_features, in_features), and how long it took at a batch size."""

    segments: tuple[tuple[str, int, int], ...]
    batch: int
    seconds: float
    kernel: str = ""  # kind of kernel, where a device has several; a launch has one


@dataclass(frozen=True)
class Head:
    """An output head inside `constant_seconds`: its shape, and its seconds at each batch size."""

    shape: Shape
    seconds: Mapping[int, float]


@dataclass(frozen=True)
class LatencyProfile:
    """Launches measured on one device. `constant_seconds` is what a step costs besides its linears: at any batch size,
    or at each. `head` is the output head as it was left in the constant, at each batch size: a plan that quantizes it
    takes it out. `spread` is how far, relatively, a step may take longer than predicted: at any batch size, or at each.

    A fused launch is known by its shapes, in any order, and the one spec of all its segments.
    """

    device: str
    constant_seconds: float | Mapping[int, float]
    launches: tuple[Launch, ...]
    spread: float | Mapping[int, float] = SPREAD
    head: Head | None = None
    _known: Mapping[tuple[tuple[Shape, ...], int], dict[str, dict[str, float]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        known: dict[tuple[tuple[Shape, ...], int], dict[str, dict[str, float]]] = {}
        for launch in self.launches:
            specs = {spec for spec, _, _ in launch.segments}
            if len(specs) > 1:
                continue
            shapes = tuple(sorted((out, inputs) for _, out, inputs in launch.segments))
            kernels = known.setdefault((shapes, launch.batch), {}).setdefault(launch.kernel, {})
            spec = specs.pop()
            kernels[spec] = min(launch.seconds, kernels.get(spec, math.inf))
        object.__setattr__(self, "_known", known)

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(sorted({launch.batch for launch in self.launches}))

    def constant(self, batch: int, planned: Iterable[Shape] = ()) -> float:
        """Seconds of a step besides its linears, which have the shapes `planned`: where the head is one of them, its
        time is not counted twice. `batch` is one of `batches`."""
        seconds = _at(self.constant_seconds, batch)
        return seconds if self.head is None or self.head.shape not in planned else seconds - self.head.seconds[batch]

    def longest(self, batch: int) -> float:
        """How many times its predicted seconds a step may take; `batch` is one of `batches`."""
        return 1 + _at(self.spread, batch)

    @property
    def specs(self) -> frozenset[str]:
        return frozenset(spec for launch in self.launches for spec, _, _ in launch.segments)

    def seconds_by_spec(self, batch: int) -> dict[str, float]:
        """Seconds of one launch of everything that was measured at `batch`, for each spec that has all of it."""
        measured = [kernels for (_, size), kernels in self._known.items() if size == batch]
        best = [fastest_kernel(kernels) for kernels in measured]
        common = set.intersection(*map(set, best)) if best else set()
        return {spec: sum(seconds[spec] for seconds in best) for spec in sorted(common)}

    def seconds(self, shapes: Iterable[Shape], batch: int) -> dict[str, dict[str, float]]:
        """Kernel -> spec -> seconds of one launch of `shapes` that all have that spec; empty when none was measured."""
        return self._known.get((tuple(sorted(shapes)), batch), {})

    def fastest(self, shapes: Iterable[Shape], batch: int) -> dict[str, float]:
        """Spec -> seconds of one launch of `shapes`, by the best kernel for each."""
        return fastest_kernel(self.seconds(shapes, batch))

    def to_json(self) -> str:
        fields = {"profile_version": PROFILE_VERSION, "device": self.device, "constant_seconds": self.constant_seconds}
        fields |= {"spread": self.spread}
        if self.head is not None:
            fields |= {"head": {"shape": list(self.head.shape), "seconds": dict(self.head.seconds)}}
        head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items())
        launches = ",\n".join(f"  {json.dumps(_entry(launch))}" for launch in self.launches)
        return f'{{\n{head} "launches": [\n{launches}\n ]\n}}\n'

    @classmethod
    def read(cls, file: str | Path) -> LatencyProfile:
        """From a file, or the one of that name that comes with the package (`shipped_profiles`).

        Raises InputError naming the file and what is wrong with it.
        """
        path = Path(file).expanduser()
        if not path.exists() and str(file) in shipped_profiles():
            path = SHIPPED / f"{file}.json"
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            names = ", ".join(shipped_profiles())
            raise InputError(f"there is no latency profile {path}; these come with qpalette: {names}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read as a latency profile: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, content: Any) -> LatencyProfile:
        """Raises InputError naming the field that is wrong."""
        if not isinstance(content, dict) or content.get("profile_version") != PROFILE_VERSION:
            raise InputError(f"a latency profile is a JSON object with profile_version {PROFILE_VERSION}")
        launches = content.get("launches")
        if not isinstance(launches, list) or not launches:
            raise InputError("launches must be a list of at least one launch")
        parsed = tuple(_launch(index, entry) for index, entry in enumerate(launches))
        spread = _by_batch_or_all(content, "spread", parsed) if "spread" in content else SPREAD
        head = _head(content["head"], parsed) if "head" in content else None
        profile = cls(
            str(content.get("device", "unknown")),
            _by_batch_or_all(content, "constant_seconds", parsed),
            parsed,
            spread,
            head,
        )
        if head is not None and any(profile.constant(batch, [head.shape]) < 0 for batch in profile.batches):
            raise InputError("head takes longer than the constant_seconds that it is a part of")
        return profile


def fastest_kernel(kernels: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Spec -> seconds, from kernel -> spec -> seconds."""
    fastest: dict[str, float] = {}
    for seconds in kernels.values():
        fastest |= {spec: min(time, fastest.get(spec, math.inf)) for spec, time in seconds.items()}
    return fastest


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def _at(known: float | Mapping[int, float], batch: int) -> float:
    return known[batch] if isinstance(known, Mapping) else known


def _by_batch_or_all(content: Mapping[str, Any], name: str, launches: Sequence[Launch]) -> float | dict[int, float]:
    values = content.get(name)
    return _by_batch(values, launches, name) if isinstance(values, dict) else _seconds(content, name, least=True)


def _head(content: Any, launches: Sequence[Launch]) -> Head:
    shape = content.get("shape") if isinstance(content, dict) else None
    if not isinstance(shape, list) or not _is_segment(["", *shape]) or not isinstance(content.get("seconds"), dict):
        raise InputError("head must be an object of shape, [out_features, in_features], and seconds by batch")
    return Head((shape[0], shape[1]), _by_batch(content["seconds"], launches, "seconds of the head"))


def _by_batch(seconds: Mapping[str, Any], launches: Sequence[Launch], name: str) -> dict[int, float]:
    batches = sorted({launch.batch for launch in launches})
    if sorted(seconds) != sorted(map(str, batches)):
        raise InputError(f"{name} must have the batches of the launches: {', '.join(map(str, batches))}")
    return {batch: _seconds(seconds, str(batch), f"{name}: ", least=True) for batch in batches}


def _entry(launch: Launch) -> dict[str, Any]:
    entry = {"segments": [list(part) for part in launch.segments], "batch": launch.batch, "seconds": launch.seconds}
    return entry | ({"kernel": launch.kernel} if launch.kernel else {})


def _launch(index: int, entry: Any) -> Launch:
    if not isinstance(entry, dict) or type(entry.get("batch")) is not int or entry["batch"] < 1:
        raise InputError(f"launch {index} must be an object with segments, a batch of at least 1, and seconds")
    segments = entry.get("segments")
    if not isinstance(segments, list) or not segments or not all(map(_is_segment, segments)):
        raise InputError(f"launch {index}: segments must be a list of [spec, out_features, in_features]")
    seconds = _seconds(entry, "seconds", f"launch {index}: ")
    return Launch(tuple(map(tuple, segments)), entry["batch"], seconds, str(entry.get("kernel", "")))


def _is_segment(part: Sequence[Any]) -> bool:
    return (
        isinstance(part, list)
        and len(part) == 3
        and isinstance(part[0], str)
        and all(type(size) is int and size > 0 for size in part[1:])
    )


def _seconds(entry: Mapping[str, Any], name: str, where: str = "", least: bool = False) -> float:
    value = entry.get(name)
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not 0 <= value < math.inf
        or not (value or least)
    ):
        raise InputError(f"{where}{name} must be a positive number, got {value!r}")
    return float(value)
