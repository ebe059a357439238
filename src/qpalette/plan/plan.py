"""A plan: which quantizer each linear gets, and the exact arithmetic of what that costs and promises."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from qpalette.codes import parse_spec
from qpalette.codes.trellis import EFFORT
from qpalette.core.errors import SpecError
from qpalette.core.records import SIGNS, LinearGroup, LinearShape, PackedBits
from qpalette.formats.parts import packed_bits
from qpalette.kvcache import CachePlan

PLAN_VERSION = 2
PLAN_FILE = "qpalette_plan.json"  # in a quantized model's directory
_FIELDS = {"plan_version", "rotation", "seed", "linears"}
_NOTES = {"prediction", "provenance", "launches", "cache"}


@dataclass(frozen=True)
class Plan:
    """Linear name -> canonical spec, and what all linears share: the rotation option and the seed of its signs.

    Linears that the plan does not name stay as they are. What a planner knew may come along: the sensitivity of each
    linear, its prediction, where it comes from, and which linears share a launch. None of it changes what is stored.

    Raises SpecError on an empty plan, a spec that means nothing, a seed that is no natural number below 2^63, or a
    sensitivity or launch of a linear that the plan does not name.
    """

    specs: Mapping[str, str]
    rotation: str = "full"  # "full", "block" or "block-64": turned into factors for each input size
    seed: int = 0
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    prediction: Mapping[str, Any] = field(default_factory=dict)  # for readers; `predicted_loss` is computed
    provenance: Mapping[str, Any] = field(default_factory=dict)
    launches: tuple[tuple[str, ...], ...] = ()
    cache: CachePlan | None = None  # how the model keeps keys and values, where nobody says otherwise

    def __post_init__(self) -> None:
        if not self.specs:
            raise SpecError("the plan quantizes no linear: name at least one")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise SpecError(f"seed {self.seed!r} must be a whole number from 0 to 2^63 - 1")
        canonical = {name: parse_spec(spec).name for name, spec in self.specs.items()}
        object.__setattr__(self, "specs", canonical)
        named = [*self.sensitivities, *(name for launch in self.launches for name in launch)]
        if strange := sorted(set(named) - canonical.keys()):
            raise SpecError(f"the plan has a sensitivity or launch of '{strange[0]}', but no spec for it")

    @property
    def effort(self) -> str:
        """The effort at which every spec is searched; "mixed" when there is no single one."""
        quantizers = {parse_spec(spec) for spec in self.specs.values()}
        for effort in sorted(EFFORT, key=lambda effort: effort != "standard"):
            if all(quantizer.with_effort(effort) == quantizer for quantizer in quantizers):
                return effort
        return "mixed"

    @property
    def predicted_loss(self) -> float | None:
        """Sum of sensitivity * distortion, in the unit of the sensitivities; None unless every linear has one."""
        if self.specs.keys() != self.sensitivities.keys():
            return None
        return sum(self.sensitivities[name] * parse_spec(spec).claimed_distortion for name, spec in self.specs.items())

    @property
    def digest(self) -> str:
        """sha256 of what decides the stored bytes: specs, rotation and seed."""
        content = {"rotation": self.rotation, "seed": self.seed, "specs": dict(self.specs)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def with_effort(self, effort: str) -> Plan:
        """The same rates, searched another way; what was predicted no longer holds."""
        specs = {name: parse_spec(spec).with_effort(effort).name for name, spec in self.specs.items()}
        return self if specs == self.specs else replace(self, specs=specs, prediction={})

    def to_json(self) -> str:
        """The plan file: one line per linear, made to be read, compared and edited. `from_json` gives an equal plan."""
        notes = {"prediction": dict(self.prediction), "provenance": dict(self.provenance)}
        head = {"plan_version": PLAN_VERSION, "rotation": self.rotation, "seed": self.seed}
        lines = [f"{_text(key)}: {_text(value)}" for key, value in head.items()]
        lines += [f"{_text(key)}: {_text(value, indent=1)}" for key, value in notes.items() if value]
        if self.cache is not None:
            lines.append(f'"cache": {_text(self.cache.content)}')
        if self.launches:
            lines.append(f'"launches": [\n  {_joined(map(_text, self.launches))}\n ]')
        linears = (f"{_text(name)}: {_text(self._entry(name))}" for name in self.specs)
        lines.append(f'"linears": {{\n  {_joined(linears)}\n }}')
        return "{\n " + ",\n ".join(lines) + "\n}\n"

    def _entry(self, name: str) -> dict[str, str | float]:
        entry: dict[str, str | float] = {"spec": self.specs[name]}
        return entry | ({"sensitivity": self.sensitivities[name]} if name in self.sensitivities else {})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises SpecError when `text` is no plan of a version that this release reads, naming what is wrong.

        The prediction of a plan whose specs were edited afterwards is dropped.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"the plan is no valid JSON ({error})") from error
        _check_content(content)
        linears = content["linears"]
        plan = cls(
            {name: entry["spec"] for name, entry in linears.items()},
            content["rotation"],
            content["seed"],
            {name: float(entry["sensitivity"]) for name, entry in linears.items() if "sensitivity" in entry},
            content.get("prediction", {}),
            content.get("provenance", {}),
            tuple(tuple(launch) for launch in content.get("launches", [])),
            CachePlan.from_content(content["cache"]) if "cache" in content else None,
        )
        loss, written = plan.predicted_loss, plan.prediction.get("predicted_loss")
        stale = loss is not None and written is not None and not math.isclose(loss, written, rel_tol=1e-6)
        return replace(plan, prediction={}) if stale else plan

    @classmethod
    def read(cls, file: str | Path) -> Plan:
        """A plan file. Raises SpecError naming the file and what is wrong with it."""
        path = Path(file).expanduser()
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SpecError(f"{path} does not exist; `qpalette plan MODEL --out {path}` writes one") from error
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} cannot be read: {error}") from error
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error


@dataclass(frozen=True)
class PlanSummary:
    """What a plan costs and promises over the linears that it names."""

    linears: int
    bits: PackedBits
    distortion: Mapping[str, float]  # predicted, by linear: `claimed_distortion` of its quantizer
    specs: Mapping[str, int]  # weights by spec

    @property
    def weights(self) -> int:
        return self.bits.weights

    @property
    def rate(self) -> Fraction:
        """Average bits per weight, everything counted."""
        return self.bits.rate

    @property
    def bytes(self) -> int:
        return self.bits.total // 8


def uniform_plan(groups: Iterable[LinearGroup], spec: str, rotation: str = "full", seed: int = 0) -> Plan:
    """The same quantizer for every linear. Raises SpecError as `Plan` does."""
    return Plan({linear.name: spec for group in groups for linear in group.linears}, rotation, seed)


def summarize(plan: Plan, groups: Iterable[LinearGroup]) -> PlanSummary:
    """Exact cost and predicted distortion. Raises SpecError when the plan names a linear that is in no group."""
    linears = select_linears(plan, groups)
    specs: dict[str, int] = {}
    for linear in linears:
        specs[plan.specs[linear.name]] = specs.get(plan.specs[linear.name], 0) + linear.weights
    return PlanSummary(
        linears=len(linears),
        bits=_sum_bits((linear, parse_spec(plan.specs[linear.name]).rate) for linear in linears),
        distortion={linear.name: parse_spec(plan.specs[linear.name]).claimed_distortion for linear in linears},
        specs=dict(sorted(specs.items())),
    )


def counted_rate(groups: Iterable[LinearGroup], rate: Fraction, diagonal: str = SIGNS) -> Fraction:
    """Average bits per weight when every linear's codes have `rate`: scales, input diagonals and padding
    included."""
    return _sum_bits(((linear, rate) for group in groups for linear in group.linears), diagonal).rate


def select_linears(plan: Plan, groups: Iterable[LinearGroup]) -> list[LinearShape]:
    """The linears that the plan names, in the order of the groups."""
    linears = [linear for group in groups for linear in group.linears if linear.name in plan.specs]
    if missing := sorted(plan.specs.keys() - {linear.name for linear in linears}):
        raise SpecError(f"the plan names '{missing[0]}', which is no linear of this model ({len(missing)} such)")
    return linears


def _sum_bits(linears: Iterable[tuple[LinearShape, Fraction]], diagonal: str = SIGNS) -> PackedBits:
    return PackedBits.sum(packed_bits(rate, x.out_features, x.in_features, diagonal) for x, rate in linears)


def _check_content(content: Any) -> None:
    if not isinstance(content, dict) or not _FIELDS <= content.keys() <= _FIELDS | _NOTES:
        known = ", ".join(sorted(_FIELDS))
        raise SpecError(f"a plan is a JSON object of {known}, may have {', '.join(sorted(_NOTES))}, and nothing else")
    if type(content["plan_version"]) is not int or content["plan_version"] != PLAN_VERSION:
        raise SpecError(f"plan_version is {content['plan_version']!r}, and this release reads {PLAN_VERSION}")
    if not isinstance(content["rotation"], str):
        raise SpecError("rotation of a plan is a string, such as full")
    if not isinstance(content["linears"], dict):
        raise SpecError("linears of a plan is an object of linear names and their spec")
    for name, entry in content["linears"].items():
        _check_entry(name, entry)
    if not all(isinstance(content.get(key, {}), dict) for key in ("prediction", "provenance")):
        raise SpecError("prediction and provenance of a plan are objects")
    launches = content.get("launches", [])
    if not isinstance(launches, list) or not all(
        isinstance(launch, list) and all(isinstance(name, str) for name in launch) for launch in launches
    ):
        raise SpecError("launches of a plan is a list of lists of linear names")


def _check_entry(name: str, entry: Any) -> None:
    if not isinstance(entry, dict) or not {"spec"} <= entry.keys() <= {"spec", "sensitivity"}:
        raise SpecError(f"{name}: an entry of a plan is an object of spec and, if known, sensitivity")
    if not isinstance(entry["spec"], str):
        raise SpecError(f"{name}: spec is {entry['spec']!r}, not the name of a quantizer")
    sensitivity = entry.get("sensitivity", 0)
    if type(sensitivity) not in (int, float) or not 0 <= sensitivity < math.inf:
        raise SpecError(f"{name}: sensitivity is {sensitivity!r}, not a number of at least 0")


def _text(value: Any, indent: int | None = None) -> str:
    """JSON; `indent` spaces before what stands on lines of its own, one level down."""
    if indent is None:
        return json.dumps(value)
    return json.dumps(value, indent=1).replace("\n", "\n" + " " * indent)


def _joined(lines: Iterable[str]) -> str:
    return ",\n  ".join(lines)
