"""The plan of least predicted loss within hard limits, with what theory and the best uniform plan say beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from qpalette.core.errors import BudgetError
from qpalette.plan.build import (
    BITS,
    MEMORY,
    SECONDS,
    Candidate,
    CountBits,
    Limits,
    Space,
    build_problem,
    constant_seconds,
)
from qpalette.plan.exact import Solved, solve
from qpalette.plan.lagrangian import pareto_front
from qpalette.plan.problem import Problem, Selection
from qpalette.plan.sensitivities import Sensitivities
from qpalette.theory import reverse_water_filling


@dataclass(frozen=True)
class Choice:
    """A spec for each linear, and which of them share a launch; empty: all that read one input and may."""

    specs: Mapping[str, str]
    launches: tuple[tuple[str, ...], ...]
    loss: float  # predicted: sum of sensitivity * distortion
    bits: int  # stored, of all linears
    seconds: float | None  # per token, as predicted, constants included; None without a limit on time
    cache: Mapping[str, str] = field(default_factory=dict)  # a code for each stream; its loss is in `loss`
    cache_loss: float = 0.0
    cache_bits: int = 0


class FrontPoint(NamedTuple):
    """A plan on the Pareto front: no other has less loss for its bits; and the bound for them."""

    bits: int
    bits_per_weight: float
    loss: float
    bound: float
    specs: Mapping[str, str]


@dataclass(frozen=True)
class Planned:
    """The answer to a budget. `optimality_gap` is (loss - lower bound of any choice) / loss: 0 is proven optimal."""

    choice: Choice
    optimality_gap: float
    uniform: Choice | None  # the best of one spec that is within the limits
    bound: float  # least loss that information theory allows for the same bits
    weights: int

    @property
    def average_bits(self) -> Fraction:
        return Fraction(self.choice.bits, self.weights)

    @property
    def loss_over_bound(self) -> float:
        return self.choice.loss / self.bound if self.bound > 0 else 1.0

    @property
    def loss_over_uniform(self) -> float | None:
        """None when no uniform plan is within the limits."""
        if self.uniform is None:
            return None
        return self.choice.loss / self.uniform.loss if self.uniform.loss > 0 else 1.0


@dataclass(frozen=True)
class Planner:
    """Answers any number of budgets for the same linears and the same space of choices."""

    sensitivities: Sensitivities
    space: Space

    def plan(self, limits: Limits, solver: str = "exact") -> Planned:
        """The choice of least loss within `limits`, never worse than the best uniform one.

        A step may take longer than predicted, by as much as the profile says: it is within the limit even so.

        Raises BudgetError, which holds the least that is possible, when nothing is within the limits; SpecError and
        InputError as `build_problem`.
        """
        if limits.seconds is not None:
            limits = limits._replace(seconds=limits.seconds / self.margin)
        problem = build_problem(self.sensitivities, self.space, limits)
        self._check(problem, limits)
        uniform = self.best_uniform(limits)
        solved = solve(problem, solver)
        if solved is None and uniform is None:
            raise self._together(problem, limits)
        choice, gap = self._better(problem, solved, uniform)
        return Planned(choice, gap, uniform, self.bound(choice.bits + choice.cache_bits), self.weights)

    @cached_property
    def weights(self) -> int:
        return sum(linear.shape.weights for linear in self.sensitivities.linears)

    def bound(self, bits: int) -> float:
        """Reverse water-filling over linears and streams: no code of whatever rate has less loss at so many bits."""
        sources = [(linear.sensitivity, linear.shape.weights) for linear in self.sensitivities.linears]
        if self.space.cache is not None:
            tokens = self.space.cache.context * self.space.cache.batch
            sources += [(stream.sensitivity, tokens * stream.numbers) for stream in self.space.cache.streams]
        sensitivities, numbers = zip(*sources, strict=True)
        return reverse_water_filling(sensitivities, numbers, bits).predicted_loss

    def best_uniform(self, limits: Limits) -> Choice | None:
        """One spec for all linears, launched as fast as fusion allows."""
        timed = limits.seconds is not None
        found = (self.uniform(candidate, timed) for candidate in self.space.palette)
        choices = [one for choice in found if choice is not None for one in self._uniform_caches(choice)]
        within = [choice for choice in choices if _within(choice, limits)]
        return min(within, key=lambda choice: (choice.loss, choice.bits), default=None)

    def uniform(self, candidate: Candidate, timed: bool) -> Choice | None:
        """`candidate` everywhere; None when the profile does not have it for every linear."""
        if not timed:
            return self._choice({linear.name: candidate.spec for linear in self.sensitivities.linears})
        shapes = {(x.shape.out_features, x.shape.in_features) for x in self.sensitivities.linears}
        if not all(self._measured(candidate.spec, shape) for shape in shapes):
            return None
        alone = replace(self.space, palette=(candidate,), cache=None)
        problem = build_problem(self.sensitivities, alone, Limits(seconds=np.inf))
        return self._described(problem, problem.relax(np.ones(1)).selection)

    def _measured(self, spec: str, shape: tuple[int, int]) -> bool:
        assert self.space.profile is not None
        return any(spec in kernel for kernel in self.space.profile.seconds((shape,), self.space.batch).values())

    def front(self, points: int = 64) -> list[FrontPoint]:
        """Plans of least loss for their bits, by rising bits; launches take no part in it."""
        alone = replace(self, space=replace(self.space, cache=None))
        problem = build_problem(self.sensitivities, alone.space, Limits(bits=0))
        choices = [alone._described(problem, selection) for selection in pareto_front(problem, points=points)]
        return [FrontPoint(c.bits, c.bits / self.weights, c.loss, alone.bound(c.bits), c.specs) for c in choices]

    def _better(self, problem: Problem, solved: Solved | None, uniform: Choice | None) -> tuple[Choice, float]:
        if solved is None:
            assert uniform is not None
            return uniform, 1.0
        choice = self._described(problem, solved.selection)
        if uniform is not None and uniform.loss < choice.loss:
            return uniform, max(0.0, 1 - solved.bound / uniform.loss)
        return choice, solved.gap

    def _described(self, problem: Problem, selection: Selection) -> Choice:
        specs: dict[str, str] = {}
        chosen = np.unique(problem.segment_of_option[selection.options])
        first_option = problem.segment_start[chosen]
        for segment, option in zip(chosen, selection.options - first_option, strict=True):
            part = problem.segments[segment]
            specs |= dict.fromkeys(part.linears, part.specs[option])
        variants = np.unique(problem.variant_of_segment[chosen])
        timed = tuple(launch for v in variants for launch in problem.variants[v].launches)
        seconds = None
        if SECONDS in problem.resources:
            seconds = float(selection.costs[-1]) + self.constant_seconds
        order = {linear.name: specs[linear.name] for linear in self.sensitivities.linears}
        return self._with_cache(self._choice(order, timed, seconds), specs)

    def _choice(
        self, specs: Mapping[str, str], timed: tuple[tuple[str, ...], ...] = (), seconds: float | None = None
    ) -> Choice:
        by_spec = {candidate.spec: candidate for candidate in self.space.palette}
        loss, bits = 0.0, 0
        for linear in self.sensitivities.linears:
            candidate = by_spec[specs[linear.name]]
            loss += linear.sensitivity * candidate.distortion
            bits += self._count_bits(candidate.rate, linear.shape.out_features, linear.shape.in_features)
        return Choice(specs, timed or self._launches(specs), loss, bits, seconds)

    def _with_cache(self, choice: Choice, codes: Mapping[str, str]) -> Choice:
        """With the codes of the streams, where there are any among `codes`."""
        cache = self.space.cache
        if cache is None or not any(stream.name in codes for stream in cache.streams):
            return choice
        chosen = {stream.name: codes[stream.name] for stream in cache.streams}
        by_name = {code.name: code for code in cache.palette}
        loss = sum(stream.sensitivity * by_name[chosen[stream.name]].distortion for stream in cache.streams)
        bits = sum(cache.bits(stream, by_name[chosen[stream.name]]) for stream in cache.streams)
        return replace(choice, loss=choice.loss + loss, cache=chosen, cache_loss=loss, cache_bits=bits)

    def _uniform_caches(self, choice: Choice) -> list[Choice]:
        """With each code, alike for all streams; the choice itself where there are none."""
        cache = self.space.cache
        if cache is None:
            return [choice]
        return [
            self._with_cache(choice, {stream.name: code.name for stream in cache.streams}) for code in cache.palette
        ]

    def _launches(self, specs: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
        """As the fusion allows, where no limit on time has chosen them; "free" leaves it to the run time."""
        if self.space.fusion == "free":
            return ()
        launches: dict[tuple[str, str], list[str]] = {}
        for linear in self.sensitivities.linears:
            key = (linear.name, "") if self.space.fusion == "none" else (linear.group, specs[linear.name])
            launches.setdefault(key, []).append(linear.name)
        return tuple(map(tuple, launches.values()))

    @cached_property
    def _count_bits(self) -> CountBits:
        """Exact fractions are slow, and experts have few shapes."""
        return lru_cache(maxsize=None)(self.space.count_bits)

    def _check(self, problem: Problem, limits: Limits) -> None:
        """Raises BudgetError when one limit alone is below what the cheapest choice needs."""
        for resource, least, limit in zip(problem.resources, problem.least, problem.limits, strict=True):
            if least > limit and resource == BITS:
                raise BudgetError(
                    f"{limits.bits} bits cannot hold these linears: the least is {int(least)}", least_bits=int(least)
                )
            if least > limit and resource == MEMORY:
                raise BudgetError("linears and cache do not fit", least_memory=int(least))
            if least > limit:
                seconds = self.margin * (float(least) + self.constant_seconds)
                raise BudgetError(f"no plan is sure to take less than {seconds:.3g} s per token", least_seconds=seconds)

    def _together(self, problem: Problem, limits: Limits) -> BudgetError:
        """Each limit can be met, but not all: the least memory, or the least bits, within the others."""
        if MEMORY in problem.resources:
            least = solve(problem.minimising(problem.resources.index(MEMORY)))
            memory = None if least is None else int(least.selection.loss)
            return BudgetError("linears and cache do not fit within the other limits", least_memory=memory)
        cheapest = solve(problem.minimising(0))
        bits = None if cheapest is None else int(cheapest.selection.loss)
        assert limits.seconds is not None
        asked = self.margin * limits.seconds
        return BudgetError(f"within {asked:.3g} s per token the least is {bits} bits", least_bits=bits)

    @cached_property
    def constant_seconds(self) -> float:
        return constant_seconds(self.sensitivities, self.space)

    @property
    def margin(self) -> float:
        """Seconds that a step may take over the predicted ones."""
        return 1.0 if self.space.profile is None else self.space.profile.longest(self.space.batch)


def _within(choice: Choice, limits: Limits) -> bool:
    in_bits = limits.bits is None or choice.bits <= limits.bits
    in_bits &= limits.memory is None or choice.bits + choice.cache_bits <= limits.memory
    return in_bits and (limits.seconds is None or (choice.seconds or 0.0) <= limits.seconds)
