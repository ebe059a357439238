"""The rotation of a linear's input on a CUDA device, in one launch, into the order that the products read."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qpalette.backends.cuda import rotate_many
from qpalette.backends.cuda.compiler import KernelLaunch, load_kernel
from qpalette.backends.cuda.rotate_many import Pieces, TileCut, pieces_of, tile_cut, tile_macros
from qpalette.core.errors import UnsupportedError
from qpalette.rotate import Factor, Rotation

SOURCE = rotate_many.SHARED_SOURCE + Path(__file__).with_name("rotate.cu").read_text(encoding="utf-8")
CHUNK_COLUMNS = 256
MOST_HADAMARD_BITS = 11  # of the part that runs in registers: MOST_THREADS of four values each
MOST_ROW_BITS = 9  # threads for a row of that
MOST_THREADS = 512
MOST_EACH = 8
MOST_ORDER = 8192  # of A: a line of it takes 32 KB of shared memory, and all of it 256 MB
MOST_FLOATS = 5632  # of A, twice, and of its output, in a block's shared memory
# Blocks of a token that is alone: as many as products often leave multiprocessors free (Llama-3.1-8B on an H100: 128 of
# 132 are used). A few tokens keep more of them busy anyway, and are done sooner in smaller pieces. Rotation and product
# of 4096 x 14336 in 4 and 14 blocks a token: 15.2 and 16.1 us for one token, 18.6 and 16.7 for 8, 22.2 and 21.2 for 16.
FEW_BLOCKS = 4
BLOCKS_OF_A_FEW_TOKENS = 16
MOST_OF_A_FEW_TOKENS = 16
# More tokens share so many blocks, or twice as many, where a thread of a cut for many would have more products with A
# than these: order 28 has 1568 (4096 x 14336 at 32 tokens takes 33.2 us so, and took 34.5: tiles.py, H200); order 2
# has 16, and was slower in more blocks.
BLOCKS_OF_MORE_TOKENS = 512
MOST_PRODUCTS = 512
# Many tokens.
MOST_SUMS = 56  # of a thread: rows times values
MOST_LOG_VALUES = 2
LEAST_THREADS = 64
MOST_FLOATS_OF_MANY = 15360
FEW_ROWS = 4  # of A, that the kernel of a few tokens multiplies as fast as any can be read and written
ALIGNMENT = 16  # bytes, of what is loaded in vectors
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True)
class Split:
    """Q = I (x) A (x) H: the dense factor A, float32 and transposed, with H's normalisation in it; H is 2^log_h."""

    dense: torch.Tensor
    log_h: int

    @property
    def order(self) -> int:
        return len(self.dense)


@dataclass(frozen=True)
class Rotated:
    """Tokens in the rotated basis, in the order of a product's fragments, and what each was divided by."""

    values: torch.Tensor
    scales: torch.Tensor


def padded_columns(inputs: int) -> int:
    return -(-inputs // CHUNK_COLUMNS) * CHUNK_COLUMNS


@lru_cache(maxsize=256)
def split_rotation(name: str, inputs: int, device: torch.device, most_bits: int = MOST_HADAMARD_BITS) -> Split:
    """Of the rotation `name`; its last factor's power of two, of at most `most_bits`, runs in registers, the rest is
    dense.

    Raises UnsupportedError when that is beyond MOST_ORDER.
    """
    rotation = Rotation.parse(name, inputs)
    last = rotation.factors[-1]
    power = last.order & -last.order if last.kind == "h" and last.order & (last.order - 1) == 0 else 1
    log_h = min(power.bit_length() - 1, most_bits)
    rest = list(rotation.factors[:-1])
    if last.order >> log_h > 1:
        rest.append(Factor(last.kind, last.order >> log_h))
    order = math.prod(factor.order for factor in rest)
    if order > MOST_ORDER:
        raise UnsupportedError(
            f"rotation '{name}' has a dense factor of {order}, and on CUDA {MOST_ORDER} is the most: "
            "quantize with the rotation `block`, or run it with QPALETTE_BACKEND=ref"
        )
    dense = torch.ones(1, 1, dtype=torch.float64)
    for factor in rest:
        dense = torch.kron(dense, torch.from_numpy(factor.matrix()))
    return Split((dense.T / (1 << log_h) ** 0.5).float().contiguous().to(device), log_h)


@dataclass(frozen=True)
class Cut:
    """How A's output is cut: 2^log_values columns of `each` rows for a thread, `lines` times so many rows for a
    block."""

    log_values: int
    lines: int
    each: int
    threads: int
    blocks: int
    shared_bytes: int

    def products(self, order: int) -> int:
        """With A, of a thread."""
        return order * self.each << self.log_values


def cut_of(order: int, log_h: int, inputs: int, tokens: int, fused: bool = False) -> Cut:
    """For a few tokens the fewest rows per thread that leave few blocks, or as few blocks as can be. For many, which
    keep the device busy anyway, the most rows per thread, for each of which it would read the token again, and then the
    most values, as a factor that is loaded from shared memory serves them all. Between them, `fused` with a product,
    are those whose blocks would be few and long."""
    many, few = None, FEW_BLOCKS if tokens == 1 else BLOCKS_OF_A_FEW_TOKENS
    if tokens > MOST_OF_A_FEW_TOKENS:
        cuts = [
            cut
            for log_values in range(max(0, log_h - MOST_ROW_BITS), min(log_h, MOST_LOG_VALUES) + 1)
            for cut in _cuts(order, log_h, inputs, log_values, MOST_SUMS >> log_values, MOST_FLOATS_OF_MANY)
        ]
        enough = [cut for cut in cuts if cut.lines << log_h >> cut.log_values >= LEAST_THREADS] or cuts
        many = max(enough, key=lambda cut: (cut.each, cut.log_values, -cut.blocks))
        if not fused or many.products(order) <= MOST_PRODUCTS:
            return many
        few = min(few, BLOCKS_OF_MORE_TOKENS // tokens)
    cuts = _cuts(order, log_h, inputs, max(0, log_h - MOST_ROW_BITS), MOST_EACH, MOST_FLOATS)
    cut = min(cuts, key=lambda cut: (max(cut.blocks, few), cut.each))
    return many if many and tokens * cut.blocks > 2 * BLOCKS_OF_MORE_TOKENS else cut


def _cuts(order: int, log_h: int, inputs: int, log_values: int, most_each: int, most_floats: int) -> list[Cut]:
    """With as many lines as a block has threads and shared memory for."""
    rows, row_threads = inputs >> log_h, 1 << log_h >> log_values
    cuts = []
    for each in range(1, most_each + 1):
        factors = order * 2 * each
        if order % each or (each > 1 and max(factors, each << log_h) > most_floats):
            continue
        fitting = min(MOST_THREADS // row_threads, most_floats // factors, most_floats // (each << log_h))
        lines = max(1, min(fitting, rows // each))
        threads, blocks = -(-row_threads * lines // 32) * 32, -(-rows // (lines * each))
        cuts.append(Cut(log_values, lines, each, threads, blocks, 4 * lines * each << log_h))
    return cuts


def rotation_macros(
    order: int,
    log_h: int,
    cut: Cut,
    in_type: int,
    norm: bool,
    batch: int | None,
    signs: bool = True,
    tabled: bool = False,
    cores: bool = False,
) -> dict[str, int]:
    """The compile-time constants of rotate.cu."""
    return {
        "DENSE": order,
        "LOG_H": log_h,
        "LOG_VALUES": cut.log_values,
        "LINES": cut.lines,
        "EACH": cut.each,
        "IN_TYPE": in_type,
        "NORM": int(norm),
        "SIGNS": int(signs),
        "BATCH": batch or 0,
        "TABLED": int(tabled),
        "CORES": int(cores),
    }


def type_of_values(dtype: torch.dtype, batch: int | None) -> torch.dtype:
    """Of x': float16, divided token by token so that nothing overflows; for a library's product of bfloat16 tokens,
    which cannot overflow, that."""
    return torch.bfloat16 if batch is None and dtype == torch.bfloat16 else torch.float16


def serves_many(split: Split, inputs: int, tokens: int, dtype: torch.dtype, signs: bool) -> bool:
    """Whether A is multiplied by matrix instructions (rotate_many.cu): where x with its signs is of 16 bits, one block
    of Q is all of it, and A has more rows than a few."""
    return (
        tokens > MOST_OF_A_FEW_TOKENS
        and signs
        and dtype != torch.float32
        and split.order > FEW_ROWS
        and split.order << split.log_h == inputs
        and split.log_h >= rotate_many.LEAST_HADAMARD_BITS
    )


@lru_cache(maxsize=256)
def _in_pieces(name: str, inputs: int, device: torch.device, dtype: torch.dtype) -> tuple[Split, Pieces]:
    """The rotation as rotate_many.cu has it."""
    split = split_rotation(name, inputs, device, rotate_many.MOST_HADAMARD_BITS)
    return split, pieces_of(split.dense.T, dtype)


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class RotationLaunch:
    """`rotate` for one diagonal and rotation, and for one number of tokens: any above 16, in lots of `batch`, or each
    in an order of its own, where that is None; any where it is 1. `table`: addresses of diagonals like `diagonal`,
    int64, of which a token has its owner's. `cores`: in the order that wgmma reads. `zero_bytes`: of memory that is
    set to zero for the product, a multiple of 16."""

    def __init__(
        self,
        rotation: str,
        diagonal: torch.Tensor,
        inputs: int,
        tokens: int,
        batch: int | None,
        dtype: torch.dtype,
        norm: tuple[torch.Tensor, float] | None = None,
        overlap: bool = True,
        table: torch.Tensor | None = None,
        cores: bool = False,
        zero_bytes: int = 0,
    ) -> None:
        device, signs = diagonal.device.index or 0, diagonal.dtype == torch.uint8
        self._x, self._out, self._scales, self._owners, self._zeros = (ctypes.c_void_p() for _ in range(5))
        padded, zero_count = ctypes.c_int(padded_columns(inputs)), ctypes.c_int(zero_bytes // ALIGNMENT)
        split = split_rotation(rotation, inputs, diagonal.device)
        cut: Cut | TileCut
        arguments: list[Any]
        self._kept: tuple[torch.Tensor, ...]  # what the kernel reads, beside its arguments of a start
        if norm is None and table is None and serves_many(split, inputs, tokens, dtype, signs):
            split, pieces = _in_pieces(rotation, inputs, diagonal.device, dtype)
            cut = tile_cut(split.order, split.log_h, tokens)
            macros = tile_macros(split.order, split.log_h, cut, pieces.count, TYPES[dtype], batch, cores)
            kernel = load_kernel(rotate_many.SOURCE, "rotate_many", macros, device, cut.shared_bytes)
            self._kept = (diagonal, pieces.values)
            arguments = [self._x, *map(_address, self._kept), ctypes.c_float(pieces.unit)]
            arguments += [padded, self._out, self._scales, self._zeros, zero_count]
        else:
            cut = cut_of(split.order, split.log_h, inputs, tokens, batch is not None)
            kind = (TYPES[dtype], norm is not None, batch, signs, table is not None, cores)
            macros = rotation_macros(split.order, split.log_h, cut, *kind)
            kernel = load_kernel(SOURCE, "rotate", macros, device, cut.shared_bytes)
            weight, epsilon = norm or (diagonal, 0.0)
            self._kept = (diagonal if table is None else table, split.dense, weight)
            arguments = [self._x, ctypes.c_longlong(inputs), *map(_address, self._kept), ctypes.c_float(epsilon)]
            arguments += [ctypes.c_int(inputs), padded, self._out, self._scales, self._owners, self._zeros, zero_count]
        overlap = overlap and torch.cuda.get_device_capability(device) >= (9, 0)
        self._blocks = cut.blocks
        self._launch = KernelLaunch(kernel, (tokens, cut.blocks), cut.threads, cut.shared_bytes, arguments, overlap)

    def start(self, tokens: int, x: int, out: int, scales: int, stream: int, owners: int = 0, zeros: int = 0) -> None:
        """`tokens` rows at address x, contiguous and aligned; results and divisors go to `out` and `scales`; `owners`:
        int32, a token's place in the table; `zeros`: what is set to zero."""
        self._x.value, self._out.value, self._scales.value, self._owners.value = x, out, scales, owners
        self._zeros.value = zeros
        self._launch.grid = (tokens, self._blocks, 1)
        self._launch.start(stream)


def rotate(
    x: torch.Tensor,
    diagonal: torch.Tensor,
    rotation: str,
    batch: int | None,
    norm: tuple[torch.Tensor, float] | None = None,
    cores: bool = False,
) -> Rotated:
    """Q diag(d) x for x [N, K]; d as packed signs, uint8 [ceil(K/8)], or as the bits of float16 values, int16 [K].

    For `batch` columns (1, 2, 4, or a multiple of 8) in the order of `multiply.cu`, or with `cores` in wgmma's, more
    tokens in lots of so many; None gives [N, padded K], each row in the order of a single column. `norm` is (weight
    [K], epsilon) of an RMSNorm to apply first.
    Raises ValueError when the weight's type is not x's, or the diagonal's none of the two.
    """
    tokens, inputs = x.shape
    if norm is not None and norm[0].dtype != x.dtype:
        raise ValueError(f"a weight of {norm[0].dtype} for an input of {x.dtype}")
    if diagonal.dtype not in (torch.uint8, torch.int16):
        raise ValueError(f"an input diagonal of {diagonal.dtype}: uint8 (packed signs) or int16 (bits of float16)")
    x, diagonal = aligned(x.contiguous()), aligned(diagonal)
    columns = -(-tokens // batch) * batch if batch else tokens
    values = x.new_empty(columns, padded_columns(inputs), dtype=type_of_values(x.dtype, batch))
    scales = torch.empty(columns, dtype=torch.float32, device=x.device)
    launch = RotationLaunch(rotation, diagonal, inputs, tokens, batch, x.dtype, norm, overlap=False, cores=cores)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    launch.start(tokens, x.data_ptr(), values.data_ptr(), scales.data_ptr(), stream)
    return Rotated(values, scales)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where no vectors can be loaded: a block of memory of its own is aligned."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
