"""What stands before transformers' server: bad requests are told in one line, and work stops with its client.

Its handlers trust a request: a prompt beyond the context or a negative number of tokens is computed for minutes, what
is no list of messages is an error 500, a client that has left is answered all the same, and anybody may have another
model loaded. All of that ends here, with the errors that OpenAI's clients know.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.generation.streamers import BaseStreamer

from qpalette.core.text import first_line
from qpalette.integrations.metrics import Metrics
from qpalette.integrations.seed import Seed
from qpalette.models.vocabulary import context_of

OPEN = "/health"  # without a key
METRICS = "/metrics"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", METRICS, OPEN)
TEXT = ("text", "input_text", "output_text")  # kinds of a message's parts
OF_EACH = ("max_new_tokens", "eos_token_id")  # what continuous batching takes from each request

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Count = Annotated[int, Field(ge=1)]
One = Annotated[int, Field(ge=1, le=1)] | None
Said = Annotated[str, Field(min_length=1)]


class _Asked(BaseModel):
    """What all requests may say. Other fields are looked at by transformers, which refuses those it does not know. What
    it knows and leaves out, though the answer would be another, may say only what changes nothing."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None  # transformers multiplies by 1 + it
    stop: Said | list[Said] | None = None
    n: One = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    generation_config: str | None = None
    tools: list[dict[str, Any]] | None = None


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str = ""


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[_Part] | None = None
    tool_calls: list[dict[str, Any]] = []


class _TemplateArguments(BaseModel):
    """For the model's own template: a client's would run here, and for as long as it likes."""

    model_config = ConfigDict(extra="allow", strict=True)

    chat_template: None = None


class _Text(BaseModel):
    type: Literal["text"]


class _Chat(_Asked):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d+$")], Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: Literal[False] | None = None
    response_format: _Text | None = None
    chat_template_kwargs: _TemplateArguments = _TemplateArguments()


class _Completion(_Asked):
    prompt: str
    max_tokens: Count | None = None
    best_of: One = None
    echo: Literal[False] | None = None
    logprobs: None = None
    logit_bias: None = None


class _Response(_Asked):
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_output_tokens: Count | None = None


_asked: ContextVar[dict[str, Any]] = ContextVar("asked", default={})  # noqa: B039 - nobody writes to it


class _Handler:
    """A handler of transformers, asked only for what it can do."""

    def __init__(self, handler: Any, kind: type[_Asked]) -> None:
        self._handler, self._kind = handler, kind
        if (convert := getattr(handler, "get_processor_inputs_from_messages", None)) is not None:
            handler.get_processor_inputs_from_messages = partial(_converted, convert)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            asked = self._kind.model_validate(body)
        except ValidationError as error:
            raise HTTPException(400, _told(error.errors()[0])) from error
        if bias := getattr(asked, "logit_bias", None):
            body["logit_bias"] = bias  # as floats: transformers refuses whole numbers, which OpenAI's clients send
        if body.get("stop") == []:
            del body["stop"]
        _asked.set(body)
        try:
            return await self._handler.handle_request(body, request_id)
        except (ValueError, TypeError, KeyError, TemplateError) as error:  # how transformers and templates refuse
            reason = first_line(error)
            raise HTTPException(400, f"the request cannot be answered ({type(error).__name__}: {reason})") from error


def _converted(convert: Callable[..., Any], messages: Any, modality: Any) -> Any:
    """Messages as `convert` of transformers makes them for a model. Raises HTTPException for a part that it would leave
    out without a word, such as an image for a model of text."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None  # no dictionary: told by `convert`
        for part in content if isinstance(content, list) else ():
            if part["type"] in TEXT:
                continue
            if not convert([{"role": message["role"], "content": [part]}], modality)[0]["content"]:
                raise HTTPException(400, f"this model reads no {part['type']}: send it text")
    return convert(messages, modality)


class _Manager:
    """A generation manager of transformers whose requests fit the model's context, and stop with their clients."""

    def __init__(self, manager: Any, batches: bool) -> None:
        self._manager, self._batches = manager, batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any) -> Any:
        self._check(model, inputs, gen_config)
        return self._manager.generate_streaming(model, processor, self._seeded(inputs), gen_config, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        self._check(model, inputs, gen_config)
        stop = _Stop()
        given = inputs if self._batches else {**self._seeded(inputs), "streamer": stop}
        work = asyncio.ensure_future(
            self._manager.generate_non_streaming(model, processor, given, gen_config, request_id=request_id)
        )
        try:
            return await asyncio.shield(work)  # a thread sets its result, cancelled or not
        except asyncio.CancelledError:
            stop.gone.set()
            work.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else looks at it
            if self._batches:
                self._manager._cb.cancel_request(request_id)
                work.cancel()
            raise

    def _check(self, model: Any, inputs: Any, gen_config: Any) -> None:
        """Raises HTTPException for a prompt that does not fit, and for what a batch would not do without a word."""
        _fit(model, inputs, gen_config)
        _check_answer(model, gen_config)
        if _asked.get().get("temperature") or _asked.get().get("top_p") is not None:
            gen_config.do_sample = gen_config.temperature != 0  # a model's own default may be not to
        if not self._batches:
            self._call_together(model)
        else:
            said = {name: value for name, value in gen_config.to_dict().items() if name not in OF_EACH}
            first = vars(self._manager).setdefault("first_asked_for", said)
            if differing := sorted(name for name in said | first if said.get(name) != first.get(name)):
                raise HTTPException(
                    400,
                    f"continuous batching answers all requests as the first one: {differing[0]} is "
                    f"{first.get(differing[0])}, not {said.get(differing[0])}",
                )

    def _seeded(self, inputs: Any) -> Any:
        """With the request's seed: torch's generator, which transformers sets when a request comes, is everybody's."""
        seed = _asked.get().get("seed")
        return inputs if seed is None or self._batches else {**inputs, "logits_processor": [Seed(seed)]}

    def _call_together(self, model: Any) -> None:
        """As many threads call `model.generate` as it answers callers together: ours says so, others take one."""
        slots = getattr(model.generate, "slots", 1)
        if slots > 1 and not isinstance(self._manager._thread, _Threads):
            self._manager._thread = _Threads(slots)


class _Threads:
    """Stand for the one thread in which transformers calls `generate`."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "generate")

    def submit(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        return self._pool.submit(work, *args, **kwargs)

    def async_submit(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args, **kwargs))


class _ClientGone(Exception):
    """Ends a generation that nobody waits for."""


class _Stop(BaseStreamer):
    """Ends `generate` before its next step."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def put(self, value: Any) -> None:
        if self.gone.is_set():
            raise _ClientGone

    def end(self) -> None:
        """All was written."""


def _fit(model: Any, inputs: Any, gen_config: Any) -> None:
    """No more new tokens than the context has room for. Raises HTTPException where there is none, or no prompt."""
    ids = inputs["input_ids"]
    length = len(ids) if isinstance(ids, list) else ids.shape[-1]
    if length == 0:
        raise HTTPException(400, "the prompt is empty")
    context = context_of(model)
    if context is None:
        return
    if length >= context:
        raise HTTPException(400, f"the prompt has {length} tokens and the model's context is {context}: shorten it")
    if gen_config.max_new_tokens is not None:
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, context - length)


def _check_answer(model: Any, gen_config: Any) -> None:
    """Raises HTTPException for more answers than one, which a generation config may ask for, too, and for a bias of
    tokens that are none, which would break off the answer."""
    for name in ("num_return_sequences", "num_beams"):
        if (getattr(gen_config, name, None) or 1) > 1:
            raise HTTPException(400, f"{name} is {getattr(gen_config, name)}: one answer is made for each request")
    size = model.config.get_text_config().vocab_size
    biased = [token for tokens in getattr(gen_config, "sequence_bias", None) or () for token in tokens]
    if isinstance(size, int) and (beyond := [token for token in biased if token >= size]):
        raise HTTPException(400, f"logit_bias: the model has {size} tokens, and none is {beyond[0]}")


def guarded(build: Callable[..., FastAPI], key: str | None) -> Callable[..., Any]:
    """transformers' `build_server`, whose arguments these are, with all of this before it. `key`: what a client has to
    know, as OpenAI's clients send it."""

    def build_guarded(
        model_manager: Any, chat_handler: Any, completion_handler: Any, response_handler: Any, **more: Any
    ) -> Any:
        state = more["generation_state"]
        manager_of = state.get_manager
        state.get_manager = lambda model_id, use_cb=False: _Manager(manager_of(model_id, use_cb=use_cb), use_cb)
        app = build(
            model_manager,
            _Handler(chat_handler, _Chat),
            completion_handler=_Handler(completion_handler, _Completion),
            response_handler=_Handler(response_handler, _Response),
            **more,
        )
        app.exception_handler(StarletteHTTPException)(_one_line)  # fastapi's own is one, too
        app.exception_handler(RequestValidationError)(_no_object)
        app.exception_handler(Exception)(_broken)
        return _Guard(app, key)

    return build_guarded


async def _one_line(request: Any, error: StarletteHTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


async def _broken(request: Any, error: Exception) -> JSONResponse:
    return _error(500, f"the answer broke off ({type(error).__name__}: {first_line(error)})")


async def _no_object(request: Any, error: RequestValidationError) -> JSONResponse:
    return _error(400, "the request is no JSON object")


class _Guard:
    """The outermost ASGI application: paths, the key, clients that leave, and what is counted of all."""

    def __init__(self, app: FastAPI, key: str | None) -> None:
        self._app, self._key, self._metrics = app, key, Metrics()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if scope["path"] not in PATHS:
            return await _error(404, f"there is no {scope['path']} here: {', '.join(PATHS)}")(scope, receive, send)
        if not self._knows_key(scope):
            return await _error(401, "the server asks for its key: Authorization: Bearer KEY")(scope, receive, send)
        if scope["path"] == METRICS:
            return await self._metrics.page()(scope, receive, send)
        with self._metrics.watching(scope["path"], send) as watched:
            await self._while_heard(scope, receive, watched)

    def _knows_key(self, scope: Any) -> bool:
        if self._key is None or scope["path"] == OPEN or scope["method"] == "OPTIONS":  # a browser asks without it
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())

    async def _while_heard(self, scope: Any, receive: Receive, send: Send) -> None:
        """The application, cancelled when its client leaves: a handler that waits for an answer does not look."""
        heard: asyncio.Queue[Any] = asyncio.Queue()

        async def listen() -> None:
            message: Any = {}
            while message.get("type") != "http.disconnect":
                message = await receive()
                heard.put_nowait(message)

        work = asyncio.ensure_future(self._app(scope, heard.get, send))
        client = asyncio.ensure_future(listen())
        try:
            await asyncio.wait({work, client}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            client.cancel()
            if work.cancel():
                await asyncio.wait({work})


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def _told(error: Any) -> str:
    """Such as "max_tokens: Input should be greater than or equal to 1, got -5"."""
    place = ".".join(map(str, error["loc"]))
    given = json.dumps(error["input"], default=str)
    return f"{place}: {error['msg']}" + ("" if error["type"] == "missing" else f", got {given[:80]}")
