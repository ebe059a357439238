"""The decoding loop: a prompt, then step after step over a static cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from qpalette.backends.cuda.graphs import CAPTURE_WARMUP, Capture
from qpalette.core.errors import UnsupportedError
from qpalette.generation.answer import Answer
from qpalette.generation.cache import CacheMaker
from qpalette.generation.compilation import Compiler
from qpalette.generation.native import ProgramCapture
from qpalette.generation.prompts import Prompts, Reading
from qpalette.generation.reader import Reader
from qpalette.generation.request import NotRead, Request
from qpalette.generation.session import Session, Sessions
from qpalette.generation.step import Step
from qpalette.kvcache import bucket
from qpalette.nn.token_cache import KeysAndValues

AHEAD = 1024  # new tokens that a cache is made for; an answer that goes on moves to a longer one

logger = logging.getLogger(__name__)


class Loop:
    """What requests of one model share: sessions, steps, and how these are captured. `capture` None runs every step
    eagerly."""

    def __init__(self, model: Any, compiler: Compiler, capture: Capture | None, make: CacheMaker) -> None:
        self.model, self.compiler, self.capture = model, compiler, capture
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.sessions = Sessions(model, make)
        self.batches = Sessions(model, make)  # of requests that are answered together
        # A program is made of kernels that are compiled for their shapes: prompts are worth that on a GPU alone.
        replays = capture is not None and not isinstance(capture, ProgramCapture)
        self.prompts = Prompts(model, self.context, self.read) if replays else None  # of such requests
        self.like: list[KeysAndValues] | None = None  # what a cache has of no tokens, once one has taken a prompt
        self.has_told = False  # that a step cannot be captured: others may be
        self.warm_since: float | None = None  # time.perf_counter() of the latest capture

    def run(self, request: Request, has_left: Callable[[], bool] = lambda: False) -> torch.Tensor:
        """The prompt and the new tokens, int64 [batch, tokens] on the host. What breaks a request off passes through,
        and leaves the session empty: InterruptedError, once `has_left`, which is asked between two tokens."""
        running = Running(self, request)
        try:
            running.begin()
            running.run(has_left)
            if not running.answer.is_whole:
                raise InterruptedError
            running.answer.end()
        except BaseException:
            running.session.forget()
            raise
        running.session.held = running.in_cache
        return running.answer.known

    def session_for(self, request: Request, tokens: int) -> Session:
        """For `tokens` that the cache must have room for, and AHEAD more, if the request is for so many."""
        length = bucket(min(request.limit, tokens + AHEAD), self.context)
        return self.sessions.get(request.ids.shape[0], length, request.masked, request.positions)

    def launch(self, session: Session, step: Step) -> None:
        """One step. It warms up eagerly, is captured, and replayed; a compiled function is taken up between tokens."""
        if step.compiled is not None and not self.compiler.busy:
            step.use(step.compiled, CAPTURE_WARMUP - 1)
        self._do(step, partial(self._run, session, step))
        session.used += 1

    def read(self, reading: Reading) -> None:
        """Of prompts. It warms up, is captured and replayed as a step is."""
        self._do(reading, reading.run)

    def _do(self, work: Step | Reading, run: Callable[[], None]) -> None:
        may_be = self.capture is not None and not work.stays_eager
        if work.graph is None and may_be and work.warm >= CAPTURE_WARMUP:
            self._capture(work)
        if work.graph is not None:
            work.graph.replay()
        else:
            run()
            work.warm += 1

    def compile_now(self, step: Step) -> None:
        """Ahead of a launch, where that is asked for."""
        if self.compiler.mode == "now" and self.compiler.wants(step):
            self.compiler.work(step)

    def compile_beside(self, step: Step) -> None:
        """After a launch: the step is captured, and may be compiled while it serves."""
        if self.compiler.mode == "background" and step.replays and self.compiler.wants(step):
            self.compiler.start(step)

    def _run(self, session: Session, step: Step) -> None:
        try:
            with _no_compilation(step):
                step.run()
        except Exception as error:
            if not step.is_compiled:
                raise
            self._without_compilation(step, error)
            session.inputs.cache.set_length(session.used)  # some layers may have taken the token
            step.run()

    def _capture(self, step: Step | Reading) -> None:
        assert self.capture is not None
        try:
            with _no_compilation(step):
                step.graph = self.capture(step.run)
            if step.graph is not None:
                self.warm_since = time.perf_counter()
        except Exception as error:
            if isinstance(step, Step) and step.is_compiled:
                self._without_compilation(step, error)
                return
            reason = str(error).strip().partition("\n")[0]
            quiet = self.has_told or isinstance(error, UnsupportedError)
            level = logging.DEBUG if quiet else logging.WARNING
            logger.log(level, "%s of this model cannot be captured, so it runs eagerly: %s", step.name, reason)
            step.stays_eager, self.has_told = True, not quiet or self.has_told

    def _without_compilation(self, step: Step, error: Exception) -> None:
        self.compiler.fail(error)
        step.use(step.eager, 0)


def _no_compilation(step: Step | Reading) -> AbstractContextManager[Any]:
    """Nobody waits for a compiled function that would compile again: that is an error."""
    return torch.compiler.set_stance("fail_on_recompile") if step.is_compiled else nullcontext()


class Running:
    """A request at work. Between calls its last known token is `session`'s next input, and no other is under way."""

    def __init__(self, loop: Loop, request: Request) -> None:
        self.loop, self.request, self.answer = loop, request, Answer(request)
        self.reader = Reader(len(request.ids), request.ids.device)
        self._enter(loop.session_for(request, self.answer.length))

    @property
    def in_cache(self) -> torch.Tensor | None:
        """The tokens in the cache, if a later prompt may go on from them."""
        return self.answer.ids[0, : self.session.used].clone() if self.request.continues else None

    def begin(self) -> None:
        """The prompt, and the first token after it."""
        logits = self._read_prompt()
        self.answer.begin()
        self.step.keep(self.step.choice.finish(self.step.choice.reduce(logits)))
        self._send()
        self._take()

    def run(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Until the answer is whole, or somebody interrupts it between two tokens.

        A step that is replayed is launched before the token ahead of it is read: the device never waits.
        """
        is_launched = False
        while not self.answer.is_whole:
            if not is_launched:
                if interrupted():
                    return
                self._advance()
            is_launched = self._may_go_ahead and not interrupted()
            if is_launched:
                self._advance()
            self._take()

    @property
    def _may_go_ahead(self) -> bool:
        return self.answer.left > 1 and self.step.choice.inside and self.step.replays and not self.session.is_full

    def _enter(self, session: Session) -> None:
        self.session, self.step = session, session.step(self.request.choice)

    def _read_prompt(self) -> torch.Tensor:
        """Its logits, [batch, vocabulary]. What a session holds of it is not read again, if it is half of it.

        Less would not save time: tokens that come after others look at the whole cache through a mask, where a prompt
        from its start looks at itself alone. 96 tokens of SmolLM2 (nuq-4, float32, one thread, a cache of 1024): 0.48 s
        of processor time, and 0.64, 0.55 and 0.44 with 12, 24 and 48 of them held.
        """
        source, held = self.loop.sessions.longest(self.answer.known[0]) if self.request.continues else (None, 0)
        try:
            logits = self._take_prompt(source, held if 2 * held >= self.answer.length else 0)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a class that cannot do with a static cache, or the user's
            raise NotRead from error
        self.loop.compile_now(self.step)
        return logits

    def _take_prompt(self, source: Session | None, kept: int) -> torch.Tensor:
        try:
            if source is not None and source is not self.session and kept:
                self.session.move(source, kept)
            return self.session.take(self.request.prompt, kept)
        except torch.OutOfMemoryError:
            pass  # the other sessions' caches are worth less than this request; what failed is free after this block
        self.loop.sessions.clear()
        self.loop.batches.clear()
        self._enter(self.loop.session_for(self.request, self.answer.length))
        torch.cuda.empty_cache()
        return self.session.take(self.request.prompt, 0)

    def _advance(self) -> None:
        """One step, after which its token is on its way to the host."""
        if self.session.is_full:
            self._grow()
        self.loop.launch(self.session, self.step)
        self._send()
        self.loop.compile_beside(self.step)

    def _grow(self) -> None:
        before = self.session
        self._enter(self.loop.session_for(self.request, before.used))
        self.session.move(before, before.used)
        self.loop.compile_now(self.step)

    def _send(self) -> None:
        token = self.step.inputs.token
        if self.step.logits is not None:
            token.copy_(self.request.choice.outside(self.answer.known.to(token.device), self.step.logits))
        self.reader.send(token)

    def _take(self) -> None:
        self.answer.take(self.reader.read())
