"""One budget for weights and cache: streams are items of the same problem, and every byte counts."""

import json
import sys
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from tiny_model import VOCABULARY, build
from typer.testing import CliRunner

import qpalette
from qpalette.cli.app import app
from qpalette.core.errors import BudgetError, InputError
from qpalette.evaluate import load_model
from qpalette.evaluate.cache import stored_plan, stream_sensitivities
from qpalette.formats import DequantizedCheckpoint, open_artifact
from qpalette.kvcache import PAGE, CachePlan, lengths, parse_cache, parse_code
from qpalette.models import find_groups
from qpalette.pipeline.jobs import make_jobs
from qpalette.pipeline.planning import longest_context, make_plan
from qpalette.plan import (
    Budget,
    CacheSpace,
    Plan,
    SensitiveLinear,
    SensitiveStream,
    Sensitivities,
    Space,
    palette_of,
    parse_size,
)
from qpalette.storage import open_checkpoint

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import joint

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 512


@pytest.fixture(autouse=True)
def _caches_of_any_length(monkeypatch):
    """In pages, in place of 1024 tokens at least."""
    monkeypatch.setattr(lengths, "STEP", PAGE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    build("llama", max_position_embeddings=4096).save_pretrained(directory)
    return open_checkpoint(directory)


@pytest.fixture(scope="module")
def known(checkpoint):
    linears = tuple(
        SensitiveLinear(shape, group.name, 1.0 + index)
        for index, group in enumerate(find_groups(checkpoint).groups)
        for shape in group.linears
    )
    streams = tuple(
        SensitiveStream(layer, kind, 2, 16, value)
        for layer in range(2)
        for kind, value in (("keys", 4.0 + layer), ("values", 0.5))
    )
    return Sensitivities(linears, {"method": "invented"}, streams=streams)


def planned(known, checkpoint, memory: int, context: int = CONTEXT, batch: int = 1, **limits):
    space = Space(palette_of(families=("nuq", "tcq")), batch=batch)
    return make_plan(known, Budget(memory=memory, **limits), space, checkpoint, context=context)


def memory_of(known, checkpoint, room: int, context: int = CONTEXT) -> int:
    """That leaves `room` bytes to linears and cache, which take 28 kB to 135 kB with 512 tokens."""
    return room + planned(known, checkpoint, 1 << 40, context).overhead.memory


@pytest.mark.parametrize("room", [40_000, 60_000, 90_000, 200_000])
def test_every_byte_is_within_the_memory(known, checkpoint, room):
    memory = memory_of(known, checkpoint, room)
    found, less = planned(known, checkpoint, memory), planned(known, checkpoint, memory - 5000)
    choice, cache = found.planned.choice, found.planner.space.cache
    assert found.memory_bytes <= memory
    stored = sum(cache.bits(stream, parse_code(choice.cache[stream.name])) for stream in cache.streams)
    assert choice.cache_bits == stored
    assert found.memory_bytes == (choice.bits + stored) // 8 + found.overhead.memory
    loss = sum(s.sensitivity * parse_code(choice.cache[s.name]).distortion for s in cache.streams)
    assert choice.cache_loss == pytest.approx(loss)
    assert found.planned.bound <= choice.loss <= less.planned.choice.loss
    assert choice.loss <= found.planned.uniform.loss
    assert found.plan.cache == cache.plan(choice.cache)


def test_no_other_split_of_the_bytes_is_better(known, checkpoint):
    """The joint plan against the cache at each uniform code, and the weights planned with what that leaves."""
    room = 60_000
    joint = planned(known, checkpoint, memory_of(known, checkpoint, room)).planned.choice
    cache, weights = CacheSpace(known.streams, CONTEXT, 1), sum(linear.shape.weights for linear in known.linears)
    space = Space(palette_of(families=("nuq", "tcq")))
    separate = []
    for code in cache.palette:
        left = 8 * room - sum(cache.bits(stream, code) for stream in cache.streams)
        loss = sum(stream.sensitivity * code.distortion for stream in cache.streams)
        with suppress(BudgetError):
            found = make_plan(known, Budget(bits=Fraction(max(0, left), weights)), space, checkpoint)
            separate.append(loss + found.planned.choice.loss)
    assert len(separate) > 5
    assert joint.loss <= min(separate) * (1 + 1e-9)


def test_long_contexts_take_bits_from_the_cache(known, checkpoint):
    """At the optimum a bit buys the same everywhere: a stream's rate falls with the tokens that pay for it."""
    short = planned(known, checkpoint, memory_of(known, checkpoint, 60_000, PAGE), PAGE)
    long = planned(known, checkpoint, memory_of(known, checkpoint, 60_000, 1024), 1024)

    def rate(found):
        cache = found.planner.space.cache
        return sum(float(parse_code(found.planned.choice.cache[s.name]).rate) for s in cache.streams)

    assert rate(long) < rate(short)
    assert long.planned.choice.bits < short.planned.choice.bits


def test_other_limits_hold_as_well(known, checkpoint):
    memory = memory_of(known, checkpoint, 90_000)
    free = planned(known, checkpoint, memory).planned
    held = planned(known, checkpoint, memory, bits=Fraction(3)).planned
    assert held.average_bits <= 3 < free.average_bits
    assert held.choice.cache_loss <= free.choice.cache_loss
    with pytest.raises(BudgetError, match="the least is a memory of") as told:
        planned(known, checkpoint, memory_of(known, checkpoint, 20_000))
    least = parse_size(str(told.value).rpartition("a memory of ")[2])
    assert planned(known, checkpoint, least).memory_bytes <= least


def test_the_longest_context_is_the_longest(known, checkpoint):
    memory = memory_of(known, checkpoint, 60_000)

    def make(context):
        return planned(known, checkpoint, memory, context=context)

    context, found = longest_context(make, 4096)
    assert context % PAGE == 0
    assert found.planner.space.cache.context == context >= CONTEXT
    with pytest.raises(BudgetError):
        make(context + PAGE)
    loss = make(128).planned.choice.loss
    shorter, held = longest_context(make, 4096, loss)
    assert 128 <= shorter < context
    assert held.planned.choice.loss <= loss < make(shorter + PAGE).planned.choice.loss
    with pytest.raises(BudgetError, match="more than"):
        longest_context(make, 4096, 1e-9)


def test_streams_come_back_from_their_file(known):
    assert Sensitivities.from_json(known.to_json()) == known
    content = json.loads(known.to_json())
    for change in ({"kind": "values"}, {"heads": 0}, {"sensitivity": -1}, {"layer": 1.0}, {"more": 2}):
        wrong = json.loads(known.to_json())
        wrong["streams"][0] |= change
        with pytest.raises(InputError, match=r"stream|cache\.0\.keys"):
            Sensitivities.from_json(json.dumps(wrong))
    assert content["streams"][0]["heads"] == 2


def test_a_plan_keeps_its_cache(tmp_path):
    plan = Plan({"a": "tcq-3"}, cache=CachePlan(("vq-3", "vq-2"), ("vq-2.5",)))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.digest == replace(plan, cache=None).digest  # what is stored of the weights is the same
    (tmp_path / "qpalette_plan.json").write_text(plan.to_json())
    assert stored_plan(tmp_path) == plan.cache


def test_a_code_for_each_stream_promises_no_more_loss_than_one_for_all(known, checkpoint):
    """At equal bits; what `qpalette plan` takes is one for all."""
    alike, free, weights = joint.plans_of(known, checkpoint, "fast", CONTEXT, 5.0)
    assert len({*alike.cache.keys, *alike.cache.values}) == 1 < len({*free.cache.keys, *free.cache.values})
    assert free.loss <= alike.loss <= weights.loss
    assert len(set(weights.specs.specs.values())) == 1
    chosen = planned(known, checkpoint, memory_of(known, checkpoint, 60_000)).plan.cache
    assert len({*chosen.keys, *chosen.values}) == 1


def test_joint_rounds_in_memory_what_quantize_writes(checkpoint, tmp_path):
    specs = {linear.name: "tcq-3-L12" for group in find_groups(checkpoint).groups for linear in group.linears}
    plan = Plan(specs | {next(iter(specs)): "nuq-2"})
    qpalette.quantize(checkpoint.location, tmp_path / "out", plan=plan)
    stored = DequantizedCheckpoint(open_artifact(tmp_path / "out"), torch.float32)
    model = load_model(checkpoint.location)[0]
    measured = joint.Rounded.of(model, list(specs))
    for _ in range(2):  # the second time nothing is rounded
        measured.take(make_jobs(checkpoint, plan))
        for name in specs:
            assert torch.equal(model.get_submodule(name).weight, stored.read(f"{name}.weight"))
    assert len(measured.kept) == len(specs)


def test_sensitivities_of_streams_predict(tmp_path):
    """Twice the distortion costs twice as much, and the sum is of the size of what a code does."""
    model = build("llama", max_position_embeddings=256)
    windows = [torch.randint(3, VOCABULARY, (48,), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    found = stream_sensitivities(model, None, windows)
    assert [(stream.layer, stream.kind) for stream in found] == [(0, "keys"), (0, "values"), (1, "keys"), (1, "values")]
    assert all(stream.sensitivity > 0 and (stream.heads, stream.dim) == (2, 16) for stream in found)
    from qpalette.evaluate.cache import evaluate_cache

    predicted = sum(stream.sensitivity for stream in found) * parse_code("nuq-5").distortion
    measured = evaluate_cache(model, None, "nuq-5", windows, calibration=windows).kl
    assert predicted / 3 < measured < 3 * predicted


def test_the_commands(tmp_path, checkpoint, known):
    file, plan_file, cache_file = tmp_path / "s.json", tmp_path / "plan.json", tmp_path / "cache.json"
    file.write_text(known.to_json())
    run, model = CliRunner(), str(checkpoint.location)
    options = [
        "--sensitivity",
        str(file),
        "--memory",
        str(memory_of(known, checkpoint, 60_000)),
        "--json",
        "--family",
        "nuq",
        "--target",
        "cpu",
    ]
    more = ["--context", "128", "--batch", "2", "--out", str(plan_file), "--cache-out", str(cache_file)]
    found = run.invoke(app, ["plan", model, *options, *more])
    assert found.exit_code == 0, found.output
    cache = json.loads(found.stdout)["cache"]
    assert (cache["context"], cache["batch"]) == (128, 2)
    assert 0 < cache["bytes"] < 60_000
    assert Plan.read(plan_file).cache == CachePlan.from_json(cache_file.read_text())
    for given, wanted in (
        (["--plan", str(plan_file)], Plan.read(plan_file).cache),
        (["--plan", str(plan_file), "--cache", "white:vq-3"], parse_cache("white:vq-3")),
        (["--spec", "nuq-4", "--cache", str(cache_file)], Plan.read(plan_file).cache),
        (["--spec", "nuq-4"], None),
    ):
        made = run.invoke(app, ["quantize", model, str(tmp_path / "out"), "--fast", "--overwrite", *given])
        assert made.exit_code == 0, made.output
        assert stored_plan(tmp_path / "out") == wanted
    wrong_layers = tmp_path / "wrong.json"
    wrong_layers.write_text(CachePlan(("vq-3",) * 9, ("vq-3",)).to_json())
    for wrong, message in ((str(wrong_layers), "9 layers"), ("vq-77", "is not a quantizer")):
        said = run.invoke(app, ["quantize", model, str(tmp_path / "no"), "--bits", "4", "--cache", wrong])
        assert said.exit_code == 1
        assert message in said.output
    longest = run.invoke(app, ["plan", model, *options, "--context", "max"])
    assert longest.exit_code == 0, longest.output
    assert json.loads(longest.stdout)["cache"]["context"] >= CONTEXT
    for wrong in (["--context", "long"], ["--context", "0x10"], ["--max-loss", "1"]):
        assert run.invoke(app, ["plan", model, *options, *wrong]).exit_code == 2
