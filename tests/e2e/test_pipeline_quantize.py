"""A checkpoint in, a quantized directory out: what is stored is what was measured, counted and promised."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpalette.core.errors import ArtifactError, CheckpointError, InputError, SpecError, UnsupportedError
from qpalette.formats import counted_bits, open_artifact
from qpalette.models import find_groups
from qpalette.pipeline import encode, estimate, quantize, quantize_checkpoint
from qpalette.plan import Plan, summarize, uniform_plan
from qpalette.rotate import Rotation, unpack_signs, unrotate_weight
from qpalette.runtime import backends
from qpalette.storage import open_checkpoint

HIDDEN, INTERMEDIATE, VOCABULARY = 64, 96, 128
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def write_llama(directory: Path, **replaced: torch.Tensor) -> Path:
    """A random tied Llama of two layers; `replaced` maps tensor names with "__" for "." to other values."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shapes[f"{prefix}.self_attn.q_proj.bias"] = (HIDDEN,)
    tensors = {name: (0.05 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
    tensors |= {name.replace("__", "."): value for name, value in replaced.items()}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    vocabulary = len(tensors["model.embed_tokens.weight"])
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": vocabulary, "num_hidden_layers": 2}
    config = {"model_type": "llama", **sizes, "num_attention_heads": 4, "tie_word_embeddings": True, "license": "mit"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def plan_of(source: Path, spec: str = "nuq-3") -> Plan:
    return uniform_plan(find_groups(open_checkpoint(source)).groups, spec)


def run(source: Path, output: Path, spec: str = "nuq-3", **options):
    return quantize_checkpoint(open_checkpoint(source), output, plan_of(source, spec), **options)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    """(directory, report, progress calls) of one run with the trellis."""
    calls: list[tuple] = []
    output = tmp_path_factory.mktemp("quantized") / "tiny"
    report = run(source, output, "tcq-2-L12", progress=lambda *call: calls.append(call), base_model="org/tiny")
    return output, report, calls


def test_stored_weights_have_the_measured_distortion(source, quantized):
    output, report, _ = quantized
    artifact, original = open_artifact(output), load_file(source / "model.safetensors")
    for linear in report.linears:
        packed = artifact.read_linear(linear.name)
        weight = original[f"{linear.name}.weight"].float()
        rotation = Rotation.parse(packed.rotation, packed.in_features)
        rotated = backends()["ref"].rotated_weight(packed)
        restored = unrotate_weight(rotated, rotation, unpack_signs(packed.diagonal, packed.in_features))
        distortion = float((restored - weight).square().sum() / weight.square().sum())
        assert distortion == pytest.approx(linear.distortion, rel=1e-4)
        assert 0.0625 < distortion < 0.0625 * 1.25


def test_everything_else_is_carried_over(source, quantized):
    output, report, _ = quantized
    original, stored = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    quantized_weights = {f"{linear.name}.weight" for linear in report.linears}
    assert len(quantized_weights) == 14
    for name, tensor in original.items():
        assert (name in stored) == (name not in quantized_weights)
        if name in stored:
            assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not output.with_name("tiny.partial").exists()


def test_config_report_and_card(source, quantized):
    output, report, _ = quantized
    config = json.loads((output / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["provenance"]["effort"] == "fast"
    assert quantization["provenance"]["source"] == open_checkpoint(source).fingerprint
    assert quantization["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"]
    stored = json.loads((output / "qpalette_report.json").read_text())
    assert stored["totals"]["bits"] == report.bits.total
    assert stored["linears"][Q]["distortion"] == report.linears[0].distortion
    card = (output / "README.md").read_text()
    assert "WARNING: `import qpalette` first" in card
    assert 'base_model: "org/tiny"' in card
    assert 'license: "mit"' in card


def test_signs_are_shared_in_a_group_only(quantized):
    artifact = open_artifact(quantized[0])

    def signs(name: str) -> torch.Tensor:
        return artifact.read(f"model.layers.{name}_proj.qp_signs")

    assert torch.equal(signs("0.self_attn.q"), signs("0.self_attn.v"))
    assert not torch.equal(signs("0.self_attn.q"), signs("0.self_attn.o"))
    assert not torch.equal(signs("0.self_attn.q"), signs("1.self_attn.q"))


def test_progress_counts_weights(quantized):
    _, report, calls = quantized
    assert [call[2] for call in calls] == [linear.name for linear in report.linears]
    assert calls[-1][0] == calls[-1][1] == report.bits.weights
    assert [call[3] for call in calls] == [linear.distortion for linear in report.linears]


def test_estimate_is_exact_and_reads_no_weight(source, quantized, monkeypatch):
    output, report, _ = quantized
    checkpoint, plan = open_checkpoint(source), plan_of(source, "tcq-2-L12")
    monkeypatch.setattr(type(checkpoint), "read", None)
    found = estimate(checkpoint, plan)
    assert found.bits == report.bits == summarize(plan, find_groups(checkpoint).groups).bits
    assert found.rate == report.rate
    assert found.tensor_bytes == report.tensor_bytes == open_artifact(output).inspect().tensor_bytes
    assert found.specs == {"tcq-2-L12": found.weights}
    assert found.peak_memory_bytes > 0


def test_shards_hold_the_same_tensors(source, tmp_path):
    run(source, tmp_path / "one")
    run(source, tmp_path / "many", max_shard_bytes=10_000)
    one, many = open_artifact(tmp_path / "one"), open_artifact(tmp_path / "many")
    assert len(many.inspect().files) > 2
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.stored)
    assert one.stored.keys() == many.stored.keys()


def test_chunks_change_nothing(source, tmp_path, monkeypatch):
    run(source, tmp_path / "a" / "out")
    monkeypatch.setattr(encode, "CHUNK_WEIGHTS", 16 * HIDDEN)
    run(source, tmp_path / "b" / "out")
    names = ["model.safetensors", "config.json"]
    assert [files_of(tmp_path / "a/out")[name] for name in names] == [files_of(tmp_path / "b/out")[n] for n in names]


def test_plan_of_some_linears(source, tmp_path):
    plan = Plan({Q: "nuq-2", UP: "nuq-4"}, rotation="block-16", seed=9)
    report = quantize_checkpoint(open_checkpoint(source), tmp_path / "out", plan)
    artifact = open_artifact(tmp_path / "out")
    assert {name: record.spec for name, record in artifact.records.items()} == plan.specs
    assert artifact.records[Q].rotation == "h16"
    assert artifact.records[Q].seed == 9
    assert "model.layers.1.self_attn.q_proj" in artifact.format.modules_to_not_convert
    assert report.bits.total == sum(counted_bits(record).total for record in artifact.records.values())


def test_rows_of_zeros_and_rows_too_small_for_float16(tmp_path):
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))
    weight[3], weight[5] = 0, 1e-30
    source = write_llama(tmp_path / "source", **{f"{Q}.weight".replace(".", "__"): weight})
    run(source, tmp_path / "out")
    scales = open_artifact(tmp_path / "out").read_linear(Q).scales
    assert (scales[3], scales[5]) == (0, 0)
    assert (scales == 0).sum() == 2


def test_rows_too_small_for_their_scales_are_told_and_can_be_left_out(tmp_path, caplog):
    """Again when a run goes on, and not when the linear stays as it is."""
    weight = 1e-7 * torch.randn(INTERMEDIATE, HIDDEN, generator=torch.Generator().manual_seed(1))
    weight[:3] *= 1e6
    source = write_llama(tmp_path / "source", **{f"{UP}.weight".replace(".", "__"): weight})
    for _ in range(2):
        caplog.clear()
        with pytest.raises(KeyError):
            run(source, tmp_path / "out", progress=lambda done, total, *_: {}["stop"] if done == total else None)
        (told,) = [record.getMessage() for record in caplog.records if UP in record.getMessage()]
        assert (
            f"{UP}: {INTERMEDIATE - 3} of {INTERMEDIATE} rows are too small for float16 scales (below 6.1e-05)" in told
        )
        assert f"leave it out with --exclude '{UP}'" in told
    caplog.clear()
    quantize(source, tmp_path / "other", spec="nuq-3", exclude=[UP])
    assert "too small" not in caplog.text
    assert UP not in open_artifact(tmp_path / "other").records
    assert torch.equal(load_file(tmp_path / "other" / "model.safetensors")[f"{UP}.weight"], weight)


def test_an_expert_is_left_out_with_all_of_its_layer():
    """They are one module, and a plan names all of them or none."""
    assert encode.pattern_of("model.layers.0.mlp.experts.3.up_proj") == "model.layers.0.mlp.experts.*"
    assert encode.pattern_of(UP) == UP


def test_what_is_quantized_can_be_chosen_however_it_is_asked(source, tmp_path):
    whole = Plan(plan_of(source).specs, launches=((Q,), (UP,)), sensitivities=dict.fromkeys(plan_of(source).specs, 1.0))
    ways = {"spec": "nuq-3", "bits": 3.5, "size": "158000", "plan": whole}
    for way, value in ways.items():
        quantize(source, tmp_path / way, **{way: value}, include=["*.0.self_attn.*"], exclude=["*.[kv]_proj"])
        stored = open_artifact(tmp_path / way)
        assert set(stored.records) == {Q, Q.replace("q_proj", "o_proj")}
        assert "model.layers.0.self_attn.k_proj" in stored.format.modules_to_not_convert
    stored = Plan.read(tmp_path / "plan" / "qpalette_plan.json")
    assert (stored.launches, set(stored.sensitivities)) == (((Q,),), set(stored.specs))
    also = quantize(source, tmp_path / "also", spec="nuq-3", also=["*"], exclude=["*.mlp.*", "model.embed_tokens"])
    assert {linear.name.split(".")[3] for linear in also.linears} == {"self_attn"}
    with pytest.raises(CheckpointError, match=r"'\*\.upp_proj' leaves nothing out"):
        quantize(source, tmp_path / "none", spec="nuq-3", exclude=["*.upp_proj"])
    with pytest.raises(SpecError, match="no linear"):
        quantize(source, tmp_path / "none", spec="nuq-3", include=["nothing"])


def test_a_matrix_of_zeros(tmp_path):
    source = write_llama(tmp_path / "source", **{f"{Q}.weight".replace(".", "__"): torch.zeros(HIDDEN, HIDDEN)})
    report = run(source, tmp_path / "out")
    assert report.linears[0].distortion == 0
    assert not open_artifact(tmp_path / "out").read_linear(Q).scales.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 3e38])
def test_weights_that_cannot_be_stored_are_named(tmp_path, value):
    weight = torch.ones(INTERMEDIATE, HIDDEN)
    weight[7, 7] = value
    source = write_llama(tmp_path / "source", **{f"{UP}.weight".replace(".", "__"): weight})
    with pytest.raises(CheckpointError, match=f"{UP}.weight") as error:
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if "beyond float16" in str(error.value):
        assert f"leave it out with --exclude '{UP}'" in str(error.value)
        quantize(source, tmp_path / "out", spec="nuq-3", exclude=[UP])


def test_output_that_exists(source, tmp_path):
    run(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(ArtifactError, match="exists already"):
        run(source, tmp_path / "out", "nuq-2")
    assert files_of(tmp_path / "out") == before
    run(source, tmp_path / "out", "nuq-2", overwrite=True)
    assert open_artifact(tmp_path / "out").records[Q].spec == "nuq-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_only_a_quantized_model_is_overwritten(source, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match="no quantized model"):
        run(source, tmp_path / "precious", overwrite=True)
    with pytest.raises(ArtifactError, match="no quantized model"):
        run(source, source, overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")


def test_a_full_disk_is_seen_before_the_work(source, tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(InputError, match=r"needs 0\.07 GB of free disk, 0\.00 GB are available"):
        run(source, tmp_path / "out")


def test_plans_and_devices_that_do_not_fit(source, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(source)
    with pytest.raises(SpecError, match="names 'nope'"):
        quantize_checkpoint(checkpoint, tmp_path / "out", Plan({"nope": "nuq-2"}))
    with pytest.raises(SpecError, match="block of 128 does not divide"):
        quantize_checkpoint(checkpoint, tmp_path / "out", Plan({Q: "nuq-2"}, rotation="block-128"))
    monkeypatch.setenv("QPALETTE_BACKEND", "nowhere")
    with pytest.raises(UnsupportedError, match="no backend"):
        run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
