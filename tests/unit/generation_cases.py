"""Models and requests that the decoding loop is tried on, and what stands for a captured step there."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

from qpalette.backends.cpu.step import Program
from qpalette.backends.cuda.graphs import Capture
from qpalette.generation import batch, loop
from qpalette.generation.native import ProgramCapture
from qpalette.generation.session import Session
from qpalette.kvcache import lengths

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # logits far apart, so that greedy tokens mean something
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MAKERS: dict[str, Callable[..., torch.nn.Module]] = {  # of what is other than usual
    "llama": lambda **other: LlamaForCausalLM(LlamaConfig(**SIZES | other)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt2": lambda n_positions=512: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=n_positions,
            initializer_range=0.4,
            eos_token_id=None,
            bos_token_id=0,
        )
    ),
}
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


class Replay:
    """What a CUDA graph is to the loop: something that does the step again."""

    made = 0

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = weakref.WeakMethod(work)  # a graph knows memory, and keeps no step
        Replay.made += 1

    def replay(self) -> None:
        self.work()()


class Programs(ProgramCapture):
    """Steps as programs of compiled kernels; waits for these, so that every test has them."""

    def __call__(self, work: Callable[[], None]) -> Program | None:
        program = super().__call__(work)
        if program is None:
            self.wait()
            program = super().__call__(work)
        Replay.made += 1
        return program


@pytest.fixture(params=[None, Replay, Programs], ids=["eager", "captured", "program"])
def capture(request) -> Capture | None:
    Replay.made = 0
    return Programs() if request.param is Programs else request.param


@pytest.fixture
def short_caches(monkeypatch):
    """Buckets of 32 tokens, so that requests of the tests outgrow them."""
    monkeypatch.setattr(lengths, "STEP", 32)
    for module in (loop, batch):
        monkeypatch.setattr(module, "AHEAD", 32)


def build(kind: str = "llama", **other: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return MAKERS[kind](**other).eval()


def prompt(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = prompt(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : ids.shape[1] - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def whole(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Without a mask transformers takes a token of the padding's number for padding."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Puts(BaseStreamer):
    def __init__(self, stop_at: int | None = None) -> None:
        self.puts, self.ended, self.stop_at = [], 0, stop_at

    def put(self, value) -> None:
        if len(self.puts) == self.stop_at:
            raise KeyboardInterrupt
        self.puts.append((value.device.type, value.dtype, value.tolist()))

    def end(self) -> None:
        self.ended += 1


def sessions_of(model) -> list[Session]:
    """None of them before the loop has run."""
    running = model.generate.loop
    return [] if running is None else list(running.sessions)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character."""
    inner = Tokenizer(models.BPE({chr(32 + number): number for number in range(VOCABULARY)}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)
