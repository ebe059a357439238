"""What writes a cache of codes on a GPU, compiled for this machine, whose threads take turns: bytes are those of the
definition, of every family, for few tokens and for many; tests/device has every code.

Matrix instructions add exactly here, and round once. Whole numbers and a Hadamard matrix of order 4^n leave nothing to
rounding before a unit is compared; a scale may be within rounding of the middle between two bytes.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qpalette.backends.cuda import coded, streams
from qpalette.backends.cuda.streams import CudaStream
from qpalette.kvcache import CacheCode, Exact, Stream, Transform, VectorFormat, cache_palette, parse_code, white
from qpalette.kvcache.codes import nearest
from qpalette.kvcache.transform import made_of
from qpalette.kvcache.vectors import BLOCK

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
NONE = Exact(0, 0)
# What a GPU's compiler knows by itself. Threads are contexts, which jump (swapcontext asks the kernel each time); at a
# barrier each passes on to the next until all have come.
STAND_IN = """
#include <cmath>
#include <csetjmp>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>
using std::isfinite; using std::isnan;
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
struct float2 { float x, y; }; struct float4 { float x, y, z, w; }; struct uint4 { u32 x, y, z, w; };
struct Index { unsigned x, y; } threadIdx, blockIdx, blockDim;
alignas(16) float shared[1 << 16];
ucontext_t contexts[THREADS];
jmp_buf threads[THREADS], scheduler;
bool begun[THREADS], ended[THREADS];
std::vector<std::pair<void *, const void *>> copies[THREADS];
struct Barrier { int arrived, passed; } of_block, of_warp[THREADS / 32];
u32 slots[THREADS][8];

void meet(Barrier &barrier, int count) {
    const int before = barrier.passed;
    if (++barrier.arrived == count) barrier.arrived = 0, barrier.passed++;
    else while (barrier.passed == before) if (!_setjmp(threads[threadIdx.x])) _longjmp(scheduler, 1);
}
void __syncthreads() { meet(of_block, THREADS); }
void __syncwarp() { meet(of_warp[threadIdx.x / 32], 32); }
template <class T> T from_lane(T value, int lane) {
    memcpy(slots[threadIdx.x], &value, 4);
    __syncwarp();
    memcpy(&value, slots[threadIdx.x / 32 * 32 + lane], 4);
    __syncwarp();
    return value;
}
template <class T> T __shfl_sync(u32, T value, int lane) { return from_lane(value, lane % 32); }
template <class T> T __shfl_xor_sync(u32, T value, int step) { return from_lane(value, threadIdx.x % 32 ^ step); }
void copy_later(void *to, const void *from) { copies[threadIdx.x].push_back({to, from}); }
void end_copies() {
    for (auto &copy : copies[threadIdx.x]) memcpy(copy.first, copy.second, 16);
    copies[threadIdx.x].clear();
}
float number_of(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
u32 __float_as_uint(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
float __uint_as_float(u32 bits) { return number_of(bits); }
float __int_as_float(int bits) { return number_of(bits); }
float __fsub_rn(float a, float b) { return a - b; }
float __fadd_rn(float a, float b) { return a + b; }
float __fmul_rn(float a, float b) { return a * b; }
float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
float __frcp_rn(float a) { return 1 / a; }
int min(int a, int b) { return a < b ? a : b; }
void wait_for_previous_kernel() {}
void let_next_kernel_start() {}
float load(const void *x, size_t i, int) { _Float16 value; memcpy(&value, (const u16 *)x + i, 2); return value; }
float half_to_float(u16 bits) { return load(&bits, 0, 0); }

// m16n8k8 of tf32, whose operands end in 13 zeros.
void multiply_tile_of_warp(float *sums, const u32 *a, u32 b0, u32 b1) {
    const u32 own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(slots[threadIdx.x], own, sizeof own);
    __syncwarp();
    const u32 (*lanes)[8] = slots + threadIdx.x / 32 * 32;
    for (int i = 0; i < 4; i++) {
        const int row = threadIdx.x % 32 / 4 + i / 2 * 8, column = threadIdx.x % 4 * 2 + i % 2;
        double sum = sums[i];
        for (int k = 0; k < 8; k++) {
            const u32 left = lanes[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2];
            const u32 right = lanes[column * 4 + k % 4][4 + k / 4];
            sum += (left | right) & 0x1fff ? NAN : (double)number_of(left) * number_of(right);
        }
        sums[i] = sum;
    }
    __syncwarp();
}
"""
DRIVER = """
const Problem *given;
void thread_begins() {
    KERNEL(*given);
    ended[threadIdx.x] = true;
    _longjmp(scheduler, 1);
}
void go_on(int thread) {
    if (_setjmp(scheduler)) return;
    if (begun[thread]) _longjmp(threads[thread], 1);
    begun[thread] = true;
    setcontext(&contexts[thread]);
}
extern "C" void run(const Problem *problem, int columns, int rows) {
    static std::vector<char> stacks(THREADS << 16);
    given = problem;
    for (blockIdx.y = 0; blockIdx.y < rows; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < columns; blockIdx.x++) {
            memset(shared, 255, sizeof shared);
            for (int i = 0; i < THREADS; i++) {
                getcontext(&contexts[i]);
                contexts[i].uc_stack = {&stacks[i << 16], 0, 1 << 16};
                begun[i] = ended[i] = false;
                makecontext(&contexts[i], thread_begins, 0);
            }
            for (bool some = true; some;) {
                some = false;
                for (int i = 0; i < THREADS; i++)
                    if (!ended[i]) some = true, threadIdx.x = i, go_on(i);
            }
        }
}
"""
REPLACED = (
    (r'asm volatile\("cp\.async\.cg.*?\);', "copy_later(near, from);"),
    (r'asm volatile\("cp\.async\.wait_all.*?\);', "end_copies();"),
    (r'asm volatile\("mma\..*?\);', "multiply_tile_of_warp(sum, a, b0, b1);"),
    (r'asm volatile\("prefetch.*?\);', ""),
    (r'asm volatile\("mov\.u32 %0, %%ctaid\.x.*?\);', "block = blockIdx.x;"),
    ("extern __shared__", "extern"),
    ("__shared__", "static"),
)


def translated(source: str) -> str:
    device = source.removeprefix(coded.COMMON_SOURCE)
    for pattern, text in REPLACED:
        device = re.sub(pattern, text, device, flags=re.DOTALL)
    return device


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In the place of `coded._start`."""
    folder, loaded = tmp_path_factory.mktemp("kernels"), {}

    def begin(source: str, name: str, macros: dict[str, int], device: int, grid: tuple[int, int], threads: int,
              shared_bytes: int, problem: ctypes.Structure) -> None:  # fmt: skip
        key = (name, *sorted(macros.items()))
        if key not in loaded:
            file = folder / f"{len(loaded)}.cpp"
            defines = "".join(f"#define {macro} {value}\n" for macro, value in macros.items())
            file.write_text(f"{defines}#define KERNEL {name}\n{STAND_IN}{translated(source)}{DRIVER}")
            assert COMPILER is not None
            options = ["-std=c++17", "-O1", "-mf16c", "-fPIC", "-shared", "-w"]
            subprocess.run([COMPILER, *options, "-o", file.with_suffix(".so"), file], check=True)
            loaded[key] = ctypes.CDLL(str(file.with_suffix(".so")))
        assert shared_bytes <= 4 << 16
        loaded[key].run(ctypes.byref(problem), *grid)

    return begin


@pytest.fixture(autouse=True)
def on_this_machine(start: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(coded, "_start", start)
    with torch.library._scoped_library("qpalette", "IMPL") as library:
        library.impl("cuda_cache_write", streams._write, "CPU")
        yield


def transform_of(kind: str, heads: int, dim: int) -> Transform:
    """ "fed back": a matrix and a mean for each head, and errors that later blocks make good."""
    if kind == "white":
        return white(dim)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0]
    plain = made_of(basis * torch.linspace(0.5, 2, dim), torch.randn(heads, dim, generator=generator))
    number = torch.arange(dim) // BLOCK
    below = (number[:, None] > number) * torch.randn(heads, dim, dim, generator=generator) / dim**0.5
    return Transform(plain.matrix, plain.inverse, plain.mean, below, 1 + torch.rand(heads, generator=generator))


def both(
    name: str, dim: int, shape: tuple[int, int, int], kind: str = "white", exact: Exact = NONE, unbiased: bool = True
) -> tuple[Stream, Stream]:
    """The definition, and the kernels."""
    format, transform = VectorFormat(parse_code(name), dim, unbiased), transform_of(kind, shape[1], dim)
    given = (format, transform, exact, shape, torch.float16, CPU)
    return Stream(*given), CudaStream(*given)


def vectors(batch: int, heads: int, count: int, dim: int) -> Tensor:
    return (torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(0)) * 3).half()


def write(stream: Stream, x: Tensor, start: int = 0, starts: tuple[int, ...] = (0, 0)) -> None:
    stream.write(x, torch.arange(start, start + x.shape[2]), torch.tensor(starts))


def assert_alike(plain: Stream, mine: Stream) -> None:
    assert torch.equal(plain.codes, mine.codes)
    assert all(torch.equal(a, b) for a, b in zip(plain.memory[1:], mine.memory[1:], strict=True))
    apart = (plain.scales.int() - mine.scales.int()).abs()
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 0.01


@pytest.mark.parametrize("name", ["nuq-2", "nuq-3", "nuq-8", "vq-1.5", "vq-2.5", "vq4-1.25", "vq4-2"])
def test_bytes_are_those_of_the_definition(name: str) -> None:
    plain, mine = both(name, 64, (2, 2, 60))
    x = vectors(2, 2, 50, 64).round()
    x[0, 0, 3], x[1, 1, 40] = 0, torch.inf
    x[0, 1, 5, 6], x[1, 1, 49, 63] = torch.nan, -torch.inf
    for stream in (plain, mine):
        for first, last in pairwise((0, 1, 3, 30, 50)):
            write(stream, x[:, :, first:last], first)
    assert_alike(plain, mine)


@pytest.mark.parametrize(("count", "exact", "starts"), [(17, NONE, (0, 0)), (140, Exact(3, 20), (2, 70))], ids=str)
def test_tokens_over_the_borders_of_warps_blocks_and_pages(count: int, exact: Exact, starts: tuple[int, int]) -> None:
    plain, mine = both("nuq-4", 16, (2, 3, 200), exact=exact, unbiased=False)
    for stream in (plain, mine):
        write(stream, vectors(2, 3, count, 16).round(), 55, starts)
    assert_alike(plain, mine)


@pytest.mark.parametrize("code", [code for code in cache_palette() if code.width == 1], ids=lambda code: code.name)
def test_borders_are_where_the_definition_changes_its_mind(code: CacheCode) -> None:
    points = code.points(CPU)
    found, borders = coded.points_of(code.name, CPU).split(len(points))
    assert torch.equal(found, points[:, 0])
    assert (points[1:] > points[:-1]).all()
    borders, number = borders[:-1], torch.arange(len(points) - 1)
    assert torch.equal(nearest(borders[:, None], points)[:, 0], number + 1)
    assert torch.equal(nearest(borders.nextafter(points[:-1, 0])[:, None], points)[:, 0], number)


@pytest.mark.parametrize("gain", [1e-2, 1e-5])
def test_numbers_far_beyond_all_points(gain: float) -> None:
    """Where several points are equally near, as differences are rounded, the first counts."""
    plain, mine = both("nuq-4", 16, (1, 2, 20), "fed back")
    for stream in (plain, mine):
        shaping = (torch.zeros(2, 16, 16), torch.full((2,), gain))
        stream.transform = Transform(white(16).matrix, white(16).inverse, torch.zeros(1, 16), *shaping)
    mine = CudaStream(mine.format, mine.transform, NONE, (1, 2, 20), torch.float16, CPU)
    for stream in (plain, mine):
        write(stream, vectors(1, 2, 20, 16).round(), 0, (0,))
    assert torch.equal(plain.codes, mine.codes)


def test_what_has_no_room_is_left_out() -> None:
    _, mine = both("nuq-2", 16, (1, 2, 20))
    write(mine, vectors(1, 2, 20, 16), 0, (0,))
    before = [memory.clone() for memory in mine.memory]
    write(mine, vectors(1, 2, 15, 16) + 1, 20, (0,))
    assert all(torch.equal(a, b) for a, b in zip(before, mine.memory, strict=True))


@pytest.mark.parametrize(
    ("name", "dim"), [("nuq-3", 64), ("nuq-7", 24), ("vq-2.5", 48), ("vq4-2", 32), ("vq4-1.75", 40)]
)
def test_keys_with_errors_fed_back(name: str, dim: int) -> None:
    """Coordinates summed in another order change an index where two points are equally near, seldom, and what is fed
    back after it."""
    count = 20
    plain, mine = both(name, dim, (1, 2, 60), "fed back")
    x = vectors(1, 2, count, dim)
    write(plain, x, 0, (0,))
    write(mine, x, 0, (0,))
    write(mine, x[:, :, :2], count, (0,))
    assert torch.equal(mine.codes[:, :, 0, count : count + 2], mine.codes[:, :, 0, :2]), "as it is with others"
    differ = (plain.codes != mine.codes)[:, :, 0, :count].any(-1)
    assert differ.float().mean() <= 0.05
    assert differ.logical_not().any()


def test_a_slice_is_written_as_a_copy_of_it_is() -> None:
    """Whose vectors lie where no sixteen bytes begin."""
    x = vectors(1, 2, 20, 32)
    wide = torch.zeros(1, 20, 2, 37).half()
    wide[..., 3:35] = x.transpose(1, 2)
    plain, mine = both("vq-3", 32, (1, 2, 30))[1], both("vq-3", 32, (1, 2, 30))[1]
    write(plain, x, 0, (0,))
    write(mine, wide[..., 3:35].transpose(1, 2), 0, (0,))
    assert torch.equal(plain.pages, mine.pages)
