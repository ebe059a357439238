"""The one torch operator that a quantized model calls, defined once for every backend, traceable by torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from qpalette.core.errors import UnsupportedError
from qpalette.runtime.contract import TILES, Backend, PackedLinear
from qpalette.runtime.dispatch import backends, select

_LIBRARY = torch.library.Library("qpalette", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor signs, str spec, str rotation, str layout, int out_features)"
    " -> Tensor"
)
_LIBRARY.define(
    "linears(Tensor x, Tensor[] codes, Tensor[] scales, Tensor signs, str[] specs, str rotation, str layout,"
    " int[] out_features) -> Tensor"
)


@lru_cache(maxsize=1024)
def _owner_of(layout: str, spec: str, device: torch.device) -> Backend:
    owners = [backend for backend in backends().values() if backend.layout == layout]
    if not owners or not owners[0].supports("linear", spec, device).ok:
        raise UnsupportedError(f"codes laid out for '{layout}' cannot run on {device}: load the model there")
    return owners[0]


def backend_for(layout: str, spec: str, device: torch.device) -> Backend:
    """The backend that runs codes stored in `layout`: its owner, or the best one for the stored layout.

    Raises UnsupportedError with the reasons when there is none.
    """
    return select("linear", spec, device) if layout == TILES else _owner_of(layout, spec, device)


@torch.library.impl(_LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    signs: torch.Tensor,
    spec: str,
    rotation: str,
    layout: str,
    out_features: int,
) -> torch.Tensor:
    return _run(x, PackedLinear(codes, scales, signs, spec, rotation, out_features, x.shape[-1], layout))


def _run(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    backend = backend_for(packed.layout, packed.spec, x.device)
    return backend.linear(x.reshape(-1, x.shape[-1]), packed).reshape(*x.shape[:-1], packed.out_features)


@torch.library.register_fake("qpalette::linear", lib=_LIBRARY)
def _linear_shape(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    signs: torch.Tensor,
    spec: str,
    rotation: str,
    layout: str,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def packed_linear(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """x [..., K] times the packed matrix: [..., M], in x's dtype.

    A plain tensor in eager mode goes straight to the backend, past torch's dispatcher, whose cost counts when a model
    makes several hundred small products per token.
    """
    if type(x) is torch.Tensor and not x.is_meta and not torch.compiler.is_compiling():
        return _run(x, packed)
    return torch.ops.qpalette.linear(
        x, packed.codes, packed.scales, packed.signs, packed.spec, packed.rotation, packed.layout, packed.out_features
    )


@torch.library.impl(_LIBRARY, "linears", "CompositeExplicitAutograd")
def _linears(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    signs: torch.Tensor,
    specs: list[str],
    rotation: str,
    layout: str,
    out_features: list[int],
) -> torch.Tensor:
    columns = x.shape[-1]
    members = [
        PackedLinear(words, row_scales, signs, spec, rotation, rows, columns, layout)
        for words, row_scales, spec, rows in zip(codes, scales, specs, out_features, strict=True)
    ]
    return _run_together(x, members)


def _run_together(x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
    backend = backend_for(members[0].layout, members[0].spec, x.device)
    result = backend.linears(x.reshape(-1, x.shape[-1]), members)
    return result.reshape(*x.shape[:-1], result.shape[-1])


@torch.library.register_fake("qpalette::linears", lib=_LIBRARY)
def _linears_shape(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    signs: torch.Tensor,
    specs: list[str],
    rotation: str,
    layout: str,
    out_features: list[int],
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(out_features))


def packed_linears(x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
    """x [..., K] times several packed matrices in one basis, side by side: [..., sum of their M], in x's dtype.

    They share signs, rotation and layout; a backend may serve them with one rotation and one launch.
    """
    if type(x) is torch.Tensor and not x.is_meta and not torch.compiler.is_compiling():
        return _run_together(x, members)
    first = members[0]
    return torch.ops.qpalette.linears(
        x,
        [member.codes for member in members],
        [member.scales for member in members],
        first.signs,
        [member.spec for member in members],
        first.rotation,
        first.layout,
        [member.out_features for member in members],
    )
