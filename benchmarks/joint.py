"""One plan for weights and cache beside the best of separate ones, at equal bytes: predicted and measured KL.

    python benchmarks/joint.py MODEL --text TEST --calibration TRAIN [--device cuda] [--bits 3 --bits 4 --bits 5]
                               [--context 4096 --context 32768] [--windows 4] [--window 2048] [--effort fast]

A budget is `--bits` for every number of the linears and of a cache of `--context` tokens, one sequence; everything
stored of both counts, and what does not depend on the plan (transforms, exact tokens, what is not quantized) is not in
it. Beside the joint plan: weights planned at a cache of one code, keys and values alike, and a cache planned at weights
of one quantizer, each for the code or quantizer whose whole is predicted to lose least. KL from the original with its
own cache is measured on windows of `--window` tokens, every one read from codes; rounding is data-free.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from report import device_name, report

import qpalette
from qpalette.api import measure_sensitivities
from qpalette.core.errors import BudgetError
from qpalette.evaluate import load_model, token_windows
from qpalette.evaluate.cache import WINDOW as MOMENT_WINDOW
from qpalette.evaluate.cache import WINDOWS as MOMENT_WINDOWS
from qpalette.evaluate.cache import evaluate_cache
from qpalette.kvcache import CacheCode, CachePlan
from qpalette.pipeline.planning import BudgetPlan, make_plan
from qpalette.plan import Budget, Plan, Sensitivities, Space, palette_of
from qpalette.storage import Checkpoint, open_checkpoint

AMPLE = 1 << 50  # a memory that everything fits
UNIFORM_STEPS = 4  # of uniform weights, to a bit


@dataclass(frozen=True)
class Found:
    """A plan whose `plan.cache` is there, and what it is predicted to lose and stores."""

    name: str
    plan: Plan
    loss: float
    bits: int  # of the linears
    cache_bits: int


@dataclass(frozen=True)
class Budgeted:
    """The plans of one budget."""

    known: Sensitivities
    checkpoint: Checkpoint
    effort: str
    context: int
    room: int  # bits

    def joint(self) -> Found:
        return self._within(palette_of(self.effort), "joint")

    def at_uniform_cache(self) -> Found:
        cache = self._ample.planner.space.cache
        assert cache is not None
        linears, weights = replace(self.known, streams=()), sum(linear.shape.weights for linear in self.known.linears)

        def plan(code: CacheCode) -> Found:
            taken = sum(cache.bits(stream, code) for stream in cache.streams)
            lost = sum(stream.sensitivity * code.distortion for stream in cache.streams)
            left = Budget(Fraction(max(1, self.room - taken), weights))
            found = make_plan(linears, left, Space(palette_of(self.effort)), self.checkpoint)
            choice, coded = found.planned.choice, CachePlan((code.name,), (code.name,), exact=cache.exact)
            whole = replace(found.plan, cache=coded)
            return Found(f"cache {code.name}", whole, choice.loss + lost, choice.bits, taken)

        return least(plan, cache.palette)

    def at_uniform_weights(self) -> Found:
        steps = [candidate for candidate in palette_of(self.effort) if candidate.rate * UNIFORM_STEPS % 1 == 0]
        return least(lambda candidate: self._within((candidate,), f"weights {candidate.spec}"), steps)

    def _within(self, palette: tuple[Any, ...], name: str) -> Found:
        """Both planned together, of this palette."""
        budget = Budget(memory=self.room // 8 + self._ample.overhead.memory)
        found = make_plan(self.known, budget, Space(palette), self.checkpoint, context=self.context)
        choice = found.planned.choice
        return Found(name, found.plan, choice.loss, choice.bits, choice.cache_bits)

    @cached_property
    def _ample(self) -> BudgetPlan:
        """Without a limit: what the planner counts besides, and its space of caches."""
        space = Space(palette_of(self.effort))
        return make_plan(self.known, Budget(memory=AMPLE), space, self.checkpoint, context=self.context)


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
    file = work / "sensitivities.json"
    if not file.exists():
        measure_sensitivities(
            model, file, calibration, tokens=tokens, window=min(window, tokens), cache=True, device=device
        )
    known, checkpoint = Sensitivities.read(file), open_checkpoint(model)
    known = known.of_listed
    trial = Trial(model, device, work, *prepared(model, text, calibration, device, window, windows))
    facts = {"model": Path(model).name, "windows": windows, "window": window, "effort": effort, "tokens": tokens}
    facts["commit"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    rows: list[dict[str, Any]] = []
    for budget in bits or [3.0, 4.0, 5.0]:
        for tokens_held in context or [4096, 32_768]:
            for found in plans_of(known, checkpoint, effort, tokens_held, budget):
                rows.append({"context": tokens_held, "budget": budget, **trial.run(found)})
                report(name, device_name(device), rows, **facts)


def plans_of(known: Sensitivities, checkpoint: Checkpoint, effort: str, context: int, bits: float) -> Iterator[Found]:
    numbers = sum(linear.shape.weights for linear in known.linears)
    numbers += context * sum(stream.numbers for stream in known.streams)
    budgeted = Budgeted(known, checkpoint, effort, context, math.floor(bits * numbers))
    yield budgeted.joint()
    yield budgeted.at_uniform_cache()
    yield budgeted.at_uniform_weights()


def prepared(model: str, text: Path, calibration: Path, device: str, window: int, windows: int) -> tuple[Any, ...]:
    """The original, its tokenizer, windows of the test and of the calibration."""
    original, tokenizer = load_model(model, device)
    train = token_windows(calibration, tokenizer, min(MOMENT_WINDOW, window), MOMENT_WINDOWS)
    return original, tokenizer, token_windows(text, tokenizer, window, windows), train


@dataclass(frozen=True)
class Trial:
    model: str
    device: str
    work: Path
    original: Any
    tokenizer: Any
    test: list[Any]
    train: list[Any]

    def run(self, found: Found) -> dict[str, Any]:
        """Quantizes by the plan, unless an earlier one was the same for the weights, and measures."""
        out = self.work / found.plan.digest[:16]
        if not out.exists():
            qpalette.quantize(self.model, out, plan=found.plan, device=self.device)
        assert found.plan.cache is not None
        cache = self.work / "cache.json"
        cache.write_text(found.plan.cache.to_json())
        packed, _ = load_model(out, self.device)
        measured = evaluate_cache(packed, self.tokenizer, str(cache), self.test, self.original, calibration=self.train)
        return {
            "plan": found.name,
            "MB": (found.bits + found.cache_bits) / 8e6,
            "weights MB": found.bits / 8e6,
            "cache bits": measured.cache_bits,
            "predicted KL": found.loss,
            "KL": measured.kl,
            "KL stderr": measured.kl_stderr,
            "top-1": measured.top1,
        }


if __name__ == "__main__":
    typer.run(main)
