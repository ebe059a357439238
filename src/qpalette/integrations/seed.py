"""A seed for one request among others."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class Seed(LogitsProcessor):
    """Says that a request's tokens are drawn from a generator of its own, whatever is answered beside it.

    Transformers hands it on to the decoding loop, which looks for it; it changes no score, so that a loop that does not
    know it draws from torch's generator, as ever.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores
