"""Streams a source model tensor by tensor: bytes and names, nothing of what they mean."""

from qpalette.storage.export import export_checkpoint, held_bytes
from qpalette.storage.exported import plain_directory
from qpalette.storage.safetensors_source import copy_side_files
from qpalette.storage.safetensors_writer import StreamingSafetensorsWriter
from qpalette.storage.source import Checkpoint, TensorInfo, local_path, open_checkpoint

__all__ = [
    "Checkpoint",
    "StreamingSafetensorsWriter",
    "TensorInfo",
    "copy_side_files",
    "export_checkpoint",
    "held_bytes",
    "local_path",
    "open_checkpoint",
    "plain_directory",
]
