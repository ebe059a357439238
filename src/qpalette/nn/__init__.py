"""Runtime modules: what a quantized model is made of."""

from qpalette.nn.launch import join_launches
from qpalette.nn.norms import fuse_norms
from qpalette.nn.packed_module import PackedModule
from qpalette.nn.quant_embedding import QuantEmbedding, TiedHead
from qpalette.nn.quant_experts import QuantExperts
from qpalette.nn.quant_linear import QuantLinear

__all__ = ["PackedModule", "QuantEmbedding", "QuantExperts", "QuantLinear", "TiedHead", "fuse_norms", "join_launches"]
