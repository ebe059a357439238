"""What the original predicts on the windows: computed when it is asked for, or from its last hidden states on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qpalette.core.errors import InputError
from qpalette.storage import StreamingSafetensorsWriter, TensorInfo
from qpalette.tuning.options import Watcher

STATES = "states"
CHUNK = 256  # positions whose log-probabilities are held in float32 at a time: 250 MB at a vocabulary of 256k


class Reference(Protocol):
    def logits(self, index: int) -> Tensor:
        """Of the `index`-th window, [length - 1, vocabulary]: the prediction of each token but the first."""
        ...


class InMemory:
    """The original beside the quantized model."""

    def __init__(self, model: Any, windows: Sequence[Tensor]) -> None:
        self.model, self.windows = model, windows

    @torch.no_grad()
    def logits(self, index: int) -> Tensor:
        return logits_of(self.model, self.windows[index])


class OnDisk:
    """The original's last hidden states, one file per window, and its output head in memory: the same logits, bit for
    bit. A window takes its tokens times the hidden size, not times the vocabulary."""

    def __init__(self, head: nn.Module, folder: Path) -> None:
        self.head, self.folder = head, folder

    @classmethod
    def fill(cls, model: Any, windows: Sequence[Tensor], folder: Path, watcher: Watcher) -> OnDisk:
        """Run `model` over the windows that `folder` lacks; `model` is not needed any more.

        Raises InputError for a model whose logits are not its head's output alone: a cap or a factor after it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        kept = cls(model.get_output_embeddings(), folder)
        for index, window in enumerate(windows):
            if not kept._file(index).exists():
                states, logits = _states_and_logits(model, kept.head, window)
                if index == 0 and not torch.equal(kept.head(states)[0, :-1], logits):
                    raise InputError(
                        "the original does more to its logits than its head does, so that its hidden states will not "
                        "do: leave --cache away"
                    )
                kept._save(index, states)
                watcher.progress("original", index + 1, len(windows))
        return kept

    @torch.no_grad()
    def logits(self, index: int) -> Tensor:
        file = self._file(index)
        try:
            with safe_open(file, "pt") as stored:
                states = stored.get_tensor(STATES)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}): remove it, and run the same command again") from error
        return self.head(states.to(next(self.head.parameters()).device))[0, :-1]

    def _save(self, index: int, states: Tensor) -> None:
        info = TensorInfo(STATES, tuple(states.shape), states.dtype)
        with StreamingSafetensorsWriter(self._file(index), [info]) as writer:
            writer.write(STATES, states)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05}.safetensors"


def logits_of(model: Any, window: Tensor) -> Tensor:
    """[length - 1, vocabulary], with gradients where they are wanted."""
    return model(window[None].to(model.device), use_cache=False).logits[0, :-1]


@torch.no_grad()
def divergence(mine: Tensor, true: Tensor, gradient: Tensor | None = None) -> Tensor:
    """The sum over positions of KL(true || mine), in nats, of logits [n, vocabulary]: float64 [].

    `gradient`, of the shape of `mine`, is filled with the derivative of that sum by `mine`.
    """
    total = torch.zeros((), dtype=torch.float64, device=mine.device)
    for rows in map(slice, range(0, len(mine), CHUNK), range(CHUNK, len(mine) + CHUNK, CHUNK)):
        ours, theirs = (logits[rows].float().log_softmax(-1) for logits in (mine, true))
        total += (theirs.exp() * (theirs - ours)).sum(-1).double().sum()
        if gradient is not None:
            gradient[rows] = (ours.exp() - theirs.exp()).to(gradient.dtype)
    return total


@torch.no_grad()
def _states_and_logits(model: Any, head: nn.Module, window: Tensor) -> tuple[Tensor, Tensor]:
    """What the head reads, [1, length, hidden], and the logits."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        logits = logits_of(model, window)
    finally:
        hook.remove()
    return seen[-1], logits
