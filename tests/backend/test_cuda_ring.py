"""The ring of tiles.cuh, step by step and in any order, without a GPU: no warp reads a chunk that is not there, or that
goes away meanwhile, and none waits forever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpalette.backends.cuda.tiles import Shape


@dataclass(frozen=True)
class Protocol:
    """Of a block: which chunks a part has, and where each of them is."""

    chunks: int
    stages: int
    parts: int

    @property
    def depth(self) -> int:
        return self.stages // self.parts

    def place(self, chunk: int) -> tuple[int, int]:
        """(stage, phase) of a chunk."""
        turn, part = divmod(chunk, self.parts)
        return part * self.depth + turn % self.depth, turn // self.depth

    @property
    def ahead(self) -> int:
        """From a chunk to the one that takes its place."""
        return self.depth * self.parts


class OneRing(Protocol):
    """All parts share the stages, in turn."""

    def place(self, chunk: int) -> tuple[int, int]:
        return chunk % self.stages, chunk // self.stages

    @property
    def ahead(self) -> int:
        return self.stages


@dataclass
class Stage:
    chunk: int | None = None  # what is there, where nothing is on its way
    completed: int = 0  # phases of its barrier
    left: int = 0


@dataclass
class Block:
    """Warps and copies of a block, of which `order` says who goes on."""

    protocol: Protocol
    users: int
    order: random.Random
    stages: list[Stage] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def fetch(self, chunk: int) -> None:
        stage, phase = self.protocol.place(chunk)
        assert all(other != stage for other, _ in self.copies), "two copies into one stage"
        assert self.stages[stage].completed == phase
        self.stages[stage].chunk = None
        self.copies.append((stage, chunk))

    def warp(self, part: int) -> Iterator[bool]:
        """Of one that reads all chunks of a part, step by step: True while it waits."""
        for chunk in range(part, self.protocol.chunks, self.protocol.parts):
            number, phase = self.protocol.place(chunk)
            stage = self.stages[number]
            while stage.completed % 2 == phase % 2:  # all that waiting by parity can tell
                yield True
            for _ in range(self.order.randrange(4)):
                assert stage.chunk == chunk, f"chunk {stage.chunk} is read for {chunk}"
                yield False
            assert stage.chunk == chunk, f"chunk {stage.chunk} is read for {chunk}"
            stage.left += 1
            if stage.left == self.users:
                stage.left = 0
                if chunk + self.protocol.ahead < self.protocol.chunks:
                    self.fetch(chunk + self.protocol.ahead)
            yield False

    def run(self) -> None:
        self.stages = [Stage() for _ in range(self.protocol.stages)]
        for chunk in range(min(self.protocol.ahead, self.protocol.chunks)):
            self.fetch(chunk)
        warps = [self.warp(part) for part in range(self.protocol.parts) for _ in range(self.users)]
        hasty = self.order.sample(warps, len(warps) // 2)  # go ahead as far as they are let
        while warps:
            alone = not self.copies
            chosen = [warp for warp in warps if alone or warp in hasty or self.order.random() < 0.3]
            waits = {warp: next(warp, None) for warp in chosen}
            assert not alone or not all(waits.values()), "all wait, and nothing is on its way"
            warps = [warp for warp in warps if waits.get(warp, False) is not None]
            if self.copies and self.order.random() < 0.5:
                self.arrive()
        assert not self.copies, "what nobody read would come over the sums"

    def arrive(self) -> None:
        number, chunk = self.copies.pop(self.order.randrange(len(self.copies)))
        self.stages[number].chunk = chunk
        self.stages[number].completed += 1


@given(st.sampled_from([128, 256, 384, 512]), st.integers(1, 10), st.integers(1, 16), st.integers(0, 40), st.randoms())
def test_no_warp_reads_what_is_not_there(
    threads: int, stages: int, groups: int, chunks: int, order: random.Random
) -> None:
    groups = min(groups, threads // 32)
    parts = Shape(32, threads, 2, stages, 1 << 17).parts(groups)
    assert 1 <= parts <= stages
    assert parts * groups <= threads // 32
    Block(Protocol(chunks, stages, parts), groups, order).run()


@pytest.mark.parametrize(("stages", "parts"), [(3, 2), (3, 4), (6, 4)])
def test_stages_that_parts_share_out_of_step_are_told(stages: int, parts: int) -> None:
    """What the test above would say of one ring for all parts: a wait by parity for a phase far off passes at once."""

    def run() -> None:
        for seed in range(200):
            Block(OneRing(40, stages, parts), 2, random.Random(seed)).run()

    with pytest.raises(AssertionError, match=r"is read for|on its way|completed"):
        run()
