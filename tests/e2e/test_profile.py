"""`qpalette profile` with a stopwatch that needs no GPU: what is measured, kept, and read by a plan."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from qpalette.backends.cuda import probe
from qpalette.bench import steps as bench_steps
from qpalette.bench.models import config_of, groups_of
from qpalette.cli import main
from qpalette.cli.profile import SAVED_EVERY
from qpalette.codes import parse_spec
from qpalette.core.errors import InputError
from qpalette.pipeline.planning import even_sensitivities
from qpalette.plan import LatencyProfile, Plan, Planner, Space, candidate_of, palette_of
from qpalette.plan.build import Limits
from qpalette.plan.profile import SHIPPED, SPREAD, shipped_profiles
from qpalette.runtime import device as devices

GROUPS = ("--group", "64x32+16x32", "--group", "32x64", "--batch", "1,8", "--spec", "tcq-3", "--spec", "nuq-2")
COMMAND = (*GROUPS, "--constant", "0.8")
LAUNCHES = 4 * 2 * 2  # shapes and the group, specs, batches


class Stopwatch:
    """A second per million weights and token; interrupted before launch number `most`."""

    def __init__(self) -> None:
        self.measured: list = []
        self.most = 10**9

    def __call__(self, parts, batch, device, with_rotation):
        if len(self.measured) == self.most:
            raise KeyboardInterrupt
        self.measured.append((parts, batch))
        return sum(rows * columns for _, rows, columns in parts) * batch / 1e6


@pytest.fixture
def stopwatch(monkeypatch) -> Stopwatch:
    found = Stopwatch()
    monkeypatch.setattr(probe, "launch_seconds", found)
    monkeypatch.setattr(devices, "parse_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return found


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["profile", *map(str, arguments)])
    return exit_.value.code or 0


def test_every_launch_once_with_a_constant_for_each_batch(tmp_path, stopwatch):
    out = tmp_path / "gpu.json"
    assert run(out, *GROUPS, "--constant", "0.5,2") == 0
    profile = LatencyProfile.read(out)
    assert len(profile.launches) == len(stopwatch.measured) == len(set(stopwatch.measured)) == LAUNCHES
    assert (profile.device, profile.batches, profile.constant(1), profile.constant(8)) == ("a GPU", (1, 8), 5e-4, 2e-3)
    fused = profile.seconds([(16, 32), (64, 32)], 8)
    assert fused[""]["tcq-3"] == pytest.approx((64 + 16) * 32 * 8 / 1e6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json"]


def test_an_interrupted_measurement_goes_on(tmp_path, stopwatch, monkeypatch):
    monkeypatch.setattr("qpalette.cli.profile.SAVED_EVERY", 5)
    out, stopwatch.most = tmp_path / "gpu.json", 12
    assert run(out, *COMMAND) != 0
    assert not out.exists()
    stopwatch.most = 10**9
    assert run(out, *COMMAND) == 0
    assert len(stopwatch.measured) == 12 + LAUNCHES - 10  # ten were kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json"]
    assert len(LatencyProfile.read(out).launches) == LAUNCHES


def test_half_a_file_of_an_interrupted_measurement_is_measured_again(tmp_path, stopwatch):
    (tmp_path / "gpu.json.partial").write_text('{"identity": {"device": "a GPU"}, "figu')
    assert run(tmp_path / "gpu.json", *COMMAND) == 0
    assert len(stopwatch.measured) == LAUNCHES


@pytest.mark.parametrize("constant", ["x", "1,2,3", "-1", "nan", ""])
def test_constants_that_mean_nothing(tmp_path, stopwatch, constant, capsys):
    assert run(tmp_path / "gpu.json", *GROUPS, f"--constant={constant}") != 0
    assert "--constant" in capsys.readouterr().err
    assert not stopwatch.measured


def test_groups_alone_do_not_say_what_a_step_costs(tmp_path, stopwatch, capsys):
    assert run(tmp_path / "gpu.json", *GROUPS) != 0
    assert "--constant" in capsys.readouterr().err
    assert not stopwatch.measured


CONSTANT = {1: 0.5, 8: 0.9}  # seconds of a step besides its linears and the head
SLOWER = 1.1  # what a step of the second probe takes over the sum of its parts


@pytest.fixture
def steps(stopwatch, monkeypatch) -> list:
    """Whole steps by the same stopwatch, in place of a GPU; every plan that was timed."""
    timed: list[Plan] = []

    def measure(candidates, batches, *conditions):
        (plan,) = candidates
        timed.append(plan)
        slower = SLOWER if "tcq-4" in plan.specs.values() else 1.0
        for batch in batches:
            spec = plan.specs.get("lm_head")
            head = plain(*HEAD, batch, None) if spec is None else clock(((spec, *HEAD),), batch)
            parts = [[("", *SHAPES[name.split(".")[-1]]) for name in launch] for launch in plan.launches]
            seconds = CONSTANT[batch] + head + sum(clock(launch, batch) for launch in parts)
            yield SimpleNamespace(batch=batch, decode_seconds=slower * seconds), None

    def clock(parts, batch):
        return sum(rows * columns for _, rows, columns in parts) * batch / 1e6

    def plain(rows, columns, batch, device):
        return 4 * clock((("", rows, columns),), batch)

    monkeypatch.setattr(probe, "plain_seconds", plain)
    monkeypatch.setattr(bench_steps, "from_config", lambda name, config, plan, *rest: plan)
    monkeypatch.setattr(bench_steps, "measure", measure)
    return timed


@pytest.fixture
def model(tmp_path) -> str:
    config = LlamaConfig(
        vocab_size=HEAD[0],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    return str(tmp_path / "config.json")


HEAD = (128, 64)
SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
SHAPES |= {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
OF_MODEL = ("--batch", "1,8", "--spec", "tcq2-3.25", "--spec", "tcq-4", "--spec", "nuq-2")


def test_a_profile_of_a_model_predicts_the_steps_it_was_measured_on(tmp_path, steps, model):
    """Of two probes, one by SLOWER slower than the sum of its parts, the constant takes the mean, and the spread tells
    of the slower one; with the head left alone, and with the head planned, whose float16 product is then gone."""
    out = tmp_path / "gpu.json"
    assert run(out, "--model", model, *OF_MODEL) == 0
    assert [set(plan.specs.values()) for plan in steps] == [{"tcq2-3.25"}, {"tcq-4"}]
    assert all(len(plan.launches) == 2 * 4 for plan in steps)
    profile = LatencyProfile.read(out)
    assert SPREAD < profile.spread < SLOWER - 1
    (first,) = (speed.decode_seconds for speed, _ in bench_steps.measure([steps[0]], [8]))
    for also in ((), ("lm_head",)):
        known = even_sensitivities(groups_of(config_of(model), also).groups)
        for spec, slower in (("tcq2-3.25", 1.0), ("tcq-4", SLOWER)):
            plan = Plan(dict.fromkeys(known.values, spec), launches=steps[0].launches)
            (step,) = (speed.decode_seconds for speed, _ in bench_steps.measure([plan], [8]))
            choice = Planner(known, Space(palette_of(), profile, 8)).uniform(candidate_of(parse_spec(spec)), timed=True)
            assert choice.seconds == pytest.approx(step / slower + (SLOWER - 1) / 2 * first)
            assert step <= (1 + profile.spread) * choice.seconds * 1.000001
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "gpu.json"]


def test_a_profile_of_a_processor_plans_for_a_speed(tmp_path, model):
    """By the real stopwatch: a plan that may take as long as the profile says one of its specs takes is found."""
    out = tmp_path / "cpu.json"
    assert run(out, "--model", model, "--device", "cpu", "--batch", "1", "--spec", "nuq-3", "--spec", "nuq-4") == 0
    profile = LatencyProfile.read(out)
    assert profile.device == devices.device_name(torch.device("cpu"))
    assert profile.constant(1) > profile.head.seconds[1] > 0
    known = even_sensitivities(groups_of(config_of(model)).groups)
    palette = tuple(candidate_of(parse_spec(spec)) for spec in ("nuq-3", "nuq-4"))
    planner = Planner(known, Space(palette, profile))
    allowed = 1.01 * max(planner.uniform(candidate, timed=True).seconds for candidate in palette)
    planned = planner.plan(Limits(seconds=planner.margin * allowed))
    assert profile.constant(1) < planned.choice.seconds <= allowed


def test_a_device_that_has_no_stopwatch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "parse_device", torch.device)  # as if torch could compute there
    assert run(tmp_path / "x.json", *COMMAND, "--device", "meta") != 0
    assert "cuda or cpu, and meta is neither" in capsys.readouterr().err


def test_a_constant_that_is_given_is_not_measured_and_a_quantized_head_is(tmp_path, steps, stopwatch, model):
    out = tmp_path / "gpu.json"
    assert run(out, "--model", model, *OF_MODEL, "--constant", "700,900") == 0
    assert not steps
    profile = LatencyProfile.read(out)
    assert (profile.constant(1), profile.head, profile.spread) == (0.7, None, SPREAD)
    assert profile.seconds([HEAD], 1)[""].keys() == {"tcq2-3.25", "tcq-4", "nuq-2"}, "the head can be planned"
    assert run(out, "--model", model, *OF_MODEL, "--head", "nuq-2") == 0
    profile = LatencyProfile.read(out)
    assert {plan.specs["lm_head"] for plan in steps} == {"nuq-2"}
    assert profile.head.seconds == {batch: HEAD[0] * HEAD[1] * batch / 1e6 for batch in (1, 8)}


def test_an_interrupted_profile_of_a_model_keeps_its_steps(tmp_path, steps, stopwatch, model, monkeypatch):
    out = tmp_path / "gpu.json"
    with monkeypatch.context() as patched:
        patched.setattr(probe, "plain_seconds", interrupted)
        assert run(out, "--model", model, *OF_MODEL) != 0
    launches = len(stopwatch.measured)
    assert run(out, "--model", model, *OF_MODEL) == 0
    assert len(stopwatch.measured) - launches < SAVED_EVERY
    assert len(steps) == 2


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_steps_that_are_shorter_than_their_launches_are_refused(tmp_path, steps, model, monkeypatch, capsys):
    monkeypatch.setitem(CONSTANT, 8, -5.0)
    assert run(tmp_path / "gpu.json", "--model", model, *OF_MODEL) != 0
    assert "batch 8 took no longer than its launches and head" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", shipped_profiles())
def test_profiles_of_the_package_can_be_read_by_name(name):
    profile = LatencyProfile.read(name)
    assert profile == LatencyProfile.read(SHIPPED / f"{name}.json")
    assert all(profile.constant(batch) > 0 for batch in profile.batches)


def test_a_profile_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(InputError, match=r"h100-llama-3\.1-8b"):
        LatencyProfile.read("absent.json")
