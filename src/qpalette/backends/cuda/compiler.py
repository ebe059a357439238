"""CUDA C++ compiled at run time, by NVRTC through cuda.core, for the device at hand; kept on disk by content."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qpalette.core.cache import cache_directory
from qpalette.core.errors import UnsupportedError

_INSTALL = "pip install 'qpalette[cuda]'"


@lru_cache(maxsize=512)
def compile_cubin(source: str, arch: str, macros: tuple[tuple[str, int], ...]) -> bytes:
    """Machine code of `source` for `arch` ("sm_90"), with integer `macros` defined; needs no GPU.

    Raises UnsupportedError when the compiler is missing or refuses; its own message is in the text.
    """
    cuda = _cuda_core()
    options = _options(arch, macros)
    key = hashlib.sha256(repr((source, arch, macros, cuda.__version__)).encode()).hexdigest()
    file = cache_directory() / "kernels" / f"{key}.cubin"
    if file.is_file():
        return file.read_bytes()
    try:
        code = bytes(cuda.Program(source, "c++", options).compile("cubin").code)
    except Exception as error:  # NVRTC's errors have no common base class
        raise UnsupportedError(f"a CUDA kernel does not compile for {arch}: {error}") from error
    _write(file, code)
    return code


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel, per thread."""

    registers: int
    spilled_bytes: int


def resources(source: str, arch: str, macros: tuple[tuple[str, int], ...]) -> Resources:
    """Registers and spills of the only kernel in `source`, compiled for `arch`. Raises as `compile_cubin`."""
    cuda, log = _cuda_core(), io.StringIO()
    options = _options(arch, macros, ptxas_options=["-v"])
    try:
        cuda.Program(source, "c++", options).compile("cubin", logs=log)
    except Exception as error:
        raise UnsupportedError(f"a CUDA kernel does not compile for {arch}: {error}") from error
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if registers is None or not spills:
        raise UnsupportedError(f"ptxas reports no resources for {arch}: {log.getvalue()[:200]!r}")
    return Resources(int(registers[1]), sum(map(int, spills[0])))


def _options(arch: str, macros: tuple[tuple[str, int], ...], **more: Any) -> Any:
    defines = [(name, str(value)) for name, value in macros] or None  # cuda.core refuses an empty list
    return _cuda_core().ProgramOptions(arch=arch, std="c++17", define_macro=defines, **more)


def load_kernel(source: str, name: str, macros: Mapping[str, int], device: int, shared_bytes: int = 0) -> Any:
    """The cuda.core Kernel `name` of `source`, loaded on CUDA device `device`, allowed `shared_bytes` of dynamic shared
    memory per block. Raises as `compile_cubin`."""
    return _load(source, name, tuple(sorted(macros.items())), device, shared_bytes)


@lru_cache(maxsize=512)
def _load(source: str, name: str, macros: tuple[tuple[str, int], ...], device: int, shared_bytes: int) -> Any:
    cuda = _cuda_core()
    handle = cuda.Device(device)
    handle.set_current()
    code = compile_cubin(source, f"sm_{handle.arch}", macros)
    kernel = cuda.ObjectCode.from_cubin(code).get_kernel(name)
    if shared_bytes:  # with the kernel's own, it may be above what CUDA gives unasked
        driver = _driver()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, int(kernel.handle), device)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise UnsupportedError(f"device {device} refuses {shared_bytes} bytes of shared memory per block: {status}")
    return kernel


def launch(
    kernel: Any,
    stream: int,
    grid: int | tuple[int, ...],
    block: int,
    shared_bytes: int,
    arguments: Sequence[Any],
    overlap: bool = False,
) -> None:
    """Start `kernel` on the CUDA stream with handle `stream`, whose device must be current.

    `arguments` are ctypes values, structures among them. With `overlap` the kernel may start before the one before it
    has ended, and must wait for it itself (programmatic dependent launch).
    """
    driver = _driver()
    config = driver.CUlaunchConfig()
    x, y, z = (*(grid if isinstance(grid, tuple) else (grid,)), 1, 1)[:3]
    config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    config.attrs = _attributes(overlap)
    config.numAttrs = len(config.attrs)
    places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    (status,) = driver.cuLaunchKernelEx(config, driver.CUfunction(int(kernel.handle)), ctypes.addressof(places), 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise UnsupportedError(f"a CUDA kernel does not start: {status.name} (grid {grid}, block {block})")


@lru_cache(maxsize=2)
def _attributes(overlap: bool) -> list[Any]:
    driver, attributes = _driver(), []
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    return attributes


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _cuda_core() -> Any:
    try:
        import cuda.core
    except ImportError as error:
        raise UnsupportedError(f"CUDA kernels need cuda.core and NVRTC ({error}): {_INSTALL}") from error
    return cuda.core


def compiler_is_installed() -> bool:
    """Whether there is a way to compile CUDA kernels at all."""
    try:
        _cuda_core()
    except UnsupportedError:
        return False
    return True


def _write(file: Path, code: bytes) -> None:
    """By rename, so that another process sees all of it or nothing. A cache that cannot be written is only slow."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(code)
        os.replace(temporary.name, file)
    except OSError:
        return
