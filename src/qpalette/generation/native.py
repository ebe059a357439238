"""A step on a CPU as a program of compiled calls, in the place of a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from qpalette.backends.cpu.step import Program, compile_kernels, instructions_of, is_compiled, kernels_of
from qpalette.generation.compilation import beside


class ProgramCapture:
    """A `Capture` on a CPU. Kernels that are not compiled yet are compiled beside the generation, or read from the
    disk: nobody waits for them."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __call__(self, work: Callable[[], None]) -> Program | None:
        """None until its kernels are ready. Raises UnsupportedError for work that depends on values."""
        if self._error is not None:
            raise self._error
        if self._thread is not None and self._thread.is_alive():
            return None
        instructions = instructions_of(work)
        missing = {kernel for kernel in kernels_of(instructions) if not is_compiled(kernel)}
        if missing:
            self._thread = beside("compile kernels of a step", lambda: self._compile(missing))
            return None
        return Program(instructions)

    def wait(self) -> None:
        """Until nothing is being compiled."""
        if self._thread is not None:
            self._thread.join()

    def _compile(self, kernels: set[Any]) -> None:
        try:
            compile_kernels(kernels)
        except Exception as error:
            self._error = error
