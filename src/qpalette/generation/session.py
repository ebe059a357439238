"""What is kept from one request to the next: a cache, the tokens in it, the steps captured over it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch

from qpalette.generation.cache import CacheMaker
from qpalette.generation.choice import Choice
from qpalette.generation.step import Inputs, Step

SESSIONS = 4  # kept; the one that was used longest ago goes first
CHOICES = 3  # captured in a session; further ones, of other temperatures, say, are made outside the step


class Session:
    """A cache of `length` tokens for `batch` sequences. `used` tokens are in it; `held` are they, int64 [used], where
    there is one sequence and a later prompt may go on from them."""

    def __init__(self, model: Any, batch: int, length: int, masked: bool, positions: bool, make: CacheMaker) -> None:
        device = model.device
        self.model, self.batch, self.length, self.masked = model, batch, length, masked
        self.inputs = Inputs(
            token=torch.zeros(batch, 1, dtype=torch.int64, device=device),
            cache=make(model.config, length),
            offset=torch.zeros(batch, 1, dtype=torch.int64, device=device) if positions else None,
            mask=torch.ones(batch, length, dtype=torch.int64, device=device) if masked else None,
        )
        self.steps: dict[Hashable, Step] = {}
        self.used = 0
        self.held: torch.Tensor | None = None

    def step(self, choice: Choice) -> Step:
        """The step of this choice, or of one outside, where CHOICES are there already."""
        if choice.key not in self.steps and len(self.steps) >= CHOICES:
            choice = replace(choice, inside=False)
        if choice.key not in self.steps:
            self.steps[choice.key] = Step(self.model, choice, self.inputs)
        return self.steps[choice.key]

    @property
    def is_full(self) -> bool:
        return self.used >= self.length

    def forget(self) -> None:
        """What is in the cache is not known: a request broke off."""
        self.used, self.held = self.length, None

    def rewind(self, tokens: int) -> None:
        """The first `tokens` stay."""
        used = self.used
        self.forget()  # until it is done
        self.inputs.cache.clear(tokens, used)
        self.inputs.cache.set_length(tokens)
        self.used = tokens

    def take(self, prompt: dict[str, Any], kept: int) -> torch.Tensor:
        """Read a prompt, of which the first `kept` tokens are in the cache; its logits [batch, vocabulary].

        prompt: what the model's forward takes, input_ids [batch, tokens] at least.
        """
        self.rewind(kept)
        tokens = prompt["input_ids"].shape[1]
        self.inputs.cache.begin(prompt.get("attention_mask"))
        if self.inputs.mask is not None:
            self.inputs.mask.fill_(1)[:, :tokens].copy_(prompt["attention_mask"])
        if self.inputs.offset is not None:
            self.inputs.offset.copy_(tokens - 1 - prompt["position_ids"][:, -1:])
        rest = {name: prompt[name][:, kept:] for name in ("input_ids", "position_ids") if name in prompt}
        output = self.model(**(prompt | rest), past_key_values=self.inputs.cache, use_cache=True, return_dict=True)
        self.used = tokens
        return output.logits[:, -1]

    def move(self, other: Session, tokens: int) -> None:
        """Take over the first `tokens` of the other's cache, and where it stands."""
        self.rewind(0)
        self.inputs.cache.copy(other.inputs.cache, tokens)  # type: ignore[arg-type]  # one maker makes both
        self.used = tokens
        self.inputs.token.copy_(other.inputs.token)
        for mine, theirs in ((self.inputs.offset, other.inputs.offset), (self.inputs.mask, other.inputs.mask)):
            if mine is not None and theirs is not None:
                mine.fill_(1)[:, : theirs.shape[1]].copy_(theirs)


class Sessions:
    """The sessions of one model, by batch size, length and whether prompts are padded."""

    def __init__(self, model: Any, make: CacheMaker) -> None:
        self.model, self.make = model, make
        self.kept: OrderedDict[Hashable, Session] = OrderedDict()

    def __iter__(self) -> Iterator[Session]:
        return iter(self.kept.values())

    def get(self, batch: int, length: int, masked: bool, positions: bool) -> Session:
        """It may hold the tokens of another request."""
        key = (batch, length, masked, positions)
        if key not in self.kept:
            while len(self.kept) >= SESSIONS:
                self.kept.popitem(last=False)
            self.kept[key] = Session(self.model, *key, self.make)
        self.kept.move_to_end(key)
        return self.kept[key]

    def clear(self) -> None:
        self.kept.clear()

    def longest(self, *prompts: torch.Tensor) -> tuple[Session | None, int]:
        """The session that holds the longest beginning of all `prompts`, int64 [tokens], and its tokens.

        One token of each is always left over: the logits behind it are wanted.
        """
        found: tuple[Session | None, int] = (None, 0)
        for session in self:
            if session.held is not None:
                tokens = min(min(_common(session.held, ids), len(ids) - 1) for ids in prompts)
                found = max(found, (session, tokens), key=lambda pair: pair[1])
        return found


def _common(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many first elements are equal."""
    length = min(len(one), len(other))
    differences = (one[:length] != other[:length]).nonzero()
    return int(differences[0]) if len(differences) else length
