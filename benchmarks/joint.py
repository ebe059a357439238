"""One plan for weights and cache beside the best of separate ones, at equal bytes: predicted and measured KL.

    python benchmarks/joint.py MODEL --text TEST --calibration TRAIN [--device cuda] [--bits 3 --bits 4 --bits 5]
                               [--context 4096 --context 32768] [--windows 4] [--window 2048] [--effort fast]

A budget is `--bits` for every number of the linears and of a cache of `--context` tokens, one sequence; everything
stored of both counts, and what does not depend on the plan (transforms, exact tokens, what is not quantized) is not in
it. Beside the joint plan, whose cache has one code: one that gives each stream of the cache a code of its own, and a
cache planned at weights of one quantizer, that whose whole is predicted to lose least. KL from the original with its
own cache is measured on windows of `--window` tokens, every one read from codes; rounding is data-free, and no model is
written: a linear is rounded once for a quantizer, and put into the model that is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import commit, device_name, report

from qpalette.api import measure_sensitivities
from qpalette.calibration.taps import weights_of
from qpalette.codes.tiles import from_tiles
from qpalette.core.errors import BudgetError
from qpalette.evaluate import load_model, token_windows
from qpalette.evaluate.cache import WHOLE, evaluate_cache
from qpalette.evaluate.cache import WINDOWS as MOMENT_WINDOWS
from qpalette.kvcache import CachePlan
from qpalette.models import find_groups
from qpalette.models.model_class import text_config
from qpalette.pipeline.encode import encode_linear
from qpalette.pipeline.jobs import Job, make_jobs
from qpalette.plan import CacheSpace, Candidate, Limits, Plan, Planner, Sensitivities, Space, palette_of
from qpalette.rotate import Rotation, unrotate_weight
from qpalette.runtime import select
from qpalette.storage import Checkpoint, open_checkpoint

UNIFORM_STEPS = 4  # of uniform weights, to a bit


@dataclass(frozen=True)
class Found:
    """A plan, and what it is predicted to lose and stores."""

    name: str
    specs: Plan
    cache: CachePlan
    loss: float
    bits: int  # of the linears
    cache_bits: int


@dataclass(frozen=True)
class Budgeted:
    """The plans of one budget, `room` bits for the linears and `cache`."""

    known: Sensitivities
    palette: tuple[Candidate, ...]
    cache: CacheSpace
    room: int

    def joint(self) -> Found:
        return self._within(self.palette, "joint")

    def free(self) -> Found:
        return self._within(self.palette, "a code each", streams="free")

    def at_uniform_weights(self) -> Found:
        steps = [candidate for candidate in self.palette if candidate.rate * UNIFORM_STEPS % 1 == 0]
        return least(lambda candidate: self._within((candidate,), f"weights {candidate.spec}"), steps)

    def _within(self, palette: tuple[Candidate, ...], name: str, streams: str = "alike") -> Found:
        """Both planned together, of this palette."""
        space = Space(palette, streams=streams, cache=self.cache)
        choice = Planner(self.known, space).plan(Limits(memory=self.room)).choice
        plan = self.cache.plan(choice.cache)
        return Found(name, Plan(choice.specs), plan, choice.loss, choice.bits, choice.cache_bits)


def least(plan: Callable[[Any], Found], choices: Sequence[Any]) -> Found:
    """Of what `plan` makes of choices with a rate and a distortion, the one that loses least: by rising rate, those of
    less distortion than all before, until the whole loses more, twice in a row: one part falls, the other one rises."""
    made: list[Found] = []
    lowest, worse = math.inf, 0
    for choice in sorted(choices, key=lambda choice: (choice.rate, choice.distortion)):
        if choice.distortion < lowest and worse < 2:
            lowest = choice.distortion
            with suppress(BudgetError):
                made.append(plan(choice))
                worse = worse + 1 if made[-1].loss > min(found.loss for found in made) else 0
    return min(made, key=lambda found: found.loss)


def main(
    model: str,
    text: Annotated[Path, typer.Option(help="What KL is measured on.")],
    calibration: Annotated[Path, typer.Option(help="What sensitivities and keys are measured on.")],
    bits: Annotated[list[float] | None, typer.Option(help="Of a number of weights and cache.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens that the budget counts.")] = None,
    windows: int = 4,
    window: int = 2048,
    tokens: Annotated[int, typer.Option(help="That sensitivities are measured on.")] = 32_768,
    device: str = "cpu",
    effort: str = "fast",
    work: Path = Path("out/joint"),
    name: str = "joint",
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    file, start = work / "sensitivities.json", time.perf_counter()
    if not file.exists():
        span = min(window, tokens)
        measure_sensitivities(model, file, calibration, tokens=tokens, window=span, cache=True, device=device)
        print(f"sensitivities: {time.perf_counter() - start:.1f} s", flush=True)
    checkpoint = open_checkpoint(model)
    known = Sensitivities.read(file).of_groups(find_groups(checkpoint).groups)
    trial = Trial.of(model, checkpoint, text, calibration, device, window, windows)
    facts = {"model": Path(model).name, "windows": windows, "window": window, "effort": effort, "tokens": tokens}
    facts["commit"] = commit()
    rows: list[dict[str, Any]] = []
    for held in context or [4096, 32_768]:
        for budget in bits or [3.0, 4.0, 5.0]:
            for found in plans_of(known, checkpoint, effort, held, budget):
                rows.append({"context": held, "budget": budget, **trial.run(found)})
                report(name, device_name(device), rows, **facts)


def plans_of(known: Sensitivities, checkpoint: Checkpoint, effort: str, context: int, bits: float) -> Iterator[Found]:
    numbers = sum(linear.shape.weights for linear in known.linears)
    numbers += context * sum(stream.numbers for stream in known.streams)
    most = text_config(checkpoint.config).get("max_position_embeddings")
    cache = CacheSpace(known.streams, context, batch=1, most=most)
    budgeted = Budgeted(known, palette_of(effort), cache, math.floor(bits * numbers))
    yield budgeted.joint()
    yield budgeted.free()
    yield budgeted.at_uniform_weights()


@dataclass
class Rounded:
    """The model that is measured: each linear takes the values that one spec leaves, data-free, which are made once."""

    model: Any
    weights: Any  # by name, of the model, where they are changed
    sources: dict[str, torch.Tensor]
    kept: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, names: Sequence[str]) -> Rounded:
        weights = weights_of(model, names)
        return cls(model, weights, {name: weight.values.clone() for name, weight in weights.items()})

    def take(self, jobs: Sequence[Job]) -> Any:
        for job in jobs:
            what = (job.name, job.record.spec)
            if what not in self.kept:
                self.kept[what] = rounded(job, self.sources[job.name])
            self.weights[job.name].values.copy_(self.kept[what])
        return self.model


def rounded(job: Job, weight: torch.Tensor) -> torch.Tensor:
    """What is left of `weight` [M, K] after the packed tensors of `job`, float32 on its device."""
    record, device = job.record, weight.device
    encoded = encode_linear(job.name, weight, record, job.signs(), device)
    codes = encoded.codes.to(device)
    tiles = select("encode", record.spec, device).decode(record.spec, codes.flatten(0, 1))
    plain = from_tiles(tiles.reshape(*codes.shape[:2], -1), *weight.shape)
    scaled = plain * encoded.scales.view(torch.float16).to(device).float()[:, None]
    return unrotate_weight(scaled, Rotation.parse(record.rotation, record.in_features), job.signs().to(device))


@dataclass(frozen=True)
class Trial:
    checkpoint: Checkpoint
    original: Any
    tokenizer: Any
    rounded: Rounded
    test: list[torch.Tensor]
    train: list[torch.Tensor]

    @classmethod
    def of(
        cls, model: str, checkpoint: Checkpoint, text: Path, calibration: Path, device: str, window: int, windows: int
    ) -> Trial:
        original, tokenizer = load_model(model, device)
        names = [linear.name for group in find_groups(checkpoint).groups for linear in group.linears]
        train = token_windows(calibration, tokenizer, min(WHOLE, window), MOMENT_WINDOWS)
        test = token_windows(text, tokenizer, window, windows)
        return cls(checkpoint, original, tokenizer, Rounded.of(load_model(model, device)[0], names), test, train)

    def run(self, found: Found) -> dict[str, Any]:
        start = time.perf_counter()
        model = self.rounded.take(make_jobs(self.checkpoint, found.specs))
        rounding = time.perf_counter() - start
        measured = evaluate_cache(model, self.tokenizer, found.cache, self.test, self.original, calibration=self.train)
        return {
            "plan": found.name,
            "MB": (found.bits + found.cache_bits) / 8e6,
            "weights MB": found.bits / 8e6,
            "cache bits": measured.cache_bits,
            "predicted KL": found.loss,
            "KL": measured.kl,
            "KL stderr": measured.kl_stderr,
            "top-1": measured.top1,
            "rounding s": round(rounding, 1),
            "measuring s": round(time.perf_counter() - start - rounding, 1),
        }


if __name__ == "__main__":
    typer.run(main)
