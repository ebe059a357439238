"""The story: a quantized model and its original in, the same codes with better scales out; kill it, run it again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpalette.core.errors import ArtifactError, CheckpointError, InputError
from qpalette.core.records import LinearRecord
from qpalette.evaluate import load_model, model_windows
from qpalette.evaluate.held_out import split, windows_around
from qpalette.evaluate.sampled_text import TOKEN_FILE
from qpalette.evaluate.text_source import check_text
from qpalette.formats import (
    BITS_MAP,
    PARETO,
    Artifact,
    RevisedCheckpoint,
    Tuned,
    base_model_of,
    bits_map,
    model_card,
    open_artifact,
    stored_shares,
    total_bits,
    write_checksums,
)
from qpalette.models.vocabulary import context_of
from qpalette.pipeline.output import Output
from qpalette.pipeline.report import REPORT_FILE, revised_report
from qpalette.runtime.device import parse_device
from qpalette.storage import Checkpoint, export_checkpoint, local_path, open_checkpoint
from qpalette.tuning.descent import Descent
from qpalette.tuning.options import Silent, Tuning, Watcher
from qpalette.tuning.reference import Reference
from qpalette.tuning.state import State
from qpalette.tuning.vectors import TunedVectors, revised_records, vector_tensors

SAMPLED_WINDOWS = 24  # to tune on where there is no text: minutes of two cores for a model of 135 M
SAME_BYTES = ("save_every", "recompute", "cache")  # options that change time and memory alone
CARD, STATE, ORIGINAL = "README.md", "tuning.safetensors", "original-"


@dataclass(frozen=True)
class Subject:
    """What is tuned, opened and checked: headers alone."""

    artifact: Artifact
    original: Checkpoint
    report: Mapping[str, Any]

    @classmethod
    def open(cls, model: str | Path, reference: str | Path, keep_size: bool) -> Subject:
        """Raises ArtifactError when `model` cannot be tuned, and CheckpointError when it was not made from
        `reference`."""
        artifact, original = open_artifact(local_path(model)), open_checkpoint(reference)
        source = artifact.format.provenance.get("source")
        if source != original.fingerprint:
            raise CheckpointError(
                f"{artifact.directory} was not made from {reference}: it names a source of fingerprint "
                f"{str(source)[:12]}, this one has {original.fingerprint[:12]}; give the model that it was made from"
            )
        revised_records(artifact, keep_size)
        file = artifact.directory / REPORT_FILE
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            revised_report(report, artifact.records, 0, {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{file} is missing or not its report; quantize the model again") from error
        return cls(artifact, original, report)


@dataclass(frozen=True)
class TuneReport:
    """What tuning did."""

    output: Path
    tuned: Tuned
    steps_run: int
    looks: Sequence[tuple[int, float]]  # (step, KL on held-out text), from the start on
    numbers: int  # that were tuned
    left_alone: int  # vectors of the model that it does not have as they are stored
    bits_before: Fraction  # per weight of the linears, everything counted
    bits_after: Fraction


def tune(
    model: str | Path,
    reference: str | Path,
    text: str | Path | None = None,
    out: str | Path | None = None,
    *,
    tuning: Tuning | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> TuneReport:
    """Tune row scales, input diagonals, norms and biases of the quantized directory `model` by KL to `reference`.

    Codes stay, and the format. `reference` is the model that it was made from. `text` is a UTF-8 file, or a file of
    sampled tokens; None: the original writes 24 windows and those held out. What is on average best on the held-out
    windows, as it would be stored, is written to `out`, or in the place of `model`, by one rename; nothing better than
    the start leaves every value as it was. `dtype` is that of activations and of the original; parameters are float32.

    Interrupted, the same call goes on from the state beside the output, to the same bytes on the same machine.

    Raises CheckpointError when `reference` is another model, ArtifactError when `model` cannot be tuned or `out`
    exists, InputError for a text, device or option that cannot be used, or a disk too full; all before the work.
    """
    tuning, watcher, place = tuning or Tuning(), watcher or Silent(), parse_device(device)
    check_text(text, reference)
    subject = Subject.open(model, reference, tuning.keep_size)
    output = _output(model, out, subject, overwrite)
    with output.claimed():
        state, vectors, windows, tuning = _descend(subject, output, text, tuning, place, dtype, watcher)
        report = _report(subject, output, state, vectors, windows, tuning)
        _write(subject, output, state, vectors, report)
    return report


def _output(model: str | Path, out: str | Path | None, subject: Subject, overwrite: bool) -> Output:
    if out is None and not Path(model).expanduser().exists():
        raise InputError(f"{model} is on the Hub: say where the tuned model goes (--out)")
    directory = subject.artifact.directory if out is None else Path(out).expanduser()
    return Output(directory.resolve(), overwrite or out is None)


def _descend(
    subject: Subject,
    output: Output,
    text: str | Path | None,
    tuning: Tuning,
    device: torch.device,
    dtype: torch.dtype,
    watcher: Watcher,
) -> tuple[State, TunedVectors, list[Tensor], Tuning]:
    """Also the windows, those held out at the end, and the tuning with their number, of which a text may have less."""
    original, tokenizer = load_model(subject.original.location, device, dtype)
    fitted, held_out = _windows(text, original, tokenizer, tuning, _token_file(output), watcher)
    windows, tuning = fitted + held_out, replace(tuning, held_out=len(held_out))
    tokens = _sha256(*windows)
    name = _digest([subject.original.fingerprint, tokens, str(dtype), device.type])[:16]
    reference = Reference(original, windows, output.work / f"{ORIGINAL}{name}")
    del original
    if tuning.cache:
        reference.release(watcher)
    model, _ = load_model(subject.artifact.directory, device, dtype)
    vectors = TunedVectors(model, subject.artifact, tuning.keep_size)
    options = {key: value for key, value in asdict(tuning).items() if key not in SAME_BYTES}
    start = _sha256(*(vector.start.cpu() for vector in vectors.vectors))
    source = subject.original.fingerprint
    identity = _digest([version("qpalette"), source, start, tokens, options, str(dtype), device.type])
    descent = Descent(model, vectors, windows, reference, tuning, output.work / STATE, identity, watcher)
    return descent.run(), vectors, windows, tuning


def _token_file(output: Output) -> Path:
    """Of text that the original has written. It stays, beside the output, for other commands to read (`--text`)."""
    folder = output.work if output.is_volume else output.directory.parent
    return folder / f"{output.directory.name}{TOKEN_FILE}"


def _windows(
    text: str | Path | None, model: Any, tokenizer: Any, tuning: Tuning, keep: Path, watcher: Watcher
) -> tuple[list[Tensor], list[Tensor]]:
    """Those to tune on, and those held out."""
    wanted = tuning.windows if text is not None else tuning.windows or SAMPLED_WINDOWS
    length = min(tuning.window, context_of(model) or tuning.window)
    windows = model_windows(
        text,
        model,
        tokenizer,
        length,
        None if wanted is None else windows_around(wanted, length, tuning.held_out),
        seed=tuning.seed,
        keep=keep,
        progress=lambda done, total: watcher.progress("text", done, total),
    )
    if len(windows) <= tuning.held_out:
        raise InputError(
            f"the text has {len(windows)} windows of {len(windows[0])} tokens, and {tuning.held_out} are held out: "
            "give a longer text, or fewer to hold out (--held-out), or shorter ones (--window)"
        )
    fitted, held_out = split(windows, tuning.held_out)
    return fitted[:wanted], held_out


def _report(
    subject: Subject, output: Output, state: State, vectors: TunedVectors, windows: Sequence[Tensor], tuning: Tuning
) -> TuneReport:
    best_step, best = state.best_look
    held_out = sum(map(len, windows[-tuning.held_out :]))
    records = vectors.records if best_step else subject.artifact.records
    found = sum(1 for vector in vectors.vectors if not set(vector.tensors).isdisjoint(vector_tensors(subject.artifact)))
    return TuneReport(
        output=output.directory,
        tuned=Tuned(
            steps=best_step,
            tokens=sum(map(len, windows)) - held_out,
            held_out_tokens=held_out,
            tokens_sha256=_sha256(*windows),
            kl_before=state.looks[0][1],
            kl_after=best,
        ),
        steps_run=state.step,
        looks=tuple(state.looks),
        numbers=len(vectors),
        left_alone=len(vector_tensors(subject.artifact)) - found,
        bits_before=subject.artifact.bits().rate,
        bits_after=total_bits(records.values()).rate,
    )


def _write(subject: Subject, output: Output, state: State, vectors: TunedVectors, report: TuneReport) -> None:
    """The artifact with its new values in a folder beside, read back, then in the place of what is there."""
    artifact, tuned = subject.artifact, report.tuned
    gained = tuned.steps > 0
    records: Mapping[str, LinearRecord] = vectors.records if gained else artifact.records
    values = vectors.stored(state.best) if gained else {}
    provenance = {"tuned_steps": str(tuned.steps), "tuned_tokens": str(tuned.tokens)}
    provenance |= {"tuned_tokens_sha256": tuned.tokens_sha256}
    revised = RevisedCheckpoint(artifact, records, values, provenance)
    linears, measured = subject.report["linears"], subject.report.get("calibration")
    card = artifact.directory / CARD
    revised.documents[REPORT_FILE] = revised_report(subject.report, records, revised.total_bytes, asdict(tuned))
    revised.documents[BITS_MAP] = bits_map(records)
    predicted = artifact.directory / PARETO  # of the codes, which stay
    if predicted.exists():
        revised.documents[PARETO] = predicted.read_text(encoding="utf-8", errors="replace")
    revised.documents[CARD] = model_card(
        output.directory.name,
        revised.config,
        records,
        {name: linears[name]["distortion"] for name in records},
        revised.carried_bytes,
        base_model_of(card.read_text(encoding="utf-8", errors="replace")) if card.exists() else None,
        None if measured is None else (measured["tokens"], measured["text_sha256"]),
        tuned,
        stored_shares(revised.config, records, revised.tensors.values()),
        predicted.exists(),
    )
    assembled = output.work / "assembled"
    shutil.rmtree(assembled, ignore_errors=True)
    export_checkpoint(revised, assembled)
    open_artifact(assembled)  # what was written is read back before anything is replaced
    write_checksums(assembled)
    output.put(assembled)
    for entry in output.work.iterdir():
        if entry.name.startswith(ORIGINAL):
            shutil.rmtree(entry)
        elif entry.name == STATE:
            entry.unlink()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
