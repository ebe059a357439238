"""What calibration on both sides is worth: KL of uniform and planned models, one-sided against both sides, all counted.

    python benchmarks/two_sided.py MODEL --text TEST --calibration TRAIN --device cuda

    [--uniform 2 --uniform 3 ...] [--planned 2.5 --planned 3 ...] [--tokens 131072] [--window 2048] [--windows 16]
    [--effort standard] [--draws 1] [--sampled] [--profile] [--work out/two_sided] [--name two_sided]

Uniform: `tcq-R` everywhere, rounded data-free, by LDLQ, by LDLQ with columns equalized, on both sides, and on both
sides equalized. Planned: LDLQ and both sides, equalized, each by sensitivities to its own error, with the KL that was
predicted, that on the windows that the prediction was measured on, and that of the best uniform plan within the same
bits. With `--sampled` every KL is measured on text that the model writes, too, and the planned models of both sides are
made once more from a calibration on such text (of another seed). With `--profile` it is told where the seconds of each
step go (`where_time_goes.py`), and seconds are no result.
Calibrations, sensitivities and models stay in `--work`, so that a rerun goes on.

    python benchmarks/two_sided.py --llama-8b [--bits 3.25] [--layers 32] --device cuda --dtype bfloat16

A random model of Llama-3.1-8B's shapes instead, or of its first layers: seconds and peak GPU memory of each step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from memory import write_llama
from report import device_name, report
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from where_time_goes import profiled

import qpalette
from qpalette.api import SENSITIVITIES, calibrated_sensitivities
from qpalette.calibration import HessianStore
from qpalette.cli.answer import parse_dtype
from qpalette.codes import parse_spec
from qpalette.evaluate import bits_per_weight, evaluate_models, load_model, model_windows, token_windows
from qpalette.pipeline.planning import BudgetPlan, make_plan
from qpalette.plan import Budget, Plan, Space, palette_of
from qpalette.storage import open_checkpoint

ONE, BOTH = "one side", "both sides"
SAMPLED = "both sides, sampled text"  # calibrated on it
TEST_SEED = 1_000_000  # of the text that the model writes to be measured on
ROUNDINGS = {  # name -> sides, columns equalized
    "data-free": (None, False),
    "one side": (ONE, False),
    "one side, equalized": (ONE, True),
    "both sides": (BOTH, False),
    "both sides, equalized": (BOTH, True),
}
LLAMA_8B = {"hidden": 4096, "inner": 14336, "kv": 1024, "vocabulary": 128256, "scale": 0.02}
PROFILED = [False]
WORDS = 4096  # of the random model's text


def main(
    model: Annotated[str | None, typer.Argument()] = None,
    text: Annotated[Path | None, typer.Option(help="What KL is measured on.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="What Hessians and sensitivities are measured on.")] = None,
    uniform: Annotated[list[str] | None, typer.Option(help="Rates of tcq, everywhere.")] = None,
    planned: Annotated[list[str] | None, typer.Option(help="Bits per weight, everything counted.")] = None,
    rounding: Annotated[list[str] | None, typer.Option(help="Of the uniform models; all by default.")] = None,
    calibrated: Annotated[list[str] | None, typer.Option(help="How the planned ones are; all by default.")] = None,
    tokens: int = 131_072,
    window: int = 2048,
    windows: int = 16,
    draws: Annotated[int, typer.Option(help="Of labels, by calibration on both sides.")] = 1,
    bands: int = 6,
    effort: str = "standard",
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model that is calibrated.")] = "float32",
    sampled: Annotated[bool, typer.Option(help="Also measure, and calibrate, on text of the model's own.")] = False,
    llama_8b: Annotated[bool, typer.Option(help="A random model of these shapes, timed.")] = False,
    bits: Annotated[str, typer.Option(help="With --llama-8b: of its plan.")] = "3.25",
    layers: Annotated[int, typer.Option(help="With --llama-8b: that it has.")] = 32,
    profile: Annotated[bool, typer.Option(help="Tell where the seconds go.")] = False,
    work: Path = Path("out/two_sided"),
    name: str = "two_sided",
) -> None:
    PROFILED.append(profile)
    work.mkdir(parents=True, exist_ok=True)
    options = {"tokens": tokens, "window": window, "draws": draws, "device": device, "dtype": parse_dtype(dtype)}
    if llama_8b:
        time_llama_8b(work, bits, layers, effort, options, "two_sided_8b" if name == "two_sided" else name)
        return
    if model is None or text is None or calibration is None:
        raise typer.BadParameter("give MODEL, --text and --calibration, or --llama-8b")
    original, tokenizer = load_model(model, device)
    trial = Trial(model, calibration, options, work, name, effort, bands, original)
    trial.tests["KL"] = token_windows(text, tokenizer, window, windows)
    if sampled:
        trial.tests["KL, sampled text"] = model_windows(None, original, tokenizer, window, windows, seed=TEST_SEED)
    trial.facts = {"model": Path(model).name, "text": text.name, "windows": windows, "window": window}
    trial.facts |= {"calibration": calibration.name, "tokens": tokens, "draws": draws, "effort": effort}
    for rate in uniform or ["2", "3", "4"]:
        for kind in rounding or ROUNDINGS:
            trial.run_uniform(rate, kind)
    for budget in planned or ["2.5", "3", "3.25", "4"]:
        for sides in calibrated or (ONE, BOTH, *([SAMPLED] if sampled else [])):
            trial.run_planned(budget, sides)


@dataclass
class Trial:
    """Models made and measured; a row each."""

    model: str
    calibration: Path
    options: dict[str, Any]
    work: Path
    name: str
    effort: str
    bands: int
    reference: Any
    tests: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> str:
        return self.options["device"]

    def directory(self, sides: str | None) -> Path | None:
        """Of the calibration, which is made if it is not there."""
        if sides is None:
            return None
        directory = self.work / file_name(sides)
        text = None if sides == SAMPLED else self.calibration
        new = not directory.exists()
        seconds = timed(
            lambda: qpalette.calibrate(self.model, directory, text, one_sided=sides == ONE, **self.options),
            "calibrate",
        )[0]
        if new:
            self.facts[f"seconds to calibrate, {sides}"] = round(seconds, 1)
        return directory

    def run_uniform(self, rate: str, kind: str) -> None:
        sides, equalize = ROUNDINGS[kind]
        spec = parse_spec(f"tcq-{rate}").with_effort(self.effort).name
        options = {"spec": spec, "calibration": self.directory(sides), "equalize": equalize}
        self.add(f"uniform-{rate}-{kind}", {"bits asked": rate, "choice": spec, "rounding": kind}, options)

    def run_planned(self, budget: str, sides: str) -> None:
        """The plan, and the best uniform one within the same bits."""
        directory = self.directory(sides)
        assert directory is not None
        found = self.plan(budget, sides, directory)
        what = {"bits asked": budget, "rounding": f"{sides}, equalized"}
        options: dict[str, Any] = {"calibration": directory, "plan": found.plan}
        self.add(f"planned-{budget}-{sides}", {**what, "choice": "planned"}, options, found.planned.choice.loss)
        best = found.planned.uniform
        if best is not None:
            options["plan"] = Plan(best.specs)
            self.add(f"best-{budget}-{sides}", {**what, "choice": "best uniform"}, options, best.loss)

    def plan(self, budget: str, sides: str, directory: Path) -> BudgetPlan:
        options = {"device": self.device, "dtype": self.options["dtype"], "bands": self.bands}
        new = not (directory / SENSITIVITIES).exists()
        seconds, known = timed(lambda: calibrated_sensitivities(self.model, directory, **options), "sensitivities")
        if new:
            self.facts[f"seconds to measure sensitivities, {sides}"] = round(seconds, 1)
        space, checkpoint = Space(palette_of(self.effort)), open_checkpoint(self.model)
        return make_plan(known, Budget(Fraction(budget)), space, checkpoint, hessians=HessianStore.open(directory))

    def add(self, name: str, what: dict[str, Any], options: dict[str, Any], predicted: float | None = None) -> None:
        out = self.work / "models" / file_name(name)
        seconds = 0.0
        if not out.exists():
            seconds, _ = timed(lambda: qpalette.quantize(self.model, out, device=self.device, **options), name)
        quantized = load_model(out, self.device)[0]
        measured = {
            kind: timed(partial(evaluate_models, quantized, self.reference, windows), kind)[1]
            for kind, windows in self.tests.items()
        }
        found = measured["KL"]
        apart = None if predicted is None else self.held_out_kl(quantized, options["calibration"])
        self.rows.append(
            {
                **what,
                "bits": bits_per_weight(out),
                **{kind: result.kl for kind, result in measured.items()},
                "KL stderr": found.kl_stderr,
                "predicted": predicted,
                "KL / predicted": _over(found.kl, predicted),
                "KL, held-out text": apart,
                "of it / predicted": _over(apart, predicted),
                "top-1": found.top1,
                "perplexity": found.perplexity,
                "16-bit perplexity": found.reference_perplexity,
                "quantize s": round(seconds, 1) or None,
            }
        )
        report(self.name, device_name(self.device), self.rows, **self.facts)

    def held_out_kl(self, quantized: Any, directory: Path) -> float | None:
        """On the windows that the prediction was measured on: another text may cost more, or less."""
        return evaluate_models(quantized, self.reference, HessianStore.open(directory).held_out).kl


def time_llama_8b(work: Path, bits: str, layers: int, effort: str, options: dict[str, Any], name: str) -> None:
    """Calibrate, measure, plan and round; rows of seconds and peak memory, each printed when it is known."""
    source, text, directory, out = (
        work / part for part in ("llama-8b", "words.txt", "llama-8b-moments", "llama-8b-out")
    )
    device, rows = options["device"], []
    if not source.exists():
        write_llama(source, layers=layers, **LLAMA_8B)
        _write_tokenizer(source)
        words = random.Random(0).choices(range(WORDS), k=200_000)
        text.write_text(" ".join(f"w{word}" for word in words))

    def step(what: str, run: Callable[[], Any]) -> Any:
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        seconds, found = timed(run, what)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.startswith("cuda") else None
        rows.append({"step": what, "seconds": round(seconds, 1), "peak GPU memory, GiB": peak})
        facts = {key: str(value) for key, value in options.items() if key != "device"}
        report(name, device_name(device), rows, layers=layers, bits=bits, effort=effort, **facts)
        return found

    step("calibrate", lambda: qpalette.calibrate(source, directory, text, **options))
    measuring = {"device": device, "dtype": options["dtype"]}
    known = step("measure sensitivities", lambda: calibrated_sensitivities(source, directory, **measuring))
    store, checkpoint = HessianStore.open(directory), open_checkpoint(source)
    space = Space(palette_of(effort))
    found = step("plan", lambda: make_plan(known, Budget(Fraction(bits)), space, checkpoint, hessians=store))
    plan = found.plan
    step("round", lambda: qpalette.quantize(source, out, plan=plan, calibration=directory, device=device))


def _over(kl: float | None, predicted: float | None) -> float | None:
    return None if kl is None or predicted is None else kl / predicted


def _write_tokenizer(directory: Path) -> None:
    vocabulary = {f"w{index}": index for index in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def file_name(words: str) -> str:
    return words.replace(" ", "_").replace(",", "")


def timed(run: Callable[[], Any], what: str) -> tuple[float, Any]:
    start = time.perf_counter()
    found = profiled(what, run) if PROFILED[-1] else run()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    typer.run(main)
