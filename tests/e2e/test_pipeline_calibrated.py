"""Text in, Hessians, and a model whose rounding they guide: measured against direct computations on a tiny Llama."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline_quantize import files_of
from tiny_model import VOCABULARY, _save_tokenizer, build
from torch import nn

import qpalette
from qpalette.calibration import collect_hessians
from qpalette.calibration.hessians import Calibration, HessianStore, rotate_hessian
from qpalette.calibration.rounding import ROUNDING, Rounding
from qpalette.core.errors import CheckpointError, HessianError, InputError
from qpalette.core.records import LinearGroup, LinearShape
from qpalette.formats import open_artifact
from qpalette.models import find_groups
from qpalette.pipeline import QuantizeReport, quantize, quantize_checkpoint, work
from qpalette.pipeline.jobs import make_jobs
from qpalette.plan import Plan, uniform_plan
from qpalette.rotate import Rotation, diagonal_of, random_signs, rotate_weight, unrotate_weight
from qpalette.runtime import backends
from qpalette.storage import open_checkpoint

QKV, DOWN = "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"
SPEC = "nuq-2"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("calibrated") / "source"
    build("llama").save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text(source) -> Path:
    file = source.parent / "text.txt"
    tokens = torch.randint(1, VOCABULARY, (400,), generator=torch.Generator().manual_seed(1))
    file.write_text(" ".join(f"w{token}" for token in tokens.tolist()))
    return file


@pytest.fixture(scope="module")
def hessians(source, text) -> Path:
    directory = source.parent / "hessians"
    seen: list[tuple[int, int]] = []
    found = qpalette.calibrate(source, directory, text, tokens=320, progress=lambda *call: seen.append(call))
    assert (found.tokens, found.window, found.sides) == (320, 64, 2), "the context is 64"
    assert seen == [(done, 5) for done in range(1, 6)]
    return directory


def groups_of(source: Path) -> tuple[LinearGroup, ...]:
    return find_groups(open_checkpoint(source)).groups


def windows() -> list[torch.Tensor]:
    return list(torch.randint(0, VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(2)))


def calibration(**changes: object) -> Calibration:
    return Calibration(**({"source": "f00d", "text_sha256": "cafe", "tokens": 96, "window": 32} | changes))


def quantized(source: Path, output: Path, hessians: Path | None = None, **options) -> QuantizeReport:
    report = quantize(source, output, spec=SPEC, calibration=hessians, **options)
    assert isinstance(report, QuantizeReport)
    return report


def proxies(source: Path, output: Path, hessians: Path) -> dict[str, float]:
    """tr(H_O E H_I E^T) / tr(H_O W H_I W^T) from the stored tensors, in the basis of the checkpoint."""
    artifact, original, store = (
        open_artifact(output),
        load_file(source / "model.safetensors"),
        HessianStore.open(hessians),
    )
    found = {}
    for group in groups_of(source):
        for linear in group.linears:
            hessian = store.read(group, linear.name).double()
            packed = artifact.read_linear(linear.name)
            rotated = backends()["ref"].rotated_weight(packed)
            rotation = Rotation.parse(packed.rotation, packed.in_features)
            restored = unrotate_weight(rotated, rotation, diagonal_of(packed.diagonal, packed.in_features)).double()
            weight = original[f"{linear.name}.weight"].double()
            error = weight - restored
            (outputs,) = store.read_outputs(group, linear.name) or [torch.eye(linear.out_features)]
            outputs = outputs.double()
            lost, all_of_it = (float(((outputs @ a @ hessian) * a).sum()) for a in (error, weight))
            found[linear.name] = lost / all_of_it
    return found


# --- collection --------------------------------------------------------------------------------------------------


def test_hessians_are_the_second_moments_of_every_input(source, tmp_path):
    model, store = build("llama"), HessianStore(tmp_path, calibration())
    inputs: dict[str, list[torch.Tensor]] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        module.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].double()))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        for window in windows():
            model(window[None])
    for handle in handles:
        handle.remove()
    collect_hessians(model, windows(), groups_of(source), store)
    for group in groups_of(source):
        for linear in group.linears:
            x = torch.cat(inputs[linear.name]).reshape(-1, group.in_features)
            torch.testing.assert_close(store.read(group).double(), x.T @ x, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_small_budget_only_takes_more_passes(source, tmp_path):
    model, groups, seen = build("llama"), groups_of(source), []
    one, many = (HessianStore(tmp_path / name, calibration()) for name in ("one", "many"))
    collect_hessians(model, windows(), groups, one)
    budget = 8 * 2 * 64 * 64  # two of the small Hessians
    collect_hessians(model, windows(), groups, many, memory_budget_bytes=budget, progress=lambda *c: seen.append(c))
    assert seen[-1] == (18, 18), "q/k/v and o, gate/up, down: three passes for each layer"
    assert files_of(one.directory) == files_of(many.directory)


def test_a_pass_leaves_the_model_after_its_last_group(source, tmp_path):
    model, reached = build("llama"), []
    model.model.layers[1].register_forward_pre_hook(lambda *_: reached.append(1))
    collect_hessians(model, windows(), groups_of(source)[:4], HessianStore(tmp_path, calibration()))
    assert not reached


def test_an_interrupted_collection_goes_on(source, tmp_path):
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise Stop

    model, groups, store = build("llama"), groups_of(source), HessianStore(tmp_path, calibration())
    with pytest.raises(Stop):
        collect_hessians(model, windows(), groups, store, memory_budget_bytes=1, progress=stop)
    finished = {name: content for name, content in files_of(tmp_path).items() if name.endswith(".safetensors")}
    assert len(finished) == 2
    collect_hessians(model, windows(), groups, store)
    assert files_of(tmp_path).items() >= finished.items()
    assert store.missing(groups) == []
    with pytest.raises(HessianError, match="another text_sha256"):
        collect_hessians(model, windows(), groups, HessianStore(tmp_path, calibration(text_sha256="beef")))


def test_groups_that_cannot_be_measured_are_named(source, tmp_path):
    model, store, groups = build("llama"), HessianStore(tmp_path, calibration()), groups_of(source)
    model.spare = nn.Linear(64, 16)
    unreached = LinearGroup("spare", (LinearShape("spare", 16, 64),))
    with pytest.raises(HessianError, match="no token of the text reached spare"):
        collect_hessians(model, windows(), [unreached], store)
    with pytest.raises(CheckpointError, match="has no weight 'nowhere"):
        collect_hessians(model, windows(), [LinearGroup("n", (LinearShape("nowhere", 16, 64),))], store)
    with pytest.raises(InputError, match="no text"):
        collect_hessians(model, [], groups, store)
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(HessianError, match=f"{QKV} holds NaN"):
        collect_hessians(model, windows(), groups, store)
    assert files_of(tmp_path) == {}


# --- use ---------------------------------------------------------------------------------------------------------


def test_a_rotated_hessian_is_that_of_the_rotated_inputs():
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotation, signs = Rotation.parse("h12xh8", 96), random_signs(96, 0, "group")
    rotated = rotation.apply(x * signs)
    torch.testing.assert_close(rotate_hessian(x.T @ x, rotation, signs), rotated.T @ rotated)
    assert torch.allclose(rotate_weight(x, rotation, signs).double(), rotated, atol=1e-5), "the same basis as weights"


@pytest.fixture(scope="module")
def one_sided(source, text) -> Path:
    directory = source.parent / "one_sided"
    assert qpalette.calibrate(source, directory, text, tokens=320, one_sided=True).sides == 1
    return directory


@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize("sides", ["one_sided", "hessians"])
def test_what_errors_cost_falls(source, request, tmp_path, sides, equalize):
    directory = request.getfixturevalue(sides)
    free = quantized(source, tmp_path / "free")
    guided = quantized(source, tmp_path / "guided", directory, equalize=equalize)
    plain, found = (proxies(source, tmp_path / name, directory) for name in ("free", "guided"))
    assert sum(found.values()) < 0.9 * sum(plain.values())
    assert all(found[name] < 1.05 * plain[name] for name in plain)
    for linear in guided.linears:
        assert linear.proxy == pytest.approx(found[linear.name], rel=1e-3)
    assert guided.distortion > free.distortion, "of the weights"
    extra = sum(16 * x.record.in_features - 8 * -(-x.record.in_features // 8) for x in guided.linears)
    assert guided.bits.total - free.bits.total == (extra if equalize else 0), "16 bits per input in place of 1"


def test_both_sides_cost_less_than_one(source, hessians, one_sided, tmp_path):
    """By the measure that has both."""
    for name, directory in (("both", hessians), ("one", one_sided)):
        quantized(source, tmp_path / name, directory)
    both, one = (sum(proxies(source, tmp_path / name, hessians).values()) for name in ("both", "one"))
    assert both < 0.9 * one


def test_siblings_share_one_diagonal_of_the_whole_group(source, hessians, tmp_path):
    """Of all linears that read the input, whether they are quantized or not."""
    quantized(source, tmp_path / "all", hessians)
    quantized(source, tmp_path / "some", hessians, exclude=["*.k_proj"])
    whole, part = open_artifact(tmp_path / "all"), open_artifact(tmp_path / "some")
    for group in groups_of(source):
        stored = [whole.read_linear(linear.name).diagonal for linear in group.linears]
        assert all(torch.equal(stored[0], other) for other in stored)
        assert stored[0].dtype == torch.int16
    q = f"{QKV.removesuffix('qkv_proj')}q_proj"
    assert torch.equal(part.read_linear(q).diagonal, whole.read_linear(q).diagonal)


def test_the_documents_say_that_it_was_calibrated(source, hessians, text, tmp_path):
    quantized(source, tmp_path / "out", hessians)
    measured = HessianStore.open(hessians).calibration
    provenance = open_artifact(tmp_path / "out").format.provenance
    assert provenance["calibration_tokens"] == "320"
    assert provenance["calibration_text_sha256"] == measured.text_sha256
    report = json.loads((tmp_path / "out" / "qpalette_report.json").read_text())
    assert report["calibration"] == {"tokens": 320, "window": 64, "text_sha256": measured.text_sha256}
    assert all(0 < linear["proxy"] < 1 for linear in report["linears"].values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "calibrated (LDLQ) on 320 tokens" in card
    assert measured.text_sha256 in card


def test_linears_encoded_together_equal_those_encoded_alone(source, hessians, monkeypatch):
    """Those of one shape, spec and rotation, of all layers: as many as there is room for."""
    checkpoint, store, cpu = open_checkpoint(source), HessianStore.open(hessians), torch.device("cpu")
    specs = dict(uniform_plan(groups_of(source), SPEC).specs) | {"model.layers.0.self_attn.v_proj": "nuq-3"}
    jobs = make_jobs(checkpoint, Plan(specs), store)
    batches = work.batches_of(jobs, cpu)
    names = [{job.name.partition("layers.")[2] for job in batch} for batch in batches]
    assert {"0.self_attn.k_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"} in names
    assert {"0.self_attn.v_proj"} in names
    assert {f"{n}.mlp.{leaf}_proj" for n in (0, 1) for leaf in ("gate", "up")} in names
    shared = work.Work(checkpoint.location, checkpoint.fingerprint, store, ROUNDING, 1)
    monkeypatch.setattr(work, "BATCH_BYTES", 1)
    assert all(len(batch) == 1 for batch in work.batches_of(jobs, cpu))
    for batch in batches:
        sources = work.read_sources(checkpoint, batch)
        together = work.encode_batch(shared, batch, sources, cpu)
        for job, one_source, one in zip(batch, sources, together, strict=True):
            (other,) = work.encode_batch(shared, [job], [one_source], cpu)
            for field in ("codes", "scales", "diagonal", "weight_digest"):
                assert (
                    getattr(one, field) == getattr(other, field)
                    if field == "weight_digest"
                    else torch.equal(getattr(one, field), getattr(other, field))
                )


def test_resume_never_mixes_two_calibrations(source, hessians, text, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*call: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantized(source, tmp_path / "out", hessians, progress=stop)
    names = {file.name for file in (tmp_path / "out.partial" / "linears").glob("*.safetensors")}
    qpalette.calibrate(source, tmp_path / "other", text, tokens=128)
    checkpoint, plan = open_checkpoint(source), uniform_plan(groups_of(source), SPEC)
    stores = [None, HessianStore.open(hessians), HessianStore.open(tmp_path / "other")]
    digests = [{job.digest for job in make_jobs(checkpoint, plan, store)} for store in stores]
    others = (Rounding(damping=0.02), Rounding(output_damping=0.02), Rounding(equalize=False))
    digests += [{job.digest for job in make_jobs(checkpoint, plan, stores[1], other)} for other in others]
    with monkeypatch.context() as another:
        another.setattr("qpalette.pipeline.jobs.DAMPING_RULE", "of the mean diagonal")
        digests.append({job.digest for job in make_jobs(checkpoint, plan, stores[1])})
    assert len(set.union(*digests)) == 7 * 14
    assert {name.partition(".")[0] for name in names} < {digest[:40] for digest in digests[1]}
    quantized(source, tmp_path / "out", hessians)
    quantized(source, tmp_path / "whole" / "out", hessians)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole" / "out")


def test_what_is_wrong_with_hessians_is_told_before_the_work(source, hessians, tmp_path):
    checkpoint, plan = open_checkpoint(source), uniform_plan(groups_of(source), SPEC)
    other = HessianStore(hessians, calibration())
    with pytest.raises(HessianError, match="of another model"):
        quantize_checkpoint(checkpoint, tmp_path / "out", plan, hessians=other)
    with pytest.raises(HessianError, match="holds no Hessians; collect them with `qpalette calibrate"):
        quantized(source, tmp_path / "out", tmp_path / "none")
    some = HessianStore(tmp_path / "some", replace(HessianStore.open(hessians).calibration, sides=1))
    some.save(groups_of(source)[0], torch.eye(64), 1)
    with pytest.raises(HessianError, match=r"has no Hessian of model\.layers\.0\.self_attn\.o_proj"):
        quantized(source, tmp_path / "out", tmp_path / "some")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(InputError, match="'abacus' is not a device"):
        quantized(source, tmp_path / "out", device="abacus")


def test_files_that_are_damaged_are_named(source, tmp_path):
    group, store = groups_of(source)[0], HessianStore(tmp_path, calibration())
    with pytest.raises(HessianError, match=r"float32 \[32, 32\], not float32 \[64, 64\]"):
        store.save(group, torch.eye(32), 1)
    store.save(group, torch.eye(64), 1)
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    for damaged in (intact[:-4], intact[:-1] + b"\x01", b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(HessianError, match=file.name):
            store.read(group)
    file.write_bytes(intact)
    assert torch.equal(store.read(group), torch.eye(64))


def test_data_free_asks_for_no_hessian(source, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "encode_linears", None)
    report = quantized(source, tmp_path / "out")
    assert all(linear.proxy is None for linear in report.linears)
    stored = json.loads((tmp_path / "out" / "qpalette_report.json").read_text())
    assert "calibration" not in stored
    assert "LDLQ" not in (tmp_path / "out" / "README.md").read_text()
