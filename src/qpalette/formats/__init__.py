"""The stored model: its format, its reader, its writer."""

from qpalette.formats.card import model_card
from qpalette.formats.checksums import check_checksums, checksums_bytes, write_checksums
from qpalette.formats.dequantized import DequantizedCheckpoint
from qpalette.formats.packed import (
    FORMAT_VERSION,
    METHOD,
    QuantizationFormat,
    counted_bits,
    expected_tensors,
)
from qpalette.formats.reader import Artifact, Inspection, open_artifact, total_bits
from qpalette.formats.writer import PackedCheckpoint

__all__ = [
    "FORMAT_VERSION",
    "METHOD",
    "Artifact",
    "DequantizedCheckpoint",
    "Inspection",
    "PackedCheckpoint",
    "QuantizationFormat",
    "check_checksums",
    "checksums_bytes",
    "counted_bits",
    "expected_tensors",
    "model_card",
    "open_artifact",
    "total_bits",
    "write_checksums",
]
