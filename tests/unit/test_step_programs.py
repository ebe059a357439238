"""Token steps of many classes as programs on the CPU, against the same steps run by torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
import transformers
from generation_cases import SIZES

from qpalette.backends.cpu.step import Program, instructions_of
from qpalette.backends.cpu.step.program import Called
from qpalette.generation import attach, fast
from qpalette.generation.cache import CacheMaker, CodedTokenCache
from qpalette.generation.choice import choice_of
from qpalette.generation.session import Session
from qpalette.kvcache import parse_cache
from qpalette.nn.token_cache import TokenCache

WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
# A padded prompt's mask is looked up by two indices, once a step: torch is called for that.
MASK = {"aten.index.Tensor"}
ROUTES = {"aten.topk.default", "aten.sort.default", "aten.histc.default", "aten._grouped_mm.default"}


def made(name: str, config: str = "", **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        of = getattr(transformers, (config or name) + "Config")
        return getattr(transformers, f"{name}ForCausalLM")(of(**SIZES | more))

    return make


MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {  # and what torch is called for
    "llama": (made("Llama"), MASK),
    "biases": (made("Qwen2"), MASK),
    "norms of queries and keys": (made("Qwen3"), MASK),
    "soft caps": (made("Gemma2", **WINDOWS), MASK),
    "windows": (made("Gemma3", "Gemma3Text", **WINDOWS), MASK),
    "partial rope, layer norms": (made("Phi"), MASK),
    "parallel residual": (made("GPTNeoX"), MASK),
    "interleaved rope": (made("Cohere"), MASK),
    "learned positions, Conv1D": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4)
        ),
        MASK,
    ),
    "experts": (made("Mixtral"), MASK | ROUTES | {"aten.floor_divide.default", "aten.cumsum.default"}),
}


def build(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().eval().to(dtype)


def session_of(model: Any, padded: bool, make: CacheMaker = TokenCache) -> Session:
    """With a prompt of two sequences in its cache, and a token to go on with."""
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    prompt = {"input_ids": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        prompt |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    session = Session(model, 2, 32, padded, padded, make)
    logits = session.take(prompt, 0)
    session.inputs.token.copy_(logits.argmax(-1, keepdim=True))
    return session


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_the_eager_step(name, padded, dtype):
    """A layer has some twenty tensors whose values differ where sums are taken in another order, independently of each
    other: in 16 bits they may fall to the neighbour, in float32 a sum of 48 terms has up to sqrt(48 / 3) units of its
    own, and both are allowed twice that, for what weights make of it. Another token, or another place, changes logits
    by about themselves."""
    model = build(name, dtype)
    found, wanted = session_of(model, padded), session_of(model, padded)
    steps = [session.step(choice_of(False, [_any_processor], torch.device("cpu"))) for session in (found, wanted)]
    for step in steps:
        step.run()
    instructions = instructions_of(steps[0].run)
    called = Counter(str(each.operation.function) for each in instructions if isinstance(each, Called))
    if name == "experts":
        assert called, "routing is torch's"
    else:
        assert called.keys() <= MODELS[name][1]
    program = Program(instructions)
    units = 2 * (sqrt(48 / 3) if dtype == torch.float32 else 1)
    bound = units * torch.finfo(dtype).eps * sqrt(20 * 2 + 10)
    for token in (5, 77, 30, 5, 8):
        for step in steps:
            step.inputs.token.fill_(token)
        before = found.step(steps[0].choice).logits.clone()
        program.replay()
        steps[1].run()
        assert not torch.allclose(steps[0].logits, before, rtol=0.1)
        assert (steps[0].logits - steps[1].logits).norm() <= bound * steps[1].logits.norm()
    lengths = [session.inputs.cache.get_seq_length() for session in (found, wanted)]
    assert lengths[0] == lengths[1] == 15


def coded(config: Any, length: int) -> CodedTokenCache:
    return CodedTokenCache(config, length, parse_cache("white:nuq-3,sinks=2,window=3"), None)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "experts"])
@torch.no_grad()
def test_over_codes_they_are_those_of_the_eager_step(name, padded):
    """In float32, by the same bound: no key lies so near to the border of two codes that its rounding decides. Torch is
    called to decode them where attention is no one function of torch's."""
    model = build(name, torch.float32)
    found, wanted = session_of(model, padded, coded), session_of(model, padded, coded)
    steps = [session.step(choice_of(False, [_any_processor], torch.device("cpu"))) for session in (found, wanted)]
    for step in steps:
        step.run()
    instructions = instructions_of(steps[0].run)
    called = Counter(str(each.operation.function) for each in instructions if isinstance(each, Called))
    decoded = {"qpalette.cpu_cache_read.default"} if name == "soft caps" else set()
    assert called.keys() - MASK == decoded
    program = Program(instructions)
    for token in (5, 77, 30, 5, 8):
        for step in steps:
            step.inputs.token.fill_(token)
        program.replay()
        steps[1].run()
        bound = 2 * sqrt(48 / 3) * torch.finfo(torch.float32).eps * sqrt(20 * 2 + 10)
        assert (steps[0].logits - steps[1].logits).norm() <= bound * steps[1].logits.norm()
    memory = [[each for layer in session.inputs.cache.layers for each in layer.memory] for session in (found, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*memory, strict=True) if not a.is_floating_point())


def test_generate_over_codes_is_captured():
    """Of two equal prompts the second goes on from what the cache has of the first, which are codes."""
    model, eager = build("llama", torch.float32), build("llama", torch.float32)
    fast(model, cache=coded)
    attach(eager, "never", None, coded)
    ids, options = torch.full((1, 7), 9), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))
        model.generate.wait()
    (session,) = model.generate.loop.sessions
    assert [type(step.graph) for step in session.steps.values()] == [Program]


def _any_processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """One that the loop does not know, so that the step leaves logits."""
    return scores


def test_a_step_that_reads_values_stays_eager_without_a_word(caplog):
    """Python that looks at values, as for a rope that grows with the text."""
    model = build("llama", torch.float32)

    def look(module: Any, given: tuple[torch.Tensor]) -> None:
        assert given[0].max().item() < 96

    model.model.embed_tokens.register_forward_pre_hook(look)
    ids, options = torch.full((1, 7), 9), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    fast(model)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            assert torch.equal(model.generate(ids, **options), wanted)
            model.generate.wait()
    said = [record for record in caplog.records if "captured" in record.message]
    assert [record.levelno for record in said] == [logging.DEBUG]
    assert "_local_scalar_dense" in said[0].message


def test_weights_written_to_are_seen_and_exchanged_ones_captured_anew():
    model, fresh = build("llama", torch.float32), build("llama", torch.float32)
    fast(model)
    ids, options = torch.full((1, 7), 9), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, **options)
    model.generate.wait()

    def written(each: Any) -> None:
        each.lm_head.weight.data.mul_(-1)

    def exchanged(each: Any) -> None:
        torch.manual_seed(3)
        each.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(48, 32))

    for change in (written, exchanged):
        for each in (model, fresh):
            change(each)
        for _ in range(2):
            assert torch.equal(model.generate(ids, **options), fresh.generate(ids, **options))
        programs = [step.graph for session in model.generate.loop.sessions for step in session.steps.values()]
        assert any(isinstance(program, Program) for program in programs)
