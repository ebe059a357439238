"""Requests of one sequence each, answered step by step together: they come and go between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from qpalette.generation.answer import Answer
from qpalette.generation.choice import Choice
from qpalette.generation.loop import AHEAD, Loop, Running
from qpalette.generation.reader import Reader
from qpalette.generation.request import Request
from qpalette.generation.session import Session
from qpalette.generation.together import Columns, read_together, readings
from qpalette.kvcache import bucket
from qpalette.nn.token_cache import KeysAndValues, TokenCache

# What follows the choice of several requests that are chosen differently: each reads its own row of the logits.
EACH_ITS_OWN = Choice(sample=False, processors=(), inside=False)


@dataclass(frozen=True, eq=False)
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
    answer: Answer
    place: int = 0
    start: int = 0

    def tell(self, error: BaseException) -> None:
        self.job.future.set_exception(error)


@dataclass
class Alone(Row):
    """In a session of its own, until it joins others."""

    running: Running = field(kw_only=True)


class Batch:
    """Up to `slots` requests of one loop.

    A single request runs in a session of its own, as it would without others. When a second comes, both move to a
    session of several sequences, padded on the left: every step writes one column of the cache for all, so a request
    that joins is laid to end in the last column that is written, and what lies ahead of it there is masked. Only
    columns change: a token's position is counted from its own first token.

    A prompt that comes to nobody is read in that session of its own; several that wait are read together
    (`together.py`), and join before their first token. One that comes to others is read as the first, unless the
    reading of prompts is captured (`prompts.py`).

    next_job: the next request that may join, or None.
    """

    def __init__(self, loop: Loop, slots: int, next_job: Callable[[], Job | None], is_waiting: Callable[[], bool]):
        self.loop, self.slots, self.next_job, self.is_waiting = loop, slots, next_job, is_waiting
        self.rows: dict[int, Row] = {}  # in `session`, by their places
        self.session: Session | None = None
        self.alone: Alone | None = None  # in its own session: while there are rows, it waits for their end
        self.next: deque[Job] = deque()  # there is room for them
        self.reads_together = True
        self.reader: Reader | None = None  # of `session`
        self.is_launched = False  # a step whose tokens were not taken

    def run(self) -> None:
        """Until nobody is left. What goes wrong with one request is told to who waits for it."""
        try:
            while self._advance():
                pass
        except BaseException as error:
            self._fail(error)

    def _advance(self) -> bool:
        """Somebody joins, or tokens are written; False where there is nobody."""
        if not self.is_launched and self._may_join():
            self._admit()
        elif self.rows or self.is_launched:
            self._step()
        elif self.alone is not None:
            self._go_on(self.alone)
        else:
            return False
        return True

    def _may_join(self) -> bool:
        if self.alone is not None and (self.rows or self.slots == 1):
            return False
        return self._room > 0 and (bool(self.next) or self.is_waiting())

    @property
    def _room(self) -> int:
        return self.slots - len(self.rows) - (self.alone is not None)

    def _admit(self) -> None:
        """One of those that wait, or several whose prompts are read together."""
        while len(self.next) < self._room and (job := self.next_job()) is not None:
            if job.left.is_set():
                job.future.set_exception(InterruptedError())
            else:
                self.next.append(job)
        if not self.next:
            return
        jobs = self._read_at_once()
        if jobs:
            self.reads_together = self._admit_together(jobs)
        else:
            self._admit_alone(self.next.popleft())

    def _read_at_once(self) -> list[Job]:
        """Those whose prompts are; none where the next one is read in a session of its own: it comes to nobody, or the
        first of all, who shows that the class can do with a static cache."""
        nobody = self.alone is None and not self.rows and len(self.next) == 1
        if nobody or self.loop.like is None or not self.reads_together:
            return []
        jobs = next(readings(self.next, [_length(job) for job in self.next]))
        prompts = self.loop.prompts
        captured = 0 if prompts is None else prompts.at_once([_length(job) for job in jobs])
        return jobs[:captured] or (jobs if len(jobs) > 1 else [])

    def _admit_alone(self, job: Job) -> None:
        """Its prompt is read in a session of one sequence, which whoever is alone there leaves first."""
        try:
            if self.alone is not None and not self._join():  # no memory for two: it ends before
                self.slots = 1
                while self.alone is not None:
                    self._go_on(self.alone)
            running = Running(job.loop, job.request)
        except BaseException as error:
            job.future.set_exception(error)
            raise
        alone = Alone(job, running.answer, running=running)
        self.alone = self._after(alone, running.begin)
        if self.loop.like is None and self.alone is not None:
            self.loop.like = _cache_of(running.session).read(0, 0, 0)
        if self.alone is not None and self.rows:
            self._join()

    def _admit_together(self, jobs: Sequence[Job]) -> bool:
        """False where that fails, for want of memory or in the model: each is told when it is read alone."""
        try:
            sequences = self._read(jobs)
        except Exception:
            return False
        rows = [Row(job, Answer(job.request)) for job in jobs]
        if not self._join(list(zip(rows, sequences, strict=True))):
            return False
        for row in rows:
            self.next.remove(row.job)
            try:
                row.answer.begin()
            except BaseException as error:
                row.tell(error)
                self._leave(row)
        return True

    def _read(self, jobs: Sequence[Job]) -> list[Columns]:
        """What the layers keep of their prompts."""
        prompts, given = [job.request.ids[0] for job in jobs], jobs[0].request.prompt
        if self.loop.prompts is not None and self.loop.like is not None:
            captured = self.loop.prompts.read(prompts, given, self.loop.like)
            if captured is not None:
                return captured
        held, kept = self.loop.sessions.longest(*(prompt.cpu() for prompt in prompts))
        shared = _sequence(held, 0, 0, kept) if held is not None else None
        return read_together(self.loop.model, prompts, given, shared)

    def _go_on(self, alone: Alone) -> None:
        left = alone.job.left
        self.alone = self._after(alone, lambda: alone.running.run(lambda: left.is_set() or self._may_join()))

    def _after(self, alone: Alone, work: Callable[[], object]) -> Alone | None:
        """`work` done for it; None where that ended it."""
        try:
            work()
            if alone.job.left.is_set():
                raise InterruptedError
        except BaseException as error:
            alone.running.session.forget()
            alone.tell(error)
            return None
        alone.running.session.held = alone.running.in_cache
        if not alone.answer.is_whole:
            return alone
        self._finish(alone)
        return None

    def _finish(self, row: Row) -> None:
        try:
            row.answer.end()
            row.job.future.set_result(row.answer.known)
        except BaseException as error:
            row.tell(error)

    # --- the cache ---------------------------------------------------------------------------------------------------

    def _join(self, others: Sequence[tuple[Row, Columns]] = ()) -> bool:
        """Who is alone leaves its own session for the batch's, with `others`; False where there is no memory for it."""
        joining = list(others)
        try:
            if self.alone is not None:
                own = self.alone.running.session
                joining.append((self.alone, _sequence(own, 0, 0, own.used)))
            self._place(joining)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return False
        self.rows |= {row.place: row for row, _ in joining}
        self.alone = None
        return True

    def _place(self, joining: Sequence[tuple[Row, Columns]]) -> None:
        free = sorted(set(range(self.session.batch)) - self.rows.keys()) if self.session is not None else []
        longest = max(length for _, (length, _) in joining)
        if self.session is None or len(free) < len(joining) or longest > self.session.used or self.session.is_full:
            self._lay_anew(joining)
            return
        for place, (row, sequence) in zip(free, joining, strict=False):
            row.place = place
            self._put(row, sequence)

    def _lay_anew(self, joining: Sequence[tuple[Row, Columns]] = ()) -> None:
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

    def _lay(self, joining: Sequence[tuple[Row, Columns]]) -> None:
        here = list(self.rows.values())
        rows = [*here, *(row for row, _ in joining)]
        sequences = [_sequence(self.session, row.place, row.start, self.session.used) for row in here if self.session]
        sequences += [sequence for _, sequence in joining]
        used = max(length for length, _ in sequences)
        ahead = min(AHEAD, max(row.answer.left for row in rows))
        length = bucket(used + ahead, self.loop.context)
        session = self.loop.batches.get(self._size(len(rows)), length, True, rows[0].job.request.positions)
        _empty(session, used, sequences[0][1])
        self.session, self.rows = session, {}
        self.reader = Reader(session.batch, session.inputs.token.device)
        for place, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            row.place = place
            self._put(row, sequence)
            self.rows[place] = row

    def _size(self, rows: int) -> int:
        """Few sizes serve all, so that few steps are captured."""
        return min(self.slots, max(2, 1 << (rows - 1).bit_length()))

    def _put(self, row: Row, sequence: Columns) -> None:
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
        inputs.token[row.place] = int(row.answer.known[0, -1])

    def _leave(self, row: Row) -> None:
        """Its place goes on with nobody in it, from position 0: else it would count past the model's context, which a
        table of positions has no row for, and a rotary embedding that looks at the highest one answers for all."""
        assert self.session is not None
        del self.rows[row.place]
        if self.session.inputs.offset is not None:
            self.session.inputs.offset[row.place] = self.session.used

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """A token more for each row. A step that is replayed is launched before the token ahead of it is read: the
        device never waits. Who has left meanwhile has a place in it all the same."""
        if not self.is_launched:
            self._launch()
        self.is_launched = self._may_go_ahead
        if self.is_launched:
            self._launch()
        assert self.reader is not None
        tokens = self.reader.read()
        for place, row in list(self.rows.items()):
            try:
                if row.job.left.is_set():
                    raise InterruptedError
                row.answer.take(tokens[place : place + 1].clone())
            except BaseException as error:  # its client has left, say
                row.tell(error)
                self._leave(row)
                continue
            if row.answer.is_whole:
                self._finish(row)
                self._leave(row)

    @property
    def _may_go_ahead(self) -> bool:
        assert self.session is not None
        return (
            not (self._wants_another_session or self._may_join())
            and any(row.answer.left > 1 for row in self.rows.values())
            and self._choice().inside
            and self.session.step(self._choice()).replays
        )

    @property
    def _wants_another_session(self) -> bool:
        assert self.session is not None
        return self.session.is_full or self._size(len(self.rows)) * 4 <= self.session.batch

    def _launch(self) -> None:
        """A step, after which its tokens are on their way to the host."""
        if self._wants_another_session:
            self._lay_anew()
        assert self.session is not None
        assert self.reader is not None
        step = self.session.step(self._choice())
        self.loop.compile_now(step)
        self.loop.launch(self.session, step)
        self.loop.compile_beside(step)
        token = step.inputs.token
        if step.logits is not None:
            for place, row in self.rows.items():
                known = row.answer.known.to(token.device)
                token[place] = row.job.request.choice.outside(known, step.logits[place : place + 1])[0]
        self.reader.send(token)

    def _choice(self) -> Choice:
        choices = [row.job.request.choice for row in self.rows.values()]
        return choices[0] if len({choice.key for choice in choices}) == 1 else EACH_ITS_OWN

    def _fail(self, error: BaseException) -> None:
        """Of all who are here."""
        for job in (*self.next, *(row.job for row in self.rows.values())):
            if not job.future.done():
                job.future.set_exception(error)
        if self.session is not None:
            self.session.forget()
        if self.alone is not None:
            self.alone.tell(error)
            self.alone.running.session.forget()
        self.session, self.rows, self.alone, self.is_launched = None, {}, None, False
        self.next.clear()


def _length(job: Job) -> int:
    """Of its prompt, in tokens."""
    return job.request.ids.shape[1]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a CPU torch has no error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _sequence(session: Session, place: int, start: int, end: int) -> Columns:
    return end - start, _cache_of(session).read(place, start, end)


def _empty(session: Session, used: int, like: Sequence[KeysAndValues]) -> None:
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
