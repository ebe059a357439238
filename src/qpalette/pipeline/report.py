"""What a run did, as a record and as the `qpalette_report.json` beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from qpalette.calibration.hessians import Calibration
from qpalette.core.records import LinearRecord, PackedBits
from qpalette.formats import counted_bits, total_bits
from qpalette.models.multiplied import Shares

REPORT_FILE = "qpalette_report.json"


@dataclass(frozen=True)
class LinearResult:
    """One quantized linear and its measured distortion; calibrated, also its output's (`Quality`)."""

    name: str
    record: LinearRecord
    distortion: float
    proxy: float | None = None

    @property
    def bits(self) -> PackedBits:
        return counted_bits(self.record)


@dataclass(frozen=True)
class QuantizeReport:
    """Totals are exact; distortions are measured with the stored scales."""

    output: Path
    linears: Sequence[LinearResult]
    tensor_bytes: int  # all tensors of the output
    plan_digest: str
    source_fingerprint: str
    shares: Shares
    calibration: Calibration | None = None

    @property
    def bits(self) -> PackedBits:
        return total_bits(linear.record for linear in self.linears)

    @property
    def rate(self) -> Fraction:
        """Counted bits per quantized weight."""
        return self.bits.rate

    @property
    def distortion(self) -> float:
        """Mean over linears, by weights."""
        return sum(linear.bits.weights * linear.distortion for linear in self.linears) / self.bits.weights

    def to_json(self) -> str:
        """Deterministic: no paths, no times."""
        content = {
            "plan": self.plan_digest,
            "source": self.source_fingerprint,
            "totals": {
                "linears": len(self.linears),
                **_counts(self.bits),
                "tensor_bytes": self.tensor_bytes,
                "distortion": self.distortion,
                "packed": shares_json(self.shares),
            },
            **({} if self.calibration is None else {"calibration": _measured_on(self.calibration)}),
            "linears": {linear.name: _entry(linear) for linear in self.linears},
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def shares_json(shares: Shares) -> dict[str, object]:
    """Plain JSON: how much of what multiplies is packed, and of each kind."""
    kinds = {kind: {"packed": share.packed, "weights": share.weights} for kind, share in shares.kinds.items()}
    return {"of_what_multiplies": shares.multiplied.fraction, "kinds": kinds}


def revised_report(
    content: Mapping[str, Any], records: Mapping[str, LinearRecord], tensor_bytes: int, tuned: Mapping[str, Any]
) -> str:
    """The report `content` of a model whose scales and diagonals were tuned: counts anew, distortions from before.

    Raises KeyError for content that is no report on these linears.
    """
    linears = {name: {**content["linears"][name], **_counts(counted_bits(record))} for name, record in records.items()}
    totals = {**content["totals"], **_counts(total_bits(records.values())), "tensor_bytes": tensor_bytes}
    revised = {**content, "totals": totals, "tuned": dict(tuned), "linears": linears}
    return json.dumps(revised, indent=1, ensure_ascii=False) + "\n"


def _entry(linear: LinearResult) -> dict[str, object]:
    record = linear.record
    return {
        "spec": record.spec,
        "shape": [record.out_features, record.in_features],
        "rotation": record.rotation,
        **_counts(linear.bits),
        "distortion": linear.distortion,
        **({} if linear.proxy is None else {"proxy": linear.proxy}),
    }


def _measured_on(calibration: Calibration) -> dict[str, object]:
    return {"tokens": calibration.tokens, "window": calibration.window, "text_sha256": calibration.text_sha256}


def _counts(bits: PackedBits) -> dict[str, object]:
    return {
        "weights": bits.weights,
        "parts": dict(bits.parts),
        "bits": bits.total,
        "rate": float(bits.rate),
    }
