"""One streamed answer of a model: what `generate` and `chat` share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qpalette.cli.output import token_bar
from qpalette.core.errors import InputError

Message = dict[str, str]  # {"role": "user" or "assistant", "content": text}

# Of a model's generation_config.json, what is said of an answer itself. How it is searched for (beams, several of them,
# assistants), what else is returned and where the cache lies are not: one answer is streamed, as the options say.
OF_AN_ANSWER = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "stop_strings"),
    *("min_length", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("exponential_decay_length_penalty", "remove_invalid_values"),
)


@dataclass(frozen=True)
class Answer:
    """What was written and how fast."""

    text: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float  # until the first token
    seconds: float  # from the second token to the last: the step that makes the second compiles kernels

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the second; None when there are none."""
        return (self.tokens - 2) / self.seconds if self.tokens > 2 and self.seconds > 0 else None

    def describe(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.1f} tokens/s"
        prompt = f"prompt of {self.prompt_tokens} tokens: {self.prompt_seconds:.1f} s"
        return f"{self.tokens} tokens{speed} ({prompt})"


def check_sampling(max_new_tokens: int, temperature: float) -> None:
    """Raises InputError on values that no model can sample with; call it before anything is loaded."""
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature must be a finite number of at least 0, got {temperature}")


def open_model(
    model: str, engine: str, device: str, dtype: str | None, compile: str, cache: str | None = None
) -> tuple[Any, Any]:
    """The model on `device` and its tokenizer; `dtype` by default float16 on a GPU and float32 on a CPU. On a GPU its
    `generate` is the fast one, with steps compiled as `compile` says; `cache` is of `qpalette.load`.

    Raises InputError for an engine, device, type or `compile` that cannot be used here and for a model without a
    tokenizer, and as `load_model` does.
    """
    from qpalette.api import load
    from qpalette.evaluate.text_source import check_tokenizer_of
    from qpalette.kvcache import parse_cache
    from qpalette.models.vocabulary import check_tokenizer
    from qpalette.runtime.device import parse_device

    if engine != "transformers":
        raise InputError(f"--engine {engine}: answers here come from transformers; other engines have `qpalette serve`")
    if cache not in (None, "none"):
        parse_cache(str(cache))  # a wrong one is told before minutes of loading
    where = parse_device(device)
    kind = parse_dtype(dtype or ("float16" if where.type == "cuda" else "float32"))
    check_tokenizer_of(model)  # before minutes of loading
    given: dict[str, Any] = {"device": where, "dtype": kind, "compile": compile, "cache": cache}
    with token_bar("calibrating the cache") as bar:
        loaded, tokenizer = load(model, fast=True, **given, writing=bar.show)
    check_tokenizer(tokenizer, model)
    loaded.generation_config = _of_an_answer(loaded.generation_config)
    return loaded, tokenizer


def _of_an_answer(config: Any) -> Any:
    from transformers import GenerationConfig

    kept = {name: getattr(config, name, None) for name in OF_AN_ANSWER}
    return GenerationConfig(**{name: value for name, value in kept.items() if value is not None})


def parse_dtype(name: str) -> Any:
    """The torch type. Raises InputError for what no model computes in."""
    import torch

    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise InputError(f"'{name}' is not a type to compute in: choose {', '.join(known)}")
    return known[name]


def prompt_of(tokenizer: Any, messages: Sequence[Message]) -> Any:
    """int64 [1, tokens]: the conversation as the tokenizer's chat template writes it."""
    encoded = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def stream_answer(
    model: Any, tokenizer: Any, prompt: Any, max_new_tokens: int, temperature: float, write: Callable[[str], None]
) -> Answer:
    """Continue `prompt` (int64 [1, tokens]), giving each finished word to `write`.

    Temperature 0 always takes the most likely token. Raises InputError when the prompt is empty, has a token that the
    model does not know, or leaves no room for an answer in the model's context.
    """
    import torch

    from qpalette.models.vocabulary import check_tokens

    length = prompt.shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if length == 0:
        raise InputError("the prompt is empty")
    if length >= context:
        raise InputError(f"the prompt has {length} tokens and the model's context is {context}; shorten it")
    check_tokens(prompt[0].tolist(), model, tokenizer)
    streamer = _streamer(tokenizer, write)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else _GREEDY
    result = model.generate(
        prompt.to(model.device),
        attention_mask=torch.ones_like(prompt, device=model.device),
        max_new_tokens=int(min(max_new_tokens, context - length)),
        pad_token_id=_pad_token(model, tokenizer),
        streamer=streamer,
        tokenizer=tokenizer,  # which stop strings are looked for with
        **sampling,
    )
    written = result[0, length:]
    first, second, last = streamer.moments[0], streamer.moments[:2][-1], streamer.moments[-1]
    return Answer(
        text=tokenizer.decode(written, skip_special_tokens=True),
        prompt_tokens=length,
        tokens=len(written),
        prompt_seconds=first - streamer.start,
        seconds=last - second,
    )


_GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


def _pad_token(model: Any, tokenizer: Any) -> int:
    """Never used with one prompt, but asked for."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return 0


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Passes text on and notes when each token came."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.start = time.perf_counter()
            self.moments: list[float] = []
            self.prompt_seen = False

        def put(self, value: Any) -> None:
            if self.prompt_seen:
                self.moments.append(time.perf_counter())
            self.prompt_seen = True
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer()
