"""How long caches are made: what `generate` takes, and what a plan for a memory counts."""

from __future__ import annotations

STEP = 1024  # of lengths up to FINE; above, a quarter of the power of two below
FINE = 8192


def bucket(tokens: int, context: int | None) -> int:
    """The length of a cache for `tokens`: few lengths serve all, so that few steps are captured.

    A step reads no more than what is masked here beyond the tokens: at most 1023 up to 8192, at most a quarter above.
    Never longer than the model's context, unless the tokens are.
    """
    step = STEP if tokens <= FINE else 1 << ((tokens - 1).bit_length() - 3)
    length = -(-tokens // step) * step
    return length if context is None else min(length, max(tokens, context))
