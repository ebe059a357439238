"""Products of many tokens as int8: what `runtime/prefill.py` defines, with the same bits from rotated tokens on."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from qpalette.backends.cuda.compiler import KernelLaunch, load_kernel
from qpalette.backends.cuda.decoder import COMMON_SOURCE
from qpalette.backends.cuda.library import LibraryProduct, Tokens
from qpalette.backends.cuda.rotate import TYPES
from qpalette.backends.cuda.unpack import Part
from qpalette.core.records import TILE
from qpalette.runtime import PackedLinear
from qpalette.runtime.prefill import LARGEST, LEAST_EXPONENT, table_step

SOURCE = COMMON_SOURCE + Path(__file__).with_name("int8.cu").read_text(encoding="utf-8")
THREADS, EACH = 256, 8
MACROS = {"THREADS": THREADS, "EACH": EACH, "LARGEST": LARGEST, "LEAST_EXPONENT": LEAST_EXPONENT}
ROWS_OF_A_BLOCK = 4 * THREADS
# At a time, an estimate, not measured: 16 MB, which the second-level cache still has when they are read again.
MOST_SUMS = 1 << 22


class RotatedTokens(ctypes.Structure):
    """As in int8.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "out", "scales")),
        *((name, ctypes.c_int) for name in ("columns", "type")),
    )


class Sums(ctypes.Structure):
    """As in int8.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sums", "token_steps", "scales", "y")),
        ("y_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("sum_stride", "tokens", "rows", "type")),
        ("step", ctypes.c_float),
    )


class Int8Product(LibraryProduct):
    """In int8: whole tiles of rows, so that their number is a multiple of 8, which the library wants; it also wants
    more than 16 tokens."""

    type_of_weights = torch.int8

    def __init__(self, members: Sequence[PackedLinear], dtype: torch.dtype, overlap: bool) -> None:
        super().__init__(members, dtype, overlap)
        self.in_pieces = set(range(len(members)))  # sums are not results: those have their place before
        self.tokens_in_int8, self.finish = TokensLaunch(self.device), FinishLaunch(self.device)

    def _height(self, part: Part) -> int:
        return part.source.height

    def _prepared(self, tokens: Tokens, stream: int) -> Tokens:
        return Tokens(self.tokens_in_int8.start(tokens, stream), tokens.scales)

    def _multiply(
        self, tokens: Tokens, weight: torch.Tensor, part: Part, y: torch.Tensor | None, stream: int
    ) -> torch.Tensor:
        assert y is not None
        packed, step = part.source.packed, table_step(part.source.packed.spec)
        scales = packed.scales[part.source.first_row :]
        for first, end in pieces(weight.shape[1], len(tokens.values)):
            sums = torch._int_mm(tokens.values, weight[:, first:end])
            self.finish.start(sums, tokens.scales, scales[first:end], step, y[:, first:end], stream)
        return y

    def _finish(self, tokens: Tokens, products: Sequence[torch.Tensor], stream: int) -> None:
        """Nothing is left to do."""


def pieces(rows: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Whole tiles, alike, of at most MOST_SUMS sums where that is a tile."""
    count = -(-rows * tokens // MOST_SUMS)
    each = -(-rows // (count * TILE)) * TILE
    return ((first, min(first + each, rows)) for first in range(0, rows, each))


class TokensLaunch:
    """Rotated tokens to int8; their scales become their steps, in place."""

    def __init__(self, device: torch.device) -> None:
        self._problem = RotatedTokens()
        kernel = load_kernel(SOURCE, "tokens_in_int8", MACROS, device.index or 0)
        self._launch = KernelLaunch(kernel, 1, THREADS, 0, [self._problem])

    def start(self, tokens: Tokens, stream: int) -> torch.Tensor:
        values, problem = tokens.values, self._problem
        whole = torch.empty_like(values, dtype=torch.int8)
        problem.values, problem.out, problem.scales = values.data_ptr(), whole.data_ptr(), tokens.scales.data_ptr()
        problem.columns, problem.type = values.shape[1], TYPES[values.dtype]
        self._launch.grid = (len(values), 1, 1)
        self._launch.start(stream)
        return whole


class FinishLaunch:
    """y = sums times the steps of tokens, and the scales of rows times one step."""

    def __init__(self, device: torch.device) -> None:
        self._problem = Sums()
        kernel = load_kernel(SOURCE, "finish", MACROS, device.index or 0)
        self._launch = KernelLaunch(kernel, 1, THREADS, 0, [self._problem])

    def start(
        self, sums: torch.Tensor, steps: torch.Tensor, scales: torch.Tensor, step: float, y: torch.Tensor, stream: int
    ) -> None:
        """sums int32 [N, M or more], steps float32 [N], scales int16 [M], y [N, M] with contiguous rows."""
        problem, (tokens, rows) = self._problem, y.shape
        problem.sums, problem.token_steps, problem.scales = sums.data_ptr(), steps.data_ptr(), scales.data_ptr()
        problem.y, problem.y_stride, problem.sum_stride = y.data_ptr(), y.stride(0), sums.stride(0)
        problem.tokens, problem.rows, problem.type, problem.step = tokens, rows, TYPES[y.dtype], step
        self._launch.grid = (-(-rows // ROWS_OF_A_BLOCK), -(-tokens // EACH), 1)
        self._launch.start(stream)
