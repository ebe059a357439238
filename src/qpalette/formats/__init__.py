"""The stored model: its format, its reader, its writer."""

from qpalette.formats.bits_map import BITS_MAP, bits_map
from qpalette.formats.card import Tuned, base_model_of, model_card
from qpalette.formats.checksums import check_checksums, checksums_bytes, write_checksums
from qpalette.formats.dequantized import DequantizedCheckpoint
from qpalette.formats.packed import FORMAT_VERSION, METHOD, QuantizationFormat
from qpalette.formats.pareto import PARETO, pareto
from qpalette.formats.parts import PARTS, Part, counted_bits, expected_tensors, packed_bits, parts_of, total_bits
from qpalette.formats.reader import Artifact, Inspection, open_artifact
from qpalette.formats.revised import RevisedCheckpoint
from qpalette.formats.shares import stored_shares
from qpalette.formats.writer import PackedCheckpoint

__all__ = [
    "BITS_MAP",
    "FORMAT_VERSION",
    "METHOD",
    "PARETO",
    "PARTS",
    "Artifact",
    "DequantizedCheckpoint",
    "Inspection",
    "PackedCheckpoint",
    "Part",
    "QuantizationFormat",
    "RevisedCheckpoint",
    "Tuned",
    "base_model_of",
    "bits_map",
    "check_checksums",
    "checksums_bytes",
    "counted_bits",
    "expected_tensors",
    "model_card",
    "open_artifact",
    "packed_bits",
    "pareto",
    "parts_of",
    "stored_shares",
    "total_bits",
    "write_checksums",
]
