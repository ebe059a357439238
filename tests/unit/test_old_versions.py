"""Artifacts that earlier releases wrote: versions 1 and 2 of the format stay readable, and mean the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qpalette
from qpalette.formats import open_artifact
from qpalette.runtime import backends

FIXTURES = Path(__file__).parents[1] / "fixtures"
# SHA-256 of the decoded weights of all linears in the rotated basis, float32: printed by the release that wrote the
# files. A table look-up and one product with a scale are the same on every machine.
WEIGHTS = {
    "v2-dense": "1997753a40ea72f95e5501e6d34a9fc6ccd3c5e9237a4922028c82b85a0213d4",
    "v2-experts": "a5515c28837798830b6ff1ac759110cbe23e0fc14272afd4064e3a751f3c0768",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_the_same_bits(name: str) -> None:
    artifact, digest = open_artifact(FIXTURES / name), hashlib.sha256()
    for linear in artifact.records:
        weight = backends()["ref"].rotated_weight(artifact.read_linear(linear))
        digest.update(weight.contiguous().numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS[name]


@pytest.mark.parametrize("name", WEIGHTS)
def test_logits_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits on the machine that wrote them; another processor may add up in another order."""
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32)
    expected = load_file(FIXTURES / name / "expected_logits.safetensors")["logits"]
    with torch.no_grad():
        logits = model(torch.arange(1, 25)[None]).logits[0]
    # Some forty roundings on the way of a logit, each 2^-24 of a value no larger than the largest logit.
    assert float((logits - expected).abs().max()) <= 40 * 2**-24 * float(expected.abs().max())


@pytest.mark.parametrize("name", WEIGHTS)
def test_saving_keeps_the_version(name: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(FIXTURES / name).save_pretrained(tmp_path)
    before, after = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (FIXTURES / name, tmp_path)
    )
    assert before == after
    saved = open_artifact(tmp_path)
    for linear, tensor in ((tensor, saved.read(tensor)) for tensor in saved.stored if ".qp_" in tensor):
        assert torch.equal(tensor, open_artifact(FIXTURES / name).read(linear))


def test_version_1_is_read(tmp_path: Path) -> None:
    """It differs from 2 in one codebook, of tcq2 at 3.375 to 4 bits, which it is refused with."""
    shutil.copytree(FIXTURES / "v2-dense", tmp_path / "v1")
    file = tmp_path / "v1" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 1
    linears = config["quantization_config"]["linears"]
    file.write_text(json.dumps(config))
    newer = [name for name, entry in linears.items() if entry["spec"] == "tcq2-4-L12"]
    with pytest.raises(qpalette.core.errors.ArtifactError, match="another codebook in format version 1"):
        open_artifact(tmp_path / "v1")
    for name in newer:
        linears[name]["spec"] = "tcq-4-L12"
    file.write_text(json.dumps(config))
    assert open_artifact(tmp_path / "v1").format.format_version == 1
