"""Files that are mapped into this process' memory, and pages of them that it needs no longer."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

MAPS = Path("/proc/self/maps")  # of Linux; elsewhere nothing is known, and nothing let go
_PRIVATE_FILE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ..-p \S+ \S+ [1-9]\d* +/", re.MULTILINE)  # inode 0 is no file


class MappedFiles:
    """The mappings at one moment. What is asked about must have been in memory then, and ever since: addresses are used
    again."""

    def __init__(self) -> None:
        maps = MAPS.read_text(encoding="utf-8") if MAPS.exists() else ""
        self.ranges = [(int(start, 16), int(end, 16)) for start, end in _PRIVATE_FILE.findall(maps)]

    def let_go(self, start: int, size: int) -> None:
        """The whole pages of `size` bytes from the address `start` on, if they are a file's; whoever reads them again
        has the file's content.

        A loader maps a whole file, so what was laid out anew would stay in memory beside its copy as long as any tensor
        of the file lives.
        """
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(begin <= first and last <= end for begin, end in self.ranges):
            libc = ctypes.CDLL(None, use_errno=True)
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def resident_bytes(file: Path) -> int:
    """What this process has of a file in memory through its mappings; 0 where nothing is known."""
    smaps = MAPS.with_name("smaps").read_text(encoding="utf-8") if MAPS.exists() else ""
    of_file = rf"{re.escape(str(file))}\n(?:(?!Rss).*\n)*Rss: +(\d+) kB"
    return sum(1024 * int(rss) for rss in re.findall(of_file, smaps))
