"""How every kernel of this backend is compiled, and kept on disk.

numba's own file cache would be wrong here: it knows a function by its own file alone, not by those it calls, two
processes that write at the same time can swap their code, and a damaged file raises. Nor does it see to it that code of
several processes can be loaded into one. So each compiled signature is one
file, named by what it is, in a directory named by everything that its code depends on: all sources of this backend,
numba and its compiler, Python, and the processor.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba import njit, types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from qpalette.core.cache import compile_cache_directory

# IEEE arithmetic in the order written (no fast-math): results must not depend on what the compiler fancies.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}

# numba numbers functions from 1 in each process, and by that number their symbols differ where names do not: with code
# of two processes loaded into a third, one calls the other's function (products of one spec were decoded as another's).
FunctionIdentity._unique_ids = iter(partial(secrets.randbits, 63), None)  # type: ignore[assignment]

kernel = njit(**_OPTIONS)
parallel_kernel = njit(parallel=True, **_OPTIONS)
inlined = njit(forceinline=True, **_OPTIONS)  # vectors as arguments and results would go through memory

# Of numba's thread pool, by the names of their symbols: numba's own functions would put this process's addresses into
# the code that calls them, and such code cannot be kept on disk.
get_num_threads = types.ExternalFunction("get_num_threads", types.intp())
set_num_threads = types.ExternalFunction("set_num_threads", types.void(types.intp))

KEPT = 8  # directories: environments and processors that share a home
_DIGEST_BYTES = hashlib.sha256().digest_size


def entry(name: str, parallel: bool = False) -> Callable[[Any], Any]:
    """Decorator of a kernel that Python calls, kept on disk under `name`, which must be its own in this backend and say
    all that its closure holds."""

    def compiled(function: Any) -> Any:
        dispatcher = njit(parallel=parallel, **_OPTIONS)(function)
        dispatcher._cache = _CompiledFiles(name)
        return dispatcher

    return compiled


def name_of(dispatcher: Any) -> str:
    """That an `entry` is kept under."""
    return str(dispatcher._cache.name)


def is_missing(dispatcher: Any, signature: tuple[Any, ...]) -> bool:
    """Whether a signature of an `entry` could be on disk, and is not."""
    file = dispatcher._cache.file(signature, dispatcher.targetctx.codegen())
    return file is not None and not file.exists()


class _CompiledFiles(_Cache):
    """One file per compiled signature of the kernel `name`: a SHA-256, then what numba pickles of it.

    Unpickling runs what a file says, as importing a .pyc file does, and with the same trust: only this user can write
    in the directory (`_directory`). Whatever is wrong with a file, the kernel is compiled.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def cache_path(self) -> str | None:
        directory = _directory()
        return None if directory is None else str(directory)

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        file = self.file(sig, target_context.codegen())
        try:
            content = b"" if file is None else file.read_bytes()
        except OSError:
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != hashlib.sha256(payload).digest():
            return None
        try:
            kept, reduced = pickle.loads(payload)
            return CompileResult._rebuild(target_context, *reduced) if kept == (self.name, sig) else None
        except Exception:  # another numba's pickle may fail in any way
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        file = self.file(sig, data.library.codegen)
        if file is None or data.library.has_dynamic_globals:  # addresses of this process in the code
            return
        payload = dumps(((self.name, sig), data._reduce()))
        try:
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
                temporary.write(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary.name, file)  # another process sees all of it or nothing
        except OSError:
            return

    def file(self, sig: Any, codegen: Any) -> Path | None:
        directory = _directory()
        key = hashlib.sha256(repr((self.name, [str(part) for part in sig], codegen.magic_tuple())).encode())
        return None if directory is None else directory / f"{key.hexdigest()}.bin"

    def enable(self) -> None:
        """Always is."""

    def disable(self) -> None:
        """Never is."""

    def flush(self) -> None:
        """Files of other sources are removed by directory."""


def _digest() -> str:
    """Of everything that compiled code depends on but a kernel's name and signature."""
    digest = hashlib.sha256()
    versions = (numba.__version__, llvmlite.__version__, sys.implementation.cache_tag, platform.machine())
    digest.update(
        repr((versions, binding.get_host_cpu_name(), sorted(binding.get_host_cpu_features().items()))).encode()
    )
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        content = source.read_bytes()
        digest.update(f"{source.relative_to(Path(__file__).parent)}:{len(content)}:".encode() + content)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _directory() -> Path | None:
    """Where this process keeps compiled code; None where that cannot be made or could be written by someone else."""
    parent = compile_cache_directory() / "numba"
    directory = parent / _digest()[:32]
    try:
        new = not directory.exists()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_mine(parent) or not _is_mine(directory):
            return None
        os.utime(directory)
        if new:
            _remove_old(parent)
    except OSError:
        return None
    return directory


def _is_mine(directory: Path) -> bool:
    if os.name != "posix":
        return True
    status = directory.lstat()
    return (
        directory.is_dir()
        and not directory.is_symlink()
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o022
    )


def _remove_old(parent: Path) -> None:
    """All but the KEPT directories used last."""
    by_use = sorted(parent.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
    for old in by_use[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
