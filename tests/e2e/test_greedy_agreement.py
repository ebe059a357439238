"""The judge of `benchmarks/greedy_agreement.py`: equal tokens pass, a wrong one does not, wherever it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_cli import save_model

import qpalette

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import greedy_agreement as script

TOKENS = 8


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("agreement")
    save_model(directory / "tiny")
    qpalette.quantize(directory / "tiny", directory / "packed", spec="nuq-4")
    return str(directory / "packed")


@pytest.fixture(scope="module")
def prompts(packed) -> list[list[int]]:
    return script.encode_prompts(packed)[:3]


@pytest.fixture(scope="module")
def answers(packed, prompts) -> list[list[int]]:
    """Of the cpu backend, in a process of its own, as the script does it."""
    return script.write_tokens("cpu", packed, prompts, TOKENS, "float32", sys.executable)


@pytest.fixture(autouse=True)
def _variable_is_restored(monkeypatch):
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")


def test_two_backends_write_the_same(packed, prompts, answers):
    verdict = script.judge(packed, prompts, answers, "float32", "cpu")
    assert verdict["prompts as ref would"] == "3 of 3"
    assert (verdict["first difference"], verdict["largest gap"], verdict["explained"]) == ("none", 0.0, True)


@pytest.mark.parametrize("place", [0, TOKENS - 1])
def test_a_wrong_token_is_found_and_not_explained(packed, prompts, answers, place):
    changed = [list(answer) for answer in answers]
    changed[1][place] = (changed[1][place] + 1) % 128
    verdict = script.judge(packed, prompts, changed, "float32", "cpu")
    assert verdict["prompts as ref would"] == "2 of 3"
    assert verdict["first difference"].startswith(f"prompt 1, token {place}, gap")
    assert verdict["largest gap"] > verdict["tolerance"]
    assert not verdict["explained"]


def test_the_tolerance_covers_the_error_that_rounding_makes(packed, prompts, answers):
    """Logits in bfloat16 against float32: the largest error over all of them stays below the bound of one."""
    exact, rounded = (script.load(packed, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    ids = torch.tensor([prompts[0] + answers[0]])
    with torch.inference_mode():
        wanted, result = exact(ids).logits, rounded(ids).logits.float()
    assert 0 < float((wanted - result).abs().max()) < script.logit_error(exact, float(wanted.abs().max()), "bfloat16")
