"""Runtime modules: what a quantized model is made of."""

from qpalette.nn.quant_linear import QuantLinear

__all__ = ["QuantLinear"]
