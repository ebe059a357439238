"""How much each linear's distortion costs: the file that `qpalette sensitivity` writes and `qpalette plan` reads."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qpalette.core.errors import InputError
from qpalette.core.records import LinearGroup, LinearShape
from qpalette.plan.streams import SensitiveStream, streams_of, streams_to_json

SENSITIVITY_VERSION = 1
CSV_COLUMNS = ("layer", "linear", "out_features", "in_features", "sensitivity")
_FIELDS = {"sensitivity_version", "provenance", "linears"}
_SIBLINGS = ((re.compile(r"\.[qkv]_proj$"), ".qkv_proj"), (re.compile(r"\.(gate|up)_proj$"), ".gate_up_proj"))


@dataclass(frozen=True)
class SensitiveLinear:
    """One linear; `sensitivity` is d(loss)/d(distortion), where distortion is mean squared error over mean square."""

    shape: LinearShape
    group: str  # linears of one group read the same input
    sensitivity: float
    listed: bool = True  # among the linears that are quantized; an embedding may be measured and left alone

    @property
    def name(self) -> str:
        return self.shape.name


@dataclass(frozen=True)
class Sensitivities:
    """The sensitivity of each linear, in layer order, and where the figures come from (all values are strings).

    streams: of a key-value cache, keys and values by layer, where they were measured.
    curve: by rising loss, pairs of (sum of sensitivity times distortion, what that costs when it is in all linears at
    once), where that was measured.
    """

    linears: tuple[SensitiveLinear, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()
    streams: tuple[SensitiveStream, ...] = ()

    @property
    def of_listed(self) -> Sensitivities:
        """Without what the checkpoint did not list as a linear to quantize."""
        return replace(self, linears=tuple(linear for linear in self.linears if linear.listed))

    def factor(self, loss: float) -> float:
        """What a predicted `loss` is multiplied by to be what the curve says: log-log between its points, the factor of
        the nearest beyond them; 1 where none was measured."""
        points = [(x, y) for x, y in self.curve if x > 0 and y > 0]
        if not points or not loss > 0:
            return 1.0
        x, y = (np.log([point[axis] for point in points]) for axis in (0, 1))
        return float(np.exp(np.interp(np.log(loss), x, y - x)))

    def times(self, factor: float) -> Sensitivities:
        """All multiplied, the curve used up. The best plan for a budget stays the best."""
        linears = tuple(replace(linear, sensitivity=factor * linear.sensitivity) for linear in self.linears)
        return replace(self, linears=linears, curve=())

    @property
    def values(self) -> dict[str, float]:
        return {linear.name: linear.sensitivity for linear in self.linears}

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        members: dict[str, list[LinearShape]] = {}
        for linear in self.linears:
            members.setdefault(linear.group, []).append(linear.shape)
        return tuple(LinearGroup(name, tuple(linears)) for name, linears in members.items())

    def of_groups(self, groups: Iterable[LinearGroup]) -> Sensitivities:
        """Those of the linears in `groups`, grouped like them. Raises InputError naming one that has none."""
        values, chosen = {linear.name: linear for linear in self.linears}, []
        for group in groups:
            for shape in group.linears:
                if shape.name not in values:
                    raise InputError(f"there is no sensitivity of {shape.name}: measure them on this model again")
                found = values[shape.name].shape
                if (found.out_features, found.in_features) != (shape.out_features, shape.in_features):
                    raise InputError(
                        f"{shape.name} is {shape.out_features} x {shape.in_features}, but its sensitivity is of "
                        f"{found.out_features} x {found.in_features}: measure them on this model"
                    )
                chosen.append(SensitiveLinear(shape, group.name, values[shape.name].sensitivity))
        return replace(self, linears=tuple(chosen))

    def to_json(self) -> str:
        """One line per linear. `from_json` of it gives an equal record."""
        curve = f' "curve": {json.dumps(self.curve)},\n' if self.curve else ""
        entries = ",\n  ".join(map(json.dumps, streams_to_json(self.streams)))
        streams = f' "streams": [\n  {entries}\n ],\n' if entries else ""
        lines = ",\n".join(f"  {json.dumps(linear.name)}: {json.dumps(_entry(linear))}" for linear in self.linears)
        return (
            f'{{\n "sensitivity_version": {SENSITIVITY_VERSION},\n'
            f' "provenance": {json.dumps(dict(self.provenance))},\n{curve}{streams} "linears": {{\n{lines}\n }}\n}}\n'
        )

    @classmethod
    def from_json(cls, text: str, source: str = "the sensitivities") -> Sensitivities:
        """Raises InputError naming `source` and the linear or field that is wrong."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: no valid JSON ({error})") from error
        if not isinstance(content, dict) or not content.keys() >= _FIELDS:
            raise InputError(f"{source}: sensitivities are a JSON object with {', '.join(sorted(_FIELDS))}")
        version = content["sensitivity_version"]
        if type(version) is not int or version != SENSITIVITY_VERSION:
            raise InputError(f"{source}: sensitivity_version is {version!r}, this release reads {SENSITIVITY_VERSION}")
        linears, provenance = content["linears"], content["provenance"]
        if not isinstance(linears, dict) or not linears:
            raise InputError(f"{source}: linears must be an object of at least one linear")
        if not isinstance(provenance, dict) or not all(isinstance(value, str) for value in provenance.values()):
            raise InputError(f"{source}: provenance must be an object of strings")
        curve = _curve(source, content.get("curve", []))
        streams = streams_of(content.get("streams", []), source)
        return cls(tuple(_parsed(source, name, entry) for name, entry in linears.items()), provenance, curve, streams)

    @classmethod
    def from_csv(cls, text: str, source: str = "the sensitivities") -> Sensitivities:
        """Columns layer, linear, out_features, in_features, sensitivity. Raises InputError naming the line.

        The linear "self_attn.q_proj" of layer 3 becomes "model.layers.3.self_attn.q_proj".
        """
        reader = csv.DictReader(io.StringIO(text))
        if missing := [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]:
            raise InputError(f"{source}: there is no column {', '.join(missing)}; it needs {','.join(CSV_COLUMNS)}")
        linears: dict[str, SensitiveLinear] = {}
        for row in reader:
            name = f"model.layers.{row['layer']}.{row['linear']}"
            try:
                shape = [int(row["out_features"]), int(row["in_features"])]
                entry = {"shape": shape, "group": _group_of(name), "sensitivity": float(row["sensitivity"])}
            except (TypeError, ValueError) as error:
                raise InputError(f"{source}, line {reader.line_num}: {error}") from error
            if name in linears:
                raise InputError(f"{source}, line {reader.line_num}: {name} comes a second time")
            linears[name] = _parsed(f"{source}, line {reader.line_num}", name, entry)
        if not linears:
            raise InputError(f"{source}: there is no linear in it")
        return cls(tuple(linears.values()), {"source": Path(source).name})

    @classmethod
    def read(cls, file: str | Path) -> Sensitivities:
        """A JSON file, or a CSV file by its name. Raises InputError naming what is wrong with it."""
        path = Path(file).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist; `qpalette sensitivity MODEL {path}` writes it") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        return (cls.from_csv if path.suffix == ".csv" else cls.from_json)(text, str(path))


def _curve(source: str, points: Any) -> tuple[tuple[float, float], ...]:
    try:
        curve = tuple((float(x), float(y)) for x, y in points)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: the curve must be pairs of numbers ({error})") from error
    if list(curve) != sorted(curve) or not all(0 <= number < math.inf for point in curve for number in point):
        raise InputError(f"{source}: the curve must be pairs of numbers of at least 0, by rising loss")
    return curve


def _entry(linear: SensitiveLinear) -> dict[str, Any]:
    shape = [linear.shape.out_features, linear.shape.in_features]
    entry = {"shape": shape, "group": linear.group, "sensitivity": linear.sensitivity}
    return entry if linear.listed else entry | {"listed": False}


def _parsed(source: str, name: str, entry: Any) -> SensitiveLinear:
    if not isinstance(entry, dict) or not entry.keys() >= {"shape", "group", "sensitivity"}:
        raise InputError(f"{source}: {name} must have shape, group and sensitivity")
    shape, value = entry["shape"], entry["sensitivity"]
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 32 for n in shape)):
        raise InputError(f"{source}: the shape of {name} must be [out_features, in_features], got {shape!r}")
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise InputError(f"{source}: the sensitivity of {name} must be a number of at least 0, got {value!r}")
    if not isinstance(entry["group"], str):
        raise InputError(f"{source}: the group of {name} must be a name")
    return SensitiveLinear(LinearShape(name, *shape), entry["group"], float(value), entry.get("listed", True) is True)


def _group_of(name: str) -> str:
    """The name that a checkpoint's groups have, for the usual decoder layers."""
    for siblings, group in _SIBLINGS:
        name = siblings.sub(group, name)
    return name
