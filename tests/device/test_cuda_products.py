"""The CUDA products and rotations against the reference, on a GPU.

Tolerance of a product: x' is rounded to float16 (relative 2^-11 per value) and so are table entries (2^-11); the errors
are independent over K terms, so relative to the norm of the result they stay near sqrt(2) 2^-11 / sqrt(3) = 4e-4, plus
the rounding of the result: 2^-11 / sqrt(3) for float16, 2^-8 / sqrt(3) for bfloat16. Twice their sum is allowed.

Of a product by the library: x', table entries and their products with the row scales are rounded to float16, 2^-11
each, or x' and the weights to bfloat16, 2^-8 each; and the result.
"""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qpalette.backends.cuda import compiler, library, segments
from qpalette.backends.cuda.decoder import decoder_spec
from qpalette.backends.cuda.decoder_sets import DecoderSets
from qpalette.backends.cuda.layout import from_chunks
from qpalette.backends.cuda.probe import random_member
from qpalette.backends.cuda.product import CudaProduct, most_fused_tokens
from qpalette.backends.cuda.rotate import rotate
from qpalette.codes import parse_spec
from qpalette.core.records import LinearRecord, tiles_of
from qpalette.nn import QuantEmbedding
from qpalette.rotate import Rotation, full_rotation, unpack_signs
from qpalette.runtime import TILES, PackedLinear, backends, select

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float16: 2 * (4e-4 + 2**-11 / 3**0.5), torch.bfloat16: 2 * (4e-4 + 2**-8 / 3**0.5)}
_HALF, _BFLOAT = 2**-11 / 3**0.5, 2**-8 / 3**0.5
LIBRARY_TOLERANCE = {
    torch.float16: 2 * (3**0.5 * _HALF + _HALF),
    torch.bfloat16: 2 * (2**0.5 * _BFLOAT + _BFLOAT),
    torch.float32: 2 * 3**0.5 * _HALF,
}
SPECS = [
    *("tcq-1", "tcq-1.125", "tcq-2.375-L18", "tcq-3.25", "tcq-4.5", "tcq-5.125", "tcq-8", "tcq-2-L12"),
    *("tcq2-1", "tcq2-1.125-L20", "tcq2-2", "tcq2-3.25", "tcq2-4", "tcq2-5", "tcq2-2.125-L12", "tcq2-3.25-L18"),
    *("vq-1.5", "vq-3", "vq-6", "nuq-2", "nuq-3", "nuq-5", "nuq-6", "nuq-7", "nuq-8"),
]
SHAPES = [
    (48, 576, 1),
    (320, 2880, 3),
    (1000, 5376, 8),
    (2064, 18944, 16),
    (64, 250, 17),
    (4096, 1024, 5),
    (20000, 256, 12),
    (1000, 5120, 1),
]


def members(specs: list[str], rows: list[int], columns: int) -> list[PackedLinear]:
    """Random codes, scales and signs; rows and columns that are no multiples of 16 among them."""
    device = torch.device("cuda")
    found = [random_member(spec, m, columns, device) for spec, m in zip(specs, rows, strict=True)]
    signs = torch.randint(0, 256, (columns // 8,), device=device).to(torch.uint8)
    tail = torch.randint(0, 1 << columns % 8, (1,), device=device).to(torch.uint8) if columns % 8 else signs[:0]
    for member in found:
        member.diagonal = torch.cat([signs, tail])
        member.scales = (torch.rand(member.out_features, device=device) + 0.5).half().view(torch.int16)
    return found


def diagonal_of(member: PackedLinear, columns: int) -> torch.Tensor:
    if member.diagonal.dtype == torch.uint8:
        return unpack_signs(member.diagonal, columns).double()
    return member.diagonal.view(torch.float16).double()


def as_stored(member: PackedLinear) -> PackedLinear:
    words = parse_spec(member.spec).words_per_tile
    shape = (tiles_of(member.out_features), tiles_of(member.in_features), words)
    return replace(member, codes=from_chunks(member.codes, shape), layout=TILES)


def expected(x: torch.Tensor, found: list[PackedLinear]) -> torch.Tensor:
    """float64, from the exact weights."""
    cuda, columns = backends()["cuda"], x.shape[1]
    rotated = Rotation.parse(found[0].rotation, columns).apply(x.double() * diagonal_of(found[0], columns))
    return torch.cat([rotated @ cuda.rotated_weight(member).double().T for member in found], dim=1)


def place(columns: int) -> torch.Tensor:
    """Where the columns of W' lie in the order of a product's fragments."""
    k = torch.arange(columns)
    return k // 32 * 32 + k % 8 // 2 * 8 + k % 32 // 16 * 4 + k % 16 // 8 * 2 + k % 2


def tolerance(tokens: int, dtype: torch.dtype) -> float:
    if tokens > most_fused_tokens(segments.device_limits(0)):
        return LIBRARY_TOLERANCE[dtype]
    return TOLERANCE[torch.float16 if dtype == torch.float32 else dtype]


def check(specs: list[str], rows: list[int], columns: int, batch: int, dtype: torch.dtype) -> None:
    found = members(specs, rows, columns)
    x = torch.randn(batch, columns, device="cuda").to(dtype)
    result, wanted = backends()["cuda"].linears(x, found), expected(x, found)
    assert result.dtype == dtype
    assert result.shape == wanted.shape
    assert (result.double() - wanted).norm() <= tolerance(batch, dtype) * wanted.norm()
    assert torch.equal(result, backends()["cuda"].linears(x, found)), "the same bits on every run"
    apart = torch.cat(CudaProduct(found)(x), dim=1)
    if batch <= most_fused_tokens(segments.device_limits(0)):
        assert torch.equal(result, apart)
    else:  # the library may sum in another order where rows are further apart
        assert (apart.double() - wanted).norm() <= tolerance(batch, dtype) * wanted.norm()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_reference(spec: str, shape: tuple[int, int, int]) -> None:
    rows, columns, batch = shape
    check([spec], [rows], columns, batch, torch.bfloat16 if rows % 3 else torch.float16)


@pytest.mark.parametrize("batch", [1, 7, 16, 40, 100, 150])
def test_segments_of_different_specs(batch: int) -> None:
    check(["tcq2-3.25", "vq-3", "tcq-2.125"], [4096, 1024, 1000], 4096, batch, torch.float16)


@pytest.mark.parametrize("dtype", list(LIBRARY_TOLERANCE))
@pytest.mark.parametrize("specs", [["tcq2-3.25", "nuq-4"], ["tcq-2.125"], ["vq-3", "tcq-3.25"], ["nuq-8"]], ids=str)
@pytest.mark.parametrize("shape", [(1000, 576, 149), (48, 250, 164), (2064, 4096, 1000), (200, 14336, 177)], ids=str)
def test_products_by_the_library(specs: list[str], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, tokens = shape
    check(specs, [rows, 333][: len(specs)], columns, tokens, dtype)


@pytest.mark.parametrize("dtype", list(LIBRARY_TOLERANCE))
def test_matrices_that_are_decoded_slab_by_slab(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SLAB_BYTES", 300 * 1024 * dtype.itemsize)
    check(["tcq2-3.25", "nuq-4", "vq-3", "tcq-2.125"], [1000, 48, 32, 500], 1000, 170, dtype)


def test_more_segments_than_a_launch_takes() -> None:
    check(["tcq2-3.25"] * 10, [256] * 10, 1024, 2, torch.bfloat16)


def test_codes_come_back_from_the_layout() -> None:
    cuda = backends()["cuda"]
    codes = torch.randint(-(2**31), 2**31, (3, 37, 27), device="cuda").to(torch.int32)
    assert torch.equal(cuda.from_layout(cuda.to_layout(codes, "tcq-3.375"), "tcq-3.375", (3, 37, 27)), codes)


@pytest.mark.parametrize("tokens", [2, 60, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_and_small_inputs_do_not_leave_float16(tokens: int, dtype: torch.dtype) -> None:
    found = members(["tcq2-3.25", "nuq-4"], [256, 48], 1024)
    for size in (1e-6, 1e4, 1e15):
        x = (torch.randn(tokens, 1024, device="cuda") * size).to(dtype)
        x[0] *= 1e-5
        result, wanted = backends()["cuda"].linears(x, found).double(), expected(x, found)
        for each, token in zip(result, wanted, strict=True):
            assert (each - token).norm() <= 1.3 * tolerance(tokens, dtype) * token.norm()
    assert not backends()["cuda"].linears(torch.zeros(tokens, 1024, device="cuda"), found).any()


def test_tokens_of_float16_that_are_near_its_limits_among_others() -> None:
    """What would overflow or lose bits as x' is divided, and the product multiplied: of these tokens alone."""
    found = members(["tcq2-3.25", "nuq-4"], [256, 48], 4096)
    for member in found:
        member.scales = torch.full_like(member.scales, 0).view(torch.float16).fill_(1e-3).view(torch.int16)
    x = torch.randn(160, 4096, device="cuda")
    x[7] *= 6e3
    x[9] *= 2e-5
    x = x.half()
    result, wanted = backends()["cuda"].linears(x, found).double(), expected(x, found)
    for each, token in zip(result, wanted, strict=True):
        assert (each - token).norm() <= 1.3 * LIBRARY_TOLERANCE[torch.float16] * token.norm() + 304**0.5 * 2**-25


@pytest.mark.parametrize("more", [0, 60, 160])
def test_a_token_that_is_not_finite_stays_so_and_alone(more: int) -> None:
    found = members(["tcq2-3.25"], [256], 1024)
    x = torch.randn(4 + more, 1024, device="cuda")
    clean = backends()["cuda"].linears(x, found)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    result = backends()["cuda"].linears(x, found)
    assert torch.equal(result[[0, *range(3, 4 + more)]], clean[[0, *range(3, 4 + more)]])
    assert result[1:3].isnan().all()


@pytest.mark.parametrize("columns", [576, 1536, 2880, 4096, 5376, 11008, 14336, 17920, 18944])
def test_block_and_full_rotations(columns: int) -> None:
    for name in (full_rotation(columns).name, "h64"):
        found = members(["nuq-4"], [64], columns)
        found[0].rotation = name
        x = torch.randn(3, columns, device="cuda", dtype=torch.float16)
        result, wanted = backends()["cuda"].linears(x, found).double(), expected(x, found)
        assert (result - wanted).norm() <= TOLERANCE[torch.float16] * wanted.norm()


# A of one tile of rows and of several, H of every length; cosines of two and three pieces, by type.
MANY_TOKENS = [1536, 5120, 5632, 8960, 11008, 14336, 18944, 24576, 29568]


@pytest.mark.parametrize("columns", MANY_TOKENS)
@pytest.mark.parametrize("tokens", [17, 40, 100, 150])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotations_of_many_tokens(columns: int, tokens: int, dtype: torch.dtype) -> None:
    check(["nuq-4"], [64], columns, tokens, dtype)


@pytest.mark.parametrize("columns", MANY_TOKENS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotated_tokens_are_rounded_once(columns: int, dtype: torch.dtype) -> None:
    """By at most 2^-11 or 2^-8 of a value, and in the mean over many by 1 / sqrt(3) of that."""
    signs = torch.randint(0, 256, (columns // 8,), device="cuda").to(torch.uint8)
    x, name = torch.randn(150, columns, device="cuda").to(dtype), full_rotation(columns).name
    values = rotate(x, signs, name, None).values[:, place(columns)].double()
    wanted = Rotation.parse(name, columns).apply(x.double() * unpack_signs(signs, columns))
    assert (values - wanted).norm() <= (_HALF if dtype == torch.float16 else _BFLOAT) * wanted.norm()


@pytest.mark.parametrize("columns", [576, 4096, 14336])
@pytest.mark.parametrize("name", ["full", "h64"])
def test_rms_norm_before_the_rotation(columns: int, name: str) -> None:
    rotation = full_rotation(columns).name if name == "full" else name
    signs = torch.randint(0, 256, (columns // 8,), device="cuda").to(torch.uint8)
    x, weight = torch.randn(3, columns, device="cuda").half() * 5, torch.rand(columns, device="cuda").half() + 0.5
    found = rotate(x, signs, rotation, None, norm=(weight, 1e-5))
    normed = torch.nn.functional.rms_norm(x.double(), (columns,), weight.double(), 1e-5)
    wanted = Rotation.parse(rotation, columns).apply(normed * unpack_signs(signs, columns))
    result = found.values[:, place(columns)].double() * found.scales[:, None].double()
    assert (result - wanted).norm() <= TOLERANCE[torch.float16] * wanted.norm()


@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 100, 150])
def test_stored_codes_give_the_same_bits(tokens: int) -> None:
    cuda, found = backends()["cuda"], members(["tcq2-3.25", "nuq-4", "tcq-2.125"], [1000, 48, 256], 1040)
    x = torch.randn(tokens, 1040, device="cuda", dtype=torch.float16)
    stored = [as_stored(member) for member in found]
    assert torch.equal(cuda.linears(x, stored), cuda.linears(x, found))
    for before, after in zip(stored, found, strict=True):
        assert torch.equal(cuda.rotated_weight(before), cuda.rotated_weight(after))
        assert torch.equal(cuda.rotated_weight(before), backends()["ref"].rotated_weight(before))


def with_diagonal(found: list[PackedLinear], diagonal: torch.Tensor) -> None:
    for member in found:
        member.diagonal = diagonal.half().view(torch.int16)


@pytest.mark.parametrize("columns", [250, 576, 2880, 4096, 14336])
@pytest.mark.parametrize("rotation", ["full", "h2", "h64"])
@pytest.mark.parametrize("tokens", [1, 7, 16, 60, 160])
def test_a_diagonal_of_float16_values(columns: int, rotation: str, tokens: int) -> None:
    if rotation == "h64" and columns % 64:
        pytest.skip("no blocks of 64")
    found = members(["nuq-4", "tcq2-3.25"], [64, 100], columns)
    for member in found:
        member.rotation = full_rotation(columns).name if rotation == "full" else rotation
    with_diagonal(found, torch.randn(columns, device="cuda") * torch.logspace(-2, 2, columns, device="cuda"))
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
    result, wanted = backends()["cuda"].linears(x, found).double(), expected(x, found)
    assert (result - wanted).norm() <= tolerance(tokens, torch.float16) * wanted.norm()


def test_a_diagonal_of_ones_and_minus_ones_is_the_signs() -> None:
    """The same bits: a product by 1 or -1 is exact, and so is the norm."""
    found = members(["tcq2-3.25"], [256], 4096)
    x = torch.randn(3, 4096, device="cuda").half()
    wanted = backends()["cuda"].linears(x, found)
    with_diagonal(found, unpack_signs(found[0].diagonal, 4096))
    assert torch.equal(backends()["cuda"].linears(x, found), wanted)


@pytest.mark.parametrize("size", [6e-5, 1.0, 6e4])
@pytest.mark.parametrize("of_x", [1e-6, 1.0, 1e12])
def test_no_diagonal_leaves_float16(size: float, of_x: float) -> None:
    """A norm taken before the diagonal would overflow, or lose every bit."""
    found = members(["nuq-8"], [256], 1024)
    with_diagonal(found, torch.full((1024,), size, device="cuda"))
    x = torch.randn(2, 1024, device="cuda") * of_x
    result, wanted = backends()["cuda"].linears(x, found).double(), expected(x, found)
    assert (result - wanted).norm() <= TOLERANCE[torch.float16] * wanted.norm()


def test_a_diagonal_that_begins_anywhere_and_one_after_an_rms_norm() -> None:
    columns, rotation = 4096, full_rotation(4096).name
    x, weight = torch.randn(3, columns, device="cuda").half(), torch.rand(columns, device="cuda").half() + 0.5
    longer = torch.randn(columns + 1, device="cuda").half()
    found = rotate(x, longer[1:].view(torch.int16), rotation, None, norm=(weight, 1e-5))
    normed = torch.nn.functional.rms_norm(x.double(), (columns,), weight.double(), 1e-5)
    wanted = Rotation.parse(rotation, columns).apply(normed * longer[1:].double())
    result = found.values[:, place(columns)].double() * found.scales[:, None].double()
    assert (result - wanted).norm() <= TOLERANCE[torch.float16] * wanted.norm()


def test_a_diagonal_of_another_type_is_refused() -> None:
    x = torch.randn(1, 1024, device="cuda").half()
    with pytest.raises(ValueError, match=r"diagonal of torch\.float32"):
        rotate(x, torch.ones(1024, device="cuda"), "h1024", 1)


@pytest.mark.parametrize("tokens", [1, 3, 16, 60, 160])
def test_a_kernel_of_many_decoders_gives_the_same_bits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    many = ["nuq-3", "nuq-8", "tcq-2.125", "tcq-3.25", "tcq-8", "tcq2-2", "tcq2-3.25", "vq-1.5", "vq-3"]
    cuda, found = backends()["cuda"], members(many, [1000] * len(many), 2880)
    x = torch.randn(tokens, 2880, device="cuda", dtype=torch.float16)
    all_of_them = [decoder_spec(spec) for spec in many]

    def products(sets: DecoderSets) -> list[torch.Tensor]:
        segments.kernel_of.cache_clear()
        monkeypatch.setattr(segments, "_sets", lambda *_: sets)
        results = [cuda.linear(x, member) for member in found]
        segments.kernel_of.cache_clear()
        return results

    shared = DecoderSets()
    shared.serving(all_of_them)
    together, each = products(shared), products(DecoderSets())
    assert len(shared.sets) == 1
    for one, other in zip(each, together, strict=True):
        assert torch.equal(one, other)


def test_what_the_backend_says_of_this_device() -> None:
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        verdict = backends()["cuda"].supports("linear", "tcq2-3.25", device)
        assert verdict.ok == (torch.cuda.get_device_capability(device) >= (8, 0)), verdict.reason
        assert (select("linear", "tcq2-3.25", device).name == "cuda") == verdict.ok
    beyond = torch.device("cuda", torch.cuda.device_count())
    assert "no device" in backends()["cuda"].supports("linear", "tcq2-3.25", beyond).reason


def test_damaged_kernels_on_disk_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPALETTE_COMPILE_CACHE", str(tmp_path))
    found = members(["nuq-4"], [64], 576)
    x = torch.randn(1, 576, device="cuda").half()

    def fresh() -> torch.Tensor:
        """As another process finds the kernels; those that are loaded stay, in `kept`."""
        kept.append(compiler._loaded)
        monkeypatch.setattr(compiler, "_loaded", {})
        compiler.compile_cubin.cache_clear()
        segments.kernel_of.cache_clear()
        return backends()["cuda"].linears(x, found)

    kept: list[object] = []
    wanted = fresh()
    files = {file: file.read_bytes() for file in (tmp_path / "cubins").iterdir()}
    assert len(files) == 2
    for file, content in files.items():
        file.write_bytes(content[: len(content) // 2])
    assert torch.equal(fresh(), wanted)
    assert {file: file.read_bytes() for file in files} == files
    torch.cuda.synchronize()


@pytest.mark.parametrize("tokens", [1, 5, 40, 160])
def test_a_prepared_product_sees_what_changes(tokens: int) -> None:
    found = members(["tcq2-3.25", "nuq-4"], [256, 48], 1024)
    prepared, x = CudaProduct(found), torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)

    def check_again() -> None:
        for y, wanted in zip(prepared(x), CudaProduct(found)(x), strict=True):
            assert torch.equal(y, wanted)

    check_again()
    found[0].scales.view(torch.float16).mul_(2)
    check_again()
    found[1].codes.add_(12345)
    check_again()
    found[0].codes.data = found[0].codes.flip(0).clone()
    check_again()
    x = x.clone()
    check_again()
    x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)  # begins anywhere
    check_again()
    x = torch.stack([x, x], dim=2)[..., 0]  # strided
    check_again()


def test_threads_and_streams_share_a_prepared_product() -> None:
    found = members(["tcq2-3.25", "nuq-4"], [256, 48], 1024)
    prepared = CudaProduct(found)
    inputs = [torch.randn(1 + index, 1024, device="cuda", dtype=torch.float16) for index in range(6)]
    expected_of = [[y.clone() for y in CudaProduct(found)(x)] for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not all(map(torch.equal, prepared(inputs[index]), expected_of[index])):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def check_captured(x: torch.Tensor) -> None:
    """A graph of a product with x [tokens, 1024] reads what lies there when it is replayed."""
    prepared = CudaProduct(members(["tcq2-3.25", "nuq-4"], [256, 48], 1024))
    prepared(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prepared(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for y, wanted in zip(captured, prepared(x), strict=True):
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("tokens", [1, 40, 160])
def test_a_captured_product_replays_with_what_is_there_then(tokens: int) -> None:
    check_captured(torch.randn(tokens, 1024, device="cuda", dtype=torch.float16))


@pytest.mark.parametrize("spec", ["nuq-4", "vq-3", "tcq-2-L12", "tcq2-3.25"])
@pytest.mark.parametrize("multiplied", [True, False])
def test_a_captured_look_up_of_a_packed_embedding(spec: str, multiplied: bool) -> None:
    record = LinearRecord(spec, 200, 96, "h32", 0)
    embedding = QuantEmbedding(record, multiplied=multiplied, dtype=torch.float16, device="cuda")
    embedding.qp_codes.random_(-(2**31), 2**31)
    embedding.qp_scales.fill_(15360)
    embedding.prepare()
    ids = torch.tensor([[3, 199, 7]], device="cuda")
    wanted = embedding(ids.flip(1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = embedding(ids)
    ids.copy_(ids.flip(1))
    graph.replay()
    assert torch.equal(found, wanted)
