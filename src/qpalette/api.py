"""Calls that join folders which do not know each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qpalette.calibration import MEMORY_BUDGET, Progress, collect_hessians
from qpalette.calibration.hessians import Calibration, HessianStore
from qpalette.calibration.rounding import ROUNDING, Rounding
from qpalette.calibration.sensitivity import (
    DISTORTION,
    METHODS,
    Divergence,
    embeddings_of,
    fisher_sensitivities,
    perturbation_sensitivities,
    weights_of,
)
from qpalette.calibration.shaped import BANDS, ShapedNoise, curvatures, measured_sensitivities
from qpalette.core.errors import HessianError, InputError
from qpalette.core.files import write_whole
from qpalette.core.records import LinearShape
from qpalette.core.resume import PartialFigures
from qpalette.evaluate import loading
from qpalette.evaluate.cache import (
    directory_of,
    plan_for,
    planned_context,
    stored_plan,
    stream_sensitivities,
    transforms_for,
)
from qpalette.evaluate.held_out import split, usual, windows_around
from qpalette.evaluate.loading import load_model
from qpalette.evaluate.sampled_text import TOKEN_FILE
from qpalette.evaluate.text_source import check_text, model_windows, text_sha256
from qpalette.evaluate.windows import WINDOW
from qpalette.generation import CacheMaker, CodedTokenCache, check_mode
from qpalette.generation import fast as make_fast
from qpalette.kvcache import CachePlan
from qpalette.models import find_groups, token_tables
from qpalette.models.vocabulary import context_of
from qpalette.nn.coded_cache import CodedCache
from qpalette.pipeline.planning import SHAPED
from qpalette.plan import SensitiveLinear, SensitiveStream, Sensitivities
from qpalette.plan.streams import streams_of, streams_to_json
from qpalette.runtime.device import parse_device
from qpalette.storage import Checkpoint, open_checkpoint

TOKENS = 65_536
CACHE_LENGTH = 4096  # tokens that a cache has room for, and its transforms are for, where nobody says more
SENSITIVITIES = "sensitivities.json"  # in a calibration's directory
HOW_WELL = ("qpalette", "windows", "bands", "dtype")  # of its provenance: not what was measured
GPU_PARTS = 4  # of a GPU's free memory, one of which is for sums: 8B has 101 GB of them, and others may run there
SENSITIVITY_TOKENS = {"fisher": 16_384, "perturbation": 2048}  # one backward pass in all, against one pass per linear


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | torch.device | int | None = None,
    backend: str | None = None,
    fast: bool = False,
    compile: str = "never",
    cache: str | CachePlan | None = None,
    writing: Progress | None = None,
    bits: str | float | Fraction | None = None,
    effort: str | None = None,
) -> tuple[Any, Any]:
    """The causal language model at `path`, a `PreTrainedModel` in evaluation mode, and its tokenizer, or None where the
    directory has none.

    path: a quantized directory, a Hugging Face directory, a .gguf file or the Hub id of a model of either kind. A GGUF
    file is dequantized once, into a cache. No code of the model runs. device: where all of it goes, such as cpu or
    cuda:1; device_map, as in `from_pretrained`, spreads it instead. dtype: of the activations and of what is not
    quantized; the checkpoint's own by default. backend: the only one that may run, by name; like the variable
    QPALETTE_BACKEND, which it sets, it holds for the whole process. fast: on one device, `model.generate` decodes
    by captured steps, with the same arguments and results, and compiles them as `compile` says: "never", in the
    "background", or "now", before the first token. bits: quantize first a model that is not quantized, without data,
    into the cache (`qpalette.Config`), searching as `effort` says. cache: with `fast`, what keys and values are kept
    as, on any device: a spec or plan as `qpalette.cache` takes it, "none" for keys and values as they are; None is what
    the directory says, or else as they are; where keys are to be calibrated on text that the model writes, `writing` is
    called with (tokens written, tokens in all).

    Raises InputError when there is no such device or `compile`, UnsupportedError with the reasons when no backend can
    run the model, and ArtifactError or CheckpointError when there is no intact model or transformers cannot build it.
    """
    check_mode(compile)
    config = None
    if bits is not None:
        path, config = _to_quantize(path, bits, effort, parse_device(device))
    model, tokenizer = loading.load(
        path, device=device, dtype=dtype, device_map=device_map, backend=backend, quantization_config=config
    )
    return (make_fast(model, compile, cache_maker(model, tokenizer, cache, writing)) if fast else model), tokenizer


def cache(
    model: Any,
    spec: str | CachePlan | None = None,
    max_length: int | None = None,
    *,
    tokenizer: Any = None,
    padding: torch.Tensor | None = None,
) -> CodedCache:
    """A key-value cache of codes, for `model.generate(..., past_key_values=qpalette.cache(model, "vq-3"))`.

    model: a transformers causal language model, quantized or not. spec: a code for keys and values, "vq-3", "nuq-4",
    "vq4-2", or one for each, "vq-3/vq-2.5"; "white:" before it needs no calibration; ",sinks=N,window=N" after it says
    how many of the first and of the newest tokens are exact (4 and 0); or a plan, or a plan file; None: what the
    directory of the model says. max_length: tokens that each sequence has room for, by default the model's context, up
    to 4096. padding: the attention mask of prompts that are padded on the left. tokenizer: where keys are calibrated
    on text that the model writes, it writes a chat; once for a model and a context, up to a minute on a CPU.

    Raises SpecError for a spec, InputError for a prompt that is longer than the cache, UnsupportedError, naming it, for
    what is no cache of keys and values of heads: latent attention, states of linear attention, encoders.
    """
    plan = plan_for(model, spec)
    length = max_length or min(CACHE_LENGTH, context_of(model) or CACHE_LENGTH)
    transforms = transforms_for(model, tokenizer, plan, length)
    return CodedCache(model.config, plan, length, transforms, padding)


def cache_maker(
    model: Any,
    tokenizer: Any,
    spec: str | CachePlan | None,
    writing: Progress | None = None,
    length: int | None = None,
) -> CacheMaker | None:
    """Makes caches of any length, alike, whose keys are calibrated for `length` tokens, by default for what the model's
    cache was planned for; None where keys and values stay as they are. Takes and raises what `load` and `cache` do;
    `writing` is called with (tokens written, tokens in all) where the model writes a text to calibrate on.
    """
    directory = directory_of(model)
    if spec == "none" or (spec is None and stored_plan(directory) is None):
        return None
    plan = plan_for(model, spec)
    # One calibration for caches of all lengths, since the tokens of one move to the next.
    wanted = length or planned_context(directory) or CACHE_LENGTH
    transforms = transforms_for(model, tokenizer, plan, wanted, progress=writing)
    return lambda config, length: CodedTokenCache(config, length, plan, transforms)


def _to_quantize(
    path: str | Path, bits: str | float | Fraction, effort: str | None, device: torch.device
) -> tuple[Path, Any]:
    """A directory, and the config that has transformers quantize it; for a GGUF file, with which it takes none, the
    quantized copy."""
    from qpalette.integrations.on_load import Config, quantized

    config = Config(bits, effort=effort, device=str(device) if device.type == "cuda" else None)
    checkpoint = open_checkpoint(path)
    return (quantized(checkpoint, config), None) if checkpoint.format == "gguf" else (checkpoint.location, config)


def calibrate(
    model: str | Path,
    hessians: str | Path,
    text: str | Path | None = None,
    *,
    one_sided: bool = False,
    tokens: int = TOKENS,
    window: int = WINDOW,
    seed: int = 0,
    draws: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_budget_bytes: int | None = None,
    progress: Progress | None = None,
    writing: Progress | None = None,
) -> Calibration:
    """Measure the Hessians of all groups of linears of `model` into the directory `hessians`, for `quantize`.

    `model` is a directory, a .gguf file or a Hub id; `text` a UTF-8 file, of which the first `tokens` are read in
    windows of `window` tokens (less in a model of shorter context), or a file of sampled tokens. With `text` None the
    model writes it, into such a file in `hessians`. An eighth more windows is set aside (`evaluate/held_out.py`), at
    most 8 of them to measure sensitivities on. With two sides each window takes `draws` backward passes, its labels
    drawn by `seed`; `one_sided` is forward only. Interrupted, the same call goes on where it stopped.

    Besides the model there are activations of one window and at most `memory_budget_bytes` of sums on the device (see
    `collect_hessians`), by default 4 GiB, or a quarter of what a GPU has left, as a backward pass needs room beside
    them. `progress` is called with (windows read, windows to read, each as often as labels are drawn), `writing` with
    (tokens written, tokens in all). Returns what was measured on.

    Raises InputError for a text or a number that cannot be used, CheckpointError for a model that cannot be read, and
    HessianError as `collect_hessians` does.
    """
    if tokens < 2 or window < 2:
        raise InputError(f"tokens and window must be at least 2, got {tokens} and {window}")
    if draws < 1:
        raise InputError(f"the number of draws must be at least 1, got {draws}")
    where = str(parse_device(device))
    if Path(hessians).expanduser().is_file():
        raise InputError(f"{hessians} is a file: Hessians go into a directory of their own")
    if (Path(hessians).expanduser() / "config.json").exists():
        raise InputError(f"{hessians} holds a model: Hessians go into a directory of their own")
    check_text(text, model)  # a wrong file is told before minutes of loading
    checkpoint = open_checkpoint(model)
    loaded, tokenizer = load_model(checkpoint.location, where, dtype)
    keep = Path(hessians).expanduser() / f"text{TOKEN_FILE}"
    length = min(window, context_of(loaded) or window, tokens)
    count = tokens // length
    most = usual(count)
    read = windows_around(count, length, most)
    fitted, held_out = split(_windows(loaded, tokenizer, text, length * read, length, 0, keep, writing), most)
    windows = fitted[:count]
    calibration = Calibration(
        source=checkpoint.fingerprint,
        text_sha256=text_sha256(text, windows),
        tokens=sum(map(len, windows)),
        window=len(windows[0]),
        sides=1 if one_sided else 2,
        seed=0 if one_sided else seed,
        draws=1 if one_sided else draws,
    )
    store = HessianStore(hessians, calibration)
    groups = find_groups(checkpoint).groups
    store.missing(groups)  # told of another calibration in the directory before anything is written
    store.set_aside(held_out)
    budget = _memory_budget(loaded.device) if memory_budget_bytes is None else memory_budget_bytes
    collect_hessians(loaded, windows, groups, store, memory_budget_bytes=budget, progress=progress)
    return calibration


def _memory_budget(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // GPU_PARTS if device.type == "cuda" else MEMORY_BUDGET


def calibrated_sensitivities(
    model: str | Path,
    directory: str | Path,
    *,
    rotation: str = "full",
    seed: int = 0,
    rounding: Rounding = ROUNDING,
    windows: int | None = None,
    bands: int = BANDS,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Sensitivities:
    """How much KL the error that calibrated rounding leaves in each linear of `model` costs (`calibration/shaped.py`);
    and what noise in embeddings and output head costs, which are rounded without a calibration.

    `directory` was filled by `calibrate` for this model; figures are measured on the windows that it has set aside, KL
    on the first `windows` of them, for linears of a kind in `bands` runs of layers. They are kept in the directory, so
    that the same call returns at once; interrupted, it goes on where it stopped. `windows` None: what was measured
    before, however many there were, and else all of them on a GPU, 1 on a CPU. The factors of `memory_budget_bytes` of
    linears are on the device at a time, and the noise of all of them in the host's memory. `progress` is called with
    (steps done, steps in all), from the beginning for each of three parts.

    Raises HessianError when the directory cannot be used, CheckpointError for a model that cannot be read.
    """
    if windows is not None and windows < 1:
        raise InputError(f"the number of windows must be at least 1, got {windows}")
    if bands < 1:
        raise InputError(f"the number of bands must be at least 1, got {bands}")
    where, store, checkpoint = parse_device(device), HessianStore.open(directory), open_checkpoint(model)
    store.check_source(checkpoint.fingerprint)
    grouping, held_out = find_groups(checkpoint), store.held_out
    groups, tables = grouping.groups, token_tables(checkpoint)
    if missing := store.missing(groups):
        raise HessianError(f"{directory} has no Hessian of {missing[0].name}; run `qpalette calibrate` again")
    few = held_out[: windows or (len(held_out) if where.type == "cuda" else 1)]
    what = asdict(store.calibration) | asdict(rounding) | {"rotation": rotation, "noise_seed": seed}
    what |= {"windows": len(few), "bands": bands, "dtype": str(dtype).removeprefix("torch.")}
    provenance = {
        "qpalette": version("qpalette"),
        "method": SHAPED,
        "held_out_sha256": hashlib.sha256(torch.cat(held_out).numpy().tobytes()).hexdigest(),
        **{key: str(value) for key, value in what.items()},
    }
    kept = store.directory / SENSITIVITIES
    known = _measured_before(kept, provenance, besides=HOW_WELL if windows is None else ())
    if known is not None and known.values.keys() >= set(tables):
        return known
    loaded, _ = load_model(checkpoint.location, str(where), dtype)
    partial = PartialFigures(kept.with_name(kept.name + ".partial"), provenance)
    options: dict[str, Any] = {"partial": partial, "progress": progress}
    if known is None:
        budget = _memory_budget(loaded.device) if memory_budget_bytes is None else memory_budget_bytes
        noise = ShapedNoise(loaded, groups, store, rounding, rotation, seed)
        prior = curvatures(loaded, held_out, noise, memory_budget_bytes=budget, seed=seed, **options)
        values, curve = measured_sensitivities(Divergence(loaded, few, bands), noise, prior, bands=bands, **options)
        linears = (
            SensitiveLinear(shape, group.name, values[shape.name]) for group in groups for shape in group.linears
        )
        known = Sensitivities(tuple(linears), provenance, tuple(curve))
    white = perturbation_sensitivities(loaded, few, tables, seed=seed, **options)
    shapes = {group.name: group.linears[0] for group in grouping.optional}
    beside = (SensitiveLinear(shapes[name], name, white[name], listed=False) for name in tables)
    found = replace(known, linears=(*known.linears, *beside))
    write_whole(kept, found.to_json())
    partial.remove()
    return found


def cache_sensitivities(
    model: str | Path,
    directory: str | Path,
    context: int,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[SensitiveStream, ...]:
    """What errors in keys and values cost in a cache of `context` tokens, on the windows that the calibration in
    `directory` has set aside. They are kept there. Raises as `stream_sensitivities`."""
    store = HessianStore.open(directory)
    kept = store.directory / f"streams-{context}.json"
    if kept.exists():
        return streams_of(json.loads(kept.read_text(encoding="utf-8")), str(kept))
    loaded, tokenizer = load_model(open_checkpoint(model).location, str(device))
    found = stream_sensitivities(loaded, tokenizer, store.held_out, context=context, progress=progress)
    write_whole(kept, json.dumps(streams_to_json(found)))
    return found


def _measured_before(file: Path, provenance: Mapping[str, str], besides: Sequence[str]) -> Sensitivities | None:
    """What `file` has, if it comes from the same, `besides` some facts that may differ."""
    if not file.exists():
        return None
    found = Sensitivities.read(file)
    facts = (provenance.keys() | found.provenance.keys()) - set(besides)
    alike = all(found.provenance.get(key) == provenance.get(key) for key in facts)
    return found if alike else None


def measure_sensitivities(
    model: str | Path,
    out: str | Path,
    text: str | Path | None = None,
    *,
    method: str = "fisher",
    tokens: int | None = None,
    window: int = WINDOW,
    distortion: float = DISTORTION,
    cache: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    writing: Progress | None = None,
) -> Sensitivities:
    """Measure the sensitivity of every linear of `model`, embeddings and output head included, into the JSON `out`.

    `model` is a directory, a .gguf file or a Hub id; `text` a UTF-8 file, of which the first `tokens` are read in
    windows of `window` tokens, or None: the model itself writes the text, into `out`.tokens.json, from which others
    may read it. `method` is "fisher", one backward pass, or "perturbation", noise of `distortion` into one linear after
    the other. With `cache` keys and values of each layer are measured, too, by another backward pass. Interrupted, the
    same call goes on where it stopped, from `out`.partial. `progress` is called with (steps done, steps in all),
    `writing` with (tokens written, tokens in all).

    Raises InputError for a method, text or number that cannot be used, CheckpointError for a model that cannot be read.
    """
    if method not in METHODS:
        raise InputError(f"'{method}' is no method: choose {' or '.join(METHODS)}")
    if not 0 < distortion < 1:
        raise InputError(f"the distortion of the noise must lie between 0 and 1, got {distortion:g}")
    where, target = str(parse_device(device)), Path(out).expanduser()
    if not target.absolute().parent.is_dir():
        raise InputError(
            f"{target.absolute().parent} does not exist; make it, or choose another place for {target.name}"
        )
    if target.is_dir():
        raise InputError(f"{target} is a directory; name a file to write")
    check_text(text, model)  # a wrong file is told before minutes of loading
    checkpoint = open_checkpoint(model)
    loaded, tokenizer = load_model(checkpoint.location, where, dtype)
    keep = target.with_name(target.name + TOKEN_FILE)
    windows = _windows(loaded, tokenizer, text, tokens or SENSITIVITY_TOKENS[method], window, seed, keep, writing)
    provenance = {
        "qpalette": version("qpalette"),
        "method": method,
        "source": checkpoint.fingerprint,
        "text": "sampled" if text is None else Path(text).name,
        "tokens_sha256": hashlib.sha256(torch.cat(list(windows)).numpy().tobytes()).hexdigest(),
        "tokens": str(sum(map(len, windows))),
        "window": str(len(windows[0])),
        "seed": str(seed),
        **({"distortion": repr(distortion)} if method == "perturbation" else {}),
    }
    linears = _measurable(loaded, checkpoint)
    partial = PartialFigures(target.with_name(target.name + ".partial"), provenance)
    names = [linear.name for linear in linears]
    if method == "fisher":
        values = fisher_sensitivities(loaded, windows, names, seed=seed, partial=partial, progress=progress)
    else:
        values = perturbation_sensitivities(
            loaded, windows, names, distortion=distortion, seed=seed, partial=partial, progress=progress
        )
    measured = tuple(replace(linear, sensitivity=values[linear.name]) for linear in linears)
    streams = stream_sensitivities(loaded, tokenizer, windows, seed=seed, progress=progress) if cache else ()
    found = Sensitivities(measured, provenance, streams=streams)
    write_whole(target, found.to_json())
    partial.remove()
    return found


def _windows(
    model: Any,
    tokenizer: Any,
    text: str | Path | None,
    tokens: int,
    window: int,
    seed: int,
    keep: Path,
    writing: Progress | None,
) -> list[torch.Tensor]:
    """The first `tokens` of a text, or as many that the model writes into `keep`."""
    if tokens < 2 or window < 2:
        raise InputError(f"tokens and window must be at least 2, got {tokens} and {window}")
    length = min(window, context_of(model) or window, tokens)
    return model_windows(text, model, tokenizer, length, tokens // length, seed=seed, keep=keep, progress=writing)


def _measurable(model: object, checkpoint: Checkpoint) -> list[SensitiveLinear]:
    """The linears that are quantized, then embeddings and output head where they are not among them."""
    linears = [
        SensitiveLinear(shape, group.name, 0.0) for group in find_groups(checkpoint).groups for shape in group.linears
    ]
    listed = {linear.name for linear in linears}
    for name in embeddings_of(model):
        if name not in listed:
            rows, columns = weights_of(model, [name])[name].values.shape  # type: ignore[arg-type]
            linears.append(SensitiveLinear(LinearShape(name, rows, columns), name, 0.0, listed=False))
    return linears
