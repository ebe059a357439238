"""Generation with captured and compiled steps, behind transformers' own `generate`."""

from qpalette.generation.cache import CacheMaker, CodedTokenCache
from qpalette.generation.choice import most_likely
from qpalette.generation.compilation import MODES, check_mode
from qpalette.generation.fast import Generate, attach, fast
from qpalette.generation.step import compile_options

__all__ = [
    "MODES",
    "CacheMaker",
    "CodedTokenCache",
    "Generate",
    "attach",
    "check_mode",
    "compile_options",
    "fast",
    "most_likely",
]
