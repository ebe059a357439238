"""OUT: where a run works, and how what it has made takes the place of what is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpalette.core.errors import ArtifactError, InputError
from qpalette.core.files import LAST, contents, is_mount_point, locked, move_contents
from qpalette.formats import open_artifact


class Output:
    """The directory OUT, and the folder in which everything lies that is not finished.

    That folder is `OUT.partial`, and OUT appears by one rename. Where OUT is a mount point no rename reaches it: the
    folder then lies in it, as `.qpalette.partial`, and what is finished is moved out of there file by file, config.json
    last, so that OUT is a model only when it is whole. A run that is stopped in between is made good by the next.
    """

    def __init__(self, directory: Path, overwrite: bool) -> None:
        self.directory, self.overwrite = directory, overwrite
        self.is_volume = is_mount_point(directory)
        beside = directory.with_name(f"{directory.name}.partial")
        self.work = directory / ".qpalette.partial" if self.is_volume else beside
        self._replaced = self.work / "replaced"
        self._whole = self.work / "whole"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """For one run, which may write it.

        Raises InputError when another run has it or nothing can be written there, and ArtifactError when OUT exists: a
        missing or empty directory will do, and to overwrite a quantized model.
        """
        self._check_place()
        with locked(self.work, self.directory):
            if self.is_volume:
                self._settle()
            self.check()
            yield

    def check(self) -> None:
        """Raises ArtifactError when something is there that is not to be overwritten, InputError when nothing can be
        written there."""
        self._check_place()
        if not self.directory.exists() or (self.directory.is_dir() and not self._there()):
            return
        if not self.overwrite:
            raise ArtifactError(
                f"{self.directory} exists already; choose another directory, or overwrite it (--overwrite)"
            )
        try:
            open_artifact(self.directory)
        except ArtifactError as error:
            raise ArtifactError(f"{self.directory} is not overwritten, since it is no quantized model: {error}") from (
                error
            )

    def _check_place(self) -> None:
        """As well as it can be known before anything is written: hours of measuring come first."""
        place = self.directory if self.is_volume else self.directory.parent
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise InputError(f"{self.directory} cannot be written: {place} is no directory")
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"{self.directory} cannot be written: nothing may be added to {place}")

    def put(self, assembled: Path) -> None:
        """`assembled`, a folder in `work`, becomes OUT. Raises ArtifactError when something came there meanwhile."""
        self.check()
        shutil.rmtree(self._replaced, ignore_errors=True)
        there = self._there()
        if not self.is_volume:
            if there:
                os.replace(self.directory, self._replaced)
            os.replace(assembled, self.directory)
        else:
            self._replaced.mkdir()
            for entry in sorted(there, key=lambda entry: entry.name != LAST):
                os.replace(entry, self._replaced / entry.name)
            os.replace(assembled, self._whole)
            self._settle()
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _settle(self) -> None:
        """Finish putting a whole model into the volume; before it was whole, what it replaces comes back."""
        if self._whole.exists():
            for entry in self.work.iterdir():  # of no use any more, and in the way of a reader of OUT
                if entry.is_dir() and entry != self._whole:
                    shutil.rmtree(entry)
            move_contents(self._whole, self.directory)
        elif self._replaced.exists() and not (self.directory / LAST).exists():
            move_contents(self._replaced, self.directory)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _there(self) -> list[Path]:
        return [entry for entry in contents(self.directory) if entry != self.work]
