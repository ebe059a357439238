"""A linear layer whose weight stays packed: the runtime half of the artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qpalette.core.records import LinearRecord
from qpalette.nn.packed_module import PackedModule

if TYPE_CHECKING:
    from qpalette.nn.launch import Launch


class QuantLinear(PackedModule):
    """Stands in for an `nn.Linear` of `record`'s shape; x [..., K] -> [..., M] in x's dtype.

    The optional bias [M] is an ordinary parameter.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        record: LinearRecord,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        """`transposed`: it stands in for a Conv1D of transformers, whose weight is in_features x out_features."""
        super().__init__(record, dtype, device)
        self.transposed = transposed
        self.in_features = record.in_features
        self.out_features = record.out_features
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(record.out_features, dtype=dtype, device=device)) if bias else None
        )

        self.launch: Launch | None = None  # shared with those that read the same input
        self.index = 0  # in it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        launch, bias = self.launch, self._parameters["bias"]  # found at once, where `self.bias` is searched for
        result = self.multiply(x) if launch is None else launch.output_of(self.index, x)
        return result if bias is None else result + bias

    def dequantize(self, dtype: torch.dtype) -> nn.Module:
        """The ordinary layer that computes the same: W = W' Q diag(s) rounded once to `dtype`, and the bias."""
        weight = self.dequantized_weight().to(dtype)
        linear: nn.Module
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                linear = Conv1D(self.out_features, self.in_features)
            weight = weight.T.contiguous()
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.packed_repr()}"
        )
