"""A plan: which quantizer each linear gets, and the exact arithmetic of what that costs and promises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from qpalette.core.errors import SpecError
from qpalette.core.records import LinearGroup, LinearShape, PackedBits, packed_bits
from qpalette.quantizers import parse_spec
from qpalette.quantizers.trellis import EFFORT

PLAN_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Linear name -> canonical spec, and what all linears share: the rotation option and the seed of its signs.

    Linears that the plan does not name stay as they are. Raises SpecError on an empty plan, a spec that means nothing
    or a seed that is no natural number below 2^63.
    """

    specs: Mapping[str, str]
    rotation: str = "full"  # "full", "block" or "block-64": turned into factors for each input size
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.specs:
            raise SpecError("the plan quantizes no linear: name at least one")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise SpecError(f"seed {self.seed!r} must be a whole number from 0 to 2^63 - 1")
        canonical = {name: parse_spec(spec).name for name, spec in self.specs.items()}
        object.__setattr__(self, "specs", canonical)

    @property
    def effort(self) -> str:
        """The effort at which every spec is searched; "mixed" when there is no single one."""
        quantizers = {parse_spec(spec) for spec in self.specs.values()}
        for effort in sorted(EFFORT, key=lambda effort: effort != "standard"):
            if all(quantizer.with_effort(effort) == quantizer for quantizer in quantizers):
                return effort
        return "mixed"

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: equal plans, and only those, have equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical text: sorted keys, no spaces. `from_json` of it gives an equal plan."""
        content = {
            "plan_version": PLAN_VERSION,
            "rotation": self.rotation,
            "seed": self.seed,
            "specs": dict(self.specs),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises SpecError when `text` is no plan of a version that this release reads."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"the plan is no valid JSON ({error})") from error
        _check_content(content)
        return cls(content["specs"], content["rotation"], content["seed"])


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


def counted_rate(groups: Iterable[LinearGroup], rate: Fraction) -> Fraction:
    """Average bits per weight when every linear's codes have `rate`: scales, signs and padding included."""
    return _sum_bits((linear, rate) for group in groups for linear in group.linears).rate


def select_linears(plan: Plan, groups: Iterable[LinearGroup]) -> list[LinearShape]:
    """The linears that the plan names, in the order of the groups."""
    linears = [linear for group in groups for linear in group.linears if linear.name in plan.specs]
    if missing := sorted(plan.specs.keys() - {linear.name for linear in linears}):
        raise SpecError(f"the plan names '{missing[0]}', which is no linear of this model ({len(missing)} such)")
    return linears


def _sum_bits(linears: Iterable[tuple[LinearShape, Fraction]]) -> PackedBits:
    parts = [packed_bits(rate, linear.out_features, linear.in_features) for linear, rate in linears]
    return PackedBits(
        weights=sum(part.weights for part in parts),
        codes=sum(part.codes for part in parts),
        scales=sum(part.scales for part in parts),
        signs=sum(part.signs for part in parts),
    )


def _check_content(content: Any) -> None:
    if not isinstance(content, dict) or set(content) != {"plan_version", "rotation", "seed", "specs"}:
        raise SpecError("a plan is a JSON object of plan_version, rotation, seed and specs, and nothing else")
    if type(content["plan_version"]) is not int or content["plan_version"] != PLAN_VERSION:
        raise SpecError(f"plan_version is {content['plan_version']!r}, and this release reads {PLAN_VERSION}")
    specs = content["specs"]
    if not isinstance(specs, dict) or not all(isinstance(spec, str) for spec in specs.values()):
        raise SpecError("specs of a plan is an object of linear names and quantizer names")
    if not isinstance(content["rotation"], str):
        raise SpecError("rotation of a plan is a string, such as full")
