"""Products in bytes on the processor: exact but for two roundings, of which both are bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qpalette.backends.cpu import instructions, product, simd
from qpalette.backends.cpu.byte_activations import BLOCK, GROUP, PAIR, TILE, empty_bytes, places_of, put_bytes
from qpalette.backends.cpu.byte_decoders import ACTIVATION_ERROR, MOST_ADDED_ERROR, byte_decoder_of
from qpalette.backends.cpu.byte_matmul import LONGEST_PASS, row_kernels
from qpalette.backends.cpu.decoders import decoder_of
from qpalette.backends.cpu.jit import kernel
from qpalette.backends.cpu.product import multiplier_of, wants_bytes
from qpalette.codes import full_palette, parse_spec
from qpalette.codes.tiles import from_tiles
from qpalette.core.cache import COMPILE_CACHE
from qpalette.core.environment import CPU_BYTES
from qpalette.core.errors import InputError
from qpalette.plan.preference import MOST_RATE_IN_BYTES
from qpalette.rotate import Rotation, pack_signs, random_signs, rotation_for, unpack_signs
from qpalette.runtime import PackedLinear, backends
from tolerance import float32_error

CPU, REF = backends()["cpu"], backends()["ref"]
IN_BYTES = ["tcq-1", "tcq-2.375-L12", "tcq-3.25", "tcq-4", "nuq-2", "nuq-4", "vq-1.5", "vq-3", "vq-4"]
needs_bytes = pytest.mark.skipif(
    not instructions.HAS_BYTES, reason="this processor has neither AVX2 nor AVX-512's bytes"
)


@pytest.fixture(autouse=True)
def as_the_commands_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_BYTES, "1")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_linear(spec: str, rows: int, inputs: int, rotation: str = "full") -> PackedLinear:
    shape = (-(-rows // 16), -(-inputs // 16), parse_spec(spec).words_per_tile)
    return PackedLinear(
        codes=torch.randint(-(2**31), 2**31, shape, generator=generator(1), dtype=torch.int32),
        scales=(torch.rand(rows, generator=generator(2)) + 0.5).half().view(torch.int16),
        diagonal=pack_signs(random_signs(inputs, 7, "test")),
        spec=spec,
        rotation=rotation_for(inputs, rotation).name,
        out_features=rows,
        in_features=inputs,
    )


def rounded_entries(spec: str) -> torch.Tensor:
    """Of a code, each as it is multiplied in bytes, float64. Four neighbouring magnitudes of a hash share their mean,
    but for the 64 largest of some codes."""
    quantizer = parse_spec(spec)
    decoder, entries = byte_decoder_of(quantizer), quantizer.entries()
    assert decoder is not None
    if quantizer.decoder.hashed:
        signed = entries.view(2, -1)
        shared = signed.view(2, 128, -1).mean(2).repeat_interleave(signed.shape[1] // 128, dim=1)
        kept = {"hashed": 0, "hashed tail": 64}[decoder.way]
        entries = torch.cat([signed[:, :kept], shared[:, kept:]], dim=1).reshape(-1, 1)
    return torch.round(entries / decoder.step).double() * decoder.step


def rounded_weight(packed: PackedLinear) -> torch.Tensor:
    """W' with its entries rounded to bytes, float64."""
    tiles = REF.decode(packed.spec, packed.codes.flatten(0, 1)).reshape(*packed.codes.shape[:2], -1)
    weights = from_tiles(tiles, packed.out_features, packed.in_features)
    entries, order = parse_spec(packed.spec).entries().flatten().sort()
    rounded = rounded_entries(packed.spec).flatten()[order][torch.searchsorted(entries, weights.contiguous())]
    return rounded * packed.scales.view(torch.float16).double()[:, None]


def groups_of(size: int) -> torch.Tensor:
    """The group of each column: the same tile of the left and of the right block of a pair."""
    column = torch.arange(size)
    return column // PAIR * (PAIR // GROUP) + column % BLOCK // TILE


def rounded_activations(rotated: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] -> the same, each group rounded to 255 steps, float64. In the arithmetic of the definition."""
    group = groups_of(rotated.shape[1])
    index = group.expand_as(rotated)
    largest = torch.zeros(len(rotated), int(group.max()) + 1).scatter_reduce(1, index, rotated.abs(), "amax")
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0)  # 127 / largest is a product in torch
    return torch.round(rotated * inverse[:, group]).double() * (largest / 127).double()[:, group]


def rotated_input(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    rotation = Rotation.parse(packed.rotation, packed.in_features)
    return rotation.apply(x.double() * unpack_signs(packed.diagonal, packed.in_features))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@needs_bytes
@pytest.mark.parametrize("spec", ["tcq-2-L12", "nuq-4", "vq-3"])
def test_activations_are_rounded_by_groups_of_columns(spec: str) -> None:
    rows, middle = row_kernels(byte_decoder_of(parse_spec(spec)).way), 0 if spec.startswith("tcq") else 128
    x = torch.randn(5, 3 * PAIR, generator=generator(3)) * torch.logspace(-30, 30, 5)[:, None]
    x[1, groups_of(3 * PAIR) == 2] = 0
    vectors, places = empty_bytes(8, 3), places_of(rows.order)
    put_bytes(x[:2].numpy(), middle, places, 1, 8, vectors)
    put_bytes(x[2:].numpy(), middle, places, 3, 8, vectors)
    words, scales, offsets = vectors
    pair_first = torch.from_numpy(words.view(np.int8)).reshape(3, 8, 8, 4, 4)  # token, word, tile, byte
    levels = torch.empty(8, 3, 4, 32, dtype=torch.int8)
    levels[..., rows.order] = pair_first.permute(1, 0, 3, 2, 4).reshape(8, 3, 4, 32)
    levels = levels.reshape(8, 3, 4, 2, TILE).transpose(2, 3).reshape(8, -1)
    group, of_token = groups_of(3 * PAIR), torch.from_numpy(scales).double().reshape(3, 8, 4).transpose(0, 1)
    found = levels.double() * of_token.reshape(8, -1)[:, group]
    assert torch.equal(found[1:6], rounded_activations(x))
    assert not found[[0, 6, 7]].any()
    sums = torch.zeros(8, 12, dtype=torch.int32).index_add(1, group, levels.int())
    assert np.array_equal(offsets.reshape(3, 8, 4).swapaxes(0, 1).reshape(8, -1), -middle * sums.numpy())


@needs_bytes
@pytest.mark.parametrize("spec", IN_BYTES)
@pytest.mark.parametrize("shape", [(64, 16), (16, 80), (70, 20), (257, 208), (5, 256), (130, 576)])
def test_nothing_but_the_rounding_to_bytes(spec: str, shape: tuple[int, int]) -> None:
    """Of small integers, with rotations whose factors are powers of two, so that the rotation is exact."""
    packed = random_linear(spec, *shape, "block")
    inputs = shape[1]
    for batch in (1, 2, 17):
        x = torch.randint(-9, 10, (batch, inputs), generator=generator(4)).half()
        rotated = (
            rotated_input(x, packed).mul(16).round() / 16
        )  # what it is but for rounding: the scale is 1/16 or more
        levels = rounded_activations(rotated.float())
        wanted = levels @ rounded_weight(packed).T
        # One rounding of each result to float16; in float32 sums over pairs of blocks and four lanes, three scales.
        size, terms = wanted.square().mean().sqrt(), -(-inputs // PAIR) + 4 + 3
        bound = torch.finfo(torch.float16).eps / 2 * wanted.abs() + 4 * float32_error(terms) * size
        within = {
            "found": CPU.linear(x, packed).double(),
            "activations as they are": rotated @ rounded_weight(packed).T,
            "weights as they are": levels @ REF.rotated_weight(packed).double().T,
        }
        passed = {name for name, result in within.items() if bool(((result - wanted).abs() <= bound).all())}
        assert passed == {"found"} or (passed == {"found", "weights as they are"} and spec == "nuq-2")


@needs_bytes
@pytest.mark.parametrize("spec", IN_BYTES)
def test_the_roundings_cost_what_is_said(spec: str) -> None:
    """Gaussian activations: errors of inputs and of weights are independent of everything, so their squares add."""
    quantizer = parse_spec(spec)
    packed, inputs = random_linear(spec, 400, 1024), 1024
    x = torch.randn(16, inputs, generator=generator(5)).half()
    exact = rotated_input(x, packed) @ REF.rotated_weight(packed).double().T
    error = relative_error(CPU.linear(x, packed), exact) ** 2
    entries = quantizer.entries().double()
    of_weights = (rounded_entries(spec) - entries).square().mean() / entries.square().mean()
    type_ = torch.finfo(torch.float16).eps ** 2 / 12
    assert error == pytest.approx(ACTIVATION_ERROR + float(of_weights) + type_, rel=0.15)  # of 500 groups
    assert ACTIVATION_ERROR / quantizer.claimed_distortion < 0.01


@needs_bytes
def test_only_codes_that_lose_little_are_multiplied_in_bytes() -> None:
    for quantizer in full_palette():
        decoder = byte_decoder_of(quantizer)
        if decoder is not None:
            entries = quantizer.entries().double()
            error = (rounded_entries(quantizer.name) - entries).square().mean()
            assert error + ACTIVATION_ERROR < MOST_ADDED_ERROR * quantizer.claimed_distortion
    assert {spec for spec in IN_BYTES if byte_decoder_of(parse_spec(spec)) is None} == set()
    for spec in ("tcq-3-L18", "tcq-2-L20", "tcq-4.125", "tcq2-2", "vq-4.5", "nuq-8"):
        assert byte_decoder_of(parse_spec(spec)) is None, spec


@needs_bytes
@needs_bytes
def test_plans_for_a_processor_know_up_to_which_rate_it_multiplies_in_bytes() -> None:
    of_trellis = [quantizer for quantizer in full_palette() if quantizer.family == "tcq"]
    in_bytes = {quantizer.rate for quantizer in of_trellis if byte_decoder_of(quantizer) is not None}
    assert in_bytes == {quantizer.rate for quantizer in of_trellis if quantizer.rate <= MOST_RATE_IN_BYTES}


@needs_bytes
def test_a_code_that_was_planned_for_a_gpu_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    for cached in (multiplier_of, product._warn_of_pairs):
        cached.cache_clear()
    for spec in IN_BYTES:
        multiplier_of(spec, in_bytes=True)
    multiplier_of("tcq2-3", in_bytes=False)
    assert not caplog.records
    for spec in ("tcq2-3", "tcq2-3.25"):
        multiplier_of(spec, in_bytes=True)
    assert [record.message.count("--target cpu") for record in caplog.records] == [1]


def test_the_largest_magnitudes_are_looked_up_by_themselves_where_that_is_needed() -> None:
    ways = {spec: byte_decoder_of(parse_spec(spec)).way for spec in ("tcq-2", "tcq-2.5", "tcq-3", "tcq-3.25", "tcq-4")}
    assert list(ways.values()) == ["hashed", "hashed", "hashed tail", "hashed tail", "hashed tail"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.ones(2, 96, dtype=torch.bfloat16)
    x[1, 50] = bad
    y = CPU.linear(x, random_linear("tcq-3", 40, 96))
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_zeros_and_the_smallest_numbers() -> None:
    x = torch.stack([torch.zeros(96), torch.full((96,), 1e-39)]).bfloat16()
    assert torch.equal(CPU.linear(x, random_linear("vq-3", 40, 96)), torch.zeros(2, 40, dtype=torch.bfloat16))


@needs_bytes
@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("spec", ["tcq-2-L12", "nuq-4", "vq-3"])
def test_the_same_bits_with_any_number_of_threads(spec: str, batch: int) -> None:
    packed = random_linear(spec, 1000, 576)
    x = torch.randn(batch, 576, generator=generator(6)).bfloat16()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(CPU.linear(x, packed))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_bytes
@pytest.mark.parametrize("spec", ["tcq-2-L12", "nuq-4", "vq-3"])
def test_a_token_has_the_same_bits_in_any_batch(spec: str) -> None:
    """Also of more columns than are decoded at once, and of more tokens than one pass takes."""
    packed = random_linear(spec, 100, 1300)
    x = torch.randn(LONGEST_PASS + 3, 1300, generator=generator(7)).bfloat16()
    together = CPU.linear(x, packed)
    for some in ([0], [1], [LONGEST_PASS - 1], [LONGEST_PASS + 2], range(5), range(3, 20), range(LONGEST_PASS)):
        assert torch.equal(CPU.linear(x[list(some)], packed), together[list(some)])


@needs_bytes
def test_a_group_of_both_kinds_has_the_bits_of_each() -> None:
    """The one that is no code of bytes is decoded first, above sixteen tokens."""
    members = [random_linear(spec, rows, 208) for spec, rows in (("nuq-4", 100), ("nuq-8", 40), ("nuq-3", 64))]
    x = torch.randn(20, 208, generator=generator(7))
    assert torch.equal(CPU.linears(x, members), torch.cat([CPU.linear(x, member) for member in members], dim=1))


@needs_bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_is_multiplied_in_bytes_unless_it_is_forbidden(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = random_linear("tcq-2-L12", 40, 96)
    x = torch.randn(2, 96, generator=generator(8)).to(dtype)
    exact = rotated_input(x, packed) @ REF.rotated_weight(packed).double().T
    rounding = float32_error(96 * 3) + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert relative_error(CPU.linear(x, packed), exact) > ACTIVATION_ERROR**0.5 / 2
    monkeypatch.setenv(CPU_BYTES, "0")
    assert relative_error(CPU.linear(x, packed), exact) < rounding


@needs_bytes
def test_types_differ_in_their_rounding_alone() -> None:
    packed = random_linear("tcq-2-L12", 40, 96)
    x = torch.randn(2, 96, generator=generator(8)).half()
    assert torch.equal(CPU.linear(x, packed), CPU.linear(x.float(), packed).half())


def test_float64_is_multiplied_in_float32() -> None:
    packed = random_linear("tcq-2-L12", 40, 96)
    x = torch.randn(2, 96, generator=generator(8), dtype=torch.float64)
    exact = rotated_input(x, packed) @ REF.rotated_weight(packed).double().T
    assert relative_error(CPU.linear(x, packed), exact) < float32_error(96 * 3)


def test_float32_is_exact_where_nobody_asks_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands do."""
    from qpalette.cli import main

    monkeypatch.delenv(CPU_BYTES)
    assert [wants_bytes(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [False, True, True]
    with pytest.raises(SystemExit):
        main(["palette", "--help"])
    try:
        assert wants_bytes(torch.float32)
    finally:
        os.environ.pop(CPU_BYTES, None)


def test_what_the_variable_cannot_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_BYTES, "no")
    with pytest.raises(InputError, match=f"{CPU_BYTES} is 'no'"):
        wants_bytes(torch.float32)


@pytest.fixture
def without_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = byte_decoder_of, decoder_of, multiplier_of
    monkeypatch.setattr(instructions, "HAS_BYTES", False)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("without_bytes")
def test_without_the_instructions_products_are_in_float32() -> None:
    packed = random_linear("tcq-2-L12", 40, 96)
    x = torch.randn(2, 96, generator=generator(8))
    exact = rotated_input(x, packed) @ REF.rotated_weight(packed).double().T
    assert relative_error(CPU.linear(x, packed), exact) < float32_error(96 * 3)


IN_A_PROCESS = """
import sys, torch
sys.path += ["tests", "tests/backend"]
torch.set_num_threads(1)
from test_cpu_bytes import CPU, instructions, random_linear
packed, x = random_linear("tcq-2-L12", 600, 576), torch.ones(16, 576).half()
"""


def in_a_process(program: str, **variables: str) -> str:
    environment = os.environ | variables
    command = [sys.executable, "-c", IN_A_PROCESS + program]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


MASKED = {"AVX-512 of before the bytes": ("avx512vbmi",), "AVX2": ("avx512", "avxvnni")}
MASKED["neither"] = (*MASKED["AVX2"], "avx2")


def masked(name: str, folder: Path) -> dict[str, str]:
    """The environment of a process whose code is compiled as numba would on a processor without some features."""
    listed = (f"-{each}" if each.startswith(MASKED[name]) else f"+{each}" for each in sorted(instructions.features()))
    return {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ",".join(listed), COMPILE_CACHE: str(folder)}


@needs_bytes
@pytest.mark.parametrize("name", MASKED)
def test_a_processor_without_the_instructions_takes_the_path_that_it_has(name: str, tmp_path: Path) -> None:
    """Whatever asks for one does not compile. A token alone, sixteen, and more than are multiplied while they are
    decoded: where bytes are multiplied, the same bits as here."""
    if not any(feature.startswith(MASKED[name]) for feature in instructions.features()):
        pytest.skip("nothing to mask: it is what the other tests run on")
    found = tmp_path / "found.pt"
    program = f"""
from test_cpu_bytes import multiplier_of, products
torch.save([products(spec) for spec in {SAME_BITS}], "{found}")
assembly = "".join(multiplier_of("nuq-4", True).linear.inspect_asm().values())
print(instructions.HAS_BYTES, "ymm" in assembly, "zmm" in assembly)
"""
    in_bytes = name != "neither"
    wide = instructions.HAS_AVX512 and name == "AVX-512 of before the bytes"
    assert in_a_process(program, **masked(name, tmp_path)) == f"{in_bytes} True {wide}\n"
    for spec, there in zip(SAME_BITS, torch.load(found), strict=True):
        for x, y, here in zip(inputs_of(), there, products(spec), strict=True):
            if in_bytes:
                assert torch.equal(y, here), spec
            else:
                assert relative_error(y, REF.linear(x.double(), random_linear(spec, 300, 200))) < 1e-5


SAME_BITS = ["tcq-2-L12", "tcq-3", "nuq-4", "vq-3", "vq-4"]


def inputs_of() -> list[torch.Tensor]:
    return [torch.randn(batch, 200, generator=generator(9)) for batch in (1, 16, 20)]


def products(spec: str) -> list[torch.Tensor]:
    packed = random_linear(spec, 300, 200)
    return [CPU.linear(x, packed) for x in inputs_of()]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_asked_for_are_threads_used() -> None:
    """One: torch still says so once numba has started all of its own, and kernels are given no more."""
    program = """
from qpalette.backends.cpu.threads import present_threads
CPU.linear(x, packed), CPU.linear(x[:1].float(), packed)
print(torch.get_num_threads(), present_threads())
"""
    assert in_a_process(program) == "1 1\n"


@pytest.mark.parametrize("missing", sorted(instructions.BYTE_FEATURES))
def test_every_feature_is_asked_for(missing: str) -> None:
    assert instructions.has_wide_bytes(instructions.BYTE_FEATURES)
    assert not instructions.has_wide_bytes(instructions.BYTE_FEATURES - {missing})


@needs_bytes
def test_look_ups_take_any_byte() -> None:
    """Of every index, and what is above an index is not read."""
    table = torch.randint(-128, 128, (128,), generator=generator(10), dtype=torch.int8).numpy()
    index = np.arange(256).astype(np.uint8)
    found = np.empty((4, 256), np.int8)
    look_up(table, index.view(np.int8), found)
    first = np.tile(table[16:32], 16)
    assert np.array_equal(found[0], np.tile(table[:16], 4)[index % 64])
    assert np.array_equal(found[1], table[index % 64])
    assert np.array_equal(found[2], table[index % 128])
    assert np.array_equal(found[3], np.where(index % 128 < 16, first, table[index % 128]))


@needs_bytes
@pytest.mark.parametrize("extreme", [True, False])
def test_no_product_of_bytes_is_saturated(extreme: bool) -> None:
    """Pairs of the largest are beyond 16 bits."""
    unsigned, levels, x = np.full(64, 255), np.full(64, -127), np.full(64, -127)
    if not extreme:
        random = np.random.default_rng(11)
        unsigned, levels, x = (random.integers(low, high, 64) for low, high in ((0, 256), (-127, 128), (-127, 128)))
    total = np.arange(16, dtype=np.int32) * 1000
    found = np.empty((2, 16), np.int32)
    multiply(total, bytes_of(unsigned), bytes_of(levels + instructions.MIDDLE), bytes_of(x), found)
    wanted = [total + (each * x).reshape(16, 4).sum(1) for each in (unsigned, levels + instructions.MIDDLE)]
    assert np.array_equal(found, wanted)


def bytes_of(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.uint8).view(np.int8)


@kernel
def look_up(table, index, found):  # type: ignore[no-untyped-def]
    low, high = simd.loadb(table, 0), simd.loadb(table, 64)
    flat, sixteen, other = found.reshape(-1), simd.load_quarterb(table, 0), simd.load_quarterb(table, 16)
    for at in range(0, 256, 64):
        each = simd.loadb(index, at)
        simd.store(flat, at, simd.lookup16(sixteen, each))
        simd.store(flat, 256 + at, simd.lookup64(low, each))
        simd.store(flat, 512 + at, simd.lookup128(low, high, each))
        simd.store(flat, 768 + at, simd.lookup128_but_first(low, high, each, other))


@kernel
def multiply(total, unsigned, levels, x, found):  # type: ignore[no-untyped-def]
    start, right, flat = simd.loadi(total, 0), simd.loadb(x, 0), found.reshape(-1)
    simd.store(flat, 0, simd.dot_magnitudes(start, simd.loadb(unsigned, 0), right))
    simd.store(flat, 16, simd.dot_levels(start, simd.loadb(levels, 0), right))


@needs_bytes
def test_the_dot_product_of_256_bits_is_used_where_a_processor_has_it(tmp_path: Path) -> None:
    """Compiled, not run."""
    program = """
from numba import types
from test_cpu_bytes import multiply
narrow, wide = (types.Array(each, 1, "C") for each in (types.int8, types.int32))
multiply.compile((wide, narrow, narrow, narrow, types.Array(types.int32, 2, "C")))
print(instructions.MIDDLE, *("vpdpbusd" in each and "zmm" not in each for each in multiply.inspect_asm().values()))
"""
    environment = masked("AVX2", tmp_path)
    environment["NUMBA_CPU_FEATURES"] += ",+avxvnni"
    assert in_a_process(program, **environment) == "128 True\n"
