"""LoRA on top of a packed model learns as on top of the same weights unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_model import save_pair
from transformers import AutoModelForCausalLM

import qpalette  # noqa: F401 - teaches transformers the format
from qpalette.core.errors import UnsupportedError
from qpalette.integrations.peft import PackedLora

STEPS = 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("lora"), "llama")


def losses(directory: Path, **options: object) -> list[float]:
    """Of STEPS steps on one batch; adapters of the same first weights."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **options))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(1, 33).reshape(2, 16)
    found = []
    for _ in range(STEPS):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_it_learns_as_with_the_weights_unpacked(pair: tuple[Path, Path]) -> None:
    packed, plain = map(losses, pair)
    assert packed[-1] < packed[0] / 2
    # The same computation but for roundings, which twenty steps of Adam amplify.
    assert packed == pytest.approx(plain, rel=1e-3)


def test_what_needs_the_weight_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UnsupportedError, match="use plain LoRA"):
        losses(pair[0], use_dora=True)
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert sum(isinstance(module, PackedLora) for module in adapted.modules()) == 2
    with pytest.raises(UnsupportedError, match="cannot be merged into packed weights"):
        adapted.merge_and_unload()
