"""What every module with packed weights has: the stored tensors as buffers, and their layout in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from qpalette.codes import parse_spec
from qpalette.core.errors import ArtifactError
from qpalette.core.records import LinearRecord
from qpalette.formats.parts import (
    CODES,
    DIAGONAL,
    PARTS,
    SCALES,
    check_values,
    counted_bits,
    expected_tensors,
    packed_linear_of,
    parts_of,
)
from qpalette.nn.packed_weight import PackedWeight
from qpalette.rotate import Rotation, diagonal_of, unrotate_weight
from qpalette.runtime import TILES, Backend, PackedLinear, PreparedLinears, backend_for, packed_linear, select

_FITTED = "fitted_"  # before the field, of a parameter's name
_CODES, _SCALES = CODES.suffix, SCALES.suffix


class PackedModule(nn.Module):
    """One matrix of `record`'s shape, packed.

    Its buffers are the parts that `formats.parts` declares, as stored in the artifact: qp_codes, qp_scales, and
    qp_signs or qp_diagonal. They are integers, so a cast of the model leaves them alone. They may be shown
    as a weight, for code that reads one (`packed_weight.py`).

    `prepare` lets a backend re-lay the codes in memory. A state dict always holds the stored layout, and takes it.
    `fit` makes parameters of scales and diagonal, `settle` rounds them back.
    Raises SpecError when the record names an unknown quantizer or rotation.
    """

    qp_codes: torch.Tensor
    type_of: torch.Tensor
    exchanged: ClassVar[int] = (
        0  # grows whenever an attribute of any such module is set: tensors, hooks, what is fitted, not what is prepared
    )
    transposed = False  # whether its weight is shown as in_features x out_features

    def __init__(
        self, record: LinearRecord, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        parse_spec(record.spec)
        Rotation.parse(record.rotation, record.in_features)
        self.record = record
        self.layout = TILES
        self.prepared = False
        rows, columns, words = CODES.shape(record)
        self.stored_shape = (rows, columns, words)
        for part in parts_of(record):
            self.register_buffer(part.suffix, torch.zeros(part.shape(record), dtype=part.dtype, device=device))
        # Empty: what `model.to(dtype)` casts in place of the weight that is not there.
        self.register_buffer("type_of", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.fitted: tuple[str, ...] = ()  # fields of PackedLinear that are parameters for now
        self._diagonal_suffix = _diagonal_suffix(record)
        self._prepared: PreparedLinears | None = None  # for the tensors that were here at the last product

    @property
    def stored(self) -> PackedLinear:
        """The weight as it is stored, in the present layout; shares the buffers."""
        packed = packed_linear_of(
            self.record, {part.suffix: getattr(self, part.suffix) for part in parts_of(self.record)}
        )
        packed.layout = self.layout
        return packed

    def multiply(self, x: torch.Tensor, group: str = "") -> torch.Tensor:
        """W x for x [..., K]: [..., M], in x's dtype. `group`: under torch.compile, products of one name are joined."""
        if torch.compiler.is_compiling() or x.is_meta:
            return packed_linear(x, self.packed, group)
        prepared = self._prepared
        if prepared is None or not self.is_of(prepared.members[0]):
            if self.fitted:
                return packed_linear(x, self.packed, group)
            prepared = self._prepared = PreparedLinears([self.stored], group)
        return prepared(x)[0]

    def is_of(self, packed: PackedLinear) -> bool:
        """Whether this module computes with the very tensors of `packed`; with no dictionary of strings, as it is asked
        for at every product."""
        buffers = self._buffers
        return (
            buffers[_CODES] is packed.codes
            and buffers[_SCALES] is packed.scales
            and buffers[self._diagonal_suffix] is packed.diagonal
            and self.layout == packed.layout
            and not self.fitted
        )

    @property
    def weight(self) -> PackedWeight:
        """What code that reads a weight gets: of the type that a cast of the model set."""
        return PackedWeight([self], self.transposed)

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, under the name by which peft finds the device of a packed weight."""
        return self.qp_codes

    @property
    def packed(self) -> PackedLinear:
        """The weight as it computes: `stored`, or with the parameters that are being fitted."""
        if not self.fitted:
            return self.stored
        return self.stored.with_(**{field: getattr(self, _FITTED + field) for field in self.fitted})

    def fit(self, *fields: str) -> list[nn.Parameter]:
        """From now on these fields, "scales" [M] or "diagonal" [K], are float32 parameters that begin with the values
        stored, and have the gradients of what this module computes. Raises ValueError for another field."""
        values = {
            "scales": self.stored.scales.view(torch.float16).float(),
            "diagonal": diagonal_of(self.stored.diagonal, self.record.in_features),
        }
        if strange := sorted(set(fields) - values.keys()):
            raise ValueError(f"'{strange[0]}' cannot be fitted: choose {', '.join(values)}")
        for field in fields:
            self.register_parameter(_FITTED + field, nn.Parameter(values[field].clone()))
        self.fitted = fields
        return [getattr(self, _FITTED + field) for field in fields]

    def share(self, field: str, other: PackedModule) -> None:
        """The parameter of `field` that is fitted in `other` is this module's, too: linears of one group have one
        diagonal. Both fit the field already, and it settles to the same bits."""
        self.register_parameter(_FITTED + field, other.get_parameter(_FITTED + field))

    def settle(self) -> None:
        """Round what was fitted to the float16 that is stored; a fitted diagonal takes the place of the signs."""
        for part in (SCALES, DIAGONAL):
            if part.field not in self.fitted:
                continue
            parameter = self._parameters.pop(_FITTED + part.field)
            assert parameter is not None
            self.record = replace(self.record, diagonal=part.diagonal or self.record.diagonal)
            self._diagonal_suffix = _diagonal_suffix(self.record)
            self.register_buffer(part.suffix, parameter.detach().half().view(torch.int16))
        for part in set(PARTS) - set(parts_of(self.record)):
            self._buffers.pop(part.suffix, None)
        self.fitted = ()

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
        self.qp_codes = backend.to_layout(self.qp_codes, self.record.spec)
        self.layout = backend.layout
        backend.expect(self.packed)

    def restore(self) -> None:
        """Bring the codes back to the stored layout."""
        self.qp_codes = self.stored_codes()
        self.layout = TILES
        self.prepared = False

    def stored_codes(self) -> torch.Tensor:
        """The codes in the stored layout, whatever the present one is; int32 `stored_shape`."""
        if self.layout == TILES:
            return self.qp_codes
        return self.backend.from_layout(self.qp_codes, self.record.spec, self.stored_shape)

    def dequantized_weight(self) -> torch.Tensor:
        """W = W' Q diag(d) of what is stored, float32 [M, K]."""
        packed, columns = self.stored, self.record.in_features
        if packed.codes.is_meta:
            return torch.empty(packed.out_features, columns, device="meta")
        rotated = self.backend.rotated_weight(packed)
        return unrotate_weight(rotated, Rotation.parse(packed.rotation, columns), diagonal_of(packed.diagonal, columns))

    def check_values(self, name: str) -> None:
        """What headers cannot show. Raises ArtifactError naming the tensor."""
        if self.qp_codes.device.type != "meta":
            check_values(name, self.record, self._buffers)  # type: ignore[arg-type]

    def packed_repr(self) -> str:
        bits = float(counted_bits(self.record).rate)
        return f"spec={self.record.spec}, rotation={self.record.rotation}, bits={bits:.4g}, layout={self.layout}"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "_prepared":  # made of the tensors, not one of them
            PackedModule.exchanged += 1

    def _check_buffers(self) -> None:
        for name, (dtype, shape) in expected_tensors(self.record).items():
            buffer = self.get_buffer(name)
            if buffer.dtype != dtype or tuple(buffer.shape) != shape:
                raise ArtifactError(
                    f"{name} must be {dtype} {list(shape)}, got {buffer.dtype} {list(buffer.shape)}: "
                    "the loader changed it, or the checkpoint is not the one of this config"
                )

    def __getstate__(self) -> dict[str, Any]:
        """What is prepared has addresses in it, which a copy does not share."""
        return self.__dict__ | {"_prepared": None}

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
        destination[prefix + CODES.suffix] = self.stored_codes()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        prepared = self.prepared
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        if prepared:
            self.prepare()


def _diagonal_suffix(record: LinearRecord) -> str:
    return next(part.suffix for part in parts_of(record) if part.field == DIAGONAL.field)
