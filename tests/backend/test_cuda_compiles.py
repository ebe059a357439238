"""CUDA kernels compile for every architecture that we promise, on a machine with no GPU."""

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from qpalette.codes import parse_spec
from qpalette.codes.trellis import Trellis
from qpalette.core.errors import UnsupportedError
from qpalette.kvcache import parse_code

pytest.importorskip("cuda.core", reason="needs qpalette[cuda]")

from qpalette.backends.cuda import coded, rotate_many, teams
from qpalette.backends.cuda.attend import SOURCE as ATTEND_SOURCE
from qpalette.backends.cuda.attend import warps_of
from qpalette.backends.cuda.compiler import compile_cubin, resources
from qpalette.backends.cuda.decoder import decoder_spec
from qpalette.backends.cuda.experts import FUNCTIONS, GATE_THREADS, MOST_EXPERTS, ROUTES_SOURCE, RUN
from qpalette.backends.cuda.experts import SOURCE as EXPERTS_SOURCE
from qpalette.backends.cuda.int8 import MACROS as INT8_MACROS
from qpalette.backends.cuda.int8 import SOURCE as INT8_SOURCE
from qpalette.backends.cuda.multiply import kernel_macros, most_rows, source_for
from qpalette.backends.cuda.rotate import MOST_THREADS, cut_of, rotation_macros
from qpalette.backends.cuda.rotate import SOURCE as ROTATE_SOURCE
from qpalette.backends.cuda.segments import THREADS, DeviceLimits, with_segments
from qpalette.backends.cuda.trellis_encoder import SOURCE, plan_launch
from qpalette.backends.cuda.unpack import RESCALE_MACROS, RESCALE_SOURCE, unpack_macros
from qpalette.backends.cuda.unpack import SOURCE as UNPACK_SOURCE

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kernel_report

# Dynamic shared memory that a block may ask for (CUDA C++ Programming Guide, technical specifications), in KiB.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


def macros(spec: str, shared_kib: int) -> tuple[tuple[str, int], ...]:
    quantizer = parse_spec(spec)
    assert isinstance(quantizer, Trellis)
    low, high = int(quantizer.shifts().min()), int(quantizer.shifts().max())
    values = quantizer.values_per_step
    launch = plan_launch(quantizer.memory, values, quantizer.steps, low, high, shared_kib * 1024 - 2048)
    assert launch.shared_bytes <= shared_kib * 1024 - 2048
    return launch.macros


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPALETTE_COMPILE_CACHE", str(tmp_path))


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("spec", ["tcq-3", "tcq2-3.25"])
def test_the_encoder_compiles(spec: str, arch: str) -> None:
    assert compile_cubin(SOURCE, arch, macros(spec, SHARED[arch])).startswith(b"\x7fELF")


@pytest.mark.parametrize("spec", ["tcq-1", "tcq-8-L12", "tcq-2.5-L20", "tcq2-5-L12", "tcq2-1"])
def test_extreme_rates_compile(spec: str) -> None:
    assert compile_cubin(SOURCE, "sm_90", macros(spec, SHARED["sm_90"])).startswith(b"\x7fELF")


def test_a_refusal_of_the_compiler_is_told() -> None:
    with pytest.raises(UnsupportedError, match="does not compile for sm_90"):
        compile_cubin("this is not C++", "sm_90", ())


LIMITS = {arch: DeviceLimits(100, kib * 1024, (int(arch[3:-1]), int(arch[-1]))) for arch, kib in SHARED.items()}
# Every family, whole and fractional rates, odd numbers of eighths, every length of trellis memory, tables of all sizes.
PRODUCTS = [
    *("tcq-1", "tcq-2.125", "tcq-3.25", "tcq-4.5", "tcq-8", "tcq-2-L12", "tcq-3-L18", "tcq-3-L20"),
    *("tcq2-1", "tcq2-2", "tcq2-3.25", "tcq2-4", "tcq2-5", "tcq2-3.125-L18", "tcq2-2-L20"),
    *("vq-1.5", "vq-3", "vq-6", "nuq-2", "nuq-3", "nuq-6", "nuq-8"),
]


FEW_BYTES = 12  # of tcq-4.5 at 32 columns, outside the loop


def product_macros(arch: str, batch: int) -> tuple[tuple[str, int], ...]:
    limits = LIMITS[arch]
    assert most_rows(limits, batch) >= 1
    return tuple(sorted(kernel_macros(limits, batch).items()))


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("spec", ["tcq2-3.25", "tcq-4.5", "vq-3", "nuq-8"])
def test_products_compile_for_every_architecture(spec: str, arch: str) -> None:
    decoder = decoder_spec(spec)
    assert decoder is not None
    assert compile_cubin(source_for([decoder]), arch, product_macros(arch, 8)).startswith(b"\x7fELF")


@pytest.mark.parametrize("batch", [1, 16, 24, 32])
@pytest.mark.parametrize("spec", PRODUCTS)
def test_products_of_every_family_compile_without_spills(spec: str, batch: int) -> None:
    decoder = decoder_spec(spec)
    assert decoder is not None
    usage = resources(source_for([decoder]), "sm_90", product_macros("sm_90", batch))
    assert usage.registers <= 65536 // THREADS
    if decoder.eighths <= 40:  # 64 words of x' and 32 of codes, at 8 bits and batch 16, are more than there are
        assert usage.spilled_bytes <= (FEW_BYTES if batch == 32 else 0)


@pytest.mark.parametrize("columns", teams.COLUMNS)
@pytest.mark.parametrize("spec", ["tcq2-3.25", "tcq-3.25", "tcq-8", "vq-3", "nuq-8"])
def test_products_in_teams_compile_almost_without_spills(spec: str, columns: int) -> None:
    decoder = decoder_spec(spec)
    assert decoder is not None
    macros = tuple(sorted(teams.kernel_macros(LIMITS["sm_90"], columns).items()))
    usage = resources(teams.source_for([decoder], columns), "sm_90", macros)
    assert usage.registers <= 65536 // THREADS
    assert usage.spilled_bytes <= (0 if decoder.eighths <= 32 else 448)
    assert not usage.serialized


@pytest.mark.parametrize("columns", teams.COLUMNS)
def test_products_in_teams_of_several_decoders_go_on_while_others_are_decoded(columns: int) -> None:
    decoders = [decoder for decoder in map(decoder_spec, ["nuq-4", "tcq-2.125", "tcq2-2", "tcq2-3.25"]) if decoder]
    macros = tuple(sorted(teams.kernel_macros(LIMITS["sm_90"], columns).items()))
    usage = resources(teams.source_for(decoders, columns), "sm_90", macros)
    assert usage.spilled_bytes <= (0 if columns < 96 else 136)
    assert not usage.serialized


def test_segments_of_different_decoders_compile_together() -> None:
    decoders = [decoder for decoder in map(decoder_spec, ["tcq2-3.25", "vq-3", "tcq-4"]) if decoder is not None]
    assert compile_cubin(source_for(decoders), "sm_90", product_macros("sm_90", 1)).startswith(b"\x7fELF")


def test_a_set_of_decoders_spills_no_more_than_one() -> None:
    decoders = [decoder for decoder in map(decoder_spec, ["nuq-4", "tcq-2.125", "tcq2-2", "tcq2-3.25"]) if decoder]
    assert resources(source_for(decoders), "sm_90", product_macros("sm_90", 1)).spilled_bytes == 0


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("spec", ["tcq2-3.25", "tcq-4.5", "vq-3", "nuq-8"])
def test_products_of_many_tokens_compile_almost_without_spills(spec: str, arch: str) -> None:
    decoder = decoder_spec(spec)
    assert decoder is not None
    assert resources(source_for([decoder]), arch, product_macros(arch, 32)).spilled_bytes <= FEW_BYTES


@pytest.mark.parametrize(
    ("order", "log_h", "inputs", "arch"),
    [
        *((28, 9, 14336, "sm_80"), (28, 9, 14336, "sm_90"), (28, 9, 14336, "sm_120"), (2, 11, 4096, "sm_90")),
        *((180, 4, 2880, "sm_90"), (125, 1, 250, "sm_90"), (1, 6, 576, "sm_90"), (32, 11, 65536, "sm_90")),
        *((26, 11, 53248, "sm_90"), (1535, 1, 3070, "sm_90")),
    ],
)
def test_rotations_compile(order: int, log_h: int, inputs: int, arch: str) -> None:
    kinds = ((1, False, True), (8, False, False), (32, False, True), (100, True, True), (1, False, False))
    for tokens, norm, signs in kinds:
        cut = cut_of(order, log_h, inputs, tokens, fused=not norm)
        assert cut.threads <= MOST_THREADS
        assert cut.blocks * cut.lines * cut.each << log_h >= inputs, "every row has a thread"
        macros = tuple(sorted(rotation_macros(order, log_h, cut, 0, norm, 1, signs).items()))
        assert resources(ROTATE_SOURCE, arch, macros).spilled_bytes <= 64  # ptxas stops at 64 or 72 registers, of 128


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(("order", "log_h", "pieces"), [(28, 9, 1), (148, 7, 1), (24, 10, 1), (924, 5, 1), (43, 8, 3)])
def test_rotations_of_many_tokens_compile_without_spills(order: int, log_h: int, pieces: int, arch: str) -> None:
    for tokens, batch in ((40, 64), (128, 128), (1 << 16, None)):
        cut = rotate_many.tile_cut(order, log_h, tokens)
        macros = rotate_many.tile_macros(order, log_h, cut, pieces, 1, batch, cores=batch == 64)
        assert resources(rotate_many.SOURCE, arch, tuple(sorted(macros.items()))).spilled_bytes == 0


@pytest.mark.parametrize(
    ("dim", "group", "arch"),
    [(64, 1, "sm_90"), (128, 4, "sm_90"), (128, 4, "sm_100"), (128, 4, "sm_120"), (192, 7, "sm_90"), (256, 8, "sm_90")],
)
def test_attention_compiles_without_spills(dim: int, group: int, arch: str) -> None:
    for blocks in (64, 512):
        macros = {"DIM": dim, "GROUP": group, "TYPE": 1, "WARPS": warps_of(dim, blocks, 132)}
        assert resources(ATTEND_SOURCE, arch, tuple(sorted(macros.items()))).spilled_bytes == 0


CACHES = [  # codes of keys and values, their widths, queries of a key head: of each family, all ways to look codes up
    *(("nuq-3", "nuq-3", 128, 128, 4), ("vq-2.5", "vq-2", 128, 128, 8), ("vq4-2", "nuq-4", 64, 64, 7)),
    *(("vq4-1.25", "vq-1.5", 80, 80, 1), ("nuq-7", "nuq-5", 128, 96, 4), ("vq-3", "vq-4", 256, 256, 8)),
]


def check_cache(keys: tuple[str, int], values: tuple[str, int], rows: int, arch: str) -> None:
    key, value = (coded.Coded(parse_code(name), dim, False) for name, dim in (keys, values))
    plan = coded.plan_attend(key, value, (1, 8, rows), 4096, torch.bfloat16, LIMITS[arch])
    assert plan.shared_bytes <= (SHARED[arch] - 20) * 1024
    units = [(coded.ATTEND_SOURCE, plan.macros), (coded.READ_SOURCE, key.macros("KEY"))]
    writes = [coded.plan_write([key, value], (1, 8, count), torch.float16) for count in (1, coded.MANY)]
    assert all(write.shared_bytes <= (SHARED[arch] - 2) * 1024 for write in writes)
    units += [(write.source, write.macros) for write in writes]
    for source, macros in units:
        assert resources(source, arch, tuple(sorted(macros.items()))).spilled_bytes == 0


@pytest.mark.parametrize(("keys", "values", "key_dim", "value_dim", "rows"), CACHES)
def test_caches_of_codes_compile_without_spills(
    keys: str, values: str, key_dim: int, value_dim: int, rows: int
) -> None:
    check_cache((keys, key_dim), (values, value_dim), rows, "sm_90")


@pytest.mark.parametrize("arch", SHARED)
def test_caches_of_codes_compile_for_every_architecture(arch: str) -> None:
    check_cache(("vq-3", 128), ("nuq-4", 128), 4, arch)


def loops_of_experts(specs: Iterable[str], arch: str) -> list[list[str]]:
    decoders = sorted({decoder for decoder in map(decoder_spec, specs) if decoder})
    code = compile_cubin(with_segments(EXPERTS_SOURCE, decoders), arch, product_macros(arch, RUN))
    loops = kernel_report.loops_of(code)
    assert len(loops) >= len(decoders)
    return loops


@pytest.mark.skipif(kernel_report.disassembler() is None, reason="needs nvdisasm")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("specs", [("tcq2-3.25",), ("nuq-3",), *kernel_report.SETS], ids=" ".join)
def test_no_loop_over_the_items_of_experts_goes_through_local_memory(specs: tuple[str, ...], arch: str) -> None:
    assert not any(map(kernel_report.local_accesses, loops_of_experts(specs, arch)))


@pytest.mark.skipif(kernel_report.disassembler() is None, reason="needs nvdisasm")
@pytest.mark.parametrize("specs", kernel_report.SETS, ids=" ".join)
def test_a_decoder_of_experts_takes_the_instructions_that_it_takes_alone(specs: tuple[str, ...]) -> None:
    alone = sorted(len(loops_of_experts([spec], "sm_90")[0]) for spec in specs)
    together = sorted(map(len, loops_of_experts(specs, "sm_90")))
    assert all(ours <= 1.05 * own for ours, own in zip(together, alone, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_around_the_products_of_experts_compiles(function: str) -> None:
    gate = {"THREADS": GATE_THREADS, "FUNCTION": FUNCTIONS[function], "GATED": 1, "INTERLEAVED": 0}
    for macros in ({"THREADS": MOST_EXPERTS}, {"THREADS": GATE_THREADS}, gate):
        assert compile_cubin(ROUTES_SOURCE, "sm_80", tuple(sorted(macros.items()))).startswith(b"\x7fELF")


CALLED = """
__device__ __noinline__ float reversed(const float* x, int step) {
    float all[64], sum = 0;
    #pragma unroll
    for (int i = 0; i < 64; ++i) all[i] = x[i * step];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; ++i) sum += all[i] * all[63 - i] * x[i];
    return sum;
}
extern "C" __global__ void __launch_bounds__(1024, 2) kernel(float* x, int step) { x[0] = reversed(x, step); }
"""  # 64 values in 32 registers, but not in the kernel itself


def test_spills_of_what_a_kernel_calls_count() -> None:
    usage = resources(CALLED, "sm_90", ())
    assert 0 < usage.registers <= 32
    assert usage.spilled_bytes > 0


def test_rescaling_compiles() -> None:
    assert compile_cubin(RESCALE_SOURCE, "sm_80", tuple(sorted(RESCALE_MACROS.items()))).startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", SHARED)
def test_what_is_around_products_of_int8_compiles(arch: str) -> None:
    assert resources(INT8_SOURCE, arch, tuple(sorted(INT8_MACROS.items()))).spilled_bytes == 0


@pytest.mark.parametrize("specs", [["tcq-3.25"], ["vq-6"], ["nuq-4", "tcq-2.125", "tcq2-3.25"]], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("in_int8", [False, True])
def test_unpacking_compiles_without_spills(specs: list[str], arch: str, in_int8: bool) -> None:
    decoders = [decoder for decoder in map(decoder_spec, specs) if decoder]
    macros = tuple(sorted(unpack_macros(LIMITS[arch], in_int8).items()))
    assert resources(with_segments(UNPACK_SOURCE, decoders), arch, macros).spilled_bytes == 0
