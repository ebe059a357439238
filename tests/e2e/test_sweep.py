"""Some classes of the sweep over all that transformers has, one for each kind of trouble that a class can make."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from architecture_checks import check_class
from architectures import SUBSET, passes

# Of their linears: what their own code computes with stays in 16 bits.
IN_PART = {
    "causal:rwkv": 0.5,
    "causal:zamba": 0.85,
    "causal:mamba": 0.96,
    "causal:gemma3n_text": 0.96,
    "image:inkling_mm_model": 0.94,
}


# A head with a bias that is tied; an embedding that is multiplied by a factor, or read beside another; both packed.
WITH_TABLES = ("causal:modernbert-decoder", "causal:gemma2", "causal:gpt2", "causal:qwen3_moe")


@pytest.mark.architectures
@pytest.mark.parametrize("name", WITH_TABLES)
def test_class_with_embeddings_and_head(name, tmp_path):
    kind, _, model_type = name.partition(":")
    row = check_class(kind, model_type, tmp_path, tables=True)
    assert passes(row), row
    assert row["share_linear"] > 0.9


@pytest.mark.architectures
@pytest.mark.parametrize("name", SUBSET)
def test_class(name, tmp_path):
    kind, _, model_type = name.partition(":")
    row = check_class(kind, model_type, tmp_path)
    assert passes(row), row
    assert row["share_language"] >= IN_PART.get(name, 0.97)
