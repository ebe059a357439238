"""The page of `--report`: one HTML file that holds plans of many sizes and draws them; it loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpalette.core.errors import InputError
from qpalette.models import find_groups
from qpalette.models.weights import weight_bytes
from qpalette.report.plan_facts import facts_of, of_all_experts, place_of, uniform_front

if TYPE_CHECKING:
    from qpalette.pipeline.planning import BudgetPlan
    from qpalette.plan import SensitiveLinear
    from qpalette.storage import Checkpoint

TEMPLATE = Path(__file__).with_name("plan_page.html")
POINTS = 64  # plans on the slider, about
FIRST = ord("0")  # the character that stands for the first spec of a plan's codes


def plan_page(
    found: BudgetPlan,
    budget: str,
    command: str,
    model: str,
    checkpoint: Checkpoint | None = None,
    peers: Sequence[Mapping[str, Any]] = (),
) -> str:
    """HTML. With a `checkpoint` it says what lies beside the linears; `peers` are of `read_peers`."""
    data = {
        "title": f"{Path(model).name}: {budget}",
        "facts": list(facts_of(found, budget).items()),
        "command": command,
        "peers": list(peers),
        **_size(found, checkpoint),
        **_plans(found),
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # nothing in it ends the script
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def read_peers(file: Path) -> list[dict[str, Any]]:
    """Name, bytes and KL of the models in what `qpalette compare --json` printed; those without a KL are left out.
    Raises InputError for another file."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["models"]
        known = [(Path(row["model"]).name, row["file_bytes"], row["kl"]) for row in rows]
        return [{"name": name, "bytes": int(nbytes), "kl": float(kl)} for name, nbytes, kl in known if kl is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not what `qpalette compare --json` prints ({error!r})") from error


def _size(found: BudgetPlan, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Bytes of all that is not packed; None without a model."""
    if checkpoint is None or found.disk_bytes is None:
        return {"rest": None, "carried": []}
    rest = found.disk_bytes - found.planned.choice.bits // 8
    packed = {linear.name for linear in found.planner.sensitivities.linears}
    carried = []
    for group in find_groups(checkpoint).optional:
        if not packed & {linear.name for linear in group.linears}:
            nbytes = sum(weight_bytes(checkpoint, linear) for linear in group.linears)
            carried.append((f"{group.name}, as it is", nbytes))
    others = rest - sum(nbytes for _, nbytes in carried)
    return {"rest": rest, "carried": [*carried, ("all else: norms, tokenizer, headers", others)]}


def _plans(found: BudgetPlan) -> dict[str, Any]:
    """The plans of least loss along the front and this one, by rising bits; what a unit costs with each spec.

    A unit is a linear, or the experts of a layer that all plans give the same. Its sensitivity is that of this plan;
    another plan's losses are `scale` times as large, by the curve that was measured.
    """
    planner, choice = found.planner, found.planned.choice
    here = (choice.bits, choice.loss - choice.cache_loss, planner.bound(choice.bits), choice.specs)
    front = [(point.bits, point.loss, point.bound, point.specs) for point in planner.front(POINTS)]
    plans = sorted([*(point for point in front if point[0] != choice.bits), here], key=lambda plan: plan[0])
    units = _units(found, [specs for *_, specs in plans])
    named = [[specs[linears[0].name] for linears in units] for *_, specs in plans]
    palette = {candidate.spec: candidate for candidate in planner.space.palette}
    used = sorted({spec for specs in named for spec in specs}, key=lambda spec: (palette[spec].rate, spec))
    letters = {spec: chr(FIRST + index) for index, spec in enumerate(used)}
    shapes = sorted({_shape(linears[0]) for linears in units})
    places = [place_of(linears[0].name) for linears in units]
    kinds = list(dict.fromkeys(kind for kind, layer in places if layer is not None))
    return {
        "first": FIRST,
        "weights": planner.weights,
        "specs": [(spec, float(palette[spec].rate), palette[spec].distortion) for spec in used],
        "shapes": [_costs(found, shape, used) for shape in shapes],
        "kinds": kinds,
        "units": [
            {
                "name": linears[0].name if len(linears) == 1 else of_all_experts(linears[0].name),
                "kind": None if layer is None else kinds.index(kind),
                "layer": layer,
                "shape": shapes.index(_shape(linears[0])),
                "times": len(linears),
                "sensitivity": sum(linear.sensitivity for linear in linears),
            }
            for (kind, layer), linears in zip(places, units, strict=True)
        ],
        "plans": [
            {
                "bits": bits,
                "loss": found.scale(loss) * loss,
                "bound": found.scale(loss) * bound,
                "scale": found.scale(loss),
                "codes": "".join(letters[spec] for spec in specs),
            }
            for (bits, loss, bound, _), specs in zip(plans, named, strict=True)
        ],
        "here": plans.index(here),
        "uniform": [
            {
                "bits": choice.bits,
                "loss": found.scale(choice.loss) * choice.loss,
                "spec": next(iter(choice.specs.values())),
            }
            for choice in uniform_front(found)
        ],
    }


def _units(found: BudgetPlan, plans: Sequence[Mapping[str, str]]) -> list[list[SensitiveLinear]]:
    """The linears; as one those experts of a layer that all `plans` give the same."""
    units: dict[Any, list[SensitiveLinear]] = {}
    for linear in found.planner.sensitivities.linears:
        alike = (of_all_experts(linear.name), _shape(linear), *(specs[linear.name] for specs in plans))
        units.setdefault(alike, []).append(linear)
    return list(units.values())


def _shape(linear: SensitiveLinear) -> tuple[int, int]:
    return linear.shape.out_features, linear.shape.in_features


def _costs(found: BudgetPlan, shape: tuple[int, int], specs: Sequence[str]) -> dict[str, Any]:
    """Of one linear: stored bits, and seconds of a launch of its own where a profile has them, with each spec."""
    space = found.planner.space
    palette = {candidate.spec: candidate for candidate in space.palette}
    measured = {} if space.profile is None else space.profile.fastest([shape], space.batch)
    return {
        "weights": shape[0] * shape[1],
        "bits": [space.count_bits(palette[spec].rate, *shape) for spec in specs],
        "seconds": [measured.get(spec) for spec in specs] if measured else None,
    }
