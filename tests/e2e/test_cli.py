"""The command line as a user meets it: on a tiny random model, with every wrong input answered in one line."""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qpalette
from qpalette.cli import main
from qpalette.cli import quantize as commands
from qpalette.core.environment import PREFILL
from qpalette.pipeline import quantize as quantize_a_model

VOCABULARY = 128
COMMANDS = (
    *("doctor", "inspect", "palette", "calibrate", "sensitivity", "plan", "quantize", "tune", "eval", "export"),
    *("bench", "generate", "chat", "serve", "profile", "compile", "compare", "push"),
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch):
    for variable in ("QPALETTE_DEBUG", "QPALETTE_BACKEND", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")


@pytest.fixture
def run(capsys):
    """Runs the command line in this process: code, stdout and stderr."""

    def call(*arguments: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=exit_.value.code or 0, out=captured.out, err=captured.err)

    return call


def save_model(directory, template: str | None = CHAT_TEMPLATE, hidden_size: int = 64, tied: bool = False) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).half().save_pretrained(directory)
    letters = {"<s>": 0, "<unk>": 1} | {chr(code): code for code in range(33, 127)} | {"\u0120": 127}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>", chat_template=template
    )
    fast.save_pretrained(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory)
    return directory


@pytest.fixture(scope="module")
def packed(model):
    out = model.parent / "packed"
    with pytest.raises(SystemExit) as exit_:
        main(["quantize", str(model), str(out), "--spec", "nuq-4"])
    assert not exit_.value.code
    return out


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 30)
    return file


# --- help and errors ---------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom qpalette.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numba', 'matplotlib')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(run, command):
    result = run(command, "--help")
    assert result.code == 0
    assert f"Example: qpalette {command}" in result.out


def test_version(run):
    assert run("--version").out.startswith("qpalette ")


def test_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, "-c", "from qpalette.cli import main; main()", "inspect", str(tmp_path / "none")]
    environment = os.environ | {"QPALETTE_DEBUG": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "CheckpointError" in result.stderr


def test_interrupted_says_that_a_rerun_resumes(run, model, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("qpalette.pipeline.quantize", interrupt)
    result = run("quantize", model, tmp_path / "out", "--bits", "4", "--fast")
    assert result.code == 130
    assert "interrupted; the same command resumes" in result.err


# --- what commands do --------------------------------------------------------------------------------------------


def test_doctor_reports_every_part(run):
    result = run("doctor", "--json")
    report = json.loads(result.out)
    assert (result.code, report["ok"]) == (0, True)
    names = [check["name"] for check in report["checks"]]
    assert {"python", "torch", "transformers", "numba", "processor", "backends", "cuda", "self test"} <= set(names)
    cuda = next(check for check in report["checks"] if check["name"] == "cuda")
    assert torch.cuda.is_available() or "CPU" in cuda["detail"]


def test_doctor_tells_what_to_type(run, monkeypatch):
    from qpalette.cli import doctor

    monkeypatch.setattr(doctor, "version", lambda name: "0.1")
    monkeypatch.setattr(doctor, "_self_test", lambda: 1 / 0)
    result = run("doctor")
    assert result.code == 1
    assert 'pip install "torch' in result.out
    assert "ZeroDivisionError" in result.out
    assert "Not ready: torch" in result.out


def test_the_command_and_the_library_quantize_alike():
    """What both call by one name and default to a number or a word has one default."""
    of_command = inspect.signature(commands.quantize).parameters
    shared = {name: p.default for name, p in inspect.signature(qpalette.quantize).parameters.items()}
    plain = {name for name, value in shared.items() if isinstance(value, int | float | str)} & of_command.keys()
    assert {"damping", "output_damping", "equalize", "seed", "rotation"} <= plain
    assert {name: of_command[name].default for name in plain} == {name: shared[name] for name in plain}


def test_calibrate_then_quantize(run, model, text, tmp_path):
    command = ("calibrate", model, tmp_path / "hessians", "--text", text, "--tokens", 512, "--window", 128)
    measured = json.loads(run(*command, "--json").out)
    assert (measured["tokens"], measured["window"]) == (512, 128)
    assert "512, in windows of 128" in run(*command).out
    options = ("--spec", "nuq-2", "--hessians", tmp_path / "hessians")
    assert json.loads(run("quantize", model, tmp_path / "out", *options, "--dry-run", "--json").out)["dry_run"]
    report = json.loads(run("quantize", model, tmp_path / "out", *options, "--json").out)
    assert all(0 < kind["proxy"] < kind["distortion"] for kind in report["kinds"].values())
    shown = run("quantize", model, tmp_path / "damped", *options, "--damping", 0.1)
    assert "of outputs" in shown.out
    plan = tmp_path / "plan.json"
    run("plan", model, "--bits", 3, "--calibration", tmp_path / "hessians", "--also", "embed_tokens", "--out", plan)
    planned = ("quantize", model, tmp_path / "planned", "--plan", plan, "--calibration", tmp_path / "hessians")
    kinds = json.loads(run(*planned, "--json").out)["kinds"]
    assert {kind for kind, facts in kinds.items() if "proxy" not in facts} == {"model.embed_tokens"}
    assert "of outputs" in run(*planned, "--overwrite").out
    assert "larger damping" not in shown.err


def test_tune(run, model, packed, text, tmp_path):
    few = ("--text", text, "--window", 64, "--held-out", 2, "--steps", 2, "--batch", 1, "--every", 1)
    command = ("tune", packed, "--reference", model, "--out", tmp_path / "out", *few)
    planned = json.loads(run(*command, "--dry-run", "--json").out)
    assert planned["dry_run"]
    assert "at most 2, of 64 tokens" in run(*command, "--dry-run").out
    assert not (tmp_path / "out").exists()
    result = run(*command, "--json")
    found = json.loads(result.out)
    assert found["kl_after"] <= found["kl_before"] == found["held_out"][0]["kl"]
    assert found["bits_per_weight"] == planned["bits_after"]
    assert "step 1: held-out KL" in result.err
    assert run("inspect", tmp_path / "out", "--verify").code == 0
    tuned = run("quantize", model, tmp_path / "both", "--spec", "nuq-4", "--tune", "--text", packed / "README.md")
    assert tuned.code == 1, "of 2048 tokens the text has not enough"
    assert "--window" in tuned.err


def test_what_a_model_writes_is_read_again(run, model, tmp_path):
    calibrated = run("calibrate", model, tmp_path / "first", "--tokens", 128, "--window", 32, "--json")
    written = tmp_path / "first" / "text.tokens.json"
    again = run("calibrate", model, tmp_path / "second", "--tokens", 128, "--window", 32, "--text", written, "--json")
    assert json.loads(calibrated.out) == json.loads(again.out)
    for folder in ("first", "second"):
        quantized = run(
            "quantize", model, tmp_path / f"{folder}-out", "--spec", "nuq-2", "--hessians", tmp_path / folder
        )
        assert quantized.code == 0
    weights = [(tmp_path / f"{folder}-out" / "model.safetensors").read_bytes() for folder in ("first", "second")]
    assert weights[0] == weights[1]
    sampled = run("sensitivity", model, tmp_path / "s.json", "--tokens", 64, "--window", 32, "--json")
    assert json.loads(sampled.out)["provenance"]["text"] == "sampled"
    assert (tmp_path / "s.json.tokens.json").exists()


def test_linears_are_left_out(run, model, tmp_path):
    options = ("--spec", "nuq-4", "--include", "*.mlp.*", "--exclude", "*.up_proj", "--exclude", "*.1.*", "--json")
    kinds = json.loads(run("quantize", model, tmp_path / "out", *options).out)["kinds"]
    assert {kind: facts["linears"] for kind, facts in kinds.items()} == {
        f"model.layers.*.mlp.{name}_proj": 1 for name in ("gate", "down")
    }


def test_inspect_a_checkpoint(run, model):
    report = json.loads(run("inspect", model, "--json").out)
    assert report["kind"] == "checkpoint"
    assert report["weights"] == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    assert [kind["count"] for kind in report["group_kinds"]] == [2, 2, 2, 2]
    assert report["group_kinds"][0]["rotation"] == "h64"
    assert report["bytes_at_bits"]["2"] < report["bytes_at_bits"]["4"] < report["bytes"]
    assert {item["reason"] for item in report["untouched"]} == {"embedding", "output head", "a vector"}
    shown = run("inspect", model).out
    assert "q_proj 64 x 64, k_proj 32 x 64" in shown


def test_inspect_a_quantized_model(run, packed):
    report = json.loads(run("inspect", packed, "--json").out)
    assert report["kind"] == "artifact"
    assert report["bits"]["total"] == sum(report["bits"][part] for part in ("qp_codes", "qp_scales", "qp_signs"))
    assert report["bits_per_weight"] == pytest.approx(report["bits"]["total"] / report["weights"])
    assert {linear["spec"] for linear in report["linears"]} == {"nuq-4"}
    assert "everything counted" in run("inspect", packed).out


def test_how_much_is_packed_is_said_alike_everywhere(run, model, tmp_path):
    """Before and after: of the result, in its report and in its card; and what to do where it is little."""
    words = "88.2 % of what multiplies (linears 100 %, head 0 %, embedding 0 %)"
    way_out = "lm_head (8.2 k weights) stays as it is; pack it too with --also lm_head"
    out = tmp_path / "out"
    quantizing = ("quantize", model, out, "--spec", "nuq-4")
    for command in ((*quantizing, "--dry-run"), quantizing, ("inspect", out), ("inspect", model)):
        result = run(*command)
        assert words in result.out, command
        if command[0] == "inspect" or "--dry-run" in command:
            assert way_out in result.err
    card, report = (out / "README.md").read_text(), json.loads((out / "qpalette_report.json").read_text())
    assert "**88.2 % of what multiplies**" in card
    assert "| head | 8,192 | 0 % |" in card
    assert report["totals"]["packed"]["of_what_multiplies"] == 61_440 / 69_632
    known = json.loads(run("inspect", out, "--json").out)["packed"]
    assert known == report["totals"]["packed"] == json.loads(run("inspect", model, "--json").out)["packed_by_default"]
    whole = ("quantize", model, tmp_path / "whole", "--spec", "nuq-4", "--also", "lm_head", "--json")
    assert json.loads(run(*whole, "--dry-run").out)["packed"]["of_what_multiplies"] == 1
    assert json.loads(run(*whole).out)["packed"]["kinds"]["head"] == {"packed": 8192, "weights": 8192}
    assert "of what multiplies is packed" not in run("inspect", tmp_path / "whole").err


def test_few_packed_weights_are_told_before_the_work(model, tmp_path, caplog):
    def stop(*_: object) -> None:
        assert "only 8" in caplog.text
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_a_model(model, tmp_path / "out", spec="nuq-4", progress=stop)


def test_palette_lists_and_measures(run):
    listed = json.loads(run("palette", "--json").out)
    assert {"tcq-1", "tcq-3.25", "nuq-4"} <= {row["spec"] for row in listed}
    assert all(row["distortion"] is None and row["gap"] > 1 for row in listed)
    result = run("palette", "--measure", "nuq-2", "--measure", "nuq-4", "--weights", "30000", "--json")
    measured = json.loads(result.out)
    assert [row["spec"] for row in measured] == ["nuq-2", "nuq-4"]
    for row in measured:
        assert row["distortion"] == pytest.approx(row["claimed_distortion"], rel=0.05)
        assert row["gap"] == pytest.approx(row["distortion"] * 4 ** row["rate"])
    assert "Mweights/s" in run("palette", "--measure", "nuq-2", "--weights", "100000").out
    assert "tcq-3.25-L12" in run("palette", "--effort", "fast").out


def test_palette_draws(run, tmp_path):
    pytest.importorskip("matplotlib")
    published, picture = tmp_path / "published.csv", tmp_path / "palette.png"
    published.write_text("family,bits,composition,distortion\nvq,2.0,whole,0.11\ntcq,2.25,halves,0.054\n")
    assert run("palette", "--plot", picture, "--compare", published).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    published.write_text("family,bits,composition,distortion\nvq,two,whole,0.11\n")
    result = run("palette", "--plot", picture, "--compare", published)
    assert (result.code, "line 2" in result.err) == (1, True)


def test_palette_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = run("palette", "--plot", tmp_path / "palette.png")
    assert (result.code, 'pip install "qpalette[plot]"' in result.err) == (1, True)


def test_quantize_with_a_budget(run, model, tmp_path):
    out = tmp_path / "out"
    command = ("quantize", model, out, "--bits", "4.6", "--fast", "--effort", "fast", "--json")
    planned = json.loads(run(*command, "--dry-run").out)
    assert not out.exists()
    assert planned["bits_per_weight"] <= 4.6
    report = json.loads(run(*command).out)
    assert report["bits_per_weight"] == planned["bits_per_weight"]
    assert report["bytes"] == planned["bytes"] < report["source_bytes"]
    assert len(report["kinds"]) == 7
    assert 0 < report["distortion"] < 0.02
    shown = run("quantize", model, out, "--spec", "nuq-4", "--overwrite")
    assert "everything counted" in shown.out
    assert "model.layers.*.mlp.down_proj" in shown.out
    assert "written" in run("quantize", model, out, "--spec", "nuq-4", "--dry-run").out


def test_spec_keeps_its_own_effort(run, model, tmp_path):
    arguments = ("quantize", model, tmp_path / "out", "--spec", "tcq-2-L12", "--dry-run", "--json")
    assert list(json.loads(run(*arguments).out)["specs"]) == ["tcq-2-L12"]
    assert list(json.loads(run(*arguments, "--effort", "best").out)["specs"]) == ["tcq-2-L18"]


def test_eval_compares_with_the_reference(run, model, packed, text):
    result = run("eval", packed, "--reference", model, "--text", text, "--windows", "2", "--json")
    report = json.loads(result.out)
    keys = {"perplexity", "kl", "top1", "bits_per_weight", "windows", "reference_perplexity", "kl_stderr", "tokens"}
    assert keys <= report.keys()
    assert (report["windows"], report["tokens"]) == (2, 2 * 255)
    assert 0 < report["kl"] < 1
    assert 4 < report["bits_per_weight"] < 5
    shown = run("eval", model, "--reference", model, "--text", text, "--windows", "1").out
    assert "100.0 %" in shown
    assert "nats per token" in shown


def test_eval_says_what_prompts_in_int8_cost(run, model, packed, text, monkeypatch):
    command = ("eval", packed, "--reference", model, "--text", text, "--windows", "2")
    monkeypatch.setenv(PREFILL, "float")  # what a command sets is gone behind this test
    refused = run(*command, "--prefill", "int8")
    assert (refused.code, "backend 'cpu' has no int8 for prompts" in refused.err) == (1, True)
    monkeypatch.setenv("QPALETTE_BACKEND", "ref")
    kls = {}
    for road in ("float", "int8"):
        report = json.loads(run(*command, "--prefill", road, "--json").out)
        assert report["prefill"] == road
        kls[road] = report["kl"]
    assert kls["int8"] != kls["float"]
    assert kls["int8"] < 1.5 * kls["float"], "of 4 bits: int8 adds a few percent to the error of nuq-4"
    assert "multiplied in int8" in run(*command, "--prefill", "int8").out


def test_generate_streams_what_json_says(run, packed):
    streamed = run("generate", packed, "hello", "--max-new-tokens", "8")
    assert "tokens/s" in streamed.err
    answer = json.loads(run("generate", packed, "hello", "--max-new-tokens", "8", "--json").out)
    assert streamed.out == answer["text"] + "\n"
    assert 0 < answer["tokens"] <= 8
    raw = json.loads(run("generate", packed, "hello", "--max-new-tokens", "8", "--raw", "--json").out)
    assert raw["prompt_tokens"] == len("hello") < answer["prompt_tokens"]
    warm = [run("generate", packed, "a", "--temperature", "1", "--seed", seed, "--json").out for seed in (1, 1, 2)]
    texts = [json.loads(out)["text"] for out in warm]
    assert texts[0] == texts[1] != texts[2]


def test_chat_remembers_until_reset(run, packed, monkeypatch):
    lengths = []
    from qpalette.cli import answer

    original = answer.stream_answer

    def spy(model, tokenizer, prompt, *rest):
        lengths.append(prompt.shape[1])
        return original(model, tokenizer, prompt, *rest)

    monkeypatch.setattr(answer, "stream_answer", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nhello\n/reset\nhello\n/what\n" + "x" * 300 + "\n"))
    result = run("chat", packed, "--max-new-tokens", "4")
    assert result.code == 0, "the end of input leaves"
    assert lengths[0] < lengths[1]
    assert lengths[2] == lengths[0]
    assert "unknown command /what" in result.err
    assert "/reset starts anew" in result.err


def test_chat_needs_a_template(run, tmp_path):
    save_model(tmp_path / "raw", template=None)
    result = run("chat", tmp_path / "raw")
    assert (result.code, "has no chat template" in result.err) == (1, True)


def test_a_closed_pipe_is_no_error(model):
    command = f"{sys.executable} -c 'from qpalette.cli import main; main()' palette | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr


def test_a_code_page_that_lacks_a_letter_ends_nothing(model, tmp_path):
    """As a pipe has on Windows: what a model writes may be anything."""
    place = tmp_path / "größe"
    shutil.copytree(model, place)
    command = [sys.executable, "-m", "qpalette.cli", "inspect", str(place)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"gr??e" in done.stdout
