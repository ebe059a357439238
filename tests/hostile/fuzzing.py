"""What the fuzzers share: damage to bytes, the loop over cases, the command line."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import traced


@st.composite
def damaged_bytes(draw: Callable, value: bytes) -> bytes:
    """A copy of `value`, cut short, lengthened, or with some bytes changed; most of it near the beginning."""
    content = bytearray(value)
    for _ in range(draw(st.integers(1, 4))):
        end = len(content) if draw(st.booleans()) else min(len(content), 600)
        place = draw(st.integers(0, max(0, end - 1)))
        how = draw(st.integers(0, 3))
        if how == 0:
            del content[place:]
        elif how == 1:
            content[place:place] = draw(st.binary(max_size=24))
        elif content:
            content[place] = draw(st.integers(0, 255))
    return bytes(content)


def try_cases(
    cases: st.SearchStrategy, check: Callable[[Any, Path], str], count: int, derandomize: bool
) -> Counter[str]:
    """How often each outcome of `check` happened in `count` cases, each in a folder of its own to be."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def try_one(case: Any) -> None:
            outcomes[check(case, Path(folder, "model"))] += 1

        with traced():
            try_one()
    return outcomes


def main(description: str, run: Callable[[int, bool], Counter[str]]) -> None:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    start = time.perf_counter()
    outcomes = run(parser.parse_args().cases, False)
    for outcome, count in outcomes.most_common():
        print(f"{count:7d}  {outcome}")
    print(f"{sum(outcomes.values())} cases, no crash, {time.perf_counter() - start:.0f} s")
