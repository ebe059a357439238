"""Every spec on every backend against the reference: equal codes, equal weights, products within float32 rounding."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from qpalette.backends.cpu import instructions, viterbi
from qpalette.backends.cpu.decoders import decoder_of
from qpalette.backends.cpu.matmul import make_kernels
from qpalette.backends.cpu.product import multiplier_of
from qpalette.codes import parse_spec
from qpalette.core.environment import CPU_BYTES
from qpalette.core.errors import UnsupportedError
from qpalette.rotate import Rotation, unpack_signs
from qpalette.runtime import PackedLinear, backends, packed_linear, select
from random_packed import REF, generator, laid_out, random_linear
from tolerance import check_float32, float32_error

CPU = torch.device("cpu")
SPECS = ["tcq-1-L12", "tcq-2", "tcq-2.875-L18", "tcq-3.25", "tcq-5.5-L20", "tcq-8"]
SPECS += ["tcq2-1.125-L12", "tcq2-2", "tcq2-3.375", "tcq2-5-L20", "vq-1.5", "vq-4.5", "vq-6", "nuq-2", "nuq-5", "nuq-8"]
OTHERS = ["cpu"]  # the backends that run on this machine's processor; tests/device has those of a GPU


def operands(x: torch.Tensor, packed: PackedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `exact`: x and W', the latter in the reference's float32, as float64."""
    return x, REF.rotated_weight(packed).double()


def exact(packed: PackedLinear) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The linear of x [N, K] and W' [M, K] in float64."""
    rotation = Rotation.parse(packed.rotation, packed.in_features)
    signs = unpack_signs(packed.diagonal, packed.in_features)
    return lambda x, weight: rotation.apply(x.double() * signs) @ weight.T


def terms(packed: PackedLinear) -> int:
    """Roundings: the rotation's factors, the product, the scale, the result."""
    rotation = Rotation.parse(packed.rotation, packed.in_features)
    return sum(factor.order for factor in rotation.factors) + packed.in_features + 2


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "spec",
    ["tcq-1-L12", "tcq-2.375-L12", "tcq-7.875-L12", "tcq-4", "tcq2-2.125-L12", "tcq2-4.875-L12", "vq-3", "nuq-3"],
)
def test_encoding_equals_the_reference_bit_for_bit(name: str, spec: str) -> None:
    tiles = torch.randn(19 if "L12" in spec else 3, 256, generator=generator())
    tiles[0] = 0
    tiles[1] *= 50  # far outside the codebook
    assert torch.equal(backends()[name].encode(spec, tiles), REF.encode(spec, tiles))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("spec", SPECS)
def test_decoded_weights_equal_the_reference_exactly(name: str, spec: str) -> None:
    for shape in ((16, 16), (200, 90), (257, 48)):
        packed = random_linear(spec, *shape)
        expected = REF.rotated_weight(packed)
        assert torch.equal(backends()[name].rotated_weight(packed), expected)
        assert torch.equal(backends()[name].rotated_weight(laid_out(name, packed)), expected)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("batch", [1, 2, 7, 16, 17, 80])
def test_products_are_within_float32_rounding(name: str, spec: str, batch: int) -> None:
    out_features, in_features = (300, 96) if batch % 2 else (40, 176)
    packed = laid_out(name, random_linear(spec, out_features, in_features))
    x = torch.randn(batch, in_features, generator=generator(3))
    stored = random_linear(spec, out_features, in_features)
    for found in (packed_linear(x, packed), REF.linear(x, stored)):
        check_float32(found, exact(stored), operands(x, stored), terms(stored))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("spec", ["tcq-2.375-L12", "tcq2-2.125-L12", "vq-3", "nuq-4"])
def test_two_threads_are_as_right_as_one(name: str, spec: str) -> None:
    """Codes, their layout, weights and products: elsewhere there may be one thread in each process of the tests."""
    tiles, packed = torch.randn(70, 256, generator=generator()), random_linear(spec, 257, 176)
    ready = laid_out(name, packed)
    assert torch.equal(backends()[name].rotated_weight(ready), REF.rotated_weight(packed))
    for batch in (1, 7, 16, 80):
        x = torch.randn(batch, 176, generator=generator(3))
        check_float32(packed_linear(x, ready), exact(packed), operands(x, packed), terms(packed))
    codes = backends()[name].encode(spec, tiles)
    torch.set_num_threads(1)
    assert torch.equal(codes, backends()[name].encode(spec, tiles))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dim", [6, 90, 107, 576, 1536, 1030, 2880])
@pytest.mark.parametrize("rotation", ["full", "block"])
def test_every_dimension_and_rotation(name: str, dim: int, rotation: str) -> None:
    if rotation == "block" and dim % 2:
        pytest.skip("an odd dimension has no power-of-two block")
    packed = random_linear("nuq-4", 20, dim, rotation)
    x = torch.randn(2, 3, dim, generator=generator(4))
    for found in (packed_linear(x, laid_out(name, packed)), REF.linear(x.reshape(6, dim), packed).reshape(2, 3, 20)):
        check_float32(found, exact(packed), operands(x, packed), terms(packed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 16, 40])
def test_half_types_keep_their_dtype(dtype: torch.dtype, batch: int) -> None:
    packed = random_linear("tcq-4.5", 64, 96)  # not multiplied in bytes on any processor
    x = torch.randn(batch, 96, generator=generator(5)).to(dtype)
    y = packed_linear(x, packed)
    assert y.dtype == dtype
    half_unit, weight = torch.finfo(dtype).eps / 2, operands(x, packed)[1]
    wanted, rounded = exact(packed)(x, weight), exact(packed)(x, weight.to(dtype).double())
    # One rounding of each result, and float32's, which twice the bound of their norm covers one by one.
    size = wanted.square().mean().sqrt()
    bound = half_unit * wanted.abs() + 2 * float32_error(terms(packed)) * size
    if batch > 16:  # weights and rotated activations are rounded to the type as well
        bound = half_unit * (wanted.abs() + 2 * x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=1))
    assert bool(((y.double() - wanted).abs() <= bound).all())
    assert batch > 16 or not bool(((rounded - wanted).abs() <= bound).all()), "weights rounded to the type pass"


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 36, 64])
def test_layouts_are_permutations(name: str, rows: int) -> None:
    """Also of a few tile rows alone. Codes of every width."""
    backend = backends()[name]
    for spec in ("tcq-3", "nuq-2", "nuq-3", "nuq-4", "nuq-7", "nuq-8", "vq-1.5", "vq-3", "vq-4", "vq-4.5"):
        shape = (rows, 5, parse_spec(spec).words_per_tile)
        codes = torch.randint(-(2**31), 2**31, shape, generator=generator(rows), dtype=torch.int32)
        laid = backend.to_layout(codes, spec)
        assert torch.equal(backend.from_layout(laid, spec, shape), codes)
        some = torch.tensor([rows - 1, 0, rows // 2])
        assert torch.equal(backend.tile_rows(laid, some, spec, shape), codes[some])


def test_compiled_code_does_not_grow_with_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product and one unpacking for each way of decoding, and one product in bytes for each codebook in registers
    (of these specs: magnitudes with a tail of their own and without; indices of two widths, of levels and of pairs);
    two searches, for one and two weights per step, each with candidates that fit a byte or do not."""
    linears, searches = set(), set()
    for spec in (
        "tcq-1",
        "tcq-2.375-L12",
        "tcq-4",
        "tcq-8-L20",
        "tcq2-1.125-L12",
        "tcq2-4",
        "vq-2",
        "vq-6",
        "nuq-2",
        "nuq-8",
    ):
        packed = laid_out("cpu", random_linear(spec, 20, 40))
        backends()["cpu"].rotated_weight(packed)
        assert len(make_kernels(decoder_of(parse_spec(spec)).way)[1].signatures) == 1
        for in_bytes in (False, True):
            monkeypatch.setenv(CPU_BYTES, str(int(in_bytes)))
            backends()["cpu"].linear(torch.randn(2, 40), packed)
            linear = multiplier_of(spec, in_bytes).linear
            assert len(linear.signatures) == 1
            linears.add(linear)
    for spec in ("tcq-1-L12", "tcq-2.375-L12", "tcq-6-L12", "tcq2-1.125-L12", "tcq2-3-L12", "tcq2-4-L12"):
        backends()["cpu"].encode(spec, torch.randn(1, 256))
        searches.add(viterbi._make_search(parse_spec(spec).values_per_step))
    assert len(linears) == (5 + 4 if instructions.HAS_BYTES else 4)
    assert len(searches) == 2
    assert all(len(search.signatures) <= 2 for search in searches)


def test_no_vectors_in_no_vectors_out() -> None:
    assert packed_linear(torch.zeros(0, 96), random_linear("tcq-2", 32, 96)).shape == (0, 32)


def test_the_operator_is_well_behaved() -> None:
    packed = random_linear("tcq-2", 32, 96)
    operands = (packed.codes, packed.scales, packed.diagonal, packed.spec, packed.rotation, packed.layout, 32, 96)
    torch.library.opcheck(torch.ops.qpalette.linear.default, (torch.randn(3, 96, requires_grad=True), *operands, ""))
    torch.library.opcheck(torch.ops.qpalette.linear_transposed.default, (torch.randn(3, 32), *operands))


def test_every_reason_is_given_when_no_backend_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="cpu: runs on the cpu, not on meta"):
        select("linear", "tcq-3", torch.device("meta"), prefer="cpu")
    with pytest.raises(UnsupportedError, match="no backend 'tpu': known are cuda, cpu, ref"):
        select("linear", "tcq-3", CPU, prefer="tpu")
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    assert select("linear", "tcq-3", CPU).name == "ref"


def test_codes_of_one_backend_do_not_run_elsewhere() -> None:
    packed = dataclasses.replace(random_linear("tcq-2", 32, 96), layout="unheard-of")
    with pytest.raises(UnsupportedError, match="laid out for 'unheard-of' cannot run on cpu"):
        packed_linear(torch.randn(1, 96), packed)
