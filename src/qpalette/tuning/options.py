"""How a model is tuned, what is told meanwhile, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import cos, pi
from typing import Protocol

from qpalette.core.errors import InputError

WARM_UP = 10  # steps, of a long run: the moments that Adam divides by are of one gradient at first


@dataclass(frozen=True)
class Tuning:
    """Options. Raises InputError for a number that means nothing."""

    steps: int = 150
    batch: int = 4  # windows whose gradients make one step; on a processor one is in memory at a time
    learning_rate: float = 1e-3  # of scales and diagonals in proportion to themselves; falls by a cosine to zero
    window: int = 2048  # tokens; less in a model of shorter context
    windows: int | None = None  # to tune on: the first so many of the text; None: all but those held out
    held_out: int = 8  # windows, at most, which decide when to stop and which step is kept (`evaluate/held_out.py`)
    every: int = 10  # steps between two looks at them
    patience: int = 4  # looks in a row without gain after which it stops
    save_every: int = 5  # steps between two states on disk
    seed: int = 0  # of the order of the windows, and of sampled text
    keep_size: bool = False  # signs stay signs: nothing grows
    recompute: bool = True  # activations of a layer in the backward pass: less memory, one pass more of three
    cache: bool = False  # the original reads all windows first, so that only its head stays in memory

    def __post_init__(self) -> None:
        least = {"window": 2}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "seed" or isinstance(value, bool) or value is None or value >= least.get(field.name, 1):
                continue
            if field.name != "learning_rate":
                raise InputError(
                    f"{field.name.replace('_', '-')} must be at least {least.get(field.name, 1)}, got {value}"
                )
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"the learning rate must be a positive number, got {self.learning_rate:g}")

    def rate_at(self, step: int) -> float:
        """The learning rate of the step after `step` others: a short rise, and a cosine that falls to zero."""
        rise = max(1, min(WARM_UP, self.steps // WARM_UP))
        return self.learning_rate * min(1.0, (step + 1) / rise) * 0.5 * (1 + cos(pi * step / self.steps))


class Watcher(Protocol):
    """Told how far tuning is."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of equal time in `stage`, "text", "original" or "tuning", which may end early."""

    def held_out(self, step: int, kl: float) -> None:
        """KL on the held-out windows after `step` steps, nats per token, with the values as they would be stored."""


class Silent:
    """A watcher that says nothing."""

    def progress(self, stage: str, done: int, total: int) -> None:
        pass

    def held_out(self, step: int, kl: float) -> None:
        pass
