"""The contract between the product and its backends: who can do what, and the one torch operator."""

from qpalette.runtime.contract import TILES, Backend, PackedLinear, Product, Verdict
from qpalette.runtime.dispatch import backends, register, select
from qpalette.runtime.ops import PreparedLinears, backend_for, packed_linear, packed_linears

__all__ = [
    "TILES",
    "Backend",
    "PackedLinear",
    "PreparedLinears",
    "Product",
    "Verdict",
    "backend_for",
    "backends",
    "packed_linear",
    "packed_linears",
    "register",
    "select",
]
