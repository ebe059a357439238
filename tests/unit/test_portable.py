"""What works on Linux and is known to break on Windows or macOS, where these tests do not run, is not in the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "readline", "syslog"}
POSIX_NAMES = {
    *("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "killpg", "setsid", "getpgid", "setpgid", "nice"),
    *("sysconf", "statvfs", "mkfifo", "mknod", "chown", "lchown", "getloadavg", "sched_getaffinity", "uname", "wait"),
    *("O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "pread", "pwrite", "sendfile", "memfd_create", "SIGKILL", "SIGALRM"),
    "getppid",  # Windows has it, and keeps the number of a parent that is gone
    "rename",  # which replaces a file on POSIX alone; os.replace does everywhere
}


def functions(tree):
    """Each call or name with the innermost function, or the module, that it is in."""

    def walk(node, scope):
        for child in ast.iter_child_nodes(node):
            inner = child if isinstance(child, ast.FunctionDef) else scope
            yield child, inner
            yield from walk(child, inner)

    yield from walk(tree, tree)


def asks_for_the_system(scope, text):
    source = ast.get_source_segment(text, scope) if isinstance(scope, ast.FunctionDef) else text
    return "os.name" in source or "sys.platform" in source or "hasattr(os" in source or "getattr(os" in source


def called(node):
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_of_a_text_file(node):
    """A call of `open` or of a path's `read_text` or `write_text`; classes have an `open` of their own."""
    modes = [a.value for a in node.args[1:] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if isinstance(node.func, ast.Attribute):
        return called(node) in ("read_text", "write_text")
    return called(node) == "open" and not any("b" in mode for mode in modes)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_the_source_asks_for_nothing_that_another_system_lacks(file):
    text = file.read_text(encoding="utf-8")
    for node, scope in functions(ast.parse(text)):
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {node.module or ""} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            assert not names & POSIX_MODULES or asks_for_the_system(scope, text), f"{where}: {names} on every system"
        of_the_system = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("os", "signal")
        if of_the_system and node.attr in POSIX_NAMES:
            assert asks_for_the_system(scope, text), f"{where}: os.{node.attr} on every system"
        if isinstance(node, ast.Call) and is_of_a_text_file(node):
            given = {keyword.arg for keyword in node.keywords}
            assert "encoding" in given, f"{where}: the encoding of a text file is the system's"
            writes = called(node) == "write_text" or any(getattr(a, "value", "") in ("w", "x", "a") for a in node.args)
            assert not writes or "newline" in given, f"{where}: Windows writes two bytes for a line's end"
