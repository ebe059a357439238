"""Packed matrices of random codes, for tests of backends."""

from __future__ import annotations

import dataclasses

import torch

from qpalette.codes import parse_spec
from qpalette.rotate import pack_signs, random_signs, rotation_for
from qpalette.runtime import PackedLinear, backends

REF = backends()["ref"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_linear(spec: str, out_features: int, in_features: int, rotation: str = "full") -> PackedLinear:
    """Any words are valid codes."""
    shape = (-(-out_features // 16), -(-in_features // 16), parse_spec(spec).words_per_tile)
    scales = torch.rand(out_features, generator=generator(1)) + 0.5
    return PackedLinear(
        codes=torch.randint(-(2**31), 2**31 - 1, shape, generator=generator(2), dtype=torch.int32),
        scales=scales.half().view(torch.int16),
        diagonal=pack_signs(random_signs(in_features, 7, "test")),
        spec=spec,
        rotation=rotation_for(in_features, rotation).name,
        out_features=out_features,
        in_features=in_features,
    )


def laid_out(name: str, packed: PackedLinear) -> PackedLinear:
    codes = backends()[name].to_layout(packed.codes, packed.spec)
    return dataclasses.replace(packed, codes=codes, layout=backends()[name].layout)
