"""What the original predicts on the windows, and how far a model is from that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpalette.core.errors import InputError
from qpalette.evaluate.kept import KeptPredictions
from qpalette.tuning.options import Watcher

CHUNK = 256  # positions whose log-probabilities are held in float32 at a time: 250 MB at a vocabulary of 256k


class Reference:
    """The original, which reads each window once: its last hidden states lie in `folder`, and make the same logits, bit
    for bit. A window takes its tokens times the hidden size, not times the vocabulary.

    A class whose code makes no logits of these alone reads its windows at every use.
    """

    def __init__(self, model: Any, windows: Sequence[Tensor], folder: Path) -> None:
        self.windows, self._model = windows, KeptPredictions(model, folder, states_only=True)

    @torch.no_grad()
    def logits(self, index: int) -> Tensor:
        """Of the `index`-th window, [length - 1, vocabulary]: the prediction of each token but the first."""
        return logits_of(self._model, self.windows[index])

    def release(self, watcher: Watcher) -> None:
        """All windows are read now, and then the memory of the model's body is given back.

        Raises InputError for a class that reads them at every use.
        """
        for index, window in enumerate(self.windows):
            if self._model.has_read(window[None]):
                continue
            self.logits(index)
            if not self._model.keeps:
                raise InputError(
                    "the original's class looks into its body for its logits, so that hidden states will not do: "
                    "leave --cache away"
                )
            watcher.progress("original", index + 1, len(self.windows))
        self._model.release()


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
