"""A step on a CPU as a program of compiled calls, in the place of a CUDA graph."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from qpalette.backends.cpu.step import (
    Instruction,
    Program,
    compile_apart,
    compile_kernels,
    instructions_of,
    is_compiled,
    kernels_of,
)
from qpalette.generation.compilation import beside


class ProgramCapture:
    """A `Capture` on a CPU. Kernels that are not compiled yet are compiled beside the generation, or read from the
    disk: nobody waits for them."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._waiting: tuple[Any, list[Instruction]] | None = None  # for kernels: whose work it is, and what it does

    def __call__(self, work: Callable[[], None]) -> Program | None:
        """None until its kernels are ready. Raises UnsupportedError for work that depends on values."""
        if self._error is not None:
            raise self._error
        if self._thread is not None and self._thread.is_alive():
            return None
        instructions = self._instructions(work)
        missing = {kernel for kernel in kernels_of(instructions) if not is_compiled(kernel)}
        if missing:
            self._waiting = weakref.WeakMethod(work), instructions
            self._thread = beside("compile kernels of a step", lambda: self._compile(missing))
            return None
        return Program(instructions)

    def _instructions(self, work: Callable[[], None]) -> list[Instruction]:
        """A record is made once."""
        waiting, self._waiting = self._waiting, None
        return instructions_of(work) if waiting is None or waiting[0]() != work else waiting[1]

    def wait(self) -> None:
        """Until nothing is being compiled."""
        if self._thread is not None:
            self._thread.join()

    def _compile(self, kernels: set[Any]) -> None:
        try:
            compile_apart(kernels)
            compile_kernels(kernels)
        except Exception as error:
            self._error = error
