"""The timing harness: one function for every model, so that a ratio compares the weights and nothing else."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from qpalette.backends.cuda.graphs import CAPTURE_WARMUP, capture_graph
from qpalette.bench.stages import Stages, silent
from qpalette.bench.stand_ins import stand_ins
from qpalette.core.errors import InputError, UnsupportedError
from qpalette.generation import compile_options, most_likely
from qpalette.kvcache import CachePlan
from qpalette.kvcache.vectors import SCALE_ONE
from qpalette.nn.coded_cache import CodedCache, CodedLayer

STEP_RUNNERS = ("eager", "graph", "compile", "compile-graph")
GENERATE = "generate"  # not a step alone, but what the commands run: `bench/generate.py`
RUNNERS = (*STEP_RUNNERS, GENERATE)
PREFILLS = 3  # prompts that are timed, after a first one; the median counts
WARMUP = 6  # steps: compilation, the allocator's first requests, three replays that CUDA graph trees record on
PROFILED = 8  # steps for a look at where the time goes: enough to see the spread, few enough for a profiler's buffers
ALIGNMENT = 64  # of the cache's length: masked attention kernels copy a mask whose rows are not aligned


@dataclass(frozen=True)
class Speed:
    """Of one model at one batch size. Times are medians."""

    model: str
    random_weights: bool
    bits_per_weight: float | None
    runner: str
    batch: int
    context: int  # tokens in the cache before the first step
    decode_seconds: float  # one step, one token for every sequence of the batch
    prefill_seconds: float | None  # all `context` tokens of every sequence, until the first new token is on the host;
    # None: there was no prompt, and the cache was filled with random numbers
    weight_bytes: int
    peak_bytes: int | None  # on a CUDA device, weights and cache included; None elsewhere
    # Of the runner "generate" alone: its first request, in seconds, and in tokens/s from the tenth token on; seconds
    # until the last capture, where steps are captured. The other figures are of requests after that.
    first_token_seconds: float | None = None
    first_tokens_per_second: float | None = None
    warm_seconds: float | None = None
    cache: str | None = None  # of codes; None: keys and values as they are
    prefill: str | None = None  # the road of prompts that was asked for

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.decode_seconds

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return None if self.prefill_seconds is None else self.batch * self.context / self.prefill_seconds


class Decoder:
    """Greedy decoding over a static cache that is filled to `context` tokens; every `step` adds one token.

    The runner says how a step runs: "eager"; "graph", one captured CUDA graph of the eager step; "compile", as
    transformers' generate does it: torch.compile(mode="reduce-overhead", fullgraph=True); "compile-graph", the step
    compiled with the choice of the token, without CUDA graphs, and captured into one here.

    Raises InputError when the cache is longer than the model's context, and UnsupportedError for a graph without CUDA.
    """

    def __init__(
        self, model: Any, batch: int, context: int, steps: int, runner: str = "eager", cache: CachePlan | None = None
    ) -> None:
        from transformers import StaticCache

        self.model, self.batch, self.context, self.runner = model, batch, context, runner
        self.device = model.device
        self.left = steps + WARMUP + (CAPTURE_WARMUP + 1 if "graph" in runner else 0)
        positions = context + self.left + 1
        _check(model, positions, runner)
        length = -(-positions // ALIGNMENT) * ALIGNMENT
        self.cache: Any = StaticCache(model.config, length)
        if cache is not None:
            self.cache = CodedCache(model.config, cache, length, stand_ins(model, cache))
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.next_token = _compiled(model, runner)
        self.graph: Any = None

    @torch.no_grad()
    def prefill(self) -> float:
        """Seconds until the first token is known on the host, after random prompts of `context` tokens."""
        vocabulary = self.model.config.get_text_config().vocab_size
        prompts = torch.randint(vocabulary, (self.batch, self.context), device=self.device)
        self.cache.reset()
        self._wait()
        start = time.perf_counter()
        logits = self.model(input_ids=prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.token.tolist()
        return time.perf_counter() - start

    @torch.no_grad()
    def fill(self) -> None:
        """The cache as after `context` tokens, of random numbers: what a step takes does not depend on them, and a long
        prompt takes minutes."""
        self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)  # takes memory
        for layer in self.cache.layers:
            _fill(layer, self.context)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile, capture, and run until nothing is done for the first time."""
        if "graph" in self.runner:
            self._capture()
        for _ in range(WARMUP):
            self.step()
        self._wait()

    @torch.no_grad()
    def step(self) -> None:
        """One token more for every sequence. Does not wait for the device."""
        if self.left == 0:
            raise InputError(f"the cache is full after {self.context} tokens and all steps: make it longer")
        self.left -= 1
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def time_steps(self, steps: int) -> float:
        """Median seconds of a step, each timed by events on the device, or by the clock on a CPU."""
        if self.device.type != "cuda":
            return statistics.median(_clock(self.step) for _ in range(steps))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.step()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(one.elapsed_time(next_) for one, next_ in pairwise(marks)) / 1e3

    def _step(self) -> None:
        if self.runner == "compile":
            torch.compiler.cudagraph_mark_step_begin()
        self.token.copy_(self.next_token(self.token, self.cache))

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARMUP):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = capture_graph(self._step)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_speed(
    candidate: Any,
    model: Any,
    batch: int,
    context: int,
    steps: int,
    runner: str,
    prefills: int = PREFILLS,
    cache: CachePlan | None = None,
    told: Stages = silent,
) -> tuple[Speed, Decoder]:
    """Prefill, if it is to be timed at all, and decode at one batch size over a cache of codes, or of what they stand
    for; the decoder comes back for a look at where the time goes."""
    cuda = model.device.type == "cuda"
    release()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    decoder, prefill = Decoder(model, batch, context, steps + PROFILED, runner, cache), None
    which = f"{candidate.title(cache)}, context {context}, batch {batch}"
    if prefills:
        with told(f"{which}: reading a first prompt"):
            decoder.prefill()  # compiles kernels, and allocates
        prefill = statistics.median(decoder.prefill() for _ in range(prefills))
    else:
        with told(f"{which}: filling the cache"):
            decoder.fill()
    with told(f"{which}: first steps, runner {runner}"):
        decoder.warm_up()
    decode = decoder.time_steps(steps)
    speed = Speed(
        model=candidate.title(cache),
        random_weights=candidate.random_weights,
        bits_per_weight=candidate.bits_per_weight,
        cache=None if cache is None else str(cache),
        prefill=candidate.road,
        runner=runner,
        batch=batch,
        context=context,
        decode_seconds=decode,
        prefill_seconds=prefill,
        weight_bytes=weight_bytes(model),
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
    )
    return speed, decoder


def _fill(layer: Any, tokens: int) -> None:
    """A layer of a cache that has its memory."""
    if isinstance(layer, CodedLayer):
        for stream in layer.streams:
            stream.codes.random_()
            stream.scales.fill_(SCALE_ONE)
            stream.sinks.normal_()
        layer.set_length(tokens)
        return
    layer.keys.normal_()
    layer.values.normal_()
    layer.cumulative_length.fill_(tokens)
    if layer.is_sliding:
        layer.cumulative_length_int = tokens


def release() -> None:
    """Gives back what nothing refers to any more: the memory of compiled and captured graphs, too."""
    torch._dynamo.reset()  # another model's graphs would also count towards the limit of recompilations
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weight_bytes(model: Any) -> int:
    """Parameters and buffers, tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def default_runner(device: torch.device) -> str:
    """As transformers' generate would run a static cache there."""
    return "compile" if device.type == "cuda" else "eager"


def greedy(forward: Callable[..., Any], token: torch.Tensor, cache: Any) -> torch.Tensor:
    """The most likely next token after `token`, both [batch, 1]."""
    logits: torch.Tensor = forward(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
    return most_likely(logits)


def _compiled(model: Any, runner: str) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    match runner:
        case "compile":
            return partial(greedy, torch.compile(model.__call__, mode="reduce-overhead", fullgraph=True, dynamic=False))
        case "compile-graph":
            return torch.compile(partial(greedy, model), fullgraph=True, dynamic=False, options=compile_options())
    return partial(greedy, model)


def _check(model: Any, positions: int, runner: str) -> None:
    if runner not in STEP_RUNNERS:
        raise InputError(f"'{runner}' is not a runner: choose {', '.join(RUNNERS)}")
    if "graph" in runner and model.device.type != "cuda":
        raise UnsupportedError(
            f"runner '{runner}' captures a CUDA graph, which needs a CUDA device: use eager or compile"
        )
    check_positions(model, positions)


def check_positions(model: Any, positions: int) -> None:
    """Raises InputError when the model's context is shorter."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and positions > longest:
        raise InputError(
            f"context and steps need {positions} positions, but the model has {longest}: make them smaller"
        )


def _clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
