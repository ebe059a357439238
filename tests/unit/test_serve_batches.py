"""What a batch of the server would do without a word is refused, and a client that leaves takes its request along."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

fastapi = pytest.importorskip("fastapi")
from transformers import GenerationConfig, LlamaConfig  # noqa: E402

from qpalette.integrations.guard import _Manager  # noqa: E402

MODEL = SimpleNamespace(config=LlamaConfig(max_position_embeddings=32))
INPUTS = {"input_ids": [1, 2, 3]}


class Batches:
    """Of transformers' CBGenerateManager, what is called."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.configs: list[GenerationConfig] = []
        self._cb = SimpleNamespace(cancel_request=self.cancelled.append)
        self.answered = True

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        self.configs.append(gen_config)
        if not self.answered:
            await asyncio.Event().wait()
        return "text"


def ask(batches: Batches, **said: object) -> str:
    """As the server does: another manager around the same one for each request."""
    manager = _Manager(batches, True)
    return asyncio.run(manager.generate_non_streaming(MODEL, None, INPUTS, GenerationConfig(**said), "id"))


def test_all_are_sampled_as_the_first_or_refused():
    batches = Batches()
    assert ask(batches, temperature=0.5, do_sample=True, max_new_tokens=4) == "text"
    assert ask(batches, temperature=0.5, do_sample=True, max_new_tokens=8) == "text"
    for other in ({"temperature": 0.7}, {"top_p": 0.9}, {"do_sample": False}, {"stop_strings": ["a"]}):
        with pytest.raises(fastapi.HTTPException) as refused:
            ask(batches, **{"temperature": 0.5, "do_sample": True} | other)
        assert refused.value.status_code == 400
        assert f"{next(iter(other))} is " in refused.value.detail
    assert len(batches.configs) == 2


def test_no_more_tokens_than_there_is_room():
    batches = Batches()
    ask(batches, max_new_tokens=1024)
    assert batches.configs[0].max_new_tokens == 32 - 3


def test_a_client_that_leaves_takes_its_request():
    batches = Batches()
    batches.answered = False

    async def leave() -> None:
        manager = _Manager(batches, True)
        work = asyncio.ensure_future(manager.generate_non_streaming(MODEL, None, INPUTS, GenerationConfig(), "id"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(leave())
    assert batches.cancelled == ["id"]
