"""What a checkpoint's tensors mean: which are linears, which read one input, and where they are in a model class."""

from qpalette.models.complete import check_complete, check_finite, check_loaded
from qpalette.models.groups import Grouping, find_groups, token_tables
from qpalette.models.weights import read_weight, tensors_of, transposed_modules, weight_bytes, whole_of

__all__ = [
    "Grouping",
    "check_complete",
    "check_finite",
    "check_loaded",
    "find_groups",
    "read_weight",
    "tensors_of",
    "token_tables",
    "transposed_modules",
    "weight_bytes",
    "whole_of",
]
