"""What the compiler makes of the fused products, for few tokens and for many, and of experts'; needs no GPU.

    python benchmarks/kernel_report.py

Registers and spills are ptxas' own. Instructions per weight are counted in the disassembly (pip package
nvidia-cuda-nvdisasm): those of the loop that decodes and multiplies a chunk of 16 tiles, or above 16 columns half of
one, over the weights that a lane has of it (of several decoders the mean). That loop holds some fifty instructions that
seldom run. Local accesses are what spills cost where it counts: loads and stores of the stack in those loops.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from report import report

from qpalette.backends.cuda.compiler import compile_cubin, resources
from qpalette.backends.cuda.decoder import decoder_spec
from qpalette.backends.cuda.experts import RUN
from qpalette.backends.cuda.experts import SOURCE as EXPERTS_SOURCE
from qpalette.backends.cuda.layout import CHUNK
from qpalette.backends.cuda.multiply import SOURCE, cuts_of, kernel_macros
from qpalette.backends.cuda.segments import DeviceLimits, with_segments

# Dynamic shared memory that a block may ask for, in KiB (CUDA C++ Programming Guide, technical specifications).
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SPECS = (
    "tcq2-2",
    "tcq2-3",
    "tcq2-3.25",
    "tcq2-4",
    "tcq-2",
    "tcq-3.25",
    "tcq-4",
    "tcq-8",
    "vq-3",
    "vq-4",
    "nuq-3",
    "nuq-8",
)
SETS = (  # of decoders in one kernel
    ("tcq2-2.5", "tcq2-3.25", "tcq2-4"),
    ("nuq-3", "nuq-4", "tcq-2.125", "tcq-3.25", "tcq2-2", "tcq2-3.25", "vq-1.5", "vq-2"),
    ("tcq2-2", "tcq2-2.5", "tcq2-2.75", "tcq2-3", "tcq2-3.25", "tcq2-3.5", "tcq2-4", "tcq2-4.5"),
)
WEIGHTS_OF_LANE = 8 * CHUNK


def disassembler() -> Path | None:
    packages = Path(sysconfig.get_paths()["purelib"])
    return next((path for path in packages.glob("nvidia/**/nvdisasm") if path.is_file()), None)


def loops_of(code: bytes) -> list[list[str]]:
    """Instructions of the innermost loops with a matrix product for every tile of a chunk, one loop for each decoder;
    none without the disassembler."""
    tool = disassembler()
    if tool is None:
        return []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([tool, "-hex", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found[1])
    ranges = []
    for at, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], at) < at:
            begin = labels[target[1]]
            if sum("HMMA" in instruction for instruction in lines[begin : at + 1]) >= CHUNK:
                ranges.append(range(begin, at + 1))
    inner = [own for own in ranges if not any(o != own and own[0] <= o[0] and o[-1] <= own[-1] for o in ranges)]
    return [lines[own.start : own.stop] for own in inner]


def local_accesses(loop: Iterable[str]) -> int:
    """Instructions that keep a register in memory."""
    return sum(bool(re.search(r"\b(LDL|STL)\b", instruction)) for instruction in loop)


def limits_of(arch: str) -> DeviceLimits:
    return DeviceLimits(1, SHARED[arch] * 1024, (int(arch[3:-1]), int(arch[-1])))


def row_of(
    kernel: str, source: str, specs: Sequence[str], arch: str, batch: int, constants: Mapping[str, int]
) -> dict[str, Any]:
    decoders = sorted({decoder for decoder in map(decoder_spec, specs) if decoder})
    macros, unit = tuple(sorted(constants.items())), with_segments(source, decoders)
    weights = WEIGHTS_OF_LANE // cuts_of(batch)
    used, loops = resources(unit, arch, macros), loops_of(compile_cubin(unit, arch, macros))
    return {
        "kernel": kernel,
        "spec": " ".join(specs),
        "arch": arch,
        "batch": batch,
        "registers": used.registers,
        "spilled bytes": used.spilled_bytes,
        "local accesses": sum(map(local_accesses, loops)) if loops else "",
        "instructions per weight": mean(map(len, loops)) / weights if loops else "",
    }


def main() -> None:
    limits = {arch: limits_of(arch) for arch in SHARED}
    rows = [
        row_of("product", SOURCE, [spec], arch, batch, kernel_macros(limits[arch], batch))
        for spec in SPECS
        for arch in SHARED
        for batch in (1, 16, 32)
    ]
    rows += [
        row_of("experts", EXPERTS_SOURCE, specs, arch, RUN, kernel_macros(limits[arch], RUN))
        for specs in (*[(spec,) for spec in SPECS], *SETS)
        for arch in SHARED
    ]
    report("kernel_report", "compiler alone", rows)


if __name__ == "__main__":
    main()
