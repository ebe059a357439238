"""What `quantization_config` says (docs/format.md). What a linear stores is declared in `parts.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qpalette.codes import parse_spec
from qpalette.core.errors import ArtifactError, SpecError
from qpalette.core.records import LinearRecord
from qpalette.rotate import Rotation

METHOD: Final = "qpalette"
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
FIRST_WITH_GROUPS = 3
MAX_WEIGHTS = 1 << 40  # of one linear: a corrupt shape must not become an allocation

Size = Annotated[int, Field(ge=1, lt=MAX_WEIGHTS)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class LinearEntry(_Strict):
    """One quantized linear, as config.json spells it."""

    spec: Name
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]  # [out_features, in_features]
    rotation: Name
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    group: Annotated[str, Field(max_length=250)] = ""  # since version 3, where "" is refused
    diagonal: Literal["signs", "float16"] = "signs"  # since version 3
    source: list[Name] = []  # since version 3: tensors of the original, where not the linear's name + ".weight"

    def record(self) -> LinearRecord:
        rows, columns = self.shape
        return LinearRecord(
            self.spec, rows, columns, self.rotation, self.seed, self.group, self.diagonal, tuple(self.source)
        )


class QuantizationFormat(_Strict):
    """The content of `quantization_config`. Build it with `of`, read it with `parse`."""

    quant_method: Literal["qpalette"] = METHOD
    format_version: int = FORMAT_VERSION
    linears: Annotated[dict[Name, LinearEntry], Field(min_length=1)]
    provenance: dict[str, str] = {}
    modules_to_not_convert: list[str] = []

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> QuantizationFormat:
        """Check every field of a `quantization_config`, before anything is allocated.

        Raises ArtifactError naming the field that is wrong, or the versions that this release reads.
        """
        _check_version(data)
        try:
            result = cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(f"quantization_config: {place}: {first['msg']}; download the model again") from error
        for name, entry in result.linears.items():
            _check_entry(name, entry)
            _check_codebook(name, entry, result.format_version)
            _check_fields(name, entry, result.format_version)
        _check_groups(result.linears)
        return result

    @classmethod
    def of(
        cls,
        records: Mapping[str, LinearRecord],
        provenance: Mapping[str, str] | None = None,
        modules_to_not_convert: list[str] | None = None,
    ) -> QuantizationFormat:
        """The format of these linears. Raises ArtifactError as `parse` does."""
        linears = {name: _entry(name, record) for name, record in records.items()}
        return cls.parse(
            {
                "quant_method": METHOD,
                "format_version": FORMAT_VERSION,
                "linears": linears,
                "provenance": dict(provenance or {}),
                "modules_to_not_convert": list(modules_to_not_convert or []),
            }
        )

    @property
    def records(self) -> dict[str, LinearRecord]:
        """Linear name -> what is needed to decode it."""
        return {name: entry.record() for name, entry in self.linears.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `parse` of it gives an equal format."""
        content = self.model_dump()
        content["linears"] = {name: entry.model_dump(exclude_defaults=True) for name, entry in self.linears.items()}
        return content


def _entry(name: str, record: LinearRecord) -> dict[str, Any]:
    """As config.json spells it; a linear that is in no group is one alone, under its own name."""
    shape = [record.out_features, record.in_features]
    entry = {"spec": record.spec, "shape": shape, "rotation": record.rotation, "seed": record.seed}
    return entry | {"group": record.group or name, "diagonal": record.diagonal, "source": list(record.source)}


def _check_version(data: Mapping[str, Any]) -> None:
    if not isinstance(data, Mapping):
        raise ArtifactError("quantization_config is no JSON object; download the model again")
    if data.get("quant_method") != METHOD:
        raise ArtifactError(f"quantization_config: quant_method is {data.get('quant_method')!r}, not '{METHOD}'")
    version = data.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        known = ", ".join(map(str, READABLE_VERSIONS))
        raise ArtifactError(
            f"quantization_config: format_version is {version!r}, and this release reads {known}; upgrade qpalette"
        )


def _check_entry(name: str, entry: LinearEntry) -> None:
    out_features, in_features = entry.shape
    if out_features * in_features >= MAX_WEIGHTS:
        raise ArtifactError(f"{name}: shape {out_features} x {in_features} is beyond 2^40 weights")
    try:
        canonical = parse_spec(entry.spec).name
        Rotation.parse(entry.rotation, in_features)
    except SpecError as error:
        raise ArtifactError(f"{name}: {error}") from error
    if canonical != entry.spec:
        raise ArtifactError(f"{name}: spec '{entry.spec}' is not canonical; write '{canonical}'")


def _check_codebook(name: str, entry: LinearEntry, version: int) -> None:
    """Version 1 had 2048 points where tcq2 has 1024 now: the same bits would mean other weights."""
    quantizer = parse_spec(entry.spec)
    if version == 1 and quantizer.family == "tcq2" and 3.25 < quantizer.rate <= 4:
        raise ArtifactError(
            f"{name}: '{entry.spec}' had another codebook in format version 1; quantize the model again"
        )


def _check_fields(name: str, entry: LinearEntry, version: int) -> None:
    """What came with version 3 must be there from then on, and must not before."""
    if version < FIRST_WITH_GROUPS and entry.model_fields_set & {"group", "diagonal", "source"}:
        raise ArtifactError(
            f"{name}: format version {version} has no group, no diagonal and no source; download the model again"
        )
    if version >= FIRST_WITH_GROUPS and not entry.group:
        raise ArtifactError(f"{name}: it names no group; download the model again")


def _check_groups(linears: Mapping[str, LinearEntry]) -> None:
    """One group, one input in one basis."""
    first: dict[str, tuple[str, LinearEntry]] = {}
    for name, entry in linears.items():
        other, known = first.setdefault(entry.group or name, (name, entry))
        for field, mine, theirs in (
            ("in-features", entry.shape[1], known.shape[1]),
            ("rotation", entry.rotation, known.rotation),
            ("diagonal", entry.diagonal, known.diagonal),
        ):
            if mine != theirs:
                raise ArtifactError(
                    f"{name}: {field} {mine}, but {other} of its group '{entry.group}' has {theirs}; "
                    "download the model again"
                )
