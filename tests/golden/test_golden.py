"""Frozen bytes: what is stored today decodes to the same weights for ever; the same weights encode to the same bytes.

A change here breaks every stored model of that quantizer. It needs a new format version, not a new file:
`python tests/golden/test_golden.py` writes golden.json, for quantizers that are not in it yet.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qpalette.codes import FAMILIES, parse_spec
from qpalette.runtime import select

GOLDEN = Path(__file__).with_name("golden.json")
SPECS = [
    *("nuq-2", "nuq-5", "nuq-8", "vq-1.5", "vq-4", "vq-6"),
    *("tcq-1-L12", "tcq-2", "tcq-3.25", "tcq-4", "tcq-4.625-L18", "tcq-6", "tcq-8-L12", "tcq-2-L20"),
    *("tcq2-1-L12", "tcq2-2", "tcq2-3.25", "tcq2-3.5-L18", "tcq2-4-L12", "tcq2-5-L12", "tcq2-3-L20"),
]
CPU = torch.device("cpu")


def words(spec: str, count: int) -> torch.Tensor:
    """Arbitrary codes, from a hash that does not depend on any library's random numbers."""
    data = hashlib.shake_256(spec.encode()).digest(4 * count)
    return torch.from_numpy(np.frombuffer(data, "<i4").copy())


def source(spec: str) -> torch.Tensor:
    """Two tiles of roughly Gaussian, exactly representable numbers: sums of twelve bytes."""
    data = np.frombuffer(hashlib.shake_256(f"{spec} source".encode()).digest(512 * 12), np.uint8)
    return torch.from_numpy((data.reshape(2, 256, 12).astype(np.int64).sum(-1) - 1530).astype(np.float32) / 256)


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def figures(spec: str) -> dict[str, str]:
    quantizer = parse_spec(spec)
    codes = words(spec, 2 * quantizer.words_per_tile).reshape(2, -1)
    return {
        "decoded": sha(quantizer.decode(codes)),
        "encoded": sha(select("encode", spec, CPU).encode(spec, source(spec))),
    }


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_never_change(spec: str) -> None:
    assert figures(spec) == json.loads(GOLDEN.read_text())[spec]


def test_every_family_is_frozen() -> None:
    assert {parse_spec(spec).family for spec in SPECS} == set(FAMILIES)


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    GOLDEN.write_text(json.dumps({spec: known.get(spec) or figures(spec) for spec in SPECS}, indent=1) + "\n")
