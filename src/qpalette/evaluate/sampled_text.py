"""Text without any data: sampled from the model itself, as a chat where it knows one."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qpalette.core.errors import InputError
from qpalette.core.resume import PartialFigures
from qpalette.evaluate.continuation import continuing, last_logits
from qpalette.evaluate.reserved_cache import bytes_of, cache_of
from qpalette.models.vocabulary import check_tokens

TOKEN_FILE = ".tokens.json"  # how the name of a file of tokens ends
KIND = "sampled text"
# Windows written side by side. A GPU waits for the host until about 64. A processor's core takes 9.5 ms for a token of
# SmolLM2 with 16, 7.4 with 36 and 6.8 with 64: as many as have keys and values in CACHE_BYTES, half of what the sums of
# a calibration may take after it. Not what is free: the text would be another on another day.
LEAST, BLOCK = 16, 64
CACHE_BYTES = 2 << 30

Progress = Callable[[int, int], None]  # (tokens written, tokens in all)


class Chat(NamedTuple):
    """A conversation as the tokenizer's template spells it, tokens, without what its two sides say."""

    opening: tuple[int, ...]  # up to the user's first word: begin of text, system prompt, the user's header
    to_assistant: tuple[int, ...]  # from the end of the user's turn to the assistant's first word
    to_user: tuple[int, ...]  # and back
    marks: frozenset[int]  # tokens that end a turn: those two begin with one, unless they begin as any text may


def sample_windows(
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int = 0,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> list[torch.Tensor]:
    """`count` windows of `length` tokens that `model` writes at temperature 1, int64 [length] each.

    With a chat template in `tokenizer` a window is a conversation, of which the model writes both sides: the template's
    headers stand between them, and a token that ends a turn ends it. Else it starts after the BOS token (EOS, or token
    0, in a model without one), which is not part of it, and goes on past an end of text, as running text does.

    Windows are written a block at a time (`side_by_side`), all of a block in one batch. The same model, seed, device
    and torch give the same windows, and fewer are the first of more, in whole blocks. `keep` is a token file, in which
    each block is kept as soon as it is whole: what it has of this model, seed and length is not written again.

    Raises UnsupportedError for a model without a cache.
    """
    chat = chat_of(tokenizer)
    if chat is not None:
        check_tokens([*chat.opening, *chat.to_assistant, *chat.to_user], model, tokenizer)
    identity = {"kind": KIND, "model": mark_of(model), "length": str(length), "seed": str(seed)}
    kept = None if keep is None else PartialFigures(keep, identity)
    windows: list[list[int]] = [] if kept is None else kept.figures.setdefault("windows", [])
    block = LEAST if count <= LEAST else side_by_side(model.device, _window_bytes(model, chat, length))
    while len(windows) < count:
        indices = range(len(windows), min(len(windows) + block, count))
        done = len(windows) * length

        def told(tokens: int, done: int = done) -> None:
            if progress is not None:
                progress(done + tokens, count * length)

        windows += _write(model, _Writers(model, chat, indices, length, seed), length, told)
        if kept is not None:
            kept.file.parent.mkdir(parents=True, exist_ok=True)
            kept.save()
    return [torch.tensor(window, dtype=torch.int64) for window in windows[:count]]


def side_by_side(device: torch.device, window_bytes: int) -> int:
    """How many windows are a block, where keys and values of one take `window_bytes`."""
    return BLOCK if device.type == "cuda" else max(LEAST, min(BLOCK, CACHE_BYTES // max(1, window_bytes)))


def is_token_file(file: str | Path) -> bool:
    """Whether `file` is named as `sample_windows` names what it keeps."""
    return str(file).endswith(TOKEN_FILE)


def read_token_file(file: str | Path) -> list[torch.Tensor]:
    """The windows in a token file, int64 [length] each. Raises InputError when it is none."""
    path = Path(file).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        windows = content["figures"]["windows"]
        if content["identity"]["kind"] != KIND or not windows or not all(map(_is_window, windows)):
            raise ValueError("no windows of two tokens or more in it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no file of sampled tokens ({error}); leave it away, or give a text file") from (
            error
        )
    return [torch.tensor(window, dtype=torch.int64) for window in windows]


def _is_window(window: Any) -> bool:
    whole = isinstance(window, list) and all(type(token) is int and 0 <= token < 1 << 31 for token in window)
    return whole and len(window) > 1


def chat_of(tokenizer: Any) -> Chat | None:
    """How the tokenizer's template spells a chat; None without a template, or where what is said does not stand in it
    as it is."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    said = ("qpalettefirst", "qpalettesecond", "qpalettethird")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # whatever the template's own code raises on a conversation that it does not like
        return None
    parts = []
    for content in said:
        before, found, text = text.partition(content)
        if not found:
            return None
        parts.append(tuple(tokenizer.encode(before, add_special_tokens=False)))
    if not all(parts) or not text:
        return None
    to_assistant, to_user = tuple(tokenizer.encode(text, add_special_tokens=False)), parts[2]
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return Chat(parts[0], to_assistant, to_user, frozenset({to_assistant[0], to_user[0]} & special))


class _Writers:
    """Those who write the windows `indices` of one block: what the template says in between, random numbers."""

    def __init__(self, model: Any, chat: Chat | None, indices: Sequence[int], length: int, seed: int) -> None:
        self.chat = chat
        self.ends = _ends_of(model) | (chat.marks if chat else set())
        self.count = len(indices)
        self._waiting: list[deque[int]] = [deque() for _ in indices]  # what a writer has to write next
        self._turns = [0] * len(indices)
        draws = [torch.rand(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in indices]
        self.draws = torch.stack(draws).to(model.device)

    def choose(self, sampled: Sequence[int]) -> list[int]:
        """The next token of each: the one that it has drawn, or what the template wants there."""
        return [self._next(index, token) for index, token in enumerate(sampled)]

    def _next(self, index: int, token: int) -> int:
        waiting = self._waiting[index]
        if not waiting and self.chat is not None and token in self.ends:
            waiting.extend(self.chat.to_assistant if self._turns[index] % 2 == 0 else self.chat.to_user)
            self._turns[index] += 1
        return waiting.popleft() if waiting else token


@torch.inference_mode()
def _window_bytes(model: Any, chat: Chat | None, length: int) -> int:
    opening = torch.tensor([_opening(model, chat)], device=model.device)
    _, cache = cache_of(model(opening, use_cache=True, **last_logits(model)))
    return bytes_of(cache, length)


@torch.inference_mode()  # not around what is returned: it may be read where gradients are wanted
def _write(model: Any, writers: _Writers, length: int, told: Callable[[int], None]) -> list[list[int]]:
    opening = _opening(model, writers.chat)
    windows = [list(opening) if writers.chat is not None else [] for _ in range(writers.count)]
    step = torch.tensor([opening] * writers.count)
    with continuing(model, len(opening) + length) as continuation:
        while len(windows[0]) < length:
            logits = continuation.logits(step)
            chosen = writers.choose(_draw(logits, writers.draws[:, len(windows[0])]))
            for window, token in zip(windows, chosen, strict=True):
                window.append(token)
            step = torch.tensor(chosen)[:, None]
            told(len(windows[0]) * writers.count)
    return [window[:length] for window in windows]


def _draw(logits: torch.Tensor, uniform: torch.Tensor) -> list[int]:
    """One token of each row by its probability: `uniform` [n] of [0, 1) finds it in the running sum."""
    sums = logits.float().softmax(-1).cumsum(-1)
    places = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)
    return places[:, 0].clamp(max=logits.shape[-1] - 1).tolist()


def _ends_of(model: Any) -> set[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    return set(end if isinstance(end, list) else [] if end is None else [end])


def mark_of(model: Any) -> str:
    """Tells models apart: the config, and a sample of each parameter and buffer."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:16].cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _opening(model: Any, chat: Chat | None) -> list[int]:
    """What is read before the first token is drawn."""
    return [_start_token(model.config)] if chat is None else list(chat.opening)


def _start_token(config: Any) -> int:
    text_config = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(text_config, name, None)
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return 0
