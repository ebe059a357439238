"""Generation by captured and compiled steps, on a GPU.

Models in float32, whose logits lie far apart: the orders of summation of two kernels do not change a token.
"""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from qpalette.backends.cuda.graphs import capture_graph
from qpalette.bench import from_config
from qpalette.bench.models import groups_of
from qpalette.generation import attach, fast
from qpalette.generation.choice import draw
from qpalette.generation.session import CHOICES, SESSIONS
from qpalette.plan import uniform_plan

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GREEDY = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}


def build(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "packed":
        config = LlamaConfig(**SIZES)
        plan = uniform_plan(groups_of(config).groups, "tcq2-3.25")
        return from_config("x", config, plan, torch.float16, torch.device("cuda"), None).build()
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(**SIZES, sliding_window=40, layer_types=layers)
        return Gemma3ForCausalLM(config).cuda().eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).cuda().eval()


def prompt(batch: int, tokens: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SIZES["vocab_size"], (batch, tokens), generator=generator).cuda()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    inputs = prompt(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        inputs["attention_mask"][row, : max(lengths) - length] = 0
    return inputs


def steps_of(model) -> list:
    return [step for session in model.generate.loop.sessions for step in session.steps.values()]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "packed"])
@pytest.mark.parametrize(
    "inputs", [lambda: prompt(1, 100), lambda: prompt(4, 30), lambda: padded([20, 90])], ids=["one", "four", "padded"]
)
def test_captured_steps_give_the_tokens_of_eager_ones(kind, inputs) -> None:
    model = fast(build(kind))
    eager = copy.deepcopy(model)
    attach(eager, "never", None)
    wanted = eager.generate(**inputs(), **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs(), **GREEDY), wanted)
    assert all(step.graph is not None for step in steps_of(model))
    if kind != "packed":  # in float16, an order of summation may
        assert torch.equal(wanted, build(kind).generate(**inputs(), **GREEDY))


def test_a_conversation_grows_out_of_its_cache() -> None:
    model, plain = fast(build()), build()
    history = prompt(1, 900)
    for turn in range(4):
        wanted = plain.generate(**history, **GREEDY | {"max_new_tokens": 200})
        answer = model.generate(**history, **GREEDY | {"max_new_tokens": 200})
        assert torch.equal(answer, wanted)
        ids = torch.cat([answer, prompt(1, 20, seed=turn)["input_ids"]], 1)
        history = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_seed_repeats_whether_a_step_is_captured_yet_or_not() -> None:
    model = fast(build())
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**prompt(2, 40), **GREEDY | {"do_sample": True, "top_k": 0}).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_captured_draws_have_their_probabilities() -> None:
    """Chi square of 16 outcomes: above 15 + 6 sqrt(30) = 48 once in some 50000 tries; and no draw is another's."""
    probabilities = torch.arange(1, 17, device="cuda", dtype=torch.float32)
    probabilities = (probabilities / probabilities.sum()).expand(4096, -1).contiguous()
    drawn = torch.zeros(4096, 1, dtype=torch.int64, device="cuda")

    def work() -> None:
        drawn.copy_(draw(probabilities))

    torch.manual_seed(0)
    work()
    graph = capture_graph(work)
    all_drawn = []
    for _ in range(10):
        graph.replay()
        all_drawn.append(drawn.clone())
    assert not any(torch.equal(one, other) for one in all_drawn for other in all_drawn if one is not other)
    counts = torch.cat(all_drawn).flatten().bincount(minlength=16).double()
    expected = 40960 * probabilities[0].double()
    assert float(((counts - expected).square() / expected).sum()) < 48


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", ["now", "background"])
def test_compiled_steps_give_the_same_tokens(kind, mode) -> None:
    torch._dynamo.reset()
    wanted = {batch: build(kind).generate(**prompt(batch, 50), **GREEDY) for batch in (1, 3)}
    model = fast(build(kind), mode)
    for batch in (1, 3):
        for _ in range(2):
            assert torch.equal(model.generate(**prompt(batch, 50), **GREEDY), wanted[batch])
            model.generate.wait()
    assert not model.generate.loop.compiler.failed
    assert all(step.is_compiled and step.graph is not None for step in steps_of(model))


def test_a_packed_model_is_compiled_with_its_launches() -> None:
    torch._dynamo.reset()
    model = fast(build("packed"), "now")
    model.generate(**prompt(1, 50), **GREEDY)
    assert not model.generate.loop.compiler.failed
    assert all(step.is_compiled and step.graph is not None for step in steps_of(model))


def test_tokens_come_while_a_step_is_compiled() -> None:
    """Hundreds of requests' captures, copies and waits beside a compilation; every one gives the same tokens."""
    torch._dynamo.reset()
    wanted = build().generate(**prompt(1, 50), **GREEDY)
    model = fast(build(), "background")
    model.generate(**prompt(1, 50), **GREEDY)
    beside = 0
    while model.generate.loop.compiler.busy:
        assert torch.equal(model.generate(**prompt(1, 50), **GREEDY), wanted)
        beside += 1
    assert beside
    assert torch.equal(model.generate(**prompt(1, 50), **GREEDY), wanted)
    assert not model.generate.loop.compiler.failed


def test_memory_stays_flat_over_200_requests() -> None:
    """What sessions of the same lengths hold is the same after 20 requests and after 200: nothing else is kept."""
    model = fast(build())
    random = torch.Generator().manual_seed(0)
    held: dict[bool, set[int]] = {}
    for number in range(200):
        tokens, new, batch = (int(torch.randint(low, high, (), generator=random)) for low, high in SPANS)
        sampling = {"do_sample": bool(number % 2), "top_k": 0, "temperature": 1 + number % 5 / 5}
        model.generate(**prompt(batch, tokens, number), max_new_tokens=new, pad_token_id=0, **sampling)
        sessions = list(model.generate.loop.sessions)
        assert len(sessions) <= SESSIONS
        assert all(len(session.steps) <= CHOICES + 1 for session in sessions)
        caches = sum(session.inputs.cache.bytes for session in sessions)
        held.setdefault(number >= 20, set()).add(torch.cuda.memory_allocated() - caches)
    # Beyond the caches: the weights, a few tokens and logits for each step, and what graphs keep for themselves.
    logits = SESSIONS * (CHOICES + 1) * SPANS[2][1] * SIZES["vocab_size"] * 4
    assert max(held[True]) <= max(held[False]) + logits + (8 << 20)


SPANS = ((1, 2500), (2, 24), (1, 4))  # tokens of a prompt, new tokens, sequences


def test_a_streamer_has_the_first_token_before_the_step_is_captured() -> None:
    moments: list[float] = []

    class Times(BaseStreamer):
        def put(self, value) -> None:
            moments.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is left."""

    model = fast(build())
    model.generate(**prompt(1, 50), **GREEDY, streamer=Times())
    assert moments[1] < model.generate.warm_since < moments[-1]


def test_an_uncapturable_model_still_answers(caplog) -> None:
    """Its forward waits for the device, as a rotary embedding that grows with the text does."""
    model, plain = fast(build()), build()
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, given: (bool(given[0].sum() == 0), None)[1])
    for _ in range(2):
        assert torch.equal(model.generate(**prompt(1, 50), **GREEDY), plain.generate(**prompt(1, 50), **GREEDY))
    assert sum("cannot be captured" in record.getMessage() for record in caplog.records) == 1
    torch.rand(2, device="cuda")  # the process can still draw
    sampled = {"do_sample": True, "max_new_tokens": 5, "pad_token_id": 0}
    assert fast(build()).generate(**prompt(1, 50), **sampled).shape == (1, 55)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_requests_of_several_threads_are_answered_in_one_batch(kind):
    model = build(kind)
    requests = [prompt(1, tokens, seed=tokens) | GREEDY for tokens in (9, 40, 3, 70, 22, 5)]
    wanted = [model.generate(**request) for request in requests]
    fast(model, slots=4)
    for _ in range(2):
        with ThreadPoolExecutor(len(requests)) as threads:
            answers = list(threads.map(lambda request: model.generate(**request), requests))
        assert all(torch.equal(one, other) for one, other in zip(answers, wanted, strict=True))
    assert any(step.graph is not None for session in model.generate.loop.batches for step in session.steps.values())
