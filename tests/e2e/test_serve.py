"""`qpalette serve` as a client of OpenAI's API meets it: a real server process, the `openai` package."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import save_model

from qpalette.cli import main
from qpalette.core.errors import InputError, UnsupportedError
from qpalette.integrations import serving

START_SECONDS = 180
ASKED = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(model: Path, *options: str) -> Iterator[SimpleNamespace]:
    """`qpalette serve`."""
    with process_of(lambda port: ["-m", "qpalette.cli", "serve", str(model), "--port", str(port), *options]) as server:
        yield server


@contextmanager
def process_of(arguments: Callable[[int], list[str]]) -> Iterator[SimpleNamespace]:
    """A Python process that serves at a port, and a client that its models endpoint has answered; stopped by Ctrl-C."""
    openai = pytest.importorskip("openai")
    port = free_port()
    command = [sys.executable, *arguments(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "QPALETTE_BACKEND": "ref"}  # compiles nothing
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True)
    told: list[str] = []  # on stderr, once it has stopped
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        wait_for(client, process)
        yield SimpleNamespace(client=client, process=process, port=port, told=told)
    finally:
        process.send_signal(signal.SIGINT)
        told.append(process.stderr.read())
        process.wait(60)


def wait_for(client, process) -> None:
    import openai

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
    pytest.fail("the server did not start")


def generated(model: Path) -> str:
    """What transformers answers without a server."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qpalette  # noqa: F401 - registers the method

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(ASKED["messages"], add_generation_prompt=True, return_tensors="pt")
    ids = prompt["input_ids"]
    answer = AutoModelForCausalLM.from_pretrained(model).generate(ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("served")
    save_model(directory / "tiny")
    with pytest.raises(SystemExit) as exit_:
        main(["quantize", str(directory / "tiny"), str(directory / "packed"), "--spec", "nuq-4"])
    assert not exit_.value.code
    return directory / "packed"


def test_a_client_gets_answers_whole_and_streamed(packed):
    with running(packed, "--", "--device", "cpu", "--dtype", "float32") as server:
        models = [model.id for model in server.client.models.list().data]
        assert models == [str(packed)]
        whole = server.client.chat.completions.create(model=models[0], **ASKED)
        chunks = list(server.client.chat.completions.create(model=models[0], stream=True, **ASKED))
    text = whole.choices[0].message.content
    assert text == generated(packed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len(chunks) > 2, "streamed means in pieces"
    assert whole.usage.completion_tokens == 8
    assert server.process.returncode == 0, "Ctrl-C is the way to stop it"


def test_clients_at_once_get_what_each_gets_alone(packed):
    """More of them than are answered together, some of whom leave."""

    def ask(number: int) -> str:
        said = {"messages": [{"role": "user", "content": "hello" * number}], "max_tokens": 8 + number, "temperature": 0}
        if number % 2:
            return completions.create(model=str(packed), **said).choices[0].message.content
        chunks = completions.create(model=str(packed), stream=True, **said)
        if number == 4:
            next(iter(chunks))
            chunks.close()
            return "left"
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    with running(packed, "--batch", "4", "--", "--device", "cpu", "--dtype", "float32") as server:
        completions = server.client.chat.completions
        alone = [ask(number) for number in range(1, 11)]
        with ThreadPoolExecutor(10) as clients:
            for _ in range(3):
                assert list(clients.map(ask, range(1, 11))) == alone
    assert "Traceback" not in server.told[0]
    assert server.process.returncode == 0


# The loop of a GPU on the CPU, every step eager; it tells of each model that it gets.
WITH_THE_LOOP = """
import sys
from qpalette.generation import attach
from qpalette.integrations import serving

def prepare(model):
    print("prepared", type(model).__name__, file=sys.stderr)
    attach(model, "never", None)
    return model

model, port, *options = sys.argv[1:]
serving.serve_transformers(model, "127.0.0.1", int(port), ["--device", "cpu", *options], prepare)
"""


def test_the_served_model_is_the_prepared_one(packed):
    def arguments(port: int) -> list[str]:
        return ["-c", WITH_THE_LOOP, str(packed), str(port), "--dtype", "float32"]

    with process_of(arguments) as server:
        completions = server.client.chat.completions
        texts = [completions.create(model=str(packed), **ASKED).choices[0].message.content for _ in range(2)]
        chunks = list(completions.create(model=str(packed), stream=True, **ASKED))
        stopped = completions.create(model=str(packed), **ASKED | {"stop": [texts[0][1]]})
    assert texts == [generated(packed)] * 2
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == texts[0]
    assert texts[0].startswith(stopped.choices[0].message.content)
    assert len(stopped.choices[0].message.content) < len(texts[0])
    assert server.told[0].count("prepared LlamaForCausalLM") == 1


def test_continuous_batching_takes_the_model_as_it_is(packed, monkeypatch):
    """What it calls is not model.generate."""
    from transformers.cli import transformers as command
    from transformers.cli.serving.model_manager import ModelManager

    loaded = object()
    monkeypatch.setattr(ModelManager, "_load_model", lambda self: loaded)
    monkeypatch.setattr(ModelManager, "get_gen_models", ModelManager.get_gen_models)
    for options, expected in ((["--continuous-batching"], loaded), ([], "prepared")):
        got = []
        monkeypatch.setattr(command, "app", lambda *_, got=got, **__: got.append(ModelManager._load_model(None)))
        serving.serve_transformers(str(packed), "127.0.0.1", free_port(), options, lambda model: "prepared")
        assert got == [expected]


def test_it_listens_on_this_machine_only_unless_told():
    from inspect import signature

    from qpalette.cli.serve import serve

    assert signature(serve).parameters["host"].default == "127.0.0.1"


def test_a_port_that_is_taken_is_one_clear_line(packed, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as exit_:
            main(["serve", str(packed), "--port", str(port)])
    assert exit_.value.code == 1
    assert f"port {port} is taken: choose another with --port" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedError, match=r"fastapi, uvicorn, openai, prometheus_client: pip install 'qpalette\[serve\]'"
    ):
        serving.check_engine("transformers")
    with pytest.raises(UnsupportedError, match="needs vllm: pip install vllm"):
        serving.check_engine("vllm")
    with pytest.raises(InputError, match="choose transformers or vllm"):
        serving.check_engine("tgi")


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(InputError, match="cannot listen there"):
        serving.check_port("192.0.2.1", 8000)  # RFC 5737: belongs to nobody


def test_an_option_that_the_engine_lacks(packed):
    with pytest.raises(InputError, match=r"transformers serve: No such option '--[^ ]*'\.$"):
        serving.serve_transformers(str(packed), "127.0.0.1", free_port(), ["--no-such-option"])
    with pytest.raises(InputError, match="rename the directory"):
        serving.serve_transformers("a@b", "127.0.0.1", free_port())
