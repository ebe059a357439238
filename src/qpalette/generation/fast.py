"""`model.generate` of transformers, with another decoding loop where that one can serve."""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from qpalette.backends.cuda.graphs import Capture, capture_graph
from qpalette.core.errors import UnsupportedError
from qpalette.generation.cache import CacheMaker
from qpalette.generation.compilation import Compiler, check_mode
from qpalette.generation.loop import Loop
from qpalette.generation.native import ProgramCapture
from qpalette.generation.request import NotOurs, NotRead, Request, request_of
from qpalette.generation.worker import Worker, decoding_on
from qpalette.integrations import attention as _grouped  # noqa: F401 - makes "grouped" known to transformers
from qpalette.nn.token_cache import ATTENTION, TokenCache, can_serve, writes_keys_out

DEFAULT_LENGTH = 20  # tokens that transformers generates to where nothing is said


def fast(model: Any, compile: str = "never", cache: CacheMaker | None = None, slots: int = 1) -> Any:
    """`model`, a transformers causal language model, whose `generate` decodes with captured steps from now on.

    The call and its results stay: transformers prepares the request, and what this loop does not do (beams, a cache
    that is given, scores that are asked for, ...) runs as before. compile: "never"; "background", beside the
    generation, which takes the compiled step up when it is ready; "now", before the first token. On a CPU a step is
    captured as a program of compiled kernels, whatever `compile` says. On another device, and spread over several,
    the model stays as it is, unless it is given a `cache`: every request is served with that, without captures.
    slots: requests that threads ask for at once are answered in one batch of up to so many (`batch.py`); with 1, and
    over a `cache`, one after another.

    Raises InputError for another `compile`; UnsupportedError for a `cache` where the loop cannot serve the model.
    """
    check_mode(compile)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1 or not can_serve(model):
        if cache is not None:
            raise UnsupportedError(f"no cache of codes for {type(model).__name__} on {len(devices)} device(s) here")
        return model
    kind = next(iter(devices)).type
    if kind == "cpu":
        if cache is None:
            _share_keys(model)
        attach(model, "never", ProgramCapture(), cache, slots)
        return model
    if kind != "cuda":
        if cache is not None:
            attach(model, "never", None, cache, slots)
        return model
    _share_keys(model)
    attach(model, compile, partial(capture_graph, pool=torch.cuda.MemPool()), cache, slots)
    return model


def _share_keys(model: Any) -> None:
    """Between the queries of a group: sdpa of some transformers writes them out for each. With 5.17 that was 73 of the
    79 ms of a token of SmolLM2 on two cores of a Xeon (benchmarks/results/cpu_batch_xeon_sdpa.json)."""
    if writes_keys_out(model.config.get_text_config()):
        model.set_attn_implementation("grouped")


def attach(
    model: Any, compile: str, capture: Capture | None, cache: CacheMaker | None = None, slots: int = 1
) -> Generate:
    """Put the loop behind `model.generate`, on any device; `capture` None runs every step eagerly, `cache` None over
    keys and values as they are."""
    model.generate = Generate(model, compile, capture, cache, slots)
    return model.generate


class Generate:
    """Stands for `model.generate`. A model has one loop: threads wait for one another, or share it by its worker."""

    def __init__(
        self, model: Any, compile: str, capture: Capture | None, cache: CacheMaker | None = None, slots: int = 1
    ) -> None:
        self.model, self.compile, self.capture, self.cache = model, compile, capture, cache
        self.slots = slots if cache is None else 1  # how many callers are answered together
        self.context = contextvars.copy_context()
        self.plain = type(model).generate.__get__(model)  # transformers' own
        self.lock, self.running = threading.RLock(), False
        self.worker = Worker(self.slots) if self.slots > 1 else None
        self.loop: Loop | None = None  # made for what the stamp says of the model
        self.stamp: Hashable = None
        self.unread: Hashable = None  # the stamp of a model whose class cannot do with our caches
        functools.update_wrapper(self, self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.GenerationMixin.generate`, whose arguments and results these are."""
        answer = self._answer_here if self.worker is None or self.worker.is_current else self._answer_among_others
        try:
            given = self._arguments(args, kwargs)
            return answer(given.pop("streamer", None), given)
        except NotOurs as error:
            reason = error
        plain = self.plain if self.cache is None else self._plain_with_cache
        if self.worker is None or self.worker.is_current:
            result = plain(*args, **kwargs)
        else:
            result = self.worker.alone(lambda has_left: plain(**self._until(has_left, args, kwargs)))
        if isinstance(reason, NotRead):  # though there is nothing wrong with the request
            self.unread = self.stamp
        return result

    def _answer_here(self, streamer: Any, given: dict[str, Any]) -> Any:
        with self.lock:
            loop = self._current_loop()
            self.running = True
            try:
                return self.plain(**given, custom_generate=partial(_decode, loop.run, streamer))
            finally:
                self.running = False

    def _answer_among_others(self, streamer: Any, given: dict[str, Any]) -> Any:
        """Transformers prepares the request in the thread that asks."""
        assert self.worker is not None
        with self.lock:
            loop = self._current_loop()
        return self.plain(**given, custom_generate=partial(_decode, partial(self.worker.answer, loop), streamer))

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        return Generate(copy.deepcopy(self.model, memo), self.compile, self.capture, self.cache, self.slots)

    @property
    def warm_since(self) -> float | None:
        """time.perf_counter() of the latest capture; None before the first."""
        return None if self.loop is None else self.loop.warm_since

    def wait(self) -> None:
        """Until nothing is being compiled; the next request takes it up."""
        if isinstance(self.capture, ProgramCapture):
            self.capture.wait()
        if self.loop is not None:
            self.loop.compiler.wait()

    def _arguments(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """By name. Raises NotOurs for what transformers does not hand on to a decoding loop."""
        bound = inspect.signature(self.plain).bind(*args, **kwargs).arguments
        given = bound | bound.pop("kwargs", {})
        tokenizer = given.pop("tokenizer", None)
        elsewhere = ("custom_generate", "assistant_model", "assistant_tokenizer", "synced_gpus", "past_key_values")
        if any(given.get(name) is not None for name in elsewhere):
            raise NotOurs
        return self._with_stop_strings(given, tokenizer)

    def _until(self, has_left: Callable[[], bool], args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by name, for an answer that ends once `has_left`."""
        bound = inspect.signature(self.plain).bind(*args, **kwargs).arguments
        given = bound | bound.pop("kwargs", {})
        criteria = StoppingCriteriaList(given.get("stopping_criteria") or [])
        criteria.append(_Left(has_left))
        return given | {"stopping_criteria": criteria}

    def _plain_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own loop, over a cache of ours that has room for the request."""
        assert self.cache is not None
        bound = inspect.signature(self.plain).bind(*args, **kwargs).arguments
        given = bound | bound.pop("kwargs", {})
        ids = given.get("input_ids", given.get("inputs"))
        if ids is None or given.get("past_key_values") is not None or given.get("use_cache") is False:
            return self.plain(*args, **kwargs)
        config = given.get("generation_config") or self.model.generation_config
        new = given.get("max_new_tokens") or config.max_new_tokens
        limit = ids.shape[1] + new if new else given.get("max_length") or config.max_length or DEFAULT_LENGTH
        cache = self.cache(self.model.config, limit)
        cache.begin(given.get("attention_mask"))
        return self.plain(**(given | {"past_key_values": cache}))

    def _with_stop_strings(self, given: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Transformers keeps the tokenizer from a loop that is not its own: the criterion is made here."""
        config = given.get("generation_config")
        strings: Any = given.pop("stop_strings", None) or getattr(config, "stop_strings", None)
        default = self.model.generation_config.stop_strings
        if strings is None and default is None:
            return given
        if default is not None or tokenizer is None:  # the default would come back; without a tokenizer it is an error
            raise NotOurs
        if config is not None:
            given["generation_config"] = config = copy.deepcopy(config)
            config.stop_strings = None
        criteria = StoppingCriteriaList(given.get("stopping_criteria") or [])
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
        return given | {"stopping_criteria": criteria}

    def _current_loop(self) -> Loop:
        """Raises NotOurs for a model in a state that a captured step would not know of, or within its own request."""
        model = self.model
        inside = self.running or (self.worker is not None and self.worker.is_current)
        if inside or model.training or getattr(model, "peft_config", None):
            raise NotOurs
        if model.config.get_text_config()._attn_implementation not in ATTENTION:
            raise NotOurs
        if (stamp := _stamp(model)) == self.unread:
            raise NotOurs
        if stamp != self.stamp or self.loop is None:
            if not can_serve(model):
                raise NotOurs
            self.stamp = stamp
            self.loop = Loop(model, Compiler(model, self.compile, self.context), self.capture, self.cache or TokenCache)
        return self.loop


class _Left(StoppingCriteria):
    """Breaks off what nobody waits for, between two tokens of transformers' own loop."""

    def __init__(self, has_left: Callable[[], bool]) -> None:
        self.has_left = has_left

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        if self.has_left():
            raise InterruptedError
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _decode(
    run: Callable[[Request], torch.Tensor],
    streamer: Any,
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **inputs: Any,
) -> torch.Tensor:
    """What transformers calls for its decoding loop; the streamer it does not hand on."""
    device = model.device
    with decoding_on(device):
        prepared = (input_ids, logits_processor, stopping_criteria, generation_config)
        request = request_of(*prepared, streamer, device, inputs)
        return run(request).to(input_ids.device, copy=True)


def _stamp(model: Any) -> Hashable:
    """Changes with what a captured step holds on to: modules, and where their tensors are."""
    attention, held = model.config.get_text_config()._attn_implementation, []
    modules = [model]
    while modules:  # torch's own walk, which makes names of them, takes 3 ms for 32 layers
        module = modules.pop()
        tensors = (*module._parameters.values(), *module._buffers.values())
        held.append((id(module), *(tensor.data_ptr() for tensor in tensors if tensor is not None)))
        modules += [child for child in module._modules.values() if child is not None]
    return attention, tuple(held)
