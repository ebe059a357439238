"""The option that says how prompts are multiplied: for every command that runs a model."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from qpalette.core.environment import PREFILL

HELP = (
    "How packed matrices multiply more than 128 tokens at once, as those of a prompt: float (of 16 bits) or int8 (on a "
    "GPU).  [default: float]"
)
Prefill = Annotated[str | None, typer.Option("--prefill", metavar="ROAD", help=HELP)]


def use_prefill(road: str | None) -> None:
    """By this road from now on, in this process and in those that it starts. Raises InputError for what is none."""
    from qpalette.runtime import check_road

    if road is not None:
        os.environ[PREFILL] = check_road(road)
