"""CUDA C++ compiled at run time, by NVRTC through cuda.core, for the device at hand; kept on disk by content."""

from __future__ import annotations

import ctypes
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from qpalette.backends.cuda import cubins
from qpalette.core.errors import UnsupportedError

INSTALL = "pip install 'qpalette[cuda]'"
_STANDARD = "c++17"


@lru_cache(maxsize=512)
def compile_cubin(source: str, arch: str, macros: tuple[tuple[str, int], ...]) -> bytes:
    """Machine code of `source` for `arch` ("sm_90"), with integer `macros` defined; needs no GPU.

    Raises UnsupportedError when the compiler is missing or refuses; its own message is in the text.
    """
    key = hashlib.sha256(repr((source, arch, macros, _STANDARD, compiler_version())).encode()).hexdigest()
    code = cubins.read(key)
    if code is None:
        code = _compile(source, arch, macros)
        cubins.write(key, code)
    return code


def _compile(
    source: str, arch: str, macros: tuple[tuple[str, int], ...], logs: io.StringIO | None = None, **more: Any
) -> bytes:
    cuda = _cuda_core()
    defines = [(name, str(value)) for name, value in macros] or None  # cuda.core refuses an empty list
    if dict(macros).get("WGMMA"):  # instructions that no other architecture has
        arch += "a"
    options = cuda.ProgramOptions(arch=arch, std=_STANDARD, define_macro=defines, **more)
    try:
        return bytes(cuda.Program(source, "c++", options).compile("cubin", logs=logs).code)
    except Exception as error:  # NVRTC's errors have no common base class
        raise UnsupportedError(f"a CUDA kernel does not compile for {arch}: {error}") from error


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a source, per thread."""

    registers: int
    spilled_bytes: int
    serialized: bool  # whether it waits for each product of a warp group (wgmma) where the source lets them go on


def resources(source: str, arch: str, macros: tuple[tuple[str, int], ...]) -> Resources:
    """Registers of the largest kernel in `source`, compiled for `arch`, and spills of all its functions, those that are
    called among them. Raises as `compile_cubin`."""
    log = io.StringIO()
    _compile(source, arch, macros, log, ptxas_options=["-v"])
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    if not registers or not spills:
        raise UnsupportedError(f"ptxas reports no resources for {arch}: {log.getvalue()[:200]!r}")
    serialized = "instructions are serialized" in log.getvalue()
    return Resources(max(map(int, registers)), sum(map(int, spills)), serialized)


def load_kernel(source: str, name: str, macros: Mapping[str, int], device: int, shared_bytes: int = 0) -> Any:
    """The cuda.core Kernel `name` of `source`, loaded on CUDA device `device`, allowed `shared_bytes` of dynamic shared
    memory per block. Raises as `compile_cubin`.

    It stays loaded: a captured CUDA graph may call it for as long as the process lives.
    """
    key = (source, name, tuple(sorted(macros.items())), device, shared_bytes)
    kernel = _loaded.get(key)
    return _loaded.setdefault(key, _load(*key)) if kernel is None else kernel  # threads at once get one and the same


_loaded: dict[tuple[Any, ...], Any] = {}


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


class KernelLaunch:
    """A kernel with its configuration and its block of arguments, made once: a start is then little more than the
    driver's own work.

    `arguments` are ctypes values, structures among them; what changes from start to start is written into them before
    it. They are read during `start` alone, which two threads must not do at once. With `overlap` the kernel may start
    before the one before it has ended, and must wait for it itself (programmatic dependent launch).
    """

    def __init__(
        self,
        kernel: Any,
        grid: int | tuple[int, ...],
        block: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        overlap: bool = False,
    ) -> None:
        driver = _driver()
        self._start, self._success = driver.cuLaunchKernelEx, driver.CUresult.CUDA_SUCCESS
        self._function, self._arguments = driver.CUfunction(int(kernel.handle)), arguments
        self._places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._address = ctypes.addressof(self._places)
        x, y, z = (*(grid if isinstance(grid, tuple) else (grid,)), 1, 1)[:3]
        self._grid = x, y, z
        self._config = _configuration(self._grid, block, shared_bytes, _attributes(overlap))
        self._stream = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return self._grid

    @grid.setter
    def grid(self, grid: tuple[int, int, int]) -> None:
        if grid != self._grid:
            self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = self._grid = grid

    def start(self, stream: int) -> None:
        """On the CUDA stream with this handle, whose device must be current. Raises UnsupportedError."""
        if stream != self._stream:
            self._stream = self._config.hStream = stream
        (status,) = self._start(self._config, self._function, self._address, 0)
        if status != self._success:
            raise UnsupportedError(f"a CUDA kernel does not start: {status.name} (grid {self._grid})")


def _configuration(grid: tuple[int, int, int], block: int, shared_bytes: int, attributes: list[Any]) -> Any:
    config = _driver().CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, 0
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


@cache
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
        raise UnsupportedError(f"CUDA kernels need cuda.core and NVRTC ({error}): {INSTALL}") from error
    return cuda.core


@cache
def compiler_version() -> tuple[str, int, int]:
    """(version of cuda.core, NVRTC's major, minor). Raises UnsupportedError when one of them is missing."""
    version = _cuda_core().__version__
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loader of NVIDIA's libraries has errors of its own
        raise UnsupportedError(f"CUDA kernels need NVRTC ({error}): {INSTALL}") from error
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    return version, major, minor


def compiler_is_installed() -> bool:
    """Whether there is a way to compile CUDA kernels at all."""
    try:
        compiler_version()
    except UnsupportedError:
        return False
    return True
