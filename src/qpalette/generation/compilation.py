"""Steps compiled beside the generation, never in its way."""

from __future__ import annotations

import atexit
import contextvars
import ctypes
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from qpalette.core.errors import InputError
from qpalette.core.text import first_line
from qpalette.generation.step import Inputs, Reduced, Step, compile_options, reduced

MODES = ("never", "background", "now")
SWITCH_SECONDS = 1e-4  # how long a compiling thread may hold Python while tokens wait; the default is 50 times as much
LEAVE_SECONDS = 10  # for a thread to leave what it compiles, when the process ends
SPARE = 1 << 30  # bytes of a device that are left alone: workspaces, the prompt of the next request

logger = logging.getLogger(__name__)
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def check_mode(mode: str) -> None:
    """Raises InputError for what is none of MODES."""
    if mode not in MODES:
        raise InputError(f"'{mode}' is no way to compile: choose {', '.join(MODES)}")


def compiled(function: Callable[..., torch.Tensor]) -> Reduced:
    """Compiled at the first call; lengths and batch sizes stay symbols, so that few calls compile it again."""
    return torch.compile(function, fullgraph=True, dynamic=True, options=compile_options())


def beside(name: str, work: Callable[[], None]) -> threading.Thread:
    """A thread that does `work`, and leaves it where the process ends."""

    def until_the_end() -> None:
        with suppress(SystemExit), _short_turns():  # `_stop`
            work()

    thread = threading.Thread(target=until_the_end, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


class Compiler:
    """Compiles steps of one model, one at a time, on a cache of their own; a failure is told once, and ends it.

    `context` is that of whoever loaded the model: what torch.compile is set to is known there alone.
    """

    def __init__(self, model: Any, mode: str, context: contextvars.Context) -> None:
        self.model, self.mode, self.context = model, mode, context
        self.thread: threading.Thread | None = None
        self.failed = False
        self.functions: dict[Any, Reduced] = {}  # by what the choice is

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wants(self, step: Step) -> bool:
        return self.mode != "never" and not (self.failed or step.is_compiled or step.compiled is not None)

    def start(self, step: Step) -> None:
        """Compile in a thread, unless one is at work already."""
        if not self.busy:
            self.thread = beside("compile a step of generation", partial(self.work, step))

    def work(self, step: Step) -> None:
        """Compile here. The step takes the function up at its next token."""
        try:
            with _short_turns(), torch.no_grad():
                step.compiled = self.context.copy().run(self._compile, step)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Told once; steps stay as they are."""
        if not self.failed:
            reason = first_line(error)
            logger.warning("a step cannot be compiled and runs without (%s: %s)", type(error).__name__, reason)
        self.failed = True

    def wait(self) -> None:
        """Until nothing is being compiled."""
        if self.thread is not None:
            self.thread.join()

    def _compile(self, step: Step) -> Reduced:
        key = step.choice.key
        function = self.functions.setdefault(key, compiled(partial(reduced, self.model, step.choice)))
        scratch = _like(step.inputs)
        with _own_stream(step.inputs.token.device):
            for _ in range(2):  # a second run compiles what the first one's guards did not foresee
                function(scratch)
        return function


def _like(inputs: Inputs) -> Inputs:
    """The same shapes in memory of its own. Raises MemoryError where there is none."""
    device, needed = inputs.token.device, inputs.cache.bytes + SPARE
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needed:
        raise MemoryError(f"{device} has no {needed >> 20} MiB free for it")
    cache = inputs.cache.empty_like()
    offset = None if inputs.offset is None else torch.zeros_like(inputs.offset)
    mask = None if inputs.mask is None else torch.ones_like(inputs.mask)
    return Inputs(torch.zeros_like(inputs.token), cache, offset, mask)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """What runs here does not wait for the generation, nor the generation for it."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


@contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@atexit.register
def _stop() -> None:
    """A thread that compiles while the interpreter is taken down would end the process by a signal."""
    for thread in [thread for thread in _threads if thread.is_alive()]:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        thread.join(LEAVE_SECONDS)
