"""Streams a source model tensor by tensor, and knows which linears share an input."""

from qpalette.checkpoint.export import export_checkpoint
from qpalette.checkpoint.groups import Grouping, find_groups
from qpalette.checkpoint.safetensors_source import copy_side_files
from qpalette.checkpoint.safetensors_writer import StreamingSafetensorsWriter
from qpalette.checkpoint.source import Checkpoint, TensorInfo, open_checkpoint

__all__ = [
    "Checkpoint",
    "Grouping",
    "StreamingSafetensorsWriter",
    "TensorInfo",
    "copy_side_files",
    "export_checkpoint",
    "find_groups",
    "open_checkpoint",
]
