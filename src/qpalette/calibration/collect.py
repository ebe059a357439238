"""Runs calibration text through a model and sums x x^T of what each group of linears reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qpalette.calibration.hessians import HessianStore
from qpalette.core.errors import CheckpointError, InputError
from qpalette.core.records import LinearGroup

MEMORY_BUDGET = 2 << 30  # bytes
ACCUMULATOR_BYTES = torch.float64.itemsize

Progress = Callable[[int, int], None]  # (windows done, windows in all), over all passes


def collect_hessians(
    model: Any,
    windows: Sequence[Tensor],
    groups: Iterable[LinearGroup],
    store: HessianStore,
    *,
    memory_budget_bytes: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> None:
    """Write the Hessian of each group that `store` does not have yet.

    `model` is a transformers model in evaluation mode on any device; `windows` are int64 [length] each. The sums are
    kept in float64 on the model's device, `memory_budget_bytes` of them at a time: a large model takes several passes
    over the text, each for a run of consecutive groups, and stops the forward pass after the last of them. A pass ends
    by writing its groups, so that an interrupted collection goes on from there.

    Raises InputError when there are no windows, CheckpointError when the model lacks a linear of a group, HessianError
    when no token reaches a group, its inputs overflow, or the store holds another calibration.
    """
    if not windows:
        raise InputError("there is no text to calibrate on")
    passes = _passes(store.missing(groups), memory_budget_bytes)
    for index, run in enumerate(passes):
        sums = [_Sum(group, _linear(model, group)) for group in run]
        for done, window in enumerate(windows, start=index * len(windows) + 1):
            _read(model, window, sums)
            if progress is not None:
                progress(done, len(passes) * len(windows))
        for item in sums:
            store.save(item.group, item.total, item.seen)


class _Sum:
    """The running sum of x x^T of one group's inputs."""

    def __init__(self, group: LinearGroup, module: nn.Module) -> None:
        self.group, self.module = group, module
        device = next(module.parameters()).device
        self.total = torch.zeros(group.in_features, group.in_features, dtype=torch.float64, device=device)
        self.seen = 0
        self.reached = False  # by the current window

    def add(self, x: Tensor) -> None:
        """x: [..., K]. float32 within a window, where the sum is short; float64 between windows."""
        rows = x.detach().reshape(-1, self.group.in_features).float()
        self.total += rows.T @ rows
        self.seen += len(rows)
        self.reached = True


class _AllReached(Exception):
    """Leaves the forward pass: the layers above are not needed."""


def _read(model: Any, window: Tensor, sums: Sequence[_Sum]) -> None:
    def hook_of(item: _Sum) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            item.add(inputs[0])
            if all(other.reached for other in sums):
                raise _AllReached

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for item in sums:
            item.reached = False
            hooks.callback(item.module.register_forward_pre_hook(hook_of(item)).remove)
        try:
            model(window[None].to(model.device), use_cache=False)
        except _AllReached:
            return


def _linear(model: nn.Module, group: LinearGroup) -> nn.Module:
    name = group.linears[0].name
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"group {group.name}: the model that transformers builds has no module '{name}'; "
            "quantize it without Hessians"
        ) from error


def _passes(groups: Iterable[LinearGroup], budget: int) -> list[list[LinearGroup]]:
    """Runs of consecutive groups whose sums fit the budget; a group that alone is beyond it has a pass for itself."""
    runs: list[list[LinearGroup]] = []
    free = 0
    for group in groups:
        size = ACCUMULATOR_BYTES * group.in_features**2
        if not runs or size > free:
            runs.append([])
            free = budget
        runs[-1].append(group)
        free -= size
    return runs
