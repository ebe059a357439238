"""What a plan is, in figures: for tables, JSON and the page."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qpalette.codes import parse_spec
from qpalette.core.text import count, size
from qpalette.models.kinds import linear_kind
from qpalette.plan import candidate_of

if TYPE_CHECKING:
    from qpalette.pipeline.planning import BudgetPlan
    from qpalette.plan import Choice

_LAYER = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def plan_json(found: BudgetPlan) -> dict[str, Any]:
    """Keys that stay: predicted_loss, loss_over_bound, loss_over_uniform, average_bits, bytes, optimality_gap,
    assignments."""
    planned, choice = found.planned, found.planned.choice
    uniform = planned.uniform
    return {
        "predicted_loss": choice.loss,
        "loss_over_bound": planned.loss_over_bound,
        "loss_over_uniform": planned.loss_over_uniform,
        "average_bits": planned.average_bits,
        "bytes": choice.bits // 8 if found.disk_bytes is None else found.disk_bytes,
        "linear_bytes": choice.bits // 8,
        "memory_bytes": found.memory_bytes,
        "cache": cache_of(found),
        "seconds_per_token": choice.seconds,
        "tokens_per_second": None if choice.seconds is None else 1 / choice.seconds,
        "least_tokens_per_second": None if choice.seconds is None else 1 / (found.planner.margin * choice.seconds),
        "optimality_gap": planned.optimality_gap,
        "uniform": None if uniform is None else {"spec": _only(uniform.specs), "predicted_loss": uniform.loss},
        "launches": [list(launch) for launch in choice.launches],
        "assignments": dict(found.plan.specs),
    }


def cache_of(found: BudgetPlan) -> dict[str, Any] | None:
    """Of the streams of a cache that were planned, too."""
    space, choice = found.planner.space.cache, found.planned.choice
    if space is None:
        return None
    numbers = space.context * space.batch * sum(stream.numbers for stream in space.streams)
    return {
        "context": space.context,
        "batch": space.batch,
        "bytes": choice.cache_bits // 8,
        "bits_per_number": choice.cache_bits / numbers,
        "predicted_loss": choice.cache_loss,
        "codes": dict(choice.cache),
    }


def cache_fact(cache: dict[str, Any] | None, loss: float) -> str:
    """What `cache_of` says, in a line; empty where nothing was planned."""
    if cache is None:
        return ""
    return (
        f"{size(cache['bytes'])} for {cache['batch']} x {cache['context']} tokens, {cache['bits_per_number']:.4f} bits "
        f"per number, {100 * cache['predicted_loss'] / (loss or 1):.0f} % of the loss"
    )


def _only(specs: Any) -> str:
    return next(iter(specs.values()))


def kinds_of(found: BudgetPlan) -> list[dict[str, Any]]:
    """Linears of all layers together: how many, their weights, mean counted bits, specs and share of the loss."""
    space = found.planner.space
    by_spec = {candidate.spec: candidate for candidate in space.palette}
    kinds: dict[str, dict[str, Any]] = {}
    for linear in found.planner.sensitivities.linears:
        spec = found.plan.specs[linear.name]
        candidate = by_spec.get(spec) or candidate_of(parse_spec(spec))
        row = kinds.setdefault(
            linear_kind(linear.name), {"linears": 0, "weights": 0, "bits": 0, "rates": [], "loss": 0.0}
        )
        row["linears"] += 1
        row["weights"] += linear.shape.weights
        row["bits"] += space.count_bits(candidate.rate, linear.shape.out_features, linear.shape.in_features)
        row["rates"].append((candidate.rate, spec))
        row["loss"] += linear.sensitivity * candidate.distortion
    return [
        {
            "kind": kind,
            **row,
            "bits_per_weight": row["bits"] / row["weights"],
            "least": min(row["rates"])[1],
            "most": max(row["rates"])[1],
        }
        for kind, row in kinds.items()
    ]


def facts_of(found: BudgetPlan, budget: str) -> dict[str, str]:
    planned, choice = found.planned, found.planned.choice
    uniform = planned.uniform
    facts = {
        "budget": budget,
        "bits per weight": f"{float(planned.average_bits):.4f} in {count(planned.weights)} weights, everything counted",
        "size": f"{size(choice.bits // 8)} of linears"
        + ("" if found.disk_bytes is None else f", {size(found.disk_bytes)} on disk with everything"),
        "memory": "" if found.memory_bytes is None else f"{size(found.memory_bytes)}, cache and activations included",
        "cache": cache_fact(cache_of(found), choice.loss),
        "speed": ""
        if choice.seconds is None
        else f"{1 / choice.seconds:.1f} tokens/s predicted in {len(choice.launches)} launches, "
        f"{1 / (found.planner.margin * choice.seconds):.1f} at least",
        "predicted loss": f"{choice.loss:.4g}",
        "over the bound": f"{planned.loss_over_bound:.4f} (reverse water-filling, same bits)",
        "over uniform": "no uniform plan is within the budget"
        if uniform is None
        else f"{planned.loss_over_uniform:.4f} ({_only(uniform.specs)} everywhere: {uniform.loss:.4g})",
        "optimality gap": f"{planned.optimality_gap:.1e}" if planned.optimality_gap else "0, proven optimal",
    }
    return {name: value for name, value in facts.items() if value}


def of_all_experts(name: str) -> str:
    """ "mlp.experts.3.up_proj" -> "mlp.experts.*.up_proj"; any other name as it is."""
    return _EXPERT.sub(".experts.*.", name)


def place_of(name: str) -> tuple[str, int | None]:
    """What a linear is in its layer, and which layer that is; its name, and None, where it is in no layer."""
    match = _LAYER.search(name)
    return (of_all_experts(name), None) if match is None else (of_all_experts(name)[match.end() :], int(match[1]))


def uniform_front(found: BudgetPlan) -> list[Choice]:
    """One spec for all linears, by rising bits; what another such plan beats is left out."""
    planner = found.planner
    choices = [choice for c in planner.space.palette if (choice := planner.uniform(c, timed=False)) is not None]
    best: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.bits, choice.loss)):
        if not best or choice.loss < best[-1].loss:
            best.append(choice)
    return best
