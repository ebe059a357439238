"""`qpalette serve` and those who ask for what cannot be: a 4xx and one line each; and clients that leave."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from test_serve import ASKED, packed, process_of, running  # noqa: F401 - a fixture

from qpalette.cli import main
from qpalette.integrations import serving

PATIENCE = 120  # seconds, for a server that hangs
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ON_CPU = ("--", "--device", "cpu", "--dtype", "float32")
CONTEXT = 256  # of the tiny model
PROMPT = [{"role": "user", "content": "hello"}]
IMAGE = {"image_url": {"url": "data:image/png;base64,AAAA"}}

BAD: dict[str, tuple[str, Any, str]] = {
    "prompt beyond the context": (
        CHAT,
        {"messages": [{"role": "user", "content": "a" * 400}]},
        f"context is {CONTEXT}",
    ),
    "prompt beyond the context, streamed": (COMPLETIONS, {"prompt": "a" * 400, "stream": True}, "shorten it"),
    "prompt beyond the context, as input": (RESPONSES, {"input": "a" * 400}, "shorten it"),
    "negative number of tokens": (CHAT, {"messages": PROMPT, "max_tokens": -5}, "max_tokens"),
    "no tokens": (CHAT, {"messages": PROMPT, "max_completion_tokens": 0}, "max_completion_tokens"),
    "negative number of output tokens": (RESPONSES, {"input": "a", "max_output_tokens": -5}, "max_output_tokens"),
    "tokens as text": (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    "messages as text": (CHAT, {"messages": "hi"}, "messages"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "messages left out": (CHAT, {}, "messages: Field required"),
    "a message that is none": (CHAT, {"messages": ["hi"]}, "messages.0"),
    "a message without a role": (CHAT, {"messages": [{"content": "hi"}]}, "messages.0.role"),
    "content as a number": (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    "a part without a type": (CHAT, {"messages": [{"role": "user", "content": [{}]}]}, "messages.0.content"),
    "an image": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image_url", **IMAGE}]}
            ]
        },
        "no image_url",
    ),
    "an image, as input": (
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}]},
        "no input_image",
    ),
    "a part of no kind": (CHAT, {"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "no smell"),
    "prompt as a list": (COMPLETIONS, {"prompt": ["a"]}, "prompt"),
    "an empty prompt": (COMPLETIONS, {"prompt": ""}, "the prompt is empty"),
    "unknown model": (CHAT, {"messages": PROMPT, "model": "another"}, "another"),
    "model as a number": (CHAT, {"messages": PROMPT, "model": 5}, "model"),
    "negative temperature": (CHAT, {"messages": PROMPT, "temperature": -1}, "temperature"),
    "temperature as text": (CHAT, {"messages": PROMPT, "temperature": "hot"}, "temperature"),
    "two answers": (CHAT, {"messages": PROMPT, "n": 2}, "n: "),
    "two answers to a text": (COMPLETIONS, {"prompt": "a", "n": 2}, "n: "),
    "the prompt again": (COMPLETIONS, {"prompt": "a", "echo": True}, "echo"),
    "a bias that is not looked at": (COMPLETIONS, {"prompt": "a", "logit_bias": {"7": 9}}, "logit_bias"),
    "probabilities": (CHAT, {"messages": PROMPT, "logprobs": True}, "logprobs"),
    "JSON": (CHAT, {"messages": PROMPT, "response_format": {"type": "json_object"}}, "response_format"),
    "presence": (CHAT, {"messages": PROMPT, "presence_penalty": 0.5}, "presence_penalty"),
    "top_p above 1": (CHAT, {"messages": PROMPT, "top_p": 1.5}, "top_p"),
    "a seed that is none": (CHAT, {"messages": PROMPT, "seed": -1}, "seed"),
    "a penalty that divides by 0": (CHAT, {"messages": PROMPT, "frequency_penalty": -1}, "frequency_penalty"),
    "bias of no token": (CHAT, {"messages": PROMPT, "logit_bias": {"a": 1}}, "logit_bias"),
    "bias of a token beyond the last": (CHAT, {"messages": PROMPT, "logit_bias": {"999999": 1}}, "none is 999999"),
    "bias beyond all": (CHAT, {"messages": PROMPT, "logit_bias": {"7": 1e9}}, "logit_bias"),
    "an end that is everywhere": (CHAT, {"messages": PROMPT, "stop": ["a", ""]}, "stop"),
    "a template of its own": (CHAT, {"messages": PROMPT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "None"),
    "many answers": (
        CHAT,
        {"messages": PROMPT, "generation_config": '{"num_return_sequences": 999, "do_sample": true}'},
        "one answer is made",
    ),
    "a generation config that is none": (CHAT, {"messages": PROMPT, "generation_config": "{"}, "JSON"),
    "unknown field": (CHAT, {"messages": PROMPT, "no_such_field": 1}, "no_such_field"),
    "no object": (CHAT, [1], "no JSON object"),
    "no JSON": (CHAT, b"{", "no JSON object"),
    "another model loaded": ("/load_model", {"model": "owner/name"}, "there is no /load_model"),
    "the model unloaded": ("/reset", {}, "there is no /reset"),
    "unknown path": ("/v1/nothing", {}, "there is no /v1/nothing"),
}


@pytest.fixture(scope="module")
def server(packed) -> Iterator[SimpleNamespace]:  # noqa: F811
    with running(packed, *ON_CPU) as started:
        yield started


def connect(port: int, path: str, body: Any, **headers: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Content-Type": "application/json"} | headers)
    return connection


def ask(port: int, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    with connect(port, path, body, **headers).getresponse() as response:
        return response.status, json.loads(response.read())


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_refused_in_one_line(server, kind):
    path, body, message = BAD[kind]
    status, answer = ask(server.port, path, body)
    assert 400 <= status < 500
    told = answer["error"]["message"]
    assert message in told
    assert "\n" not in told
    assert server.process.poll() is None


def test_what_is_right_is_still_answered(server):
    """Whole, in parts, and with more new tokens asked for than the context has room for."""
    whole = {"messages": PROMPT, "max_tokens": 4, "temperature": 0}
    in_parts = whole | {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
    (status, first), (_, second) = ask(server.port, CHAT, whole), ask(server.port, CHAT, in_parts)
    assert status == 200
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    status, long = ask(server.port, COMPLETIONS, {"prompt": "a" * 250, "max_tokens": 4000, "temperature": 0})
    assert status == 200
    assert long["usage"]["total_tokens"] <= CONTEXT


def figures(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_requests_are_counted(server):
    def ended(status: int) -> str:
        return f'qpalette_requests_total{{path="{CHAT}",status="{status}"}}'

    before = figures(server.port)
    ask(server.port, CHAT, {"messages": PROMPT, "max_tokens": 2})
    ask(server.port, CHAT, {"messages": "hi"})
    ask(server.port, "/v1/nothing", {})
    after = figures(server.port)
    for status in (200, 400):
        assert after[ended(status)] == before.get(ended(status), 0) + 1
    assert after["qpalette_running"] == 0
    count = f'qpalette_answer_seconds_count{{path="{CHAT}"}}'
    assert after[count] == before.get(count, 0) + 2
    assert "nothing" not in "".join(after), "paths that are not there would fill the memory"


def said(port: int, **more: Any) -> str:
    status, answer = ask(port, CHAT, {"messages": PROMPT, "max_tokens": 12} | more)
    assert status == 200
    return answer["choices"][0]["message"]["content"]


def test_a_temperature_is_one_though_the_model_says_nothing_of_sampling(server):
    greedy = said(server.port, temperature=0)
    assert said(server.port) == greedy
    assert len({said(server.port, temperature=2.0, seed=seed) for seed in range(4)} - {greedy}) > 1


def test_a_seed_holds_beside_other_requests(server):
    wanted = {seed: said(server.port, temperature=1.5, seed=seed) for seed in (1, 2, 3, 1)}
    assert len(set(wanted.values())) > 1
    with ThreadPoolExecutor(6) as clients:
        answers = [(seed, clients.submit(said, server.port, temperature=1.5, seed=seed)) for seed in (1, 2, 3) * 2]
        assert [answer.result() for seed, answer in answers] == [wanted[seed] for seed, _ in answers]


def test_a_bias_is_a_whole_number_too(server):
    assert said(server.port, max_tokens=3, temperature=0, logit_bias={str(ord("X")): 100}) == "XXX"


def test_what_changes_nothing_may_be_said(server):
    neutral = {"n": 1, "stop": [], "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}}
    assert said(server.port, temperature=0, **neutral) == said(server.port, temperature=0)
    assert said(server.port, temperature=1, top_p=0, seed=4) == said(server.port, temperature=0)


def test_another_method_is_refused_as_all_is(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("GET", COMPLETIONS)
    with connection.getresponse() as response:
        assert (response.status, "message" in json.loads(response.read())["error"]) == (405, True)


def test_a_key_is_asked_for(packed, monkeypatch):  # noqa: F811
    monkeypatch.setenv("QPALETTE_API_KEY", "none")  # what the client of `running` sends
    with running(packed, *ON_CPU) as started:
        assert ask(started.port, CHAT, ASKED)[0] == 401
        status, answer = ask(started.port, CHAT, ASKED, Authorization="Bearer another")
        assert (status, "key" in answer["error"]["message"]) == (401, True)
        assert ask(started.port, CHAT, ASKED, Authorization="Bearer none")[0] == 200
        health = http.client.HTTPConnection("127.0.0.1", started.port, timeout=PATIENCE)
        health.request("GET", "/health")
        assert health.getresponse().status == 200
    assert "none" not in "".join(started.told)


# Every step takes a while, and each request says how many it took.
SLOW = """
import sys, time
from qpalette.integrations import serving

def prepare(model):
    generate, steps = model.generate, []
    model.generation_config.eos_token_id = None
    model.register_forward_hook(lambda *call: (steps.append(1), time.sleep(0.05))[0])

    def counted(**given):
        steps.clear()
        try:
            return generate(**given)
        finally:
            print("steps:", len(steps), file=sys.stderr)

    model.generate = counted
    return model

model, port = sys.argv[1:]
serving.serve_transformers(model, "127.0.0.1", int(port), ["--device", "cpu", "--dtype", "float32"], prepare)
"""


@pytest.mark.parametrize("stream", [False, True])
def test_work_stops_with_its_client(packed, stream):  # noqa: F811
    """Of one that is being answered, and of one that waits."""
    long = ASKED | {"max_tokens": 200, "stream": stream}
    with process_of(lambda port: ["-c", SLOW, str(packed), str(port)]) as started:
        answered, waiting = (connect(started.port, CHAT, long) for _ in range(2))
        sockets = [client.sock for client in (answered, waiting)]
        if stream:
            answered.getresponse().read(1)
        time.sleep(1)
        for client in sockets:
            client.shutdown(socket.SHUT_RDWR)
        status, answer = ask(started.port, CHAT, ASKED | {"max_tokens": 3})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
    told = "".join(started.told)
    steps = [int(line.split()[1]) for line in told.splitlines() if line.startswith("steps:")]
    assert 0 < steps[0] < 200
    assert steps[1:] == [0, 3]
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("host", "public"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("::", True), ("a.b", True)],
)
def test_what_other_machines_reach(host, public):
    assert serving.is_public(host) is public


@pytest.mark.parametrize(("options", "told"), [((), "--api-key KEY asks for a key"), (("--api-key", "k"), "TLS")])
@pytest.mark.parametrize("engine", serving.ENGINES)
def test_a_public_host_is_warned_of(packed, monkeypatch, capsys, options, told, engine):  # noqa: F811
    given = []
    monkeypatch.setattr(serving, "check_engine", lambda name: None)
    monkeypatch.setattr(serving, f"serve_{engine}", lambda *arguments: given.append(arguments))
    for host, expected in (("0.0.0.0", True), ("127.0.0.1", False)):
        with pytest.raises(SystemExit):
            main(["serve", str(packed), "--host", host, "--engine", engine, *options])
        assert (told in capsys.readouterr().err) is expected
    assert [arguments[-1] for arguments in given] == [options[1] if options else None] * 2
