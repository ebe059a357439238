"""Adam on KL(original || quantized), with a look at held-out windows from time to time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qpalette.runtime import keeping
from qpalette.tuning.options import Tuning, Watcher
from qpalette.tuning.reference import Reference, divergence
from qpalette.tuning.state import State
from qpalette.tuning.vectors import TunedVectors

FILLS: Any = torch.utils.deterministic  # its attribute is made as it is imported
SEEDS = 1_000_003  # between those of two runs: more than a run has epochs
FLOAT32 = torch.float32.itemsize
KEPT_SHARE = 0.25
LOGITS_SHARE = 1 / 40  # of a GPU's memory, for logits of windows read in one pass; all else takes some four times that
BACKWARD = 2  # passes that a backward pass takes; one more where activations are computed again


class Descent:
    """Tunes `vectors` of `model`. The last `tuning.held_out` of `windows` are held out.

    The state lies in `file`, after every `tuning.save_every` steps and after each look. Each run with the same
    `identity` does the same arithmetic in the same order, however often it was stopped.
    """

    def __init__(
        self,
        model: Any,
        vectors: TunedVectors,
        windows: Sequence[Tensor],
        reference: Reference,
        tuning: Tuning,
        file: Path,
        identity: str,
        watcher: Watcher,
    ) -> None:
        self.model, self.vectors, self.windows, self.reference = model, vectors, windows, reference
        self.tuning, self.file, self.identity, self.watcher = tuning, file, identity, watcher
        self.training = len(windows) - tuning.held_out
        self._logits_bytes = FLOAT32 * len(windows[0]) * model.config.get_text_config().vocab_size
        device = vectors.factors.device
        self.state = State.load(file, identity, device) or State.start(len(vectors), device)

    def run(self) -> State:
        """Steps until the last one, or until held-out KL has not fallen for `tuning.patience` looks."""
        state, tuning = self.state, self.tuning
        vectors, optimizer = self.vectors, self._optimizer()
        vectors.apply()
        for step, kl in state.looks:
            self.watcher.held_out(step, kl)
        with codes_kept(self.model.device):
            if not state.looks:
                self._look()
            while state.step < tuning.steps and state.looks_since_best < tuning.patience:
                self._step(optimizer)
                if state.step % tuning.every == 0 or state.step == tuning.steps:
                    self._look()
                elif state.step % tuning.save_every == 0:
                    self._save()
        return state

    def _optimizer(self) -> torch.optim.Adam:
        factors, state = self.vectors.factors, self.state
        factors.data.copy_(state.factors)
        optimizer = torch.optim.Adam([factors], lr=self.tuning.learning_rate)
        moments = {"step": torch.tensor(float(state.step)), "exp_avg": state.mean, "exp_avg_sq": state.square}
        optimizer.state[factors] = moments
        return optimizer

    def _step(self, optimizer: torch.optim.Adam) -> None:
        tuning, state = self.tuning, self.state
        uses = range(state.step * tuning.batch, (state.step + 1) * tuning.batch)
        for indices in self._passes([self._window_at(use) for use in uses]):
            self._add_gradient(indices)
        self.vectors.take_gradient()
        for group in optimizer.param_groups:
            group["lr"] = tuning.rate_at(state.step)
        optimizer.step()
        self.vectors.apply()
        state.step += 1
        self._tell()

    def _add_gradient(self, indices: Sequence[int]) -> None:
        """Of the mean over a step's predictions of KL(original || quantized)."""
        with deterministic(self.model.device), recomputing(self.model, self.tuning.recompute):
            logits = self._logits(indices)
            gradient = torch.zeros_like(logits)  # the last token predicts nothing that is known
            for row, index in enumerate(indices):
                divergence(logits[row, :-1], self.reference.logits(index), gradient[row, :-1])
            logits.backward(gradient.div_((logits.shape[1] - 1) * self.tuning.batch))

    def _logits(self, indices: Sequence[int]) -> Tensor:
        """[windows, tokens, vocabulary]."""
        windows = torch.stack([self.windows[index] for index in indices])
        return self.model(windows.to(self.model.device), use_cache=False).logits

    def _passes(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """As many windows at a time as are read side by side."""
        width = side_by_side(self.model.device, self._logits_bytes)
        return [indices[start : start + width] for start in range(0, len(indices), width)]

    def _look(self) -> None:
        """KL on the held-out windows, with the values as they would be stored."""
        state, total, count = self.state, 0.0, 0
        with self.vectors.as_stored(), torch.no_grad():
            for indices in self._passes(range(self.training, len(self.windows))):
                with deterministic(self.model.device):
                    logits = self._logits(indices)
                for row, index in enumerate(indices):
                    total += float(divergence(logits[row, :-1], self.reference.logits(index)))
                    count += logits.shape[1] - 1
        state.looks.append((state.step, total / count))
        if state.looks_since_best == 0:
            state.best = self.vectors.factors.detach().clone()
        self._save()
        self.watcher.held_out(*state.looks[-1])
        self._tell()

    def _save(self) -> None:
        self.state.factors = self.vectors.factors.detach()
        self.state.save(self.file, self.identity)

    def _window_at(self, use: int) -> int:
        """The window of the `use`-th gradient: all of them in a new order, again and again."""
        epoch, place = divmod(use, self.training)
        random = torch.Generator().manual_seed(self.tuning.seed * SEEDS + epoch)
        return int(torch.randperm(self.training, generator=random)[place])

    def _tell(self) -> None:
        step, look = passes(self.tuning, len(self.windows))
        looks = 1 + -(-self.tuning.steps // self.tuning.every)
        done = self.state.step * step + len(self.state.looks) * look
        self.watcher.progress("tuning", done, self.tuning.steps * step + looks * look)


def passes(tuning: Tuning, windows: int) -> tuple[int, int]:
    """Forward passes over a window, or what takes as long, of a step and of a look. The original's are not counted: a
    window takes one."""
    return tuning.batch * (1 + BACKWARD + tuning.recompute), tuning.held_out


def side_by_side(device: torch.device, logits_bytes: int) -> int:
    """How many windows one pass reads, where the logits of one take so much. Starting the kernels takes the host longer
    than a GPU takes for a window of a small model; a processor gains nothing."""
    if device.type != "cuda":
        return 1
    return max(1, int(LOGITS_SHARE * torch.cuda.mem_get_info(device)[1] / logits_bytes))


def codes_kept(device: torch.device) -> AbstractContextManager[None]:
    """Inside, a GPU decodes codes for the backward pass once, as far as KEPT_SHARE of its free memory has room."""
    room = room_for_codes(device)
    return keeping(room) if room else nullcontext()


def room_for_codes(device: torch.device, taken: int = 0) -> int:
    """Bytes that decoded codes may take, once `taken` more are than now; 0 where they are decoded at each use."""
    if device.type != "cuda":
        return 0
    return int(KEPT_SHARE * max(0, torch.cuda.mem_get_info(device)[0] - taken))


@contextmanager
def recomputing(model: Any, wanted: bool) -> Iterator[None]:
    """Inside, layers of transformers keep their inputs alone for the backward pass.

    Its own switch for that is read in training mode only, in which some layers drop values at random.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is there again


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside, sums on a GPU have an order: attention's backward pass and the experts' sum have none otherwise."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), FILLS.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    FILLS.fill_uninitialized_memory = False  # torch would write all new memory once more, to show what reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        FILLS.fill_uninitialized_memory = before[1]
