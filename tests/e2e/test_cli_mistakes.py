"""Every wrong input to the command line is answered in one clear line, before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
from test_cli import _plain_output, model, packed, run, text  # noqa: F401 - fixtures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "{missing}"), "does not exist"),
        (("palette", "--measure", "xyz-3"), "'xyz-3' is not a quantizer"),
        (("palette", "--measure", "tcq-3.3"), "multiples of 0.125"),
        (("palette", "--measure", "nuq-4", "--weights", "0"), "at least 1, got 0"),
        (("palette", "--measure", "nuq-4", "--seed", str(1 << 64)), "64 bits"),
        (("palette", "--effort", "heroic"), "choose fast, standard, best"),
        (("palette", "--plot", "{tmp}/picture.xyz"), "must end in .png"),
        (("palette", "--plot", "{tmp}/none/picture.png"), "does not exist"),
        (("palette", "--compare", "{text}"), "give both"),
        (("palette", "--compare", "{text}", "--plot", "{tmp}/p.png"), "has no column family"),
        (("quantize", "{missing}", "{tmp}/out", "--bits", "4"), "does not exist"),
        (("quantize", "{model}", "{tmp}/out", "--spec", "tcq-99"), "tcq-99"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "-1"), "'-1' is not a rate"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "nan"), "'nan' is not a rate"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "0.5"), "the least is"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "99"), "more than the 16"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "99", "--fast"), "more than the 16"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "4", "--exclude", "x"), "'x' leaves nothing out"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "4", "--effort", "x"), "'x' is not an effort"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "4", "--rotation", "x"), "'x' is not a rotation"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "4", "--rotation", "block-128"), "does not divide"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "4", "--seed", "-1"), "seed"),
        (("quantize", "{model}", "{model}", "--spec", "nuq-4"), "exists already"),
        (("quantize", "{model}", "{model}", "--spec", "nuq-4", "--overwrite"), "not overwritten"),
        (("quantize", "{packed}", "{tmp}/out", "--spec", "nuq-4"), "quantized already"),
        (("quantize", "{model}", "{tmp}/out", "--spec", "nuq-4", "--hessians", "{missing}"), "holds no Hessians"),
        (("quantize", "{model}", "{tmp}/out", "--spec", "nuq-4", "--device", "abacus"), "'abacus' is not a device"),
        (("quantize", "{model}", "{tmp}/out", "--spec", "nuq-4", "--device", "meta"), "cannot compute on meta"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "4", "--report", "{tmp}"), "is a directory; name a file"),
        (("quantize", "{model}", "{text}/out", "--spec", "nuq-4"), "text.txt is no directory"),
        (("quantize", "{model}", "{text}/out", "--bits", "4"), "text.txt is no directory"),
        (("calibrate", "{missing}", "{tmp}/out", "--text", "{text}"), "does not exist"),
        (("calibrate", "{model}", "{tmp}/out", "--text", "{missing}"), "does not exist"),
        (("calibrate", "{model}", "{tmp}/out", "--text", "{text}", "--tokens", "1"), "at least 2, got 1"),
        (("calibrate", "{model}", "{tmp}/out", "--text", "{text}", "--window", "-1"), "at least 2"),
        (("calibrate", "{model}", "{tmp}/out", "--text", "{text}", "--memory", "nan"), "memory"),
        (("calibrate", "{model}", "{tmp}/out", "--text", "{text}", "--device", "abacus"), "'abacus' is not a device"),
        (("calibrate", "{model}", "{model}", "--text", "{text}"), "holds a model"),
        (("sensitivity", "{model}", "{tmp}", "--text", "{text}"), "is a directory; name a file"),
        (("plan", "{model}", "--bits", "4", "--batch", "0"), "the batch must be at least 1, got 0"),
        (("plan", "{model}", "--bits", "0.2"), "the least is 1.249 bits per weight"),
        (("bench", "{packed}", "--alone", "--attention", "x"), "--attention x: "),
        (("eval", "{missing}", "--text", "{text}"), "does not exist"),
        (("eval", "{packed}", "--reference", "{missing}", "--text", "{text}"), "does not exist"),
        (("eval", "{packed}", "--text", "{missing}"), "does not exist"),
        (("eval", "{packed}", "--text", "{tmp}"), "is a directory"),
        (("eval", "{packed}", "--text", "{packed}/model.safetensors"), "is not text"),
        (("eval", "{packed}", "--text", "{text}", "--windows", "0"), "at least 1, got 0"),
        (("eval", "{packed}", "--text", "{text}", "--windows", "-2"), "at least 1, got -2"),
        (("eval", "{packed}"), "a reference to sample one from"),
        (("calibrate", "{model}", "{tmp}/out", "--text", "{tmp}/no.tokens.json"), "no file of sampled tokens"),
        (("tune", "{missing}", "--reference", "{model}"), "does not exist"),
        (("tune", "{model}", "--reference", "{model}"), "is not quantized"),
        (("tune", "{packed}", "--reference", "{packed}"), "quantized already"),
        (("tune", "{packed}", "--reference", "{model}", "--text", "{missing}"), "does not exist"),
        (("tune", "{packed}", "--reference", "{model}", "--out", "{model}"), "exists already"),
        (("tune", "{packed}", "--reference", "{model}", "--steps", "0"), "error: steps must be at least 1, got 0"),
        (
            ("tune", "{packed}", "--reference", "{model}", "--save-every", "0"),
            "error: save-every must be at least 1, got 0",
        ),
        (("tune", "{packed}", "--reference", "{model}", "--learning-rate", "nan"), "a positive number, got nan"),
        (("tune", "{packed}", "--reference", "{model}", "--dtype", "int4"), "choose float32 or bfloat16"),
        (("tune", "{packed}", "--reference", "{model}", "--device", "abacus"), "'abacus' is not a device"),
        (("quantize", "{model}", "{tmp}/out", "--bits", "4", "--tune", "--text", "{missing}"), "does not exist"),
        (("generate", "{missing}", "hello"), "does not exist"),
        (("generate", "{packed}", "  "), "the prompt is empty"),
        (("generate", "{packed}", "hello", "--max-new-tokens", "0"), "at least 1, got 0"),
        (("generate", "{packed}", "hello", "--temperature", "-1"), "at least 0, got -1"),
        (("generate", "{packed}", "hello", "--temperature", "nan"), "at least 0, got nan"),
        (("generate", "{packed}", "hello", "--compile", "soon"), "choose never, background, now"),
        (("chat", "{packed}", "--compile", "soon"), "choose never, background, now"),
        (("serve", "{packed}", "--compile", "soon"), "choose never, background, now"),
        (("generate", "{packed}", "x" * 300), "the model's context is 256"),
        (("chat", "{missing}"), "does not exist"),
        (("chat", "{packed}", "--engine", "vllm"), "other engines have `qpalette serve`"),
        (("generate", "{packed}", "hello", "--device", "gpu"), "'gpu' is not a device"),
        (("generate", "{packed}", "hello", "--dtype", "int4"), "choose float16, bfloat16, float32"),
    ],
)
def test_a_mistake_is_one_clear_line(run, model, packed, text, tmp_path, arguments, message):  # noqa: F811
    names = {"missing": tmp_path / "missing", "tmp": tmp_path, "model": model, "packed": packed, "text": text}
    result = run(*(argument.format(**names) for argument in arguments))
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert message in result.err
    assert not result.out
    assert not (tmp_path / "out").exists()


NONSENSE = {"hidden_size": -3, "num_attention_heads": 0, "num_hidden_layers": "many", "rope_parameters": "x"}
READERS = (
    *(("quantize", "{model}", "{tmp}/out", "--bits", "4", *more) for more in ((), ("--fast",))),
    ("plan", "{model}", "--bits", "4"),
    ("eval", "{model}", "--text", "{text}"),
    ("generate", "{model}", "hello"),
    ("bench", "--config", "{model}", "--spec", "nuq-4"),
)


@pytest.mark.parametrize("field", NONSENSE)
@pytest.mark.parametrize("arguments", READERS, ids=lambda arguments: " ".join(arguments[::4]))
def test_a_config_of_nonsense_is_one_clear_line(run, model, text, tmp_path, arguments, field):  # noqa: F811
    """Transformers raises whatever a class comes upon: errors of its own, a TypeError, a division by zero."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, field: NONSENSE[field]}))
    result = run(*(argument.format(model=broken, tmp=tmp_path, text=text) for argument in arguments))
    assert result.code == 1
    assert result.err.startswith("error: transformers ")
    assert result.err.count("\n") == 1, result.err
    assert not result.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [("--bits", "4"), ("--spec", "nuq-4")])
def test_a_place_that_cannot_be_written_is_told_before_the_work(run, model, tmp_path, monkeypatch, how):  # noqa: F811
    """Not after a model has been calibrated for hours. Who runs this may be allowed everything."""
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    monkeypatch.setattr("qpalette.recipe.run.calibrate", lambda *given, **named: pytest.fail("it has begun"))
    result = run("quantize", model, tmp_path / "out", *how)
    assert (result.code, result.out) == (1, "")
    assert result.err == f"error: {tmp_path / 'out'} cannot be written: nothing may be added to {tmp_path}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "{model}", "{model}-out", "--bits", "3", "--context", "4096"),
        ("quantize", "{model}", "{model}-out", "--bits", "3", "--fast", "--batch", "2"),
        ("quantize", "{model}", "{model}-out"),
        ("quantize", "{model}", "{model}-out", "--bits", "4", "--spec", "nuq-4"),
        ("quantize", "{model}"),
        ("quantize", "{model}", "{model}-out", "--bits", "4", "--fast", "--text", "{model}/config.json"),
        ("quantize", "{model}", "{model}-out", "--bits", "4", "--fast", "--best"),
        ("quantize", "{model}", "{model}-out", "--memory", "4MB", "--fast"),
        ("quantize", "{model}", "{model}-out", "--bits", "4", "--sign-seeds", "2"),
        ("quantize", "{model}", "{model}-out", "--bits", "4", "--also", "lm_head"),
        ("tune", "{model}"),
        ("palette", "--weights", "many"),
        ("no-such-command",),
        ("inspect", "{model}", "--no-such-option"),
    ],
)
def test_wrong_usage_exits_with_2(run, model, arguments):  # noqa: F811
    result = run(*(argument.format(model=model) for argument in arguments))
    assert result.code == 2
    assert "Usage: qpalette" in result.err
    assert "Traceback" not in result.err
