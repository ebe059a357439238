"""What every module with packed weights has: the stored tensors as buffers, and their layout in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from qpalette.codes import parse_spec
from qpalette.core.errors import ArtifactError
from qpalette.core.records import LinearRecord, packed_bits, tiles_of
from qpalette.rotate import Rotation, unpack_signs, unrotate_weight
from qpalette.runtime import TILES, Backend, PackedLinear, backend_for, select


class PackedModule(nn.Module):
    """One matrix of `record`'s shape, packed.

    Buffers, as stored in the artifact: qp_codes int32 [ceil(M/16), ceil(K/16), words per tile]; qp_scales int16 [M],
    the bits of one float16 per row; qp_signs uint8 [ceil(K/8)]. They are integers, so a cast of the model leaves them
    alone. There is no `weight`: code that reads it must fail, not get something else.

    `prepare` lets a backend re-lay the codes in memory. A state dict always holds the stored layout, and takes it.
    Raises SpecError when the record names an unknown quantizer or rotation.
    """

    qp_codes: torch.Tensor
    qp_scales: torch.Tensor
    qp_signs: torch.Tensor

    def __init__(self, record: LinearRecord, device: torch.device | str | None = None) -> None:
        super().__init__()
        quantizer = parse_spec(record.spec)
        Rotation.parse(record.rotation, record.in_features)
        self.record = record
        self.layout = TILES
        self.prepared = False
        self.stored_shape = (tiles_of(record.out_features), tiles_of(record.in_features), quantizer.words_per_tile)
        self.register_buffer("qp_codes", torch.zeros(self.stored_shape, dtype=torch.int32, device=device))
        self.register_buffer("qp_scales", torch.zeros(record.out_features, dtype=torch.int16, device=device))
        self.register_buffer("qp_signs", torch.zeros(-(-record.in_features // 8), dtype=torch.uint8, device=device))

    @property
    def packed(self) -> PackedLinear:
        """The weight as the kernels take it; shares the buffers."""
        return PackedLinear(
            self.qp_codes,
            self.qp_scales,
            self.qp_signs,
            self.record.spec,
            self.record.rotation,
            self.record.out_features,
            self.record.in_features,
            self.layout,
        )

    @property
    def backend(self) -> Backend:
        """What runs codes of the present layout on their device. Raises UnsupportedError with every reason."""
        return backend_for(self.layout, self.record.spec, self.qp_codes.device)

    def prepare(self) -> None:
        """Lay the codes out for the best backend on their device; again after a change of device or backend.

        Nothing happens on the meta device. Raises UnsupportedError with every backend's reason when none fits, and
        ArtifactError when a buffer was replaced by one of another type or shape.
        """
        if self.qp_codes.device.type == "meta":
            return
        self.restore()
        self._check_buffers()
        self._lay_out(select("linear", self.record.spec, self.qp_codes.device))
        self.prepared = True

    def _lay_out(self, backend: Backend) -> None:
        self.qp_codes = backend.to_layout(self.qp_codes)
        self.layout = backend.layout
        backend.expect(self.packed)

    def restore(self) -> None:
        """Bring the codes back to the stored layout."""
        self.qp_codes = self.stored_codes()
        self.layout = TILES
        self.prepared = False

    def stored_codes(self) -> torch.Tensor:
        """The codes in the stored layout, whatever the present one is; int32 `stored_shape`."""
        return self.qp_codes if self.layout == TILES else self.backend.from_layout(self.qp_codes, self.stored_shape)

    def dequantized_weight(self) -> torch.Tensor:
        """W = W' Q diag(s), float32 [M, K]."""
        rotation = Rotation.parse(self.record.rotation, self.record.in_features)
        signs = unpack_signs(self.qp_signs, self.record.in_features)
        return unrotate_weight(self.backend.rotated_weight(self.packed), rotation, signs)

    def check_values(self, name: str) -> None:
        """What headers cannot show. Raises ArtifactError naming the tensor."""
        if self.qp_scales.device.type == "meta":
            return
        if not bool(self.qp_scales.view(torch.float16).isfinite().all()):
            raise ArtifactError(f"{name}.qp_scales has a scale that is not finite; download the model again")
        try:
            unpack_signs(self.qp_signs, self.record.in_features)
        except ArtifactError as error:
            raise ArtifactError(f"{name}.qp_signs: {error}; download the model again") from error

    def packed_repr(self) -> str:
        rate = packed_bits(parse_spec(self.record.spec).rate, self.record.out_features, self.record.in_features).rate
        return f"spec={self.record.spec}, rotation={self.record.rotation}, bits={float(rate):.4g}, layout={self.layout}"

    def _check_buffers(self) -> None:
        wanted = {
            "qp_codes": (torch.int32, self.stored_shape),
            "qp_scales": (torch.int16, (self.record.out_features,)),
            "qp_signs": (torch.uint8, (-(-self.record.in_features // 8),)),
        }
        for name, (dtype, shape) in wanted.items():
            buffer = self.get_buffer(name)
            if buffer.dtype != dtype or tuple(buffer.shape) != shape:
                raise ArtifactError(
                    f"{name} must be {dtype} {list(shape)}, got {buffer.dtype} {list(buffer.shape)}: "
                    "the loader changed it, or the checkpoint is not the one of this config"
                )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Moves go through the stored layout: another device has another backend."""
        prepared = self.prepared
        self.restore()
        super()._apply(fn, recurse)
        if prepared:
            self.prepare()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}qp_codes"] = self.stored_codes()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        prepared = self.prepared
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        if prepared:
            self.prepare()
