"""What a request is, and what of it the loop here does; the rest is transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from qpalette.generation.choice import Choice, choice_of

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
ON_THE_HOST = (MaxTimeCriteria, StopStringCriteria)  # criteria that do not ask where the ids are


class NotOurs(Exception):
    """The request wants what transformers' own loop does, and this one does not."""


class NotRead(NotOurs):
    """The model could not read the prompt into a cache of ours."""


@dataclass(frozen=True)
class Request:
    """prompt: what forward takes of it; limit: tokens in all; pad: what follows a finished sequence, None: it goes on;
    continues: whether another request's tokens may be the beginning of this one's."""

    prompt: dict[str, Any]
    choice: Choice
    stops: Stops
    limit: int
    pad: int | None
    continues: bool
    streamer: Any

    @property
    def ids(self) -> torch.Tensor:
        """int64 [batch, tokens]."""
        return self.prompt["input_ids"]

    @property
    def masked(self) -> bool:
        return "attention_mask" in self.prompt

    @property
    def positions(self) -> bool:
        return "position_ids" in self.prompt


def request_of(
    ids: torch.Tensor,
    processors: Sequence[Any],
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    device: torch.device,
    given: dict[str, Any],
) -> Request:
    """What transformers prepared, `given` for the model's forward. Raises NotOurs."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    fits = (
        config.get_generation_mode() in MODES
        and not (config.return_dict_in_generate or config.is_assistant)
        and config.prefill_chunk_size is None
        and {name for name, value in given.items() if value is not None} <= INPUTS
        and given.get("use_cache") is True
        and type(given.get("past_key_values")) is DynamicCache
        and not getattr(given["past_key_values"], "_is_user_defined", False)
        and ids.shape[1] > 0
        and (mask is None or mask.shape == ids.shape)
        and (positions is None or (positions.ndim == 2 and positions.shape[1] == ids.shape[1]))
    )
    limit = criteria.max_length
    if limit is None or not fits:
        raise NotOurs
    prompt = {"input_ids": ids.to(device)}
    if mask is not None and not bool((mask == 1).all()):
        prompt["attention_mask"] = mask.to(device)
    if positions is not None:
        prompt["position_ids"] = positions.to(device)
    if "logits_to_keep" in given:
        prompt["logits_to_keep"] = given["logits_to_keep"]
    stops, pad = Stops(criteria), config._pad_token_tensor
    return Request(
        prompt,
        choice_of(bool(config.do_sample), processors, device),
        stops,
        limit=limit,
        pad=int(pad) if stops.pads and pad is not None else None,
        continues=len(ids) == 1 and "attention_mask" not in prompt and _counts(positions),
        streamer=streamer,
    )


def _counts(positions: torch.Tensor | None) -> bool:
    """Whether the positions are 0, 1, 2 ..."""
    return positions is None or bool((positions[0] == torch.arange(len(positions[0]), device=positions.device)).all())


class Stops:
    """When a sequence ends. Its last token and its length are looked at here; other criteria are asked."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        ends = [criterion for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.ends = {int(token) for criterion in ends for token in criterion.eos_token_id.flatten()}
        counted = (EosTokenCriteria, MaxLengthCriteria)
        self.others = StoppingCriteriaList(criterion for criterion in criteria if type(criterion) not in counted)
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.on_the_host = all(type(criterion) in ON_THE_HOST for criterion in self.others)

    def __call__(self, ids: torch.Tensor, device: torch.device) -> list[bool]:
        """Which of the sequences `ids`, int64 [batch, tokens] on the host, end here."""
        ended = [token in self.ends for token in ids[:, -1].tolist()]
        if self.others:
            asked = self.others(ids if self.on_the_host else ids.to(device), None)
            ended = [one or other for one, other in zip(ended, asked.tolist(), strict=True)]
        return ended
