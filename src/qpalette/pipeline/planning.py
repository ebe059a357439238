"""From sensitivities and a budget to a plan for a model, its every byte counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import AutoConfig

from qpalette.calibration.gains import feedback_gains, with_feedback
from qpalette.calibration.hessians import HessianStore
from qpalette.calibration.rounding import ROUNDING, Rounding
from qpalette.core.errors import BudgetError, InputError
from qpalette.core.records import LinearGroup
from qpalette.formats import total_bits
from qpalette.kvcache import PAGE, CachePlan
from qpalette.models import find_groups
from qpalette.models.model_class import text_config
from qpalette.nn.coded_cache import check_cacheable
from qpalette.pipeline.footprint import LONGEST, carried_bytes, disk_bytes
from qpalette.pipeline.jobs import make_jobs
from qpalette.pipeline.rehearsal import check_packable
from qpalette.plan import (
    CONTEXT,
    Budget,
    CacheSpace,
    Overhead,
    Plan,
    Planned,
    Planner,
    SensitiveLinear,
    SensitiveStream,
    Sensitivities,
    Space,
    device_bytes,
    even_streams,
    stored_bits,
)
from qpalette.plan.memory import cached_heads
from qpalette.storage import Checkpoint

ATTEMPTS = 4
SHAPED = "shaped"  # the method of sensitivities to the error that calibrated rounding leaves
LONGEST_BUDGET = "9" * 120  # characters of a budget with every limit: what is told as the least holds any other text
PREDICTION = (
    *("predicted_loss", "loss_over_bound", "loss_over_uniform"),
    *("average_bits", "linear_bytes", "seconds_per_token", "optimality_gap"),
)


@dataclass(frozen=True)
class BudgetPlan:
    """A plan, the answer it comes from, and what lies beside the linears; sizes are None without a model."""

    plan: Plan
    planned: Planned
    planner: Planner
    overhead: Overhead
    disk_bytes: int | None  # of all files, never less than what is written
    memory_bytes: int | None  # weights, key-value cache, activations; None unless a memory was asked for
    measured: Sensitivities
    factor: float = 1.0  # of the measured ones, by their curve at this plan's loss: the planner's

    def scale(self, loss: float) -> float:
        """What the planner's figures for another plan, of this predicted `loss`, are multiplied by: the curve at that
        plan's loss in place of this one's."""
        return self.measured.factor(loss / self.factor) / self.factor


def make_plan(
    sensitivities: Sensitivities,
    budget: Budget,
    space: Space,
    checkpoint: Checkpoint | None = None,
    *,
    also: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    hessians: HessianStore | None = None,
    rounding: Rounding = ROUNDING,
    cache: CachePlan | None = None,
    device: str = "cpu",
    context: int = 4096,
    solver: str = "exact",
    rotation: str = "full",
    seed: int = 0,
) -> BudgetPlan:
    """The plan of least predicted loss within `budget`, for `checkpoint` or for the linears of the sensitivities alone.

    `also` names optional linears to quantize ("lm_head", "embed_tokens"), `include` and `exclude` which of the others
    are and are not, as in `find_groups`. A memory budget is for `space.batch` sequences of `context` tokens; where the
    sensitivities have streams of a cache, codes are chosen for them by the same measure, else keys and values take 16
    bits, or what `cache` says, which is not planned then. With `hessians` the plan is for calibrated rounding. What
    feedback takes off the error is in the sensitivities that were measured for it; others are multiplied by what is
    known of it from the Hessian of each group. Of `space.quick` alone it is made where that loses little more.

    Raises BudgetError naming the least that is possible, InputError when sensitivities lack a linear of the checkpoint
    or a size or memory is asked for without one, CheckpointError for a model without linears, SpecError for options
    that mean nothing.
    """
    if checkpoint is None:
        if budget.size is not None or budget.memory is not None:
            raise InputError("a size or memory counts the whole model: give the model as well, or bits")
        chosen = sensitivities.of_listed
    else:
        check_packable(checkpoint)
        chosen = sensitivities.of_groups(find_groups(checkpoint, include, exclude, also).groups)
    if hessians is not None and checkpoint is not None and chosen.provenance.get("method") != SHAPED:
        measured = find_groups(checkpoint).groups
        chosen = with_feedback(chosen, feedback_gains(hessians, measured, rotation, seed, rounding.damping, device))
    if hessians is not None:
        space = replace(space, count_bits=partial(stored_bits, diagonal=rounding.diagonal))
    if chosen.streams and budget.memory is not None and cache is None:
        assert checkpoint is not None, "a memory counts a model"
        space = replace(space, cache=CacheSpace(chosen.streams, context, space.batch, most=_most(checkpoint)))
    draft = _Draft(chosen, budget, space, checkpoint, hessians, rounding, cache, context, rotation, seed)
    found = draft.by_curve(solver)
    if space.quick is None:
        return found
    only_quick = replace(space, palette=space.quick.palette, quick=None)
    try:
        quick = replace(draft, space=only_quick).by_curve(solver)
    except BudgetError:
        return found
    return quick if quick.planned.choice.loss <= space.quick.allowed * found.planned.choice.loss else found


def longest_context(make: Callable[[int], BudgetPlan], most: int, loss: float | None = None) -> tuple[int, BudgetPlan]:
    """The longest context, up to `most` and in whole pages, for which `make(context)` finds a plan of at most this
    predicted loss, and that plan. Raises what `make` does for one page, BudgetError where its loss is more.
    """

    def fitting(context: int) -> BudgetPlan | None:
        try:
            found = make(context)
        except BudgetError:
            return None
        return found if loss is None or found.planned.choice.loss <= loss else None

    low, best = min(PAGE, most), make(min(PAGE, most))
    if loss is not None and best.planned.choice.loss > loss:
        raise BudgetError(
            f"with {low} tokens of context the loss is {best.planned.choice.loss:.4g}, more than {loss:g}"
        )
    high = -(-most // PAGE) + 1  # in pages: too long
    pages = 1
    while high - pages > 1:
        middle = (pages + high) // 2
        context = min(middle * PAGE, most)
        found = fitting(context)
        if found is None:
            high = middle
        else:
            pages, low, best = middle, context, found
    return low, best


def even_sensitivities(groups: Sequence[LinearGroup], streams: Sequence[SensitiveStream] = ()) -> Sensitivities:
    """Every weight counts alike: what to minimise when nothing is known of the model. `streams` are as they are."""
    return Sensitivities(
        tuple(SensitiveLinear(shape, group.name, float(shape.weights)) for group in groups for shape in group.linears),
        {"method": "every weight alike"},
        streams=tuple(streams),
    )


def cached_streams(checkpoint: Checkpoint, tokens: int) -> tuple[SensitiveStream, ...]:
    """Keys and values of a model's cache of so many tokens, every number alike. Raises UnsupportedError where it cannot
    be coded, KeyError for a config that says nothing of heads, ValueError for a model that transformers does not know.
    """
    layers = check_cacheable(AutoConfig.for_model(**checkpoint.config))
    return even_streams(layers, *cached_heads(text_config(checkpoint.config)), tokens)


def _most(checkpoint: Checkpoint) -> int | None:
    """The model's own context."""
    return text_config(checkpoint.config).get("max_position_embeddings")


@dataclass(frozen=True)
class _Draft:
    sensitivities: Sensitivities
    budget: Budget
    space: Space
    checkpoint: Checkpoint | None
    hessians: HessianStore | None
    rounding: Rounding
    cache: CachePlan | None
    context: int
    rotation: str
    seed: int

    def by_curve(self, solver: str) -> BudgetPlan:
        """By the sensitivities of their curve at the loss of the plan that the measured ones give."""
        found, known = self.plan(solver), self.sensitivities
        factor = known.factor(found.planned.choice.loss - found.planned.choice.cache_loss)
        if factor != 1.0:
            found = replace(self, sensitivities=known.times(factor)).plan(solver)
        return replace(found, measured=known, factor=factor)

    def plan(self, solver: str) -> BudgetPlan:
        planner = Planner(self.sensitivities, self.space)
        streams = self.space.cache is not None
        overhead = self._overhead(solver)
        for _ in range(ATTEMPTS):
            try:
                planned = planner.plan(self.budget.limits(planner.weights, overhead, streams), solver)
            except BudgetError as error:
                raise self.budget.explain(error, planner.weights, overhead) from error
            plan = self._described(
                planned.choice.specs, _prediction(planned), solver, str(self.budget), planned.choice.launches
            )
            if self.space.cache is not None:
                plan = replace(plan, cache=self.space.cache.plan(planned.choice.cache))
            size = None if self.checkpoint is None else disk_bytes(self.checkpoint, plan, self.hessians, self.rounding)
            excess = 0 if size is None or self.budget.size is None else size - self.budget.size
            if excess <= 0:
                break
            overhead = replace(overhead, disk=overhead.disk + excess)  # a header whose offsets have a digit more
        memory = (
            None
            if self.budget.memory is None
            else ((planned.choice.bits + planned.choice.cache_bits) // 8 + overhead.memory)
        )
        return BudgetPlan(plan, planned, planner, overhead, size, memory, self.sensitivities)

    def _overhead(self, solver: str) -> Overhead:
        """Measured on a plan whose spec names are the longest there are."""
        if self.checkpoint is None:
            return Overhead()
        longest = max(self.space.palette, key=lambda candidate: (len(candidate.spec), candidate.rate)).spec
        specs = {linear.name: longest for linear in self.sensitivities.linears}
        plan = self._described(specs, dict.fromkeys(PREDICTION, LONGEST), solver, LONGEST_BUDGET)
        disk = memory = 0
        if self.budget.size is not None:
            jobs = make_jobs(self.checkpoint, plan, self.hessians, self.rounding)
            packed = total_bits(job.record for job in jobs).total // 8
            disk = disk_bytes(self.checkpoint, plan, self.hessians, self.rounding) - packed
        if self.budget.memory is not None:
            kept, activations = device_bytes(self.checkpoint.config, self.context, self.space.batch)
            if self.space.cache is not None:
                kept = self.space.cache.fixed_bytes
            elif self.cache is not None:
                kept = self._bytes_of(self.cache, self.checkpoint)
            memory = carried_bytes(self.checkpoint, plan) + kept + activations
        return Overhead(disk, memory)

    def _bytes_of(self, cache: CachePlan, checkpoint: Checkpoint) -> int:
        streams = cached_streams(checkpoint, self.context * self.space.batch)
        return CacheSpace(streams, self.context, self.space.batch, cache.exact, _most(checkpoint)).bytes_of(cache)

    def _described(
        self,
        specs: Mapping[str, str],
        prediction: Mapping[str, float | None],
        solver: str,
        budget: str,
        launches: tuple[tuple[str, ...], ...] = (),
    ) -> Plan:
        space = self.space
        provenance = {
            "budget": budget,
            "solver": solver,
            "sensitivities": dict(self.sensitivities.provenance),
            **({} if space.profile is None else {"latency": space.profile.device, "fusion": space.fusion}),
            **({} if space.cache is None else {CONTEXT: self.context}),
        }
        known = {name: value for name, value in prediction.items() if value is not None}
        return Plan(specs, self.rotation, self.seed, self.sensitivities.values, known, provenance, launches)


def _prediction(planned: Planned) -> dict[str, float | None]:
    choice = planned.choice
    figures = (
        *(choice.loss, planned.loss_over_bound, planned.loss_over_uniform),
        *(float(planned.average_bits), choice.bits // 8, choice.seconds, planned.optimality_gap),
    )
    return dict(zip(PREDICTION, figures, strict=True))
