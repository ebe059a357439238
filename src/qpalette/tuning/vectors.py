"""What tuning moves while the codes stay: row scales, input diagonals, other vectors of the model (norms, biases)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qpalette.core.errors import ArtifactError
from qpalette.core.records import FLOAT16, LinearRecord
from qpalette.formats import Artifact, expected_tensors
from qpalette.formats.packed import FIRST_WITH_GROUPS
from qpalette.formats.parts import DIAGONAL, SCALES, is_part
from qpalette.models.model_class import model_of
from qpalette.models.names import Names
from qpalette.models.resolver import places_of
from qpalette.nn import PackedModule, packed_path

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Vector:
    """Numbers that are tuned, [n]: where they act, and where they are stored."""

    parameter: nn.Parameter  # of the model: float32, or of the type that it computes in
    start: Tensor  # float32, as stored
    unit: Tensor  # float32: a learning rate of r moves a number by about r of these a step
    dtype: torch.dtype  # in which it is stored
    tensors: tuple[str, ...]  # that hold it: more than one for the diagonal of linears that read one input


class TunedVectors:
    """All vectors of `model` that are tuned, as one float32 parameter: value = start + unit * factor.

    A scale or a diagonal moves in proportion to itself, so that one learning rate suits all sizes; other vectors, which
    may have zeros, in proportion to their root mean square. `factors` are zero at the start, where every value is
    exactly what is stored. The model's own parameters follow with `apply`.
    """

    def __init__(self, model: Any, artifact: Artifact, keep_size: bool = False) -> None:
        """`model` is `artifact` as transformers has loaded it. With `keep_size` signs stay signs: they take one bit per
        input of a linear, and a diagonal takes 16. Raises ArtifactError when the model is not the artifact's."""
        self.records = revised_records(artifact, keep_size)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.vectors = [*_packed_vectors(model, artifact, self.records), *_other_vectors(model, artifact)]
        for vector in self.vectors:
            vector.parameter.requires_grad_(True)
        self._sizes = [len(vector.start) for vector in self.vectors]
        self._start = torch.cat([vector.start for vector in self.vectors])
        self._unit = torch.cat([vector.unit for vector in self.vectors])
        self.factors = nn.Parameter(torch.zeros_like(self._start))

    def __len__(self) -> int:
        """How many numbers there are."""
        return len(self._start)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the values of the present factors."""
        self._give(self._values(self.factors))

    @torch.no_grad()
    def take_gradient(self) -> None:
        """Move the gradients of the model's parameters to `factors.grad`; where there is none, it is zero."""
        gradients = [
            torch.zeros_like(vector.start) if vector.parameter.grad is None else vector.parameter.grad.float()
            for vector in self.vectors
        ]
        self.factors.grad = torch.cat(gradients) * self._unit
        for vector in self.vectors:
            vector.parameter.grad = None

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Inside, the model has the values as they would be stored, rounded to their types."""
        with torch.no_grad():
            self._give(torch.cat([stored.float() for stored in self._rounded(self.factors)]))
        try:
            yield
        finally:
            self.apply()

    def stored(self, factors: Tensor) -> dict[str, Tensor]:
        """Tensor name -> what is stored for these factors, on the CPU."""
        result = {}
        for vector, values in zip(self.vectors, self._rounded(factors), strict=True):
            for name in vector.tensors:
                result[name] = (values.view(torch.int16) if is_part(name) else values).cpu()
        return result

    def _values(self, factors: Tensor) -> Tensor:
        return self._start + self._unit * factors.detach()

    def _rounded(self, factors: Tensor) -> list[Tensor]:
        parts = self._values(factors).split(self._sizes)
        return [part.to(vector.dtype) for vector, part in zip(self.vectors, parts, strict=True)]

    def _give(self, values: Tensor) -> None:
        for vector, part in zip(self.vectors, values.split(self._sizes), strict=True):
            vector.parameter.data.copy_(part)


def revised_records(artifact: Artifact, keep_size: bool) -> dict[str, LinearRecord]:
    """The linears as tuning leaves them. Raises ArtifactError for a version of the format that knows no groups: which
    linears must share a diagonal is not said there."""
    version = artifact.format.format_version
    if version < FIRST_WITH_GROUPS:
        raise ArtifactError(
            f"{artifact.directory} has format version {version}, which does not say which linears read one input: "
            "quantize the model again"
        )
    if keep_size:
        return dict(artifact.records)
    return {name: replace(record, diagonal=FLOAT16) for name, record in artifact.records.items()}


def vector_tensors(artifact: Artifact) -> list[str]:
    """Names of the stored vectors that belong to no linear."""
    return [
        name
        for name, stored in artifact.stored.items()
        if len(stored.info.shape) == 1 and stored.info.dtype in FLOATS and not is_part(name)
    ]


def _packed_vectors(model: Any, artifact: Artifact, records: Mapping[str, LinearRecord]) -> Iterator[Vector]:
    """Of all linears, experts and a packed embedding among them; linears of one group have one diagonal."""
    diagonals: dict[str, tuple[PackedModule, list[str]]] = {}
    for name, module in _packed_modules(model, artifact).items():
        record = records[name]
        has_diagonal = DIAGONAL.suffix in expected_tensors(record)
        module.fit(*(part.field for part in (SCALES, *([DIAGONAL] if has_diagonal else []))))
        yield _packed_vector(module, SCALES.field, [f"{name}.{SCALES.suffix}"])
        if has_diagonal:
            owner, tensors = diagonals.setdefault(record.group, (module, []))
            tensors.append(f"{name}.{DIAGONAL.suffix}")
            if owner is not module:
                module.share(DIAGONAL.field, owner)
    for owner, tensors in diagonals.values():
        yield _packed_vector(owner, DIAGONAL.field, tensors)


def _packed_vector(module: PackedModule, field: str, tensors: list[str]) -> Vector:
    parameter = getattr(module.packed, field)
    start = parameter.detach().clone()
    return Vector(parameter, start, start.abs(), torch.float16, tuple(tensors))


def _other_vectors(model: Any, artifact: Artifact) -> Iterator[Vector]:
    """Those that are parameters of the model as they are stored; what transformers makes anew of some is left alone."""
    parameters = dict(model.named_parameters())
    taken: set[int] = set()
    units = Names(_plain_model(artifact)).units(vector_tensors(artifact))
    for name, path in ((unit.all_tensors[0], unit.parameters[0]) for unit in units if unit.converter is None):
        parameter = parameters.get(path)
        if parameter is None or id(parameter) in taken:
            continue
        stored = artifact.read(name)
        if torch.equal(parameter.detach().cpu(), stored.to(parameter.dtype)):
            taken.add(id(parameter))
            start = stored.to(parameter.device, torch.float32)
            unit = start.square().mean().sqrt().expand_as(start)
            yield Vector(parameter, start, unit, stored.dtype, (name,))


def _packed_modules(model: Any, artifact: Artifact) -> dict[str, PackedModule]:
    """Linear's name in the artifact -> its module."""
    places = places_of(_plain_model(artifact), artifact.records)
    found = {}
    for name in artifact.records:
        module = model.get_submodule(packed_path(name, places[name])) if name in places else None
        if not isinstance(module, PackedModule):
            raise ArtifactError(f"the model that transformers loads from {artifact.directory} has no packed '{name}'")
        found[name] = module
    return found


def _plain_model(artifact: Artifact) -> Any:
    """Of the class before anything in it is packed."""
    model = model_of(artifact.config)
    if model is None:
        raise ArtifactError(f"transformers builds no model of {artifact.directory / 'config.json'}")
    return model
