"""An OpenAI-compatible server: the one of transformers or of vLLM. Either keeps the process until it is stopped."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from qpalette.core.errors import InputError, UnsupportedError

ENGINES = ("transformers", "vllm")
_NEEDED = {"transformers": ("fastapi", "uvicorn", "openai", "prometheus_client"), "vllm": ("vllm",)}
_INSTALL = {"transformers": "pip install 'qpalette[serve]'", "vllm": "pip install vllm"}


def check_engine(engine: str) -> None:
    """Raises InputError for an engine that is not known, UnsupportedError for one that is not installed."""
    if engine not in ENGINES:
        raise InputError(f"'{engine}' is not an engine: choose {' or '.join(ENGINES)}")
    if missing := [name for name in _NEEDED[engine] if find_spec(name) is None]:
        raise UnsupportedError(f"serving with {engine} needs {', '.join(missing)}: {_INSTALL[engine]}")


def check_port(host: str, port: int) -> None:
    """Raises InputError when nothing can listen there, before minutes of loading."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if (
                os.name == "posix"
            ):  # a server that has just left is no obstacle; Windows would not see one that is there
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = f"port {port} is taken: choose another with --port" if taken else f"cannot listen there ({error})"
        raise InputError(f"{host}: {reason}") from error


def is_public(host: str) -> bool:
    """Whether other machines may reach a server that listens there."""
    try:
        return not ip_address(host).is_loopback
    except ValueError:  # a name
        return host != "localhost"


def serve_transformers(
    model: str,
    host: str,
    port: int,
    options: Sequence[str] = (),
    prepare: Callable[[Any], Any] = lambda loaded: loaded,
    key: str | None = None,
) -> None:
    """`transformers serve MODEL` with `options` of that command. Returns when the server is stopped.

    `prepare` gives the model to serve for the one that was loaded; continuous batching, which does not call
    `model.generate`, takes that as it is. `key` is what a client must know. What is wrong with a request is told by
    `guard.py`, which stands before the server.

    Raises InputError for an option that it does not have.
    """
    from transformers.cli.serving import server
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.transformers import app

    from qpalette.integrations.guard import guarded

    if "@" in model:
        raise InputError(f"{model}: transformers serve takes what follows an @ for a revision; rename the directory")
    entry = {"id": model, "object": "model", "created": _created(model), "owned_by": "qpalette"}
    # Its list of models is what the Hub's cache holds, which a directory is not in.
    setattr(ModelManager, "get_gen_models", staticmethod(lambda cache_dir=None: [entry]))  # noqa: B010 - a method
    if "--continuous-batching" not in options:
        load = ModelManager._load_model
        setattr(ModelManager, "_load_model", lambda *given, **named: prepare(load(*given, **named)))  # noqa: B010
    setattr(server, "build_server", guarded(server.build_server, key))  # noqa: B010 - where the command looks it up
    try:
        app(["serve", model, "--host", host, "--port", str(port), *options], standalone_mode=False)
    except Exception as error:
        if type(error).__name__ == "Abort":  # Ctrl-C, after the server has shut down
            return
        if hasattr(error, "format_message"):  # of click: an option that the command does not have
            reason = error.format_message().partition("Available options")[0].strip()
            raise InputError(f"transformers serve: {reason}") from error
        raise


def serve_vllm(model: str, host: str, port: int, options: Sequence[str] = (), key: str | None = None) -> None:
    """`vllm serve MODEL` with `options` of that command, and the `key` that a client must know. Returns when the server
    is stopped.

    vLLM finds the method by its entry point, in this process and in its workers.
    """
    from vllm.entrypoints.cli.main import main

    known = [] if key is None else ["--api-key", key]
    sys.argv = ["vllm", "serve", model, "--host", host, "--port", str(port), *known, *options]
    main()


def _created(model: str) -> int:
    path = Path(model)
    return int(path.stat().st_mtime) if path.exists() else 0
