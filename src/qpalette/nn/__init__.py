"""Runtime modules: what a quantized model is made of."""

from qpalette.nn.assemble import pack_modules, packed_path
from qpalette.nn.launch import join_launches
from qpalette.nn.norms import fuse_norms
from qpalette.nn.packed_module import PackedModule
from qpalette.nn.quant_embedding import QuantEmbedding, TiedHead, TiedLinear
from qpalette.nn.quant_experts import QuantExperts
from qpalette.nn.quant_linear import QuantLinear
from qpalette.nn.stacked_experts import StackedExperts

__all__ = [
    "PackedModule",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "StackedExperts",
    "TiedHead",
    "TiedLinear",
    "fuse_norms",
    "join_launches",
    "pack_modules",
    "packed_path",
]
