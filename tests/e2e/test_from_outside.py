"""A quantizer and a backend that the package has never heard of: once registered, they plan, quantize, save and run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from tiny_model import build
from transformers import AutoModelForCausalLM

import qpalette  # noqa: F401 - teaches transformers the format
from qpalette import runtime
from qpalette.codes import FAMILIES, Quantizer, parse_spec
from qpalette.codes.base import register
from qpalette.codes.bits import pack_fields, windows
from qpalette.codes.description import LANE_WEIGHTS, Decoder
from qpalette.core.errors import SpecError
from qpalette.core.records import TILE_WEIGHTS
from qpalette.models import find_groups
from qpalette.nn import QuantLinear
from qpalette.pipeline import quantize_checkpoint
from qpalette.pipeline.planning import even_sensitivities, make_plan
from qpalette.plan import Budget, Space, palette_of
from qpalette.runtime import backends, dispatch
from qpalette.storage import open_checkpoint

BITS = 3


@dataclass(frozen=True)
class Uniform(Quantizer):
    """2^BITS levels at equal steps; the decoder is described, so that every backend has a fast one."""

    family = "toy"

    rate = Fraction(BITS)
    name = f"toy-{BITS}"
    claimed_distortion = 0.0374  # of a uniform quantizer of 8 levels at its best step (Max 1960, table II)

    @classmethod
    def parse(cls, parameters: str) -> Uniform:
        if parameters != str(BITS):
            raise SpecError(f"'toy-{parameters}' is not a quantizer: toy takes {BITS} bits")
        return cls()

    @classmethod
    def palette(cls) -> tuple[Uniform, ...]:
        return (cls(),)

    @property
    def decoder(self) -> Decoder:
        return Decoder((BITS,) * LANE_WEIGHTS, 1, BITS, BITS, hashed=False)

    def entries(self) -> torch.Tensor:
        return (torch.arange(1 << BITS)[:, None] - ((1 << BITS) - 1) / 2) * 0.586

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        nearest = (tiles[..., None] - self.entries()[:, 0]).abs().argmin(-1)
        return pack_fields(nearest, torch.full((TILE_WEIGHTS,), BITS))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        ends = BITS * torch.arange(1, TILE_WEIGHTS + 1)
        return self.entries()[:, 0][windows(codes, ends, BITS)]


class ToyBackend(type(backends()["ref"])):
    """What `ref` does, in a layout of its own: words in reverse order."""

    name = "toy"
    priority = 1000
    layout = "reversed"
    fuses = False
    products = 0

    def to_layout(self, codes: torch.Tensor, spec: str) -> torch.Tensor:
        return codes.flip(-1)

    def from_layout(self, codes: torch.Tensor, spec: str, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return codes.flip(-1)

    def rotated_weight(self, packed: runtime.PackedLinear) -> torch.Tensor:
        codes = packed.codes if packed.layout == runtime.TILES else packed.codes.flip(-1)
        return super().rotated_weight(packed.with_(codes=codes))

    def linear(self, x: torch.Tensor, packed: runtime.PackedLinear) -> torch.Tensor:
        type(self).products += 1
        return super().linear(x, packed)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(FAMILIES, "toy", Uniform)
    register(Uniform)
    monkeypatch.setattr(dispatch, "_registered", [])
    yield
    monkeypatch.undo()
    parse_spec.cache_clear()
    dispatch.backends.cache_clear()
    dispatch._select.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_quantizer_and_a_backend_from_outside(toys: None, source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    groups = find_groups(checkpoint).groups
    found = make_plan(
        even_sensitivities(groups), Budget(Fraction(4)), Space(palette_of("standard", ["toy"])), checkpoint
    )
    assert set(found.plan.specs.values()) == {"toy-3"}
    report = quantize_checkpoint(checkpoint, tmp_path / "out", found.plan)
    assert report.distortion == pytest.approx(Uniform.claimed_distortion, rel=0.1)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        by_the_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert {m.layout for m in by_the_cpu.modules() if isinstance(m, QuantLinear)} == {backends()["cpu"].layout}
        expected = by_the_cpu(ids).logits
        runtime.register(ToyBackend())
        by_the_toy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert {m.layout for m in by_the_toy.modules() if isinstance(m, QuantLinear)} == {"reversed"}
        ToyBackend.products = 0
        logits = by_the_toy(ids).logits
    assert ToyBackend.products == len(found.plan.specs)
    assert float((logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    by_the_toy.save_pretrained(tmp_path / "again")
    entries = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert entries[0]["quantization_config"] == entries[1]["quantization_config"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (
        tmp_path / "again" / "model.safetensors"
    ).stat().st_size
