"""qpalette doctor: is this machine ready, and if not, what to type."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpalette.core.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from qpalette.runtime import Backend

SELF_TEST_SPEC = "tcq-2-L12"  # quick to compile
CUDA_SPEC = "tcq2-3.25"
ROWS, COLUMNS, VECTORS = 64, 64, 3  # 16 tiles
TOLERANCE = 1e-4
CPU_FEATURES = ("avx512f", "avx512vnni", "avx2", "fma", "f16c", "neon")
LEAST_FREE_MEMORY = 2e9  # what a small model needs


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str
    required: bool = True
    fix: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """Check that this machine can quantize and run models.

    Exit code 1 when something that is required does not work; each such line says what to type.

    Example: [bold]qpalette doctor[/]
    """
    from qpalette.cli.output import print_json

    checks = run_checks()
    if as_json:
        print_json({"ok": not _broken(checks), "checks": checks})
    else:
        _print_report(checks)
    if _broken(checks):
        raise typer.Exit(1)


def run_checks() -> list[Check]:
    """Every check; one that raises is a broken one, not the end of the report."""
    makers: tuple[Callable[[], Check], ...] = (
        _python,
        *(lambda name=name: _package(name) for name in ("torch", "transformers", "numba")),
        _processor,
        _memory,
        _disk,
        _backends,
        _cuda,
        _cuda_compiler,
        _self_test,
    )
    return [_guarded(make) for make in makers]


def _guarded(make: Callable[[], Check]) -> Check:
    try:
        return make()
    except Exception as error:  # a doctor reports whatever is broken
        name = getattr(make, "__name__", "check").strip("_").replace("_", " ")
        return Check(name, False, f"{type(error).__name__}: {error}", fix="pip install --force-reinstall qpalette")


def _broken(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.required and not check.ok]


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), platform.python_version(), fix="install Python 3.11 or newer")


def _package(name: str) -> Check:
    """Is it installed, in a version that pyproject.toml allows, and does it import?"""
    from packaging.requirements import Requirement

    wanted = next((r for r in map(Requirement, requires("qpalette") or []) if r.name == name), Requirement(name))
    fix = f'pip install "{wanted.name}{wanted.specifier}"'
    try:
        found = version(name)
        __import__(name)
    except (PackageNotFoundError, ImportError) as error:
        return Check(name, False, f"does not import: {error}", fix=fix)
    ok = wanted.specifier.contains(found, prereleases=True)
    return Check(name, ok, found if ok else f"{found}, but qpalette needs {wanted.specifier}", fix=fix)


def _processor() -> Check:
    import torch
    from llvmlite import binding

    available = binding.get_host_cpu_features()
    features = [name for name in CPU_FEATURES if available.get(name)]
    fast = bool({"avx2", "neon"} & set(features))
    detail = f"{platform.machine()}, {binding.get_host_cpu_name()}, {torch.get_num_threads()} threads"
    detail += f", {' '.join(features) or 'no vector extensions'}"
    return Check("processor", fast, detail, required=False, fix="without AVX2 or Neon everything works, slowly")


def _memory() -> Check:
    free = _free_memory()
    if free is None:
        return Check("free memory", True, "unknown on this system", required=False)
    fix = "close other programs: a model needs about twice its largest layer to quantize, its size to run"
    return Check("free memory", free >= LEAST_FREE_MEMORY, f"{free / 1e9:.1f} GB", required=False, fix=fix)


def _free_memory() -> float | None:
    """Bytes that can be had without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return None


def _disk() -> Check:
    free = shutil.disk_usage(os.getcwd()).free
    fix = "free some disk space: a quantized model takes up to half the bytes of its source"
    return Check("free disk", free >= 1e9, f"{free / 1e9:.1f} GB in {os.getcwd()}", required=False, fix=fix)


def _backends() -> Check:
    from qpalette.runtime import backends

    names = list(backends())
    fix = "pip install --force-reinstall qpalette"
    return Check("backends", {"ref", "cpu"} <= set(names), ", ".join(names), fix=fix)


def _cuda() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("cuda", True, torch.cuda.get_device_name(), required=False)
    return Check("cuda", True, "no CUDA device; not needed: everything works on the CPU", required=False)


def _cuda_compiler() -> Check:
    """Does the run-time compiler make a fused product, for the device that is here or else for an H100?"""
    import torch

    from qpalette.backends.cuda.compiler import compile_cubin
    from qpalette.backends.cuda.decoder import decoder_spec
    from qpalette.backends.cuda.multiply import kernel_macros, source_for
    from qpalette.backends.cuda.segments import DeviceLimits, device_limits

    present = torch.cuda.is_available()
    limits = device_limits(0) if present else DeviceLimits(132, 227 << 10, (9, 0))
    arch, decoder = "sm_{}{}".format(*limits.capability), decoder_spec(CUDA_SPEC)
    assert decoder is not None
    fix = "pip install 'qpalette[cuda]' (cuda.core and NVRTC with its headers); QPALETTE_BACKEND=ref works without"
    start = time.perf_counter()
    try:
        compile_cubin(source_for([decoder]), arch, tuple(sorted(kernel_macros(limits, 1).items())))
    except UnsupportedError as error:
        # Without a GPU nothing is missing.
        return Check("cuda compiler", not present, str(error), required=present, fix=fix)
    seconds = time.perf_counter() - start
    return Check(
        "cuda compiler", True, f"{CUDA_SPEC} for {arch}, {seconds:.1f} s (later from the cache)", required=present
    )


def _self_test() -> Check:
    """Encode and multiply a small matrix with the CPU backend, and compare with the reference."""
    import torch

    from qpalette.runtime import backends

    start = time.perf_counter()
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    difference = _largest_difference(SELF_TEST_SPEC, weight, backends())
    if not difference < TOLERANCE:
        fix = "set QPALETTE_BACKEND=ref to work without the fast kernels, and report this machine"
        return Check("self test", False, f"{SELF_TEST_SPEC}: cpu and ref differ by {difference:.2g}", fix=fix)
    seconds = time.perf_counter() - start
    return Check("self test", True, f"{SELF_TEST_SPEC} agrees with the reference, {seconds:.1f} s")


def _largest_difference(spec: str, weight: torch.Tensor, backends: dict[str, Backend]) -> float:
    import torch

    from qpalette.codes.tiles import to_tiles
    from qpalette.core.records import TILE_WEIGHTS
    from qpalette.rotate import full_rotation, pack_signs, random_signs
    from qpalette.runtime import PackedLinear

    tiles = to_tiles(weight)
    codes = backends["cpu"].encode(spec, tiles.reshape(-1, TILE_WEIGHTS)).reshape(*tiles.shape[:2], -1)
    packed = PackedLinear(
        codes=codes,
        scales=torch.ones(ROWS, dtype=torch.float16).view(torch.int16),
        diagonal=pack_signs(random_signs(COLUMNS, 0, "doctor")),
        spec=spec,
        rotation=full_rotation(COLUMNS).name,
        out_features=ROWS,
        in_features=COLUMNS,
    )
    x = torch.randn(VECTORS, COLUMNS, generator=torch.Generator().manual_seed(1))
    return float((backends["cpu"].linear(x, packed) - backends["ref"].linear(x, packed)).abs().max())


def _print_report(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[bold red]not ok[/]" if check.required else "[yellow]weak[/]"
        detail = escape(check.detail) + ("" if check.ok else f"\n[bold]fix:[/] {escape(check.fix)}")
        table.add_row(mark, check.name, detail)
    console = Console(soft_wrap=False, highlight=False)
    console.print(table)
    broken = _broken(checks)
    console.print("Ready." if not broken else f"Not ready: {', '.join(check.name for check in broken)}.")
