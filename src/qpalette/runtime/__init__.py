"""The contract between the product and its backends: who can do what, and the one torch operator."""

from qpalette.runtime.contract import (
    TILES,
    Backend,
    ExpertsProduct,
    PackedExperts,
    PackedLinear,
    Product,
    Verdict,
    in_one_basis,
    in_runs,
)
from qpalette.runtime.dispatch import backends, register, select
from qpalette.runtime.experts import PreparedExperts, packed_experts
from qpalette.runtime.gate import Gate, recognise
from qpalette.runtime.held_experts import held_experts, hold, is_one_operator
from qpalette.runtime.kept import keeping
from qpalette.runtime.ops import PreparedLinears, backend_for, packed_linear, packed_linears
from qpalette.runtime.prefill import INT8, check_road, prefill_by, prefill_road

__all__ = [
    "INT8",
    "TILES",
    "Backend",
    "ExpertsProduct",
    "Gate",
    "PackedExperts",
    "PackedLinear",
    "PreparedExperts",
    "PreparedLinears",
    "Product",
    "Verdict",
    "backend_for",
    "backends",
    "check_road",
    "held_experts",
    "hold",
    "in_one_basis",
    "in_runs",
    "is_one_operator",
    "keeping",
    "packed_experts",
    "packed_linear",
    "packed_linears",
    "prefill_by",
    "prefill_road",
    "recognise",
    "register",
    "select",
]
