"""From sensitivities and a budget to a directory: every byte counted beforehand, the plan kept and shown."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_model
import torch

import qpalette
from qpalette.api import measure_sensitivities
from qpalette.calibration.feedback import factorize
from qpalette.calibration.gains import feedback_gain, feedback_gains, with_feedback
from qpalette.calibration.hessians import HessianStore
from qpalette.cli import main
from qpalette.core.errors import BudgetError, InputError, SpecError
from qpalette.models import find_groups
from qpalette.pipeline import quantize_checkpoint
from qpalette.pipeline.footprint import disk_bytes
from qpalette.pipeline.planning import even_sensitivities, make_plan
from qpalette.plan import ALLOWED, Budget, Plan, Sensitivities, Space, palette_of, parse_size
from qpalette.storage import open_checkpoint

QUICK = ("nuq", "vq")  # families whose encoder has nothing to search
MOST_DIGITS = 24  # of a figure in JSON; the shortest has 3


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=exit_.value.code or 0, out=captured.out, err=captured.err)

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.build("llama").save_pretrained(directory)
    tiny_model._save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    words = torch.randint(1, tiny_model.VOCABULARY, (640,), generator=torch.Generator().manual_seed(2))
    file.write_text(" ".join(f"w{word}" for word in words.tolist()))
    return file


@pytest.fixture(scope="module")
def sensitivity(model, text) -> Path:
    file = text.with_name("sensitivity.json")
    measure_sensitivities(model, file, text, tokens=512, window=64)
    return file


@pytest.fixture(scope="module")
def hessians(model, text) -> Path:
    directory = text.with_name("hessians")
    qpalette.calibrate(model, directory, text, tokens=640, window=64)
    return directory


def test_every_linear_and_the_embedding_are_measured(model, sensitivity):
    found = Sensitivities.read(sensitivity)
    names = [linear.name for group in find_groups(open_checkpoint(model)).groups for linear in group.linears]
    assert [linear.name for linear in found.of_listed.linears] == names
    assert [linear.name for linear in found.linears if not linear.listed] == ["model.embed_tokens"]
    assert all(value > 0 for value in found.values.values())
    assert found.provenance["source"] == open_checkpoint(model).fingerprint
    assert (found.provenance["method"], found.provenance["tokens"], found.provenance["text"]) == (
        "fisher",
        "512",
        "words.txt",
    )
    assert not sensitivity.with_name(sensitivity.name + ".partial").exists()


@pytest.mark.parametrize("calibrated", [False, True])
def test_disk_bytes_are_known_beforehand(model, sensitivity, hessians, tmp_path, calibrated):
    checkpoint, store = open_checkpoint(model), HessianStore.open(hessians) if calibrated else None
    space = Space(palette_of(families=QUICK))
    found = make_plan(Sensitivities.read(sensitivity), Budget(Fraction(4)), space, checkpoint, hessians=store)
    quantize_checkpoint(checkpoint, tmp_path / "out", found.plan, hessians=store)
    actual, promised = size_of(tmp_path / "out"), disk_bytes(checkpoint, found.plan, store)
    figures = len(found.plan.specs) * (2 if calibrated else 1) + 1
    names = 3 * (2 * 255 - len("out"))  # the model card repeats the directory's name, and may escape it
    assert actual <= promised <= actual + figures * MOST_DIGITS + names
    assert found.disk_bytes == promised


def test_a_size_is_never_exceeded(model, sensitivity, tmp_path):
    tensors = open_checkpoint(model).total_bytes
    for share in (0.45, 0.5):
        limit = int(share * tensors) + 24_000  # documents weigh more than this model
        found = make_plan(
            Sensitivities.read(sensitivity),
            Budget(size=limit),
            Space(palette_of(families=QUICK)),
            open_checkpoint(model),
        )
        out = tmp_path / str(share)
        qpalette.quantize(model, out, plan=found.plan)
        assert size_of(out) <= limit
        assert found.disk_bytes <= limit


def test_the_least_size_is_told_and_works(model, sensitivity):
    known, space, checkpoint = Sensitivities.read(sensitivity), Space(palette_of()), open_checkpoint(model)
    with pytest.raises(BudgetError, match="the least is") as error:
        make_plan(known, Budget(size=1000), space, checkpoint)
    least = str(error.value).split("a size of ")[1].split(" (")[0]
    make_plan(known, Budget(size=parse_size(least)), space, checkpoint)
    with pytest.raises(InputError, match="give the model"):
        make_plan(known, Budget(size=10**9), space)


def test_memory_counts_weights_cache_and_activations(model, sensitivity):
    known, space, checkpoint = Sensitivities.read(sensitivity), Space(palette_of()), open_checkpoint(model)
    limit = 3_000_000
    short = make_plan(known, Budget(memory=limit), space, checkpoint, context=16)
    assert short.memory_bytes <= limit
    # a cache entry: 2 layers x (key, value) x 2 heads of 16, 2 bytes each
    longer = make_plan(known, Budget(memory=limit), space, checkpoint, context=17)
    assert longer.overhead.memory - short.overhead.memory >= 2 * 2 * 2 * 16 * 2
    with pytest.raises(BudgetError, match="a memory of"):
        make_plan(known, Budget(memory=limit), space, checkpoint, context=100_000)


def test_the_embedding_can_be_planned_too(model, sensitivity):
    known, checkpoint = Sensitivities.read(sensitivity), open_checkpoint(model)
    budget, space = Budget(Fraction(4)), Space(palette_of())
    assert "model.embed_tokens" not in make_plan(known, budget, space, checkpoint).plan.specs
    assert "model.embed_tokens" in make_plan(known, budget, space, checkpoint, also=["embed_tokens"]).plan.specs


def test_without_sensitivities_a_size_is_spent_evenly(model, tmp_path):
    tensors = open_checkpoint(model).total_bytes
    report = qpalette.quantize(model, tmp_path / "out", size=int(0.5 * tensors) + 30_000, effort="fast")
    rates = [linear.bits.rate for linear in report.linears]
    assert max(rates) - min(rates) < 1
    assert size_of(tmp_path / "out") <= int(0.5 * tensors) + 30_000
    groups = find_groups(open_checkpoint(model)).groups
    assert {x.sensitivity / x.shape.weights for x in even_sensitivities(groups).linears} == {1.0}


def test_feedback_gain_is_what_feedback_takes_off_white_errors():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    feedback = factorize((inputs.T @ inputs).double())
    hessian = feedback.hessian.double()
    unit = torch.eye(48, dtype=torch.float64) + feedback.upper
    rounding = torch.randn(4000, 48, generator=generator).double()
    # an error R made good by the columns that follow is E with E (I + U) = R
    errors = torch.linalg.solve_triangular(unit, rounding, upper=True, left=False)
    with_it = ((errors @ hessian) * errors).sum(1)
    without = float(hessian.diagonal().sum())  # its expectation
    standard_error = float(with_it.std() / len(with_it) ** 0.5) / without
    assert abs(float(with_it.mean()) / without - feedback_gain(feedback)) < 5 * standard_error
    assert feedback_gain(feedback) < 1
    assert feedback_gain(factorize(torch.eye(48))) == pytest.approx(1)


def test_a_calibrated_plan_weighs_groups_by_their_gain(model, sensitivity, hessians):
    checkpoint, known = open_checkpoint(model), Sensitivities.read(sensitivity).of_listed
    groups = find_groups(checkpoint).groups
    gains = feedback_gains(HessianStore.open(hessians), groups)
    assert set(gains) == {group.name for group in groups}
    assert all(0 < gain < 1 for gain in gains.values())
    weighed = with_feedback(known, gains)
    for before, after in zip(known.linears, weighed.linears, strict=True):
        assert after.sensitivity == pytest.approx(before.sensitivity * gains[before.group])
    found = make_plan(known, Budget(Fraction(3)), Space(palette_of()), checkpoint, hessians=HessianStore.open(hessians))
    assert found.plan.sensitivities == weighed.values


def test_calibrate_plan_quantize_eval(run, model, text, tmp_path, monkeypatch):
    """Sensitivities are measured by the first plan, and kept; the second does not load the model."""
    directory, plan, out = tmp_path / "moments", tmp_path / "plan.json", tmp_path / "out"
    assert run("calibrate", model, directory, "--text", text, "--tokens", 512, "--window", 64, "--json").code == 0
    options = ("--calibration", directory, "--family", "nuq", "--out", plan)
    assert run("plan", model, *options, "--bits", "3.5").code == 0
    with monkeypatch.context() as patched:
        patched.setattr("qpalette.api.load_model", None)
        assert run("plan", model, *options, "--bits", "4").code == 0
        file = tmp_path / "sensitivity.json"
        assert run("sensitivity", model, file, "--calibration", directory).code == 0
    known, content = Sensitivities.read(file), json.loads(plan.read_text())
    assert len(known.curve) >= 3
    assert content["provenance"]["sensitivities"]["method"] == "shaped"
    made = json.loads(run("quantize", model, out, "--plan", plan, "--calibration", directory, "--json").out)
    assert Fraction(made["bits"], made["weights"]) <= 4
    assert content["prediction"]["average_bits"] == pytest.approx(float(Fraction(made["bits"], made["weights"])))
    found = json.loads(run("eval", out, "--reference", model, "--text", text, "--windows", 1, "--json").out)
    assert found["predicted_kl"] == pytest.approx(content["prediction"]["predicted_loss"])
    assert 0.2 < found["kl"] / found["predicted_kl"] < 5
    refused = run("plan", model, *options, "--bits", "3", "--sensitivity", file)
    assert refused.code == 2
    assert "--calibration needs a MODEL" in refused.err


def test_plan_quantize_inspect_eval(run, model, sensitivity, text, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    options = ["--sensitivity", sensitivity, "--bits", "3.5", "--family", "nuq", "--family", "vq", "--out", plan]
    made = run("plan", model, *options, "--json")
    assert made.code == 0
    content = json.loads(made.out)
    assert content.keys() >= {
        *("predicted_loss", "loss_over_bound", "loss_over_uniform", "average_bits"),
        *("bytes", "optimality_gap", "assignments"),
    }
    assert content["average_bits"] <= 3.5
    assert content["loss_over_bound"] > 1 >= content["loss_over_uniform"]
    assert Plan.read(plan).specs == content["assignments"]
    assert run("quantize", model, out, "--plan", plan).code == 0
    assert size_of(out) <= content["bytes"]
    shown = json.loads(run("inspect", out, "--json").out)
    assert shown["plan"]["predicted_loss"] == pytest.approx(content["predicted_loss"])
    assert "planned for" in run("inspect", out).out
    measured = run("eval", out, "--reference", model, "--text", text, "--json")
    assert json.loads(measured.out)["predicted_kl"] == pytest.approx(content["predicted_loss"])
    assert "by the plan" in run("eval", out, "--reference", model, "--text", text).out
    again = run("plan", model, *options)
    assert again.code == 0
    assert "proven optimal" in again.out
    assert "quantize" in again.err


def test_a_hand_edited_plan_is_used_and_a_wrong_one_refused(run, model, tmp_path):
    names = [linear.name for group in find_groups(open_checkpoint(model)).groups for linear in group.linears]
    plan = tmp_path / "plan.json"
    plan.write_text(Plan(dict.fromkeys(names, "nuq-3")).to_json().replace('"nuq-3"', '"nuq-4"', 1))
    report = qpalette.quantize(model, tmp_path / "out", plan=plan)
    assert [linear.record.spec for linear in report.linears] == ["nuq-4"] + ["nuq-3"] * (len(names) - 1)
    plan.write_text(plan.read_text().replace("nuq-4", "nuq-9"))
    refused = run("quantize", model, tmp_path / "other", "--plan", plan)
    assert refused.code == 1
    assert str(plan) in refused.err.replace("\n", "")
    with pytest.raises(SpecError, match="give one of"):
        qpalette.quantize(model, tmp_path / "x", plan=plan, bits=3)


def test_a_plan_needs_no_model(run, tmp_path):
    table = tmp_path / "s.csv"
    rows = [
        f"{layer},{name},64,64,{0.1 * layer + 0.1}" for layer in range(3) for name in ("mlp.up_proj", "mlp.gate_proj")
    ]
    table.write_text("layer,linear,out_features,in_features,sensitivity\n" + "\n".join(rows) + "\n")
    made = run("plan", "--sensitivity", table, "--bits", "4", "--json")
    assert len(json.loads(made.out)["assignments"]) == 6
    least = run("plan", "--sensitivity", table, "--bits", "0.5")
    assert least.code == 1
    assert "the least is" in least.err
    assert run("plan", "--bits", "4").code == 2
    assert "a budget" in run("plan", "--sensitivity", table).err


def test_pictures_and_page(run, sensitivity, tmp_path):
    pytest.importorskip("matplotlib")
    picture, page = tmp_path / "plan.png", tmp_path / "plan.html"
    made = run("plan", "--sensitivity", sensitivity, "--bits", "3", "--plot", picture, "--report", page)
    assert made.code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "qpalette quantize" in page.read_text(encoding="utf-8")  # tests/e2e/test_plan_report.py has the rest
    wrong = run("plan", "--sensitivity", sensitivity, "--bits", "3", "--plot", tmp_path / "plan.txt")
    assert wrong.code == 1
    assert ".png" in wrong.err


def test_sensitivity_command(run, model, text, tmp_path):
    out = tmp_path / "s.json"
    options = ["--text", text, "--tokens", "64", "--window", "32", "--method", "perturbation"]
    shown = run("sensitivity", model, out, *options, "--json")
    assert json.loads(shown.out)["sensitivities"] == Sensitivities.read(out).values
    assert run("sensitivity", model, out, "--method", "guess").code == 1
    assert run("sensitivity", model, tmp_path / "no" / "s.json", "--text", text).code == 1


def test_what_a_budget_takes_depends_on_the_target(run, model, sensitivity, monkeypatch):
    """Alike for all, by size and by plan: a GPU gets the faster of two codes of nearly equal distortion, a processor
    the better."""
    monkeypatch.setattr("qpalette.pipeline.api.forecast_seconds", lambda *_: None)  # which compiles every encoder
    checkpoint = open_checkpoint(model)
    even = even_sensitivities(find_groups(checkpoint).groups)
    size = make_plan(even, Budget(Fraction(4)), Space(palette_of()), checkpoint).disk_bytes
    for budget in ({"bits": "4"}, {"size": size}, {"bits": "4", "sensitivity": sensitivity}):
        families = {
            target: {
                spec.partition("-")[0]
                for spec in qpalette.quantize(model, "unused", **budget, target=target, dry_run=True).specs
            }
            for target in ("cpu", "cuda")
        }
        assert families["cpu"] == {"tcq"}
        assert "tcq2" in families["cuda"]
    rounded = ("quantize", model, "unused", "--bits", "4", "--fast", "--dry-run")
    shown = run(*rounded, "--target", "cuda", "--prefer", "quality", "--json")
    assert {spec.partition("-")[0] for spec in json.loads(shown.out)["specs"]} == {"tcq"}
    options = ("--sensitivity", sensitivity, "--bits", "3", "--json", "--target")
    planned = {target: json.loads(run("plan", model, *options, target).out) for target in ("cpu", "cuda")}
    assert any(spec.startswith("tcq2-") for spec in planned["cuda"]["assignments"].values())
    best = json.loads(run("plan", model, *options, "cpu", "--prefer", "quality").out)["predicted_loss"]
    assert all(best <= plan["predicted_loss"] <= ALLOWED["balanced"] * best for plan in planned.values())
    assert "no target" in run(*rounded, "--target", "tpu").err
    assert "no preference" in run("plan", model, *options, "cpu", "--prefer", "fast").err


def test_the_tokenizer_is_written_once_to_be_counted(model, monkeypatch):
    """However many plans are made for a checkpoint."""
    checkpoint, saved = open_checkpoint(model), []
    save = type(checkpoint).save_side_files
    monkeypatch.setattr(type(checkpoint), "save_side_files", lambda self, at: (saved.append(at), save(self, at)))
    names = [linear.name for group in find_groups(checkpoint).groups for linear in group.linears]
    plans = [Plan(dict.fromkeys(names, spec)) for spec in ("nuq-2", "nuq-3")]
    assert len({disk_bytes(checkpoint, plan) for plan in plans}) == 2
    assert len(saved) == 1
