"""Requests of one sequence each, answered step by step together: they come and go between two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from qpalette.generation.cache import TokenCache, bucket
from qpalette.generation.choice import Choice
from qpalette.generation.loop import AHEAD, Loop, Running
from qpalette.generation.request import Request
from qpalette.generation.session import Session

# What follows the choice of several requests that are chosen differently: each reads its own row of the logits.
EACH_ITS_OWN = Choice(sample=False, processors=(), inside=False)


@dataclass(frozen=True)
class Job:
    """A request, and who waits for its tokens, int64 [1, tokens]; `left` is set where nobody does any more."""

    loop: Loop
    request: Request
    future: Future[torch.Tensor] = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)


@dataclass
class Row:
    """A request in a batch: its place there, and the column of the cache that its first token is in."""

    job: Job
    running: Running
    place: int = 0
    start: int = 0


class Batch:
    """Up to `slots` requests of one loop.

    A single request runs in a session of its own, as it would without others. When a second comes, both move to a
    session of several sequences, padded on the left: every step writes one column of the cache for all, so a request
    that joins is laid to end in the last column that is written, and what lies ahead of it there is masked. Only
    columns change: a token's position is counted from its own first token.

    next_job: the next request that may join, or None.
    """

    def __init__(self, loop: Loop, slots: int, next_job: Callable[[], Job | None], is_waiting: Callable[[], bool]):
        self.loop, self.slots, self.next_job, self.is_waiting = loop, slots, next_job, is_waiting
        self.rows: dict[int, Row] = {}  # in `session`, by their places
        self.session: Session | None = None
        self.alone: Row | None = None  # in its own session: while there are rows, it waits for their end

    def run(self) -> None:
        """Until nobody is left. What goes wrong with one request is told to who waits for it."""
        try:
            while self._advance():
                pass
        except BaseException as error:
            self._fail(error)

    def _advance(self) -> bool:
        """Somebody joins, or tokens are written; False where there is nobody."""
        if self._may_join() and (job := self.next_job()) is not None:
            self._admit(job)
        elif self.rows:
            self._step()
        elif self.alone is not None:
            self._go_on(self.alone)
        else:
            return False
        return True

    def _may_join(self) -> bool:
        if self.alone is not None and (self.rows or self.slots == 1):
            return False
        return len(self.rows) + (self.alone is not None) < self.slots and self.is_waiting()

    def _admit(self, job: Job) -> None:
        """Its prompt is read in a session of one sequence, which whoever is alone there leaves first."""
        if job.left.is_set():
            job.future.set_exception(InterruptedError())
            return
        try:
            if self.alone is not None and not self._join(self.alone):  # no memory for two: it ends before
                self.slots = 1
                while self.alone is not None:
                    self._go_on(self.alone)
            row = Row(job, Running(job.loop, job.request))
        except BaseException as error:
            job.future.set_exception(error)
            raise
        self.alone = self._after(row, row.running.begin)
        if self.alone is not None and self.rows:
            self._join(self.alone)

    def _go_on(self, row: Row) -> None:
        self.alone = self._after(row, lambda: row.running.run(lambda: row.job.left.is_set() or self._may_join()))

    def _after(self, row: Row, work: Callable[[], object]) -> Row | None:
        """`work` done for the row alone; None where that ended it."""
        try:
            work()
            if row.job.left.is_set():
                raise InterruptedError
        except BaseException as error:
            row.running.session.forget()
            row.job.future.set_exception(error)
            return None
        if not row.running.answer.is_whole:
            return row
        row.running.session.held = row.running.in_cache
        self._finish(row)
        return None

    def _finish(self, row: Row) -> None:
        try:
            row.running.answer.end()
            row.job.future.set_result(row.running.answer.known)
        except BaseException as error:
            row.job.future.set_exception(error)

    # --- the cache ---------------------------------------------------------------------------------------------------

    def _join(self, row: Row) -> bool:
        """From its own session, where it is alone, to the batch's; False where there is no memory for that."""
        own = row.running.session
        own.held = row.running.in_cache
        free = sorted(set(range(self.session.batch)) - self.rows.keys()) if self.session is not None else []
        try:
            if self.session is None or not free or own.used > self.session.used or self.session.is_full:
                self._lay_anew(row)
            else:
                row.place = free[0]
                self._put(row, _sequence(own, 0, 0, own.used))
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return False
        self.rows[row.place], self.alone = row, None
        return True

    def _lay_anew(self, joining: Row | None = None) -> None:
        """All rows side by side in as few columns as they take; where memory is short, in that of idle sessions."""
        try:
            return self._lay(joining)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        self.loop.batches.clear()  # but for the one in use, which is held here
        if self.loop.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._lay(joining)

    def _lay(self, joining: Row | None) -> None:
        rows = list(self.rows.values())
        sequences = [_sequence(self.session, row.place, row.start, self.session.used) for row in rows if self.session]
        if joining is not None:
            own = joining.running.session
            rows.append(joining)
            sequences.append(_sequence(own, 0, 0, own.used))
        used = max(length for length, _ in sequences)
        ahead = min(AHEAD, max(row.running.answer.left for row in rows))
        length = bucket(used + ahead, self.loop.context)
        session = self.loop.batches.get(self._size(len(rows)), length, True, rows[0].job.request.positions)
        _empty(session, used, sequences[0][1])
        self.session, self.rows = session, {}
        for place, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            row.place = place
            self._put(row, sequence)
            self.rows[place] = row

    def _size(self, rows: int) -> int:
        """Few sizes serve all, so that few steps are captured."""
        return min(self.slots, max(2, 1 << (rows - 1).bit_length()))

    def _put(self, row: Row, sequence: _Sequence) -> None:
        session, (length, tensors) = self.session, sequence
        assert session is not None
        row.start = session.used - length
        _cache_of(session).write(row.place, row.start, tensors)
        inputs = session.inputs
        assert inputs.mask is not None
        inputs.mask[row.place, : row.start] = 0
        inputs.mask[row.place, row.start :] = 1
        if inputs.offset is not None:
            inputs.offset[row.place] = row.start
        inputs.token[row.place] = int(row.running.answer.known[0, -1])

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """A token more for each row."""
        tokens = self._tokens()
        for place, row in list(self.rows.items()):
            try:
                if row.job.left.is_set():
                    raise InterruptedError
                row.running.answer.take(tokens[place : place + 1].clone())
            except BaseException as error:  # its client has left, say
                row.job.future.set_exception(error)
                del self.rows[place]
                continue
            if row.running.answer.is_whole:
                self._finish(row)
                del self.rows[place]

    def _tokens(self) -> torch.Tensor:
        """int64 [places], on the host."""
        assert self.session is not None
        if self.session.is_full or self._size(len(self.rows)) * 4 <= self.session.batch:
            self._lay_anew()
        step = self.session.step(self._choice())
        self.loop.compile_now(step)
        self.loop.launch(self.session, step)
        self.loop.compile_beside(step)
        token = step.inputs.token
        if step.logits is not None:
            for place, row in self.rows.items():
                known = row.running.answer.known.to(token.device)
                token[place] = row.job.request.choice.outside(known, step.logits[place : place + 1])[0]
        return token[:, 0].cpu()

    def _choice(self) -> Choice:
        choices = [row.job.request.choice for row in self.rows.values()]
        return choices[0] if len({choice.key for choice in choices}) == 1 else EACH_ITS_OWN

    def _fail(self, error: BaseException) -> None:
        """Of all who are here."""
        rows = [*self.rows.values(), *([] if self.alone is None else [self.alone])]
        for row in rows:
            row.job.future.set_exception(error)
        for session in (self.session, *(row.running.session for row in rows)):
            if session is not None:
                session.forget()
        self.session, self.rows, self.alone = None, {}, None


# Tokens, and of each layer copies of their keys and values, [heads, tokens, width].
_Sequence = tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a CPU torch has no error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _sequence(session: Session, place: int, start: int, end: int) -> _Sequence:
    return end - start, _cache_of(session).read(place, start, end)


def _empty(session: Session, used: int, like: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Nothing but a past of `used` tokens that no place sees."""
    cache, inputs = _cache_of(session), session.inputs
    cache.take_memory(session.batch, like)
    cache.set_length(used)
    session.used = used
    assert inputs.mask is not None
    inputs.mask[:, :used] = 0
    inputs.mask[:, used:] = 1
    inputs.token.zero_()
    if inputs.offset is not None:
        inputs.offset.fill_(used)


def _cache_of(session: Session) -> TokenCache:
    cache = session.inputs.cache
    assert isinstance(cache, TokenCache)
    return cache
