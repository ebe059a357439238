"""CUDA kernels compiled for this machine, whose threads take turns, to test them where there is no GPU.

Matrix instructions add exactly here, and round once.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from qpalette.backends.cuda import coded, streams
from qpalette.backends.cuda.decoder import COMMON_SOURCE

COMPILER = shutil.which("g++") or shutil.which("clang++")
SHARED_BYTES = 256 << 10
# What a GPU's compiler knows by itself, and common.cuh. Threads are contexts, which jump (swapcontext asks the kernel
# each time); at a barrier each passes on to the next until all have come.
STAND_IN = """
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>
using std::isfinite; using std::isnan; using std::min; using std::max;
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
struct float2 { float x, y; }; struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; }; struct uint4 { u32 x, y, z, w; };
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x, y, z; } threadIdx, blockIdx, blockDim = {EMULATED, 1, 1}, gridDim;
alignas(16) u8 dynamic_memory[EMULATED_BYTES];
ucontext_t contexts[EMULATED];
jmp_buf threads[EMULATED], scheduler;
bool begun[EMULATED], ended[EMULATED];
std::vector<std::pair<void *, const void *>> copies[EMULATED];
struct Barrier { int arrived, passed; } of_block, of_warp[EMULATED / 32];
u32 slots[EMULATED][8];
long moves;  // of threads to barriers, or to their end

void meet(Barrier &barrier, int count) {
    const int before = barrier.passed;
    moves++;
    if (++barrier.arrived == count) barrier.arrived = 0, barrier.passed++;
    else while (barrier.passed == before) if (!_setjmp(threads[threadIdx.x])) _longjmp(scheduler, 1);
}
void __syncthreads() { meet(of_block, EMULATED); }
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
u32 __ballot_sync(u32, bool is_so) {
    slots[threadIdx.x][0] = is_so;
    __syncwarp();
    u32 lanes = 0;
    for (int i = 0; i < 32; i++) lanes |= slots[threadIdx.x / 32 * 32 + i][0] << i;
    __syncwarp();
    return lanes;
}
bool __any_sync(u32 lanes, bool is_so) { return __ballot_sync(lanes, is_so); }
void __threadfence() {}
int atomicAdd(int *place, int more) { const int before = *place; *place += more; return before; }
template <class T> T __ldcg(const T *place) { return *place; }
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
float rsqrtf(float a) { return 1 / sqrtf(a); }
u32 __byte_perm(u32 a, u32 b, u32 which) {
    const unsigned long long both = a | (unsigned long long)b << 32;
    u32 bytes = 0;
    for (int i = 0; i < 4; i++) bytes |= (u32)(both >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return bytes;
}

void wait_for_previous_kernel() {}
void let_next_kernel_start() {}
float half_to_float(u16 bits) { _Float16 value; memcpy(&value, &bits, 2); return value; }
u16 to_half(float value) { const _Float16 half = value; u16 bits; memcpy(&bits, &half, 2); return bits; }
u16 to_bfloat16(float value) {
    const u32 bits = __float_as_uint(value);
    return isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <bool BFLOAT16> u16 to_bits(float value) { return BFLOAT16 ? to_bfloat16(value) : to_half(value); }
float load(const void *x, size_t i, int type) {
    if (type == 2) return ((const float *)x)[i];
    const u16 bits = ((const u16 *)x)[i];
    return type == 1 ? number_of((u32)bits << 16) : half_to_float(bits);
}
void store(void *y, size_t i, int type, float value) {
    if (type == 2) ((float *)y)[i] = value;
    else ((u16 *)y)[i] = type == 1 ? to_bfloat16(value) : to_half(value);
}

// m16n8k16 of float16 (NUMBERS 0) or bfloat16 (1), two of which are a word; m16n8k8 of tf32 (2) (13 zeros at its end).
// A lane's words: `halves` of rows first, then of k.
template <int NUMBERS>
float operand(const u32 (*lanes)[8], int first, int row, int k, int halves) {
    constexpr int each = NUMBERS == 2 ? 1 : 2;
    const u32 word = lanes[row % 8 * 4 + k / each % 4][first + row / 8 + k / (4 * each) * halves];
    if (NUMBERS == 2) return word & 0x1fff ? NAN : number_of(word);
    const u16 bits = k % 2 ? word >> 16 : word;
    return NUMBERS == 1 ? number_of((u32)bits << 16) : half_to_float(bits);
}
template <int NUMBERS>
void multiply_tile_of_warp(float *sums, const u32 *a, u32 b0, u32 b1) {
    const u32 own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(slots[threadIdx.x], own, sizeof own);
    __syncwarp();
    const u32 (*lanes)[8] = slots + threadIdx.x / 32 * 32;
    for (int i = 0; i < 4; i++) {
        const int row = threadIdx.x % 32 / 4 + i / 2 * 8, column = threadIdx.x % 4 * 2 + i % 2;
        double sum = sums[i];
        for (int k = 0; k < (NUMBERS == 2 ? 8 : 16); k++)
            sum += (double)operand<NUMBERS>(lanes, 0, row, k, 2) * operand<NUMBERS>(lanes, 4, column, k, 1);
        sums[i] = sum;
    }
    __syncwarp();
}
template <bool BFLOAT16 = false>
void multiply_tile(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_tile_of_warp<BFLOAT16>(sum, a, b0, b1);
}
"""
DRIVER = """
void **given;
template <class... Types, size_t... Places>
void call(void (*kernel)(Types...), std::index_sequence<Places...>) {
    kernel(*(std::remove_reference_t<Types> *)given[Places]...);
}
template <class... Types>
void call(void (*kernel)(Types...)) { call(kernel, std::index_sequence_for<Types...>()); }
void thread_begins() {
    call(KERNEL);
    ended[threadIdx.x] = true, moves++;
    _longjmp(scheduler, 1);
}
void go_on(int thread) {
    if (_setjmp(scheduler)) return;
    if (begun[thread]) _longjmp(threads[thread], 1);
    begun[thread] = true;
    setcontext(&contexts[thread]);
}
// Whether all threads come to their end: false where some wait at a barrier for ever.
extern "C" bool run(void **arguments, unsigned columns, unsigned rows, unsigned layers) {
    static std::vector<char> stacks(EMULATED << 16);
    given = arguments, gridDim = {columns, rows, layers};
    for (unsigned block = 0; block < columns * rows * layers; block++) {
        blockIdx = {block % columns, block / columns % rows, block / columns / rows};
        memset(dynamic_memory, 255, sizeof dynamic_memory);
        for (int i = 0; i < EMULATED; i++) {
            getcontext(&contexts[i]);
            contexts[i].uc_stack = {&stacks[i << 16], 0, 1 << 16};
            begun[i] = ended[i] = false;
            makecontext(&contexts[i], thread_begins, 0);
        }
        for (bool some = true; some;) {
            some = false;
            const long before = moves;
            for (int i = 0; i < EMULATED; i++)
                if (!ended[i]) some = true, threadIdx.x = i, go_on(i);
            if (some && moves == before) return false;
        }
    }
    return true;
}
"""
REPLACED = (
    (r'asm volatile\("cp\.async\.cg.*?\);', "copy_later(near, from);"),
    (r'asm volatile\("cp\.async\.wait_all.*?\);', "end_copies();"),
    (r'asm volatile\("mma\.[^"]*tf32.*?\);', "multiply_tile_of_warp<2>(sum, a, b0, b1);"),
    (r'asm volatile\("prefetch.*?\);', ""),
    (r'asm\("ex2\.approx.*?\);', "result = exp2f(x);"),
    (r'asm\("cvt\.rn\.f16x2.*?\);', "pair = to_half(low) | (u32)to_half(high) << 16;"),
    (r'asm volatile\("mov\.u32 %0, %%ctaid\.x.*?\);', "block = blockIdx.x;"),
    (r"extern __shared__ __align__\(16\) (\w+) (\w+)\[\];", r"\1 *const \2 = (\1 *)dynamic_memory;"),
    ("__shared__", "static"),
)


def emulated(
    folder: Path, source: str, name: str, macros: Mapping[str, int], threads: int
) -> Callable[[Sequence[Any], tuple[int, ...]], None]:
    """The kernel, called with ctypes values and a grid; compiled in `folder`."""
    assert COMPILER is not None
    for pattern, text in REPLACED:
        source = re.sub(pattern, text, source.removeprefix(COMMON_SOURCE), flags=re.DOTALL)
    own = {"EMULATED": threads, "KERNEL": name, "EMULATED_BYTES": SHARED_BYTES}
    defines = "".join(f"#define {macro} {value}\n" for macro, value in {**macros, **own}.items())
    file = folder / f"{len(list(folder.iterdir()))}.cpp"
    file.write_text(f"{defines}{STAND_IN}{source}{DRIVER}")
    options = ["-std=c++17", "-O1", "-mf16c", "-fPIC", "-shared", "-w"]
    subprocess.run([COMPILER, *options, "-o", file.with_suffix(".so"), file], check=True)
    library = ctypes.CDLL(str(file.with_suffix(".so")))
    library.run.restype = ctypes.c_bool

    def run(arguments: Sequence[Any], grid: tuple[int, ...]) -> None:
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        assert library.run(addresses, *grid, *[1] * (3 - len(grid))), (
            "threads wait at a barrier that others never reach"
        )

    return run


@contextmanager
def emulated_caches(folder: Path) -> Iterator[None]:
    """Each `CudaStream` on this machine writes and attends by its kernels."""
    with patch.object(coded, "_start", _start(folder)), torch.library._scoped_library("qpalette", "IMPL") as library:
        library.impl("cuda_cache_write", streams._write, "CPU")
        library.impl("cuda_cache_attend", streams._attend, "CPU")
        yield


def _start(folder: Path) -> Callable[..., None]:
    """What takes the place of `coded._start`; each kernel is compiled in `folder`, once."""
    loaded: dict[Any, Callable[..., None]] = {}

    def start(
        source: str,
        name: str,
        macros: Mapping[str, int],
        device: int,
        grid: tuple[int, ...],
        threads: int,
        shared_bytes: int,
        problem: ctypes.Structure,
    ) -> None:
        key = (name, *sorted(macros.items()))
        if key not in loaded:
            loaded[key] = emulated(folder, source, name, macros, threads)
        assert shared_bytes <= SHARED_BYTES
        loaded[key]([problem], grid)

    return start
