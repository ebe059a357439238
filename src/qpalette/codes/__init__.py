"""The palette. Importing this folder registers every family in it: adding a quantizer is adding one file."""

from importlib import import_module
from pkgutil import iter_modules

from qpalette.codes.base import FAMILIES, Quantizer, full_palette, parse_spec

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Quantizer", "full_palette", "parse_spec"]
