"""SHA256SUMS beside the weights, in the form that `sha256sum --check` reads: a copy may lose a bit on its way."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qpalette.core.errors import ArtifactError

CHECKSUMS = "SHA256SUMS"
_NAME = r"(?!\.\.?/)[^/\\]{1,255}"
_LINE = re.compile(rf"([0-9a-f]{{64}})  ({_NAME}(?:/{_NAME})?)")


def write_checksums(directory: Path) -> None:
    """One line for each file in `directory` and its folders."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file != directory / CHECKSUMS)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_sha256, files)
        lines = [
            f"{digest}  {file.relative_to(directory).as_posix()}\n" for digest, file in zip(digests, files, strict=True)
        ]
    (directory / CHECKSUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def checksums_bytes(names: Iterable[str]) -> int:
    """Size of SHA256SUMS for files of these names."""
    return sum(len(f"{'0' * 64}  {name}\n".encode()) for name in names)


def checked_names(directory: Path) -> list[str]:
    """The files that SHA256SUMS names. Raises ArtifactError for a list that is missing or not of its form."""
    return [name for _, name in _read(directory)]


def check_checksums(directory: Path) -> int:
    """Compare every file that SHA256SUMS names; how many there are.

    Raises ArtifactError naming the first file that is missing or differs, and when there is no such list.
    """
    lines = _read(directory)
    for digest, name in lines:
        named = directory / name
        if not named.is_file():
            raise ArtifactError(f"{named} is missing; download it")
        if _sha256(named) != digest:
            raise ArtifactError(f"{named} is not what was written: its SHA-256 differs; download it again")
    return len(lines)


def _read(directory: Path) -> list[tuple[str, str]]:
    """(SHA-256, file name) of each line."""
    file = directory / CHECKSUMS
    if not file.is_file():
        raise ArtifactError(f"{file} is missing: there is nothing to compare with")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ArtifactError(f"{file}: line {number} is no SHA-256 and a file name; download it again")
        found.append((match[1], match[2]))
    return found


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
