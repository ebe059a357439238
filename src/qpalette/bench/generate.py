"""What `qpalette generate`, `chat` and `serve` run, from the prompt to the last token, as a user meets it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from qpalette.bench.decode import GENERATE, Speed, check_positions, release, weight_bytes
from qpalette.bench.stand_ins import stand_ins
from qpalette.core.errors import InputError
from qpalette.generation import CacheMaker, CodedTokenCache, Generate, fast
from qpalette.kvcache import CachePlan

TENTH = 10  # tokens that a speed leaves out: the first are slow, and their number should not tell
REQUESTS = 3  # after the model is warm; the median counts


def check_steps(steps: int) -> None:
    """Raises InputError where a request has no tokens left to time."""
    if steps <= TENTH:
        raise InputError(f"runner '{GENERATE}' times what follows token {TENTH}: take --steps {TENTH + 1} or more")


def make_fast(model: Any, compile: str, cache: CachePlan | None = None) -> None:
    """As the commands do, and without a token that ends an answer."""
    maker: CacheMaker | None = None
    if cache is not None:
        transforms = stand_ins(model, cache)
        maker = lambda config, length: CodedTokenCache(config, length, cache, transforms)  # noqa: E731
    fast(model, compile, maker)
    model.generation_config.eos_token_id = None


def measure_generate(
    candidate: Any,
    model: Any,
    batch: int,
    context: int,
    steps: int,
    requests: int = REQUESTS,
    clock: Callable[[], float] = time.perf_counter,
    cache: CachePlan | None = None,
) -> Speed:
    """Of requests for `steps` new tokens after random prompts of `context` tokens, by the times at which a streamer
    gets them on the host: medians of `requests`, after a first one. `model` is one of `make_fast` with this `cache`.
    Seconds are of `clock`: time.thread_time counts the processor's in this thread. Raises InputError as `check_steps`,
    and for more tokens than the model's context has.
    """
    check_steps(steps)
    check_positions(model, context + steps)
    cuda = model.device.type == "cuda"
    release()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    first = _token_times(model, batch, context, steps)
    warm = _warm_up(model, batch, context)
    later = [_token_times(model, batch, context, steps, clock) for _ in range(requests)]
    return Speed(
        model=candidate.title(cache),
        random_weights=candidate.random_weights,
        bits_per_weight=candidate.bits_per_weight,
        cache=None if cache is None else str(cache),
        prefill=candidate.road,
        runner=GENERATE,
        batch=batch,
        context=context,
        decode_seconds=statistics.median(map(_step_seconds, later)),
        prefill_seconds=statistics.median(times[0] for times in later),
        weight_bytes=weight_bytes(model),
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        first_token_seconds=first[0],
        first_tokens_per_second=batch / _step_seconds(first),
        warm_seconds=None if warm is None else warm - start,
    )


def _warm_up(model: Any, batch: int, context: int) -> float | None:
    """A compiled step, if there is one to come, is ready and taken up; the time.perf_counter() of the last capture."""
    if not isinstance(model.generate, Generate):
        return None
    model.generate.wait()
    _token_times(model, batch, context, TENTH)
    return model.generate.warm_since


def _token_times(
    model: Any, batch: int, context: int, steps: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds from the call of generate to each new token."""
    vocabulary = model.config.get_text_config().vocab_size
    prompts = torch.randint(vocabulary, (batch, context), device=model.device)
    times = _Times(clock)
    start = clock()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        streamer=times,
    )
    return [moment - start for moment in times.moments[1:]]  # the first is the prompt's


def _step_seconds(times: list[float]) -> float:
    return (times[-1] - times[TENTH - 1]) / (len(times) - TENTH)


class _Times(BaseStreamer):
    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(self.clock())

    def end(self) -> None:
        """The last token has come."""
