"""A piece of work that is done again and again on the same memory (a token step) as a program of compiled calls."""

from qpalette.backends.cpu.step.ahead import compile_apart, compile_kernels, is_compiled
from qpalette.backends.cpu.step.program import Instruction, Program, instructions_of, kernels_of

__all__ = [
    "Instruction",
    "Program",
    "compile_apart",
    "compile_kernels",
    "instructions_of",
    "is_compiled",
    "kernels_of",
]
