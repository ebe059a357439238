"""Orthogonal transforms of a linear's input, which make its weights look Gaussian."""

from qpalette.rotate.choice import block_rotation, full_rotation, rotation_for
from qpalette.rotate.factor import Factor
from qpalette.rotate.hadamard import hadamard
from qpalette.rotate.rotation import Rotation
from qpalette.rotate.signs import diagonal_of, pack_signs, random_signs, unpack_signs
from qpalette.rotate.weight import rotate_weight, unrotate_weight

__all__ = [
    "Factor",
    "Rotation",
    "block_rotation",
    "diagonal_of",
    "full_rotation",
    "hadamard",
    "pack_signs",
    "random_signs",
    "rotate_weight",
    "rotation_for",
    "unpack_signs",
    "unrotate_weight",
]
