"""What a decoding step costs besides its linears, for a latency profile: whole steps, less the launches in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean
from typing import Any, NamedTuple

import torch

from qpalette.bench.models import config_of, from_config, groups_of, with_head
from qpalette.bench.probes import launch_seconds, plain_seconds
from qpalette.bench.run import measure
from qpalette.core.errors import InputError
from qpalette.core.records import LinearGroup, LinearShape
from qpalette.core.resume import PartialFigures
from qpalette.plan import Head, LatencyProfile, Plan, is_expert
from qpalette.plan.profile import SPREAD

PROBES = ("tcq2-3.25", "tcq-4")  # how far their constants differ shows how well launches add up to a step
CONTEXT, STEPS = 1024, 64

Shape = tuple[int, int]  # out_features, in_features
StepTimer = Callable[[Plan, Sequence[int]], Mapping[int, float]]  # plan, batch sizes -> seconds of a step by batch


class Constant(NamedTuple):
    """Seconds of a step besides its linears, by batch size, and the spread to declare: how much longer than predicted,
    relatively, a step may take."""

    seconds: dict[int, float]
    spread: float


class Steps(NamedTuple):
    """How a step runs on a kind of device, and the type of what its plan leaves alone there."""

    runner: str
    dtype: torch.dtype


STEPS_ON = {"cuda": Steps("compile-graph", torch.float16), "cpu": Steps("eager", torch.float32)}


@dataclass(frozen=True)
class Subject:
    """A model that a profile is made for: a preset, or any checkpoint, of which only the config is read.

    `head` is the quantizer of its output head; None leaves it alone.
    """

    model: str
    head: str | None = None

    @cached_property
    def config(self) -> Any:
        return config_of(self.model)

    @cached_property
    def groups(self) -> tuple[LinearGroup, ...]:
        return tuple(groups_of(self.config).groups)

    @cached_property
    def head_shape(self) -> Shape:
        """Of the embedding, where the two are one."""
        inner = {linear.name for group in self.groups for linear in group.linears}
        every = [linear for group in groups_of(self.config, ["lm_head"]).groups for linear in group.linears]
        return _shape(next(linear for linear in every if linear.name not in inner))

    @property
    def launches(self) -> list[tuple[Shape, ...]]:
        """The shapes of each group of linears, and the head's."""
        return [*(tuple(map(_shape, group.linears)) for group in self.groups), (self.head_shape,)]

    def probes(self, specs: Sequence[str]) -> dict[str, Plan]:
        """Uniform plans, each group one launch, for the PROBES that are among `specs`, or else for the first of them.

        Raises InputError for a mixture of experts: which of them a step launches is not known.
        """
        names = [tuple(linear.name for linear in group.linears) for group in self.groups]
        if expert := next((name for launch in names for name in launch if is_expert(name)), None):
            raise InputError(f"{expert}: which experts a step launches is not known; give a --constant")
        plans = {}
        for spec in [probe for probe in PROBES if probe in specs] or specs[:1]:
            plan = Plan({name: spec for launch in names for name in launch}, launches=tuple(names))
            plans[spec] = plan if self.head is None else with_head(plan, self.config, self.head)
        return plans

    def step_seconds(self, device: torch.device, attention: str | None, partial: PartialFigures) -> StepTimer:
        """Steps as `qpalette bench` times them: random weights, as STEPS_ON says, after CONTEXT tokens. They are
        kept in `partial`, and what is there is not timed again."""
        runner, dtype = STEPS_ON[device.type]

        def seconds(plan: Plan, batches: Sequence[int]) -> Mapping[int, float]:
            key = f"steps of {self.model}, plan {plan.digest}, attention {attention}, batches {list(batches)}"
            if key not in partial.figures:
                candidate = from_config("probe", self.config, plan, dtype, device, attention)
                speeds = measure([candidate], batches, [CONTEXT], STEPS, runner)
                partial.figures[key] = [speed.decode_seconds for speed, _ in speeds]
                partial.save()
            return dict(zip(batches, partial.figures[key], strict=True))

        return seconds

    def head_seconds(self, batch: int, device: torch.device) -> float:
        """Of the head alone, as it is left: cold weights, with the rotation of its input if it is quantized."""
        if self.head is None:
            return plain_seconds(*self.head_shape, batch, device)
        return launch_seconds(((self.head, *self.head_shape),), batch, device)

    def complete(
        self, measured: LatencyProfile, plans: Mapping[str, Plan], steps: StepTimer, head_seconds: Mapping[int, float]
    ) -> LatencyProfile:
        """`measured`, which has every launch of `plans`, with its constant, the head in it, and its spread.

        Raises InputError when a step took no longer than what is in it: the device was not idle all the time.
        """
        constant = self.constant(measured, plans, steps)
        for batch, seconds in constant.seconds.items():
            if seconds <= head_seconds[batch]:
                raise InputError(
                    f"a step of batch {batch} took no longer than its launches and head: measure again, idle"
                )
        head = Head(self.head_shape, dict(head_seconds))
        return replace(measured, constant_seconds=constant.seconds, spread=constant.spread, head=head)

    def constant(self, measured: LatencyProfile, plans: Mapping[str, Plan], steps: StepTimer) -> Constant:
        """The mean over `plans`, by the spec of each, of what its steps take beyond their launches in `measured`."""
        shapes = {linear.name: _shape(linear) for group in self.groups for linear in group.linears}
        timed, linears = {}, {}
        for spec, plan in plans.items():
            launches = [[shapes[name] for name in launch] for launch in plan.launches]
            for batch, seconds in steps(plan, measured.batches).items():
                timed[spec, batch] = seconds
                linears[spec, batch] = sum(measured.fastest(launch, batch)[spec] for launch in launches)
        rest = {b: mean(timed[spec, b] - linears[spec, b] for spec in plans) for b in measured.batches}
        over = [seconds / (linears[spec, b] + rest[b]) - 1 for (spec, b), seconds in timed.items()]
        return Constant(rest, max(SPREAD, *over))  # plans mix specs, and vary by more than uniform probes do


def _shape(linear: LinearShape) -> Shape:
    return linear.out_features, linear.in_features
