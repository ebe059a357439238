"""From logits to the next token, on the device."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import logits_process as library

from qpalette.integrations.seed import Seed

ARGMAX_PARTS = 64
# What reads the scores alone, and has numbers for parameters: it can run inside a captured step.
PURE = (
    library.TemperatureLogitsWarper,
    library.TopKLogitsWarper,
    library.TopPLogitsWarper,
    library.MinPLogitsWarper,
    library.TypicalLogitsWarper,
    library.EpsilonLogitsWarper,
    library.LogitNormalization,
)


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The place of the highest of [batch, vocabulary], [batch, 1]; of equal ones the first."""
    # In parts, which run side by side: over 128256 logits an argmax is one block's work, 21 us on an H100.
    parts = math.gcd(logits.shape[-1], ARGMAX_PARTS)
    highest, place = logits.unflatten(-1, (parts, -1)).max(-1)
    part = highest.argmax(-1, keepdim=True)
    return part * (logits.shape[-1] // parts) + place.gather(-1, part)


def draw(probabilities: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A place of [batch, vocabulary] by its probability, [batch, 1]; `generator` None: torch's own.

    As torch.multinomial draws one, without its look at the values, for which the host would wait.
    """
    noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return most_likely(probabilities / noise)


@dataclass(frozen=True, eq=False)
class Choice:
    """The likeliest token, or a draw, after `processors` of transformers; `inside` a captured step, or after it: from
    torch's generator, or after it from one of its own."""

    sample: bool
    processors: Sequence[Any]
    inside: bool
    generator: torch.Generator | None = None

    @property
    def key(self) -> Hashable:
        """Equal for choices that one captured step serves."""
        if not self.inside:
            return "logits"
        return (self.sample, *(parameters_of(processor) for processor in self.processors))

    def reduce(self, logits: torch.Tensor) -> torch.Tensor:
        """[batch, vocabulary] -> what `finish` makes a token of. A function of its argument: it may be compiled."""
        if not self.inside:
            return logits.float()
        if not self.sample and not self.processors:
            return most_likely(logits)
        scores = logits.float()
        for processor in self.processors:
            scores = processor(None, scores)
        return scores.softmax(-1) if self.sample else most_likely(scores)

    def finish(self, reduced: torch.Tensor) -> torch.Tensor:
        """The token, [batch, 1], where the choice is inside; else the logits, float32 [batch, vocabulary]."""
        return draw(reduced) if self.inside and self.sample else reduced

    def outside(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The token after `ids`, [batch, tokens], by processors that read them; [batch, 1]."""
        scores = logits.clone()
        for processor in self.processors:
            scores = processor(ids, scores)
        return draw(scores.softmax(-1), self.generator) if self.sample else most_likely(scores)


def choice_of(sample: bool, processors: Sequence[Any], device: torch.device) -> Choice:
    """Inside the step if every processor is PURE, and none of them a Seed."""
    others = tuple(processor for processor in processors if not isinstance(processor, Seed))
    seeds = [processor.seed for processor in processors if isinstance(processor, Seed)]
    if seeds and sample:
        return Choice(sample, others, False, torch.Generator(device).manual_seed(seeds[-1]))
    return Choice(sample, others, all(parameters_of(processor) is not None for processor in others))


def parameters_of(processor: Any) -> Hashable | None:
    """What tells one PURE processor from another; None for any other."""
    if type(processor) not in PURE or not all(isinstance(value, int | float) for value in vars(processor).values()):
        return None
    return type(processor), *sorted(vars(processor).items())
