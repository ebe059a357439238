"""Choosing a backend: found by name, asked in order of priority, every refusal reported."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules

import torch

from qpalette.core.environment import PREFILL
from qpalette.core.errors import UnsupportedError
from qpalette.runtime.contract import Backend, Operation
from qpalette.runtime.prefill import INT8, prefill_road

ENVIRONMENT = "QPALETTE_BACKEND"


_registered: list[Backend] = []


def register(backend: Backend) -> None:
    """Makes a backend from outside the package known, under its name; one of that name before it is replaced."""
    _registered.append(backend)
    backends.cache_clear()
    _select.cache_clear()


@lru_cache(maxsize=1)
def backends() -> dict[str, Backend]:
    """Every folder under `qpalette.backends` and what was registered, by falling priority. One that fails to import is
    an error, not a gap."""
    package = import_module("qpalette.backends")
    found = [import_module(f"{package.__name__}.{module.name}").backend for module in iter_modules(package.__path__)]
    by_name = {backend.name: backend for backend in (*found, *_registered)}
    return dict(sorted(by_name.items(), key=lambda item: -item[1].priority))


def select(operation: Operation, spec: str, device: torch.device, prefer: str | None = None) -> Backend:
    """The best backend for the job; `prefer` or the variable QPALETTE_BACKEND allows that one alone.

    Raises UnsupportedError with the reason of each backend when none fits, and where that one has not the asked road
    for prompts.
    """
    backend = _select(operation, spec, device, prefer or os.environ.get(ENVIRONMENT) or None)
    if operation == "linear" and not backend.in_int8 and prefill_road() == INT8:
        raise UnsupportedError(
            f"backend '{backend.name}' has no int8 for prompts: leave out --prefill ({PREFILL}), or take "
            f"{ENVIRONMENT}=ref, which is slow"
        )
    return backend


@lru_cache(maxsize=1024)
def _select(operation: Operation, spec: str, device: torch.device, wanted: str | None) -> Backend:
    if wanted is not None and wanted not in backends():
        raise UnsupportedError(f"there is no backend '{wanted}': known are {', '.join(backends())}")
    reasons = []
    for name, backend in backends().items():
        if wanted not in (None, name):
            continue
        verdict = backend.supports(operation, spec, device)
        if verdict.ok:
            return backend
        reasons.append(f"{name}: {verdict.reason}")
    raise UnsupportedError(f"no backend can {operation} {spec} on {device}: {'; '.join(reasons)}")
