"""Kernels of steps, compiled by a process of their own: a compiler in this one holds Python while tokens wait. On two
cores it left 1.3 to 2 tokens per second of SmolLM2 until it was done."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

from numba import types

from qpalette.backends.cpu.calls import SIGNATURE, address_of
from qpalette.backends.cpu.decoders import WAYS
from qpalette.backends.cpu.jit import is_missing, name_of
from qpalette.backends.cpu.operands import TYPES
from qpalette.backends.cpu.rows import make_rows
from qpalette.backends.cpu.step import kernels
from qpalette.backends.cpu.step.dense import make_dense
from qpalette.backends.cpu.step.scalars import ELEMENTWISE, compute_kernel

MODULE = "qpalette.backends.cpu.step.ahead"
NICE = 10  # to whoever answers meanwhile


def is_compiled(kernel: Any) -> bool:
    return bool(kernel.overloads)


def compile_kernels(wanted: Iterable[Any]) -> None:
    """Here; from the disk where they are there."""
    for kernel in wanted:
        if kernel is kernels.run:
            kernel.compile(_signature(kernel))
        else:
            address_of(kernel)


def compile_apart(wanted: Iterable[Any]) -> None:
    """Those that are not on the disk, to the disk, in another process. Whatever it does not do is left to
    `compile_kernels`. It ends with this process at the latest: then SystemExit is raised in the thread that waits."""
    names = [name_of(kernel) for kernel in wanted if is_missing(kernel, _signature(kernel))]
    if not names:
        return
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-P", "-m", MODULE, *names]  # -P: a model's directory, for instance, holds no modules
    try:
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError:
        return
    ending = threading.Event()

    def end() -> None:
        ending.set()
        process.terminate()

    atexit.register(end)
    process.wait()
    atexit.unregister(end)
    if ending.is_set():
        raise SystemExit


def every_kernel() -> dict[str, Any]:
    """By name, none compiled yet: all that a program may call."""
    fixed = [kernels.run, kernels.elementwise, kernels.indexed, kernels.reduce, kernels.layer_norm]
    dense = [kernel for type_ in TYPES.values() for kernel in make_dense(type_)]
    scalars = [
        compute_kernel(name, place, bool(integers))
        for name, forms in ELEMENTWISE.items()
        for place, form in enumerate(forms)
        for integers, expression in enumerate((form.floats, form.integers))
        if expression is not None
    ]
    every = [*fixed, *dense, *map(make_rows, WAYS), *(each for each in scalars if each is not None)]
    return {name_of(kernel): kernel for kernel in every}


def _signature(kernel: Any) -> tuple[Any, ...]:
    return (types.int64[:, ::1], types.int64) if kernel is kernels.run else SIGNATURE


def main() -> None:
    if hasattr(os, "nice"):
        os.nice(NICE)
    every = every_kernel()
    compile_kernels(every[name] for name in sys.argv[1:])


if __name__ == "__main__":
    main()
