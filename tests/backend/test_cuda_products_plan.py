"""What the CUDA products take for granted, checked without a GPU: table entries, fixed point, and how rows are cut."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpalette.backends.cuda import teams
from qpalette.backends.cuda.decoder import decoder_spec, entries
from qpalette.backends.cuda.multiply import (
    COLUMNS,
    MOST_NORM,
    MOST_VALUE,
    columns_of,
    fixed_point,
    most_rows,
    sum_bytes,
)
from qpalette.backends.cuda.rotate import split_rotation
from qpalette.backends.cuda.segments import DeviceLimits, plan_grid
from qpalette.codes import FAMILIES, parse_spec
from qpalette.codes.trellis import MEMORIES
from qpalette.core.errors import UnsupportedError

SPECS = [quantizer.name for family in FAMILIES.values() for quantizer in family.palette()]


@pytest.mark.parametrize("spec", SPECS)
def test_no_table_entry_can_overflow_a_sum(spec: str) -> None:
    memories = MEMORIES if parse_spec(spec).family.startswith("tcq") else ()
    for name in (spec, *(f"{spec}-L{memory}" for memory in memories)):
        decoder = decoder_spec(name)
        assert decoder is not None
        halves = entries(name, torch.device("cpu")).view(torch.float16)
        assert len(halves) == 2 << decoder.index_bits
        assert halves.abs().max() < MOST_VALUE


@pytest.mark.parametrize(("name", "inputs"), [("c65537", 65537), (f"h{1 << 26}", 1 << 26)])
def test_a_rotation_beyond_shared_memory_is_refused_before_it_is_built(name: str, inputs: int) -> None:
    with pytest.raises(UnsupportedError, match=f"rotation '{name}' has a dense factor of \\d+, and on CUDA"):
        split_rotation(name, inputs, torch.device("cpu"))


@given(st.integers(16, 1 << 20))
def test_the_largest_sum_fits_in_32_bits(columns: int) -> None:
    largest = MOST_NORM * MOST_VALUE * sqrt(columns) * fixed_point(columns)
    assert 2**30 <= largest <= 2**31


@given(
    st.lists(st.tuples(st.integers(1, 9000), st.sampled_from([8.0, 12.0, 16.4, 24.0])), min_size=1, max_size=8),
    st.integers(8, 140),
    st.integers(1, 500),
)
def test_rows_are_cut_without_rest_within_what_a_block_holds(
    segments: list[tuple[int, float]], multiprocessors: int, most: int
) -> None:
    row_tiles, costs = zip(*segments, strict=True)
    grid = plan_grid(row_tiles, costs, multiprocessors, most)
    for tiles, rows, blocks in zip(row_tiles, grid.rows_per_block, grid.blocks, strict=True):
        assert 1 <= rows <= most
        assert (blocks - 1) * rows < tiles <= blocks * rows
    least = sum(-(-tiles // most) for tiles in row_tiles)
    rounds = -(-max(least, len(row_tiles)) // multiprocessors)
    assert sum(grid.blocks) <= rounds * multiprocessors


LIMITS = [DeviceLimits(132, kib << 10, (9, 0)) for kib in (99, 163, 227)]  # of every device that we promise


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_block_of_many_tokens_has_its_room(limits: DeviceLimits, columns: int) -> None:
    rows = most_rows(limits, columns)
    assert rows >= 8
    left = limits.shared_bytes - limits.table_bytes
    assert rows * sum_bytes(columns) <= left < (rows + 1) * sum_bytes(columns)


@given(tokens=st.integers(1, 1000))
def test_lots_of_tokens_are_as_few_as_can_be(tokens: int) -> None:
    lots, columns = columns_of(tokens)
    assert (lots - 1) * max(COLUMNS) < tokens <= lots * columns
    assert columns in COLUMNS
    assert lots == 1 or columns > 16  # a token's chunk is cut alike in any company


@given(tokens=st.integers(teams.FROM, 1000))
def test_lots_in_teams_are_as_few_as_can_be(tokens: int) -> None:
    lots, columns = teams.columns_of(tokens)
    assert (lots - 1) * max(teams.COLUMNS) < tokens <= lots * columns
    assert columns in teams.COLUMNS


@given(st.integers(1, 600), st.integers(1, 120), st.integers(8, 140))
def test_no_other_runs_keep_the_busiest_block_of_a_team_for_less_time(
    groups: int, chunks: int, multiprocessors: int
) -> None:
    def seconds(run: int) -> int:
        runs = -(-chunks // run)
        items = -(-groups * runs // multiprocessors)
        return items * run + (items * teams.CHUNKS_OF_AN_ADDITION if runs > 1 else 0)

    found = teams.run_of(groups, chunks, multiprocessors)
    assert 1 <= found <= chunks
    assert seconds(found) == min(map(seconds, range(1, chunks + 1)))


@pytest.mark.parametrize("columns", teams.COLUMNS)
def test_the_ring_of_a_team_has_room(columns: int) -> None:
    assert 2 <= teams.stages_of(LIMITS[-1], columns) <= teams.MOST_STAGES


@given(
    st.lists(st.tuples(st.integers(1, 9000), st.sampled_from([8.0, 12.0, 16.4, 24.0])), min_size=1, max_size=8),
    st.integers(1, 70),
    st.integers(8, 140),
)
def test_items_of_teams_are_cut_without_rest(
    segments: list[tuple[int, float]], runs: int, multiprocessors: int
) -> None:
    row_tiles, costs = zip(*segments, strict=True)
    planner = teams.Planner(runs, multiprocessors)
    grid = planner(None, row_tiles, costs)
    for tiles, own, blocks in zip(row_tiles, grid.rows_per_block, grid.blocks, strict=True):
        items = -(-tiles // teams.GROUP) * runs
        assert (blocks - 1) * own < items <= blocks * own
