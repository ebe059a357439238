"""One token more: forward and choice of the token, eager, captured in a CUDA graph, compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qpalette.backends.cpu.step import Program
from qpalette.generation.cache import SessionCache
from qpalette.generation.choice import Choice

# Kernels of torch.compile that start before the one ahead of them has ended, and small ones that run as one. A step of
# 8 layers of Llama-3.1-8B on an H100: 689 instead of 758 us at 3.25 bits.
COMPILE_OPTIONS = {"triton.enable_pdl": True, "combo_kernels": True}


def compile_options() -> dict[str, Any]:
    """COMPILE_OPTIONS that this torch knows."""
    known = set(torch._inductor.list_options())
    return {name: value for name, value in COMPILE_OPTIONS.items() if name in known}


@dataclass(frozen=True)
class Inputs:
    """Memory that a step reads and writes, the same at every step."""

    token: torch.Tensor  # int64 [batch, 1]
    cache: SessionCache
    offset: torch.Tensor | None  # int64 [batch, 1]: a token's place in the cache less its position; None: no positions
    mask: torch.Tensor | None  # int64 [batch, length of the cache]: 0 where a prompt is padded; None: nowhere

    def logits(self, model: Any) -> torch.Tensor:
        """[batch, vocabulary] after the token, which the cache takes in."""
        given: dict[str, Any] = {}
        if self.offset is not None:
            given["position_ids"] = self.cache.get_seq_length() - self.offset
        if self.mask is not None:
            given["attention_mask"] = self.mask
        output = model(input_ids=self.token, past_key_values=self.cache, use_cache=True, return_dict=True, **given)
        return output.logits[:, -1]


Reduced = Callable[[Inputs], torch.Tensor]


def reduced(model: Any, choice: Choice, inputs: Inputs) -> torch.Tensor:
    """The part of a step that torch.compile may have: what `choice.finish` makes a token of."""
    return choice.reduce(inputs.logits(model))


class Step:
    """A step of one session and one choice. `result` is int64 [batch, 1] and the next input, or the logits in float32,
    where the choice is made outside.

    It runs eagerly until it is warm, then it is captured, where there is something to capture with; `improve` brings
    the compiled function, with which it is warmed and captured anew.
    """

    name = "a step"

    def __init__(self, model: Any, choice: Choice, inputs: Inputs) -> None:
        self.choice, self.inputs = choice, inputs
        self.eager: Reduced = partial(reduced, model, choice)
        self.function: Reduced = self.eager
        self.warm = 0  # runs with this function
        self.graph: Any = None
        self.stays_eager = False  # it could not be captured
        self.compiled: Reduced | None = None  # waits for the next step
        self.logits: torch.Tensor | None = None

    @property
    def replays(self) -> bool:
        """Whether the next launch costs the host next to nothing."""
        return self.graph is not None and self.compiled is None and not isinstance(self.graph, Program)

    @property
    def is_compiled(self) -> bool:
        return self.function is not self.eager

    def use(self, function: Reduced, warm: int) -> None:
        """Run `function` from now on; `warm` of the CAPTURE_WARMUP runs are not needed."""
        self.function, self.warm, self.graph, self.compiled = function, warm, None, None

    def run(self) -> None:
        """Without a graph: what a graph of it replays."""
        self.keep(self.choice.finish(self.function(self.inputs)))

    def keep(self, result: torch.Tensor) -> None:
        """`result` becomes the next input, or the logits to choose by."""
        if self.choice.inside:
            self.inputs.token.copy_(result)
        elif self.logits is None:
            self.logits = result.clone()
        else:
            self.logits.copy_(result)
