"""How attention over a cache of codes on a GPU finds numbers, compiled for this machine: those of the definition, of
every code, in the lane's own copy of the table."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qpalette.backends.cuda import coded
from qpalette.kvcache import CacheCode, cache_palette
from qpalette.kvcache.codes import look_up
from qpalette.kvcache.vectors import unpack

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
DIMS, PARTS, VECTORS = (64, 128, 256), (4, 8), 5
# What a GPU's compiler knows by itself, for one thread.
STAND_IN = """
#include <cmath>
#include <cstdio>
#include <cstring>
#define __device__
#define __host__
#define __forceinline__ inline
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
struct uint2 { u32 x, y; }; struct uint4 { u32 x, y, z, w; }; struct float4 { float x, y, z, w; };
struct { unsigned x; } threadIdx, blockDim;
inline void __syncthreads() {}
inline int min(int a, int b) { return a < b ? a : b; }
inline u32 __byte_perm(u32 a, u32 b, u32 select) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (u32)(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}
"""
DRIVER = """
// The numbers of each vector and part, as a lane of its own looks them up in one of two tables; the other is not there.
template <class F, int PARTS>
void show(const u8 *codes, const u32 *entries, u8 *tables, FILE *out) {
    typedef Looks<F> L;
    for (int v = 0; v < VECTORS; v++)
        for (int part = 0; part < PARTS; part++) {
            const int lane = (11 * v + part) % 32, copy = v % 2 * 32 + lane * L::WORDS % 32;
            threadIdx.x = 0;
            memset(tables, 255, L::TABLE_BYTES);
            spread_table<F, 1>(entries, tables, v % 2);
            for (int at = 0; at < L::TABLE_BYTES / 4; at++)  // only the lane's own copy stays
                if (at % 64 < copy || at % 64 >= copy + L::WORDS) ((u32 *)tables)[at] = ~0u;
            threadIdx.x = lane;
            Piece<F, PARTS> piece;
            piece.load(codes + v * F::CODE_BYTES, part);
            const Indexes<F, PARTS> indexes(piece);
            for (int four = 0; four < Piece<F, PARTS>::NUMBERS / 4; four++) {
                u32 found[2];
                indexes.look_up(tables, start_of_lane<F>(v % 2), four, found);
                fwrite(found, 4, 2, out);
            }
        }
}
"""


def source(formats: list[tuple[CacheCode, int]]) -> str:
    folder = Path(coded.__file__).parent
    parts = [(folder / name).read_text(encoding="utf-8") for name in ("coded.cuh", "coded_look_up.cuh")]
    device = re.sub(r"asm volatile\([^;]*\);", "", "".join(parts))
    shows = [
        f"""    fread(codes, 1, {VECTORS} * Format<{dim}, {code.width}, {code.index_bits}>::CODE_BYTES, in);
    fread(entries, 4, (1 << Looks<Format<{dim}, {code.width}, {code.index_bits}>>::BITS) *
        Looks<Format<{dim}, {code.width}, {code.index_bits}>>::WORDS, in);
"""
        + "".join(
            f"    show<Format<{dim}, {code.width}, {code.index_bits}>, {cut}>(codes, entries, tables, out);\n"
            for cut in PARTS
        )
        for code, dim in formats
    ]
    main = f"""
alignas(16) u8 codes[1 << 16], tables[1 << 16]; u32 entries[1 << 12];
int main(int, char **names) {{
    FILE *in = fopen(names[1], "rb"), *out = fopen(names[2], "wb");
{"".join(shows)}
    return fclose(out);
}}
"""
    return f"{STAND_IN}constexpr int VECTORS = {VECTORS};\n{device}{DRIVER}{main}"


def test_look_ups_find_the_numbers_of_the_definition(tmp_path: Path) -> None:
    formats = [(code, dim) for code in cache_palette() for dim in DIMS]
    given, wanted = b"", []
    for code, dim in formats:
        units = dim // code.width
        size = sum(-(-units * width // 8) for width in coded.planes(code.index_bits))
        codes = torch.randint(256, (VECTORS, size), dtype=torch.uint8)
        look_ups = coded.lookups_of(code.name, torch.device("cpu"))
        given += codes.numpy().tobytes() + look_ups.numpy().tobytes()
        points = code.points(torch.device("cpu"))
        wanted.append(look_up(unpack(codes, code.index_bits, units), points).half().reshape(VECTORS, dim))
    (tmp_path / "look.cpp").write_text(source(formats), encoding="utf-8")
    (tmp_path / "in").write_bytes(given)
    program = tmp_path / "look"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-w", "-o", program, tmp_path / "look.cpp"], check=True)
    subprocess.run([program, tmp_path / "in", tmp_path / "out"], check=True)
    found = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float16)
    for (code, dim), values in zip(formats, wanted, strict=True):
        for cut in PARTS:
            own, found = found[: values.numel()], found[values.numel() :]
            assert torch.equal(own.view(VECTORS, dim), values), f"{code.name}, {dim} numbers in {cut} parts"
    assert len(found) == 0
