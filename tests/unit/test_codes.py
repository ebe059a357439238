"""One generic test for every registered quantizer: stated rate, stated distortion, Shannon's bound, canonical name."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from qpalette.codes import full_palette, parse_spec
from qpalette.codes.bits import windows
from qpalette.codes.distortions import distortions, estimated_specs
from qpalette.codes.tcq import TrellisCoded
from qpalette.codes.tcq2 import TrellisCodedPairs
from qpalette.codes.trellis import MEMORIES
from qpalette.core.errors import SpecError
from qpalette.core.records import TILE_WEIGHTS
from qpalette.evaluate.distortion import estimate_distortion
from qpalette.runtime import select
from qpalette.theory import distortion_bound, lloyd_max

CPU = torch.device("cpu")
FLAGSHIPS = [parse_spec(name) for name in ("tcq-2", "tcq-3.25", "tcq-4", "tcq2-3.25")]
MEASURED = [*(quantizer.with_effort("fast") for quantizer in full_palette()), *FLAGSHIPS]
TOLERANCE, SIGMAS = 0.02, 4
CLAIM_ERROR = 0.0025  # relative, one sigma, at most: what the claims of MEASURED were measured to
# The difference of two independent figures has the root of the sum of their squared errors.
SAMPLE_ERROR = math.sqrt((TOLERANCE / SIGMAS) ** 2 - CLAIM_ERROR**2)


@pytest.mark.parametrize("quantizer", full_palette(), ids=str)
def test_states_its_rate_and_a_distortion_above_the_bound(quantizer) -> None:
    assert parse_spec(quantizer.name) == quantizer
    assert quantizer.words_per_tile * 32 == quantizer.rate * 256
    assert quantizer.claimed_distortion > distortion_bound(float(quantizer.rate))


@pytest.mark.parametrize("quantizer", MEASURED, ids=str)
def test_keeps_its_rate_and_distortion_on_a_gaussian_source(quantizer) -> None:
    """Every registered one, trellises with their shortest memory; the flagships with the one they are used with. The
    estimator says its own standard error, and takes as many weights as SAMPLE_ERROR needs: 65,536 to 10^6."""
    tiles = torch.randn(4, TILE_WEIGHTS, generator=torch.Generator().manual_seed(0))
    codes = select("encode", quantizer.name, CPU).encode(quantizer.name, tiles)
    assert codes.dtype == torch.int32
    assert codes.numel() * 32 == quantizer.rate * tiles.numel()
    found = estimate_distortion(quantizer, SAMPLE_ERROR)
    assert found.relative_error <= SAMPLE_ERROR
    assert found.value > distortion_bound(float(quantizer.rate))
    assert found.value == pytest.approx(quantizer.claimed_distortion, rel=TOLERANCE)


@pytest.mark.parametrize("family", [TrellisCoded, TrellisCodedPairs])
def test_every_trellis_quantizer_has_a_distortion_of_its_own_and_memory_pays(family) -> None:
    """Between two rates of one codebook the gap moves by percents: what was not measured would have to be made up."""
    for quantizer in family.palette():
        claims = [replace(quantizer, memory=memory).claimed_distortion for memory in MEMORIES]
        assert distortion_bound(float(quantizer.rate)) < claims[-1]
        assert all(longer < (1 + 2 * CLAIM_ERROR) * shorter for shorter, longer in pairwise(claims))
    members = {replace(quantizer, memory=memory).name for quantizer in family.palette() for memory in MEMORIES}
    assert members == {name for name in distortions() if name.startswith(f"{family.family}-")}
    assert all(parse_spec(name).memory == MEMORIES[-1] for name in estimated_specs())


@pytest.mark.parametrize(
    "name", ["tcq-1-L12", "tcq-2.375-L12", "tcq-8-L12", "tcq-3", "tcq2-2.125-L12", "tcq2-5-L12", "vq-2.5", "nuq-5"]
)
def test_a_codeword_encodes_to_itself(name: str) -> None:
    quantizer = parse_spec(name)
    random = torch.randint(-(2**31), 2**31 - 1, (3, quantizer.words_per_tile), dtype=torch.int32)
    codeword = quantizer.decode(random)
    assert torch.equal(quantizer.decode(quantizer.encode(codeword)), codeword)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("family", [TrellisCoded, TrellisCodedPairs])
def test_every_codebook_entry_is_used_equally_often_and_opposite_states_have_opposite_values(
    family, memory: int
) -> None:
    quantizer = family(eighths=24, memory=memory)
    values = quantizer.state_values()
    _, counts = values.unique(dim=0, return_counts=True)
    assert len(counts.unique()) == 1
    opposite = torch.arange(1 << memory) ^ (1 << (memory - 1))
    assert torch.equal(values[opposite], -values)


@pytest.mark.parametrize("eighths", range(8, 65))
def test_codebook_values_are_one_multiply_add(eighths: int) -> None:
    """What lets a kernel compute values instead of looking them up, bit for bit: slope and intercept are exact in
    float32, so that a fused multiply-add and the float64 sum (exact: checked here) round once, to the same float."""
    quantizer = TrellisCoded(eighths)
    slopes, intercepts = quantizer.segments()
    odd = torch.arange(1, 1 << quantizer.codebook_bits, 2, dtype=torch.float64)
    segment = (odd.float().view(torch.int32) >> 22) % 32
    in_float64 = slopes.double()[segment] * odd + intercepts.double()[segment]
    assert torch.equal(quantizer.codebook()[: len(odd)], in_float64.float())
    assert bool((in_float64.diff() < 0).all())
    for i in range(0, len(odd), 37):
        slope, intercept = (Fraction(float(part[segment[i]])) for part in (slopes, intercepts))
        assert slope * (2 * i + 1) + intercept == Fraction(float(in_float64[i]))


def test_more_effort_is_less_distortion_at_the_same_rate() -> None:
    tiles = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = []
    for effort in ("fast", "standard"):
        quantizer = parse_spec("tcq-3").with_effort(effort)
        codes = select("encode", quantizer.name, CPU).encode(quantizer.name, tiles)
        assert codes.shape == (64, 24)
        errors.append(float((quantizer.decode(codes) - tiles).square().mean()))
    assert errors[1] < 0.95 * errors[0]


def test_nuq_is_lloyd_max() -> None:
    codebook = torch.tensor(lloyd_max(8).codebook, dtype=torch.float32)
    tiles = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    quantizer = parse_spec("nuq-3")
    nearest = (tiles[..., None] - codebook).abs().argmin(-1)
    assert torch.equal(quantizer.decode(quantizer.encode(tiles)), codebook[nearest])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tcq-3.1", "multiples of 0.125 from 1 to 8"),
        ("tcq-0.875", "multiples of 0.125 from 1 to 8"),
        ("tcq-8.125", "multiples of 0.125 from 1 to 8"),
        ("tcq-3-L13", "L is one of 12, 16, 18, 20"),
        ("tcq-3-L", "L is one of"),
        ("tcq2-5.125", "multiples of 0.125 from 1 to 5"),
        ("vq-2.25", "multiples of 0.5 from 1.5 to 6"),
        ("vq-6.5", "multiples of 0.5 from 1.5 to 6"),
        ("tcq-", "not a rate"),
        ("tcq--3", "not a rate"),
        ("tcq-nan", "not a rate"),
        ("tcq-٣", "not a rate"),
        ("tcq-1e1", "not a rate"),
        ("nuq-9", "2 to 8 whole bits"),
        ("nuq-3.5", "2 to 8 whole bits"),
        ("tcq", "is not a quantizer: known are"),
        ("", "is not a quantizer: known are"),
        ("gptq-4", "is not a quantizer: known are"),
    ],
)
def test_a_wrong_name_is_refused_with_the_way_out(name: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        parse_spec(name)


@pytest.mark.parametrize("quantizer", [*full_palette(), parse_spec("tcq-4-L12"), parse_spec("tcq2-5-L12")], ids=str)
def test_the_description_is_the_code(quantizer):
    """What backends read of a code decodes to what it says."""
    decoder, random = quantizer.decoder, torch.Generator().manual_seed(0)
    codes = torch.randint(-(1 << 31), 1 << 31, (4, quantizer.words_per_tile), generator=random).to(torch.int32)
    ends = torch.tensor(decoder.shifts * (256 // 8)).cumsum(0)
    window = windows(codes, ends, decoder.memory)
    hashed = (window * (2 * window + 1)) & ((1 << decoder.memory) - 1)
    index = hashed >> (decoder.memory - decoder.index_bits) if decoder.hashed else window
    assert torch.equal(quantizer.entries()[index].reshape(4, 256), quantizer.decode(codes))
    if (segments := quantizer.segments()) is not None:
        odd = torch.arange(1, 1 << decoder.index_bits, 2, dtype=torch.float32)
        slope, intercept = (part.double()[(odd.view(torch.int32) >> 22) % 32] for part in segments)
        assert torch.equal((slope * odd.double() + intercept).float(), quantizer.entries()[: len(odd), 0])


@pytest.mark.parametrize("spec", ["nuq-3", "vq-2.5", "tcq-2-L12", "tcq2-2-L12"])
def test_a_second_decoding_makes_no_table(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is made anew is copied to the device each time, which a CUDA graph cannot hold."""
    quantizer = parse_spec(spec)
    codes = torch.zeros(1, quantizer.words_per_tile, dtype=torch.int32)
    wanted = quantizer.decode(codes)
    for name in ("entries", "codebook", "state_values", "shifts"):
        if hasattr(type(quantizer), name):
            monkeypatch.setattr(type(quantizer), name, lambda self: pytest.fail("made again"))
    assert torch.equal(quantizer.decode(codes), wanted)
