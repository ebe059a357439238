"""One model after the other, one batch size after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qpalette.bench.breakdown import Share, breakdown
from qpalette.bench.decode import GENERATE, Speed, measure_speed, release
from qpalette.bench.generate import make_fast, measure_generate
from qpalette.bench.models import Candidate


def measure(
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    context: int,
    steps: int,
    runner: str,
    look: bool = False,
    compile: str = "never",
) -> Iterator[tuple[Speed, list[Share] | None]]:
    """The speed of every candidate at every batch size, and with `look` where a step goes at the first one.
    `compile` is what the runner "generate" is told.

    A candidate is gone before the next is built, so that its memory is in nobody else's peak.
    """
    for candidate in candidates:
        if runner == GENERATE:
            yield from _measure_generate(candidate, batches, context, steps, compile)
        else:
            yield from _measure(candidate, batches, context, steps, runner, look)
        release()


def _measure(
    candidate: Candidate, batches: Sequence[int], context: int, steps: int, runner: str, look: bool
) -> Iterator[tuple[Speed, list[Share] | None]]:
    model = candidate.build()
    for batch in batches:
        speed, decoder = measure_speed(candidate, model, batch, context, steps, runner)
        shares = breakdown(decoder) if look and batch == batches[0] else None
        del decoder
        yield speed, shares


def _measure_generate(
    candidate: Candidate, batches: Sequence[int], context: int, steps: int, compile: str
) -> Iterator[tuple[Speed, None]]:
    model = candidate.build()
    make_fast(model, compile, candidate.cache)
    for batch in batches:
        yield measure_generate(candidate, model, batch, context, steps), None
