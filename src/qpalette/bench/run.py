"""One model after the other, one batch size after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch

from qpalette.bench.breakdown import Share, breakdown
from qpalette.bench.decode import GENERATE, PREFILLS, Speed, measure_speed, release
from qpalette.bench.generate import make_fast, measure_generate
from qpalette.bench.models import Candidate
from qpalette.bench.stages import Stages, silent
from qpalette.runtime import prefill_by

Result = tuple[Speed, list[Share] | None]


def measure(
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    runner: str,
    look: bool = False,
    compile: str = "never",
    prefills: int = PREFILLS,
    too_large: Callable[[str], None] | None = None,
    told: Stages = silent,
) -> Iterator[Result]:
    """The speed of every candidate with each of its caches, at every context and batch size, and with `look` where a
    step goes at the first ones. `compile` is what the runner "generate" is told; `prefills` how many prompts the others
    time.

    A candidate is gone before the next is built, so that its memory is in nobody else's peak. What a device has no
    memory for is told to `too_large`, and left out; None: torch.OutOfMemoryError goes on. `told` is told of each stage.
    """
    for candidate in candidates:
        with prefill_by(candidate.road):
            yield from _measured(candidate, batches, contexts, steps, runner, look, compile, prefills, too_large, told)
        release()


def _measured(
    candidate: Candidate,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    runner: str,
    look: bool,
    compile: str,
    prefills: int,
    too_large: Callable[[str], None] | None,
    told: Stages,
) -> Iterator[Result]:
    with told(f"{candidate.name}: building"):
        model = candidate.build()
    for cache in candidate.caches:
        if runner == GENERATE:
            make_fast(model, compile, cache)
        for context, batch in product(contexts, batches):
            try:
                if runner == GENERATE:
                    result: Result = measure_generate(candidate, model, batch, context, steps, cache=cache), None
                else:
                    about = (candidate, model, batch, context, steps, runner, prefills, cache, told)
                    speed, decoder = measure_speed(*about)
                    first = (context, batch) == (contexts[0], batches[0])
                    result = speed, breakdown(decoder) if look and first else None
                    del decoder
            except torch.OutOfMemoryError:
                if too_large is None:
                    raise
                too_large(f"{candidate.title(cache)}, context {context}, batch {batch}")
            else:
                yield result
            release()
