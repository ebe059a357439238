"""What the host knows of a request's answer, token by token."""

from __future__ import annotations

import torch

from qpalette.generation.request import Request


class Answer:
    """`ids`, int64 [batch, limit], of which `length` tokens are known; `ended` tells which sequences are."""

    def __init__(self, request: Request) -> None:
        self.request = request
        batch, self.length = request.ids.shape
        self.ids = torch.empty(batch, request.limit, dtype=torch.int64)
        self.known.copy_(request.ids)
        self.ended = [False] * batch

    @property
    def known(self) -> torch.Tensor:
        """int64 [batch, length], a view."""
        return self.ids[:, : self.length]

    @property
    def left(self) -> int:
        """How many tokens more there may be."""
        return self.request.limit - self.length

    @property
    def is_whole(self) -> bool:
        return all(self.ended) or self.left <= 0

    def begin(self) -> None:
        """The streamer gets the prompt, as from transformers."""
        if self.request.streamer is not None:
            self.request.streamer.put(self.request.ids.cpu())

    def take(self, tokens: torch.Tensor) -> None:
        """One more of each sequence, int64 [batch]."""
        if self.request.pad is not None and any(self.ended):
            tokens[torch.tensor(self.ended)] = self.request.pad
        self.ids[:, self.length] = tokens
        self.length += 1
        ends = self.request.stops(self.known, self.request.ids.device)
        self.ended = [before or now for before, now in zip(self.ended, ends, strict=True)]
        if self.request.streamer is not None:
            self.request.streamer.put(tokens)

    def end(self) -> None:
        """No token follows."""
        if self.request.streamer is not None:
            self.request.streamer.end()
