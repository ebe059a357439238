"""Every dimension that breaks other tools' Hadamard tables or block sizes is rotated, quantized and multiplied."""

import pytest
import torch

from qpalette.codes import parse_spec
from qpalette.core.records import LinearRecord
from qpalette.pipeline.encode import encode_linear
from qpalette.rotate import Rotation, random_signs, rotation_for
from qpalette.runtime import PackedLinear, backends
from tolerance import check_float32

SPEC, ROWS = "nuq-3", 33  # not whole tiles of rows either
# Inputs of linears in published models, Qwen3.x to Falcon; none is a power of two.
DIMS = [
    576, 704, 768, 960, 1408, 1536, 1792, 1856, 2112, 2304, 2560, 2688, 2816, 2880, 3072, 3584, 3712, 3840, 4544, 4608,
    4864, 5120, 5376, 6144, 6656, 6912, 7168, 7680, 9728, 10240, 10304, 10944, 11008, 11264, 12288, 13312, 13696, 14336,
    15360, 17408, 17920, 18176, 18432, 18944, 19968, 21504, 24576, 25600, 27392, 27648, 28672, 29568,
]  # fmt: skip


@pytest.mark.parametrize("dim", DIMS)
def test_rotated_quantized_and_multiplied(dim):
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randn(ROWS, dim, generator=generator)
    weight[:, 5] *= 30  # an outlier input, which the rotation has to spread
    record = LinearRecord(SPEC, ROWS, dim, rotation_for(dim, "full").name, 0)
    signs = random_signs(dim, 0, "group")
    encoded = encode_linear("linear", weight, record, signs, torch.device("cpu"))
    # The mean of 33 * dim squared errors of a unit Gaussian: its relative standard error is below 2 / sqrt(33 * dim),
    # and a spread outlier leaves the rows less than perfectly Gaussian.
    assert encoded.quality.distortion < parse_spec(SPEC).claimed_distortion * (1.1 + 8 / (ROWS * dim) ** 0.5)
    packed = PackedLinear(
        encoded.codes, encoded.scales, encoded.diagonal, SPEC, record.rotation, record.out_features, record.in_features
    )
    x = torch.randn(2, dim, generator=generator)
    rotation = Rotation.parse(record.rotation, dim)
    roundings = sum(factor.order for factor in rotation.factors) + dim + 2
    fast, plain = (backends()[name].linear(x, packed) for name in ("cpu", "ref"))
    for found in (fast, plain):
        check_float32(
            found,
            lambda x, weight: rotation.apply(x.double() * signs) @ weight.double().T,
            (x, backends()["ref"].rotated_weight(packed)),
            roundings,
        )
    error = (plain - x @ weight.T).square().mean() / (x @ weight.T).square().mean()
    assert error < 3 * encoded.quality.distortion
