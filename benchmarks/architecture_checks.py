"""What is checked of one class: a tiny model is quantized, loaded, run, saved, exported, and compared at each step.

A check is true, false, or absent where it could not be tried:

  said               every matrix left in 16 bits has a reason
  no_tensor_lost     names, shapes and values of the dequantized model's state against the original's
  equals_export      logits of the packed model = logits of `export --to f32` loaded by transformers alone
  equals_dequantize  ... = logits of model.dequantize()
  near_original      correlation with the original's logits >= 0.85, or what Gaussian noise of the same size leaves
  generates          5 greedy tokens, the same as the exported model's
  saves              save_pretrained, reload: equal logits
  bf16               loads and runs in bfloat16 (only where the original does), correlation with its float32 >= 0.95
"""

from __future__ import annotations

import copy
import math
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import reinitialise, tiny_config
from torch import Tensor, nn

import qpalette
from qpalette.evaluate.loading import read_model
from qpalette.formats import Artifact, DequantizedCheckpoint, open_artifact
from qpalette.models import find_groups, tensors_of, token_tables
from qpalette.storage import Checkpoint, export_checkpoint, open_checkpoint

SPEC = "tcq-4-L12"
EQUAL = 1e-3  # of the largest logit: decoded weights in float32, in another order of sums
NEAR, NEAR_IN_BFLOAT16 = 0.85, 0.95
AUTO = {"causal": "AutoModelForCausalLM", "image": "AutoModelForImageTextToText", "seq2seq": "AutoModelForSeq2SeqLM"}
NOT_LANGUAGE = re.compile(
    r"merger|downsampl|vision|visual|audio|image|multi_modal|(^|\.)mm_|speech|vq|codec|qformer|perceiver|resampler"
    r"|connector|projector|vit|encoder\.conv|t2u|vocoder|aligner|protein"
)
HEADS = re.compile(
    r"(^|\.)(lm_head|output_layer|embed_out|pred_layer|lm_loss|cls\.predictions\.decoder|generator_lm_head"
    r"|output_projection|proj_out|lm_head\.decoder)(\.|$)"
)
Inputs = dict[str, Any]
NO_MATRIX = re.compile(r"bias|A_log")  # of two dimensions or more, but added or exponentiated


def check_class(kind: str, model_type: str, folder: Path, tables: bool = False) -> dict[str, Any]:
    """One row of the table: shares, checks, and of every stage that failed its error. With `tables` embeddings and
    output head are packed, too."""
    row: dict[str, Any] = {"kind": kind, "type": model_type, "checks": {}, "failures": {}}
    start = time.perf_counter()
    _Class(getattr(transformers, AUTO[kind]), model_type, folder, row, tables).run()
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


class _Class:
    def __init__(self, auto: Any, model_type: str, folder: Path, row: dict[str, Any], tables: bool) -> None:
        self.auto, self.model_type, self.row, self.checks = auto, model_type, row, row["checks"]
        self.tables = tables
        self.source, self.out, self.plain, self.again = (folder / name for name in ("source", "out", "plain", "again"))
        self.inputs: Inputs | None = None
        self.original: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{re.sub(r'.*/(qpalette|site-packages)/', '', frame.filename)}:{frame.lineno}"
            self.row["failures"][name] = f"{type(error).__name__}: {str(error)[:300]} ({place})"

    def failed(self, *stages: str) -> bool:
        return any(stage in self.row["failures"] for stage in stages)

    def run(self) -> None:
        with self.stage("build"):
            self.write_source()
        if self.failed("build"):
            return
        with self.stage("quantize"):
            also = token_tables(open_checkpoint(self.source)) if self.tables else ()
            report = qpalette.quantize(self.source, self.out, spec=SPEC, also=also)
            self.row["bits"] = round(float(report.rate), 3)  # type: ignore[union-attr]
        if self.failed("quantize"):
            return
        artifact, checkpoint = open_artifact(self.out), open_checkpoint(self.source)
        with self.stage("lost in files"):
            self.check_files(artifact, checkpoint)
        with self.stage("load"):
            quantized = self.load(self.out)
        with self.stage("qpalette.load"):
            assert type(read_model(self.out, {})) is type(self.original), "it is of another class"
        decoded = None
        with self.stage("export"):
            decoded = self.export(artifact, checkpoint)
        if self.failed("load"):
            return
        if self.inputs is not None:
            self.check_run(quantized, decoded)
        with self.stage("save"):
            self.check_saved(quantized)
        with self.stage("dequantize"):
            self.check_dequantized(quantized)

    def write_source(self) -> None:
        torch.manual_seed(0)
        model = self.auto.from_config(tiny_config(self.model_type)).eval()
        self.row["class"] = type(model).__name__
        if type(model.config) not in self.auto._model_mapping:
            self.auto = type(model)  # its auto class makes it of another config than it saves
        reinitialise(model)
        with self.stage("forward"):
            self.inputs = inputs_of(model)
        model.save_pretrained(self.source)
        self.original, found = self.auto.from_pretrained(self.source, trust_remote_code=False, output_loading_info=True)
        self.original.eval()
        assert not found["missing_keys"], f"transformers finds {len(found['missing_keys'])} tensors not in its own save"

    def load(self, directory: Path, **options: Any) -> Any:
        return self.auto.from_pretrained(directory, trust_remote_code=False, **options).eval()

    def check_files(self, artifact: Artifact, checkpoint: Checkpoint) -> None:
        """Every tensor that is not packed is there as it was, and every matrix among them has a reason."""
        packed = {tensor for name in artifact.records for tensor in tensors_of(checkpoint, name)}
        reasons = find_groups(checkpoint).reasons
        kept = [name for name in checkpoint.tensors if name not in packed]
        self.checks["said"] = all(reasons.get(n) for n in kept if len(checkpoint.tensors[n].shape) > 1)
        lost = [n for n in kept if n not in artifact.stored or not torch.equal(artifact.read(n), checkpoint.read(n))]
        assert not lost, f"{len(lost)} tensors are not as they were: {lost[:3]}"

    def export(self, artifact: Artifact, checkpoint: Checkpoint) -> Any:
        export_checkpoint(DequantizedCheckpoint(artifact, torch.float32), self.plain)
        found = ({n: tuple(i.shape) for n, i in c.tensors.items()} for c in (open_checkpoint(self.plain), checkpoint))
        exported, wanted = found
        assert exported == wanted, f"export has other tensors: {sorted(exported.items() ^ wanted.items())[:3]}"
        return self.load(self.plain)

    def check_run(self, quantized: Any, decoded: Any) -> None:
        assert self.inputs is not None
        with self.stage("run"):
            wanted, self.logits = logits_of(self.original, self.inputs), logits_of(quantized, self.inputs)
            found = self.row["correlation"] = round(correlation(self.logits, wanted), 4)
            if decoded is not None:
                self.checks["equals_export"] = relative(self.logits, logits_of(decoded, self.inputs)) <= EQUAL
            if found < NEAR and decoded is not None:
                models = (noisy(self.original, decoded, seed) for seed in range(3))
                self.row["noise"] = [round(correlation(logits_of(model, self.inputs), wanted), 4) for model in models]
            self.checks["near_original"] = found >= min(NEAR, *self.row.get("noise", [NEAR])) - 0.02 * (found < NEAR)
        if self.failed("run"):
            self.inputs = None
            return
        with self.stage("generate"):
            self.check_generates(quantized, decoded)
        with self.stage("bf16"):
            self.check_bfloat16()

    def check_generates(self, quantized: Any, decoded: Any) -> None:
        try:
            reference = self.tokens(decoded or self.original)
        except Exception as error:
            self.row["original cannot generate"] = str(error)[:200]
            return
        self.checks["generates"] = decoded is None or torch.equal(self.tokens(quantized), reference)

    def tokens(self, model: Any) -> Tensor:
        torch.manual_seed(3)
        given = {name: value.clone() for name, value in _tensors(self.inputs).items() if "decoder_" not in name}
        return model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1)

    def check_bfloat16(self) -> None:
        assert self.inputs is not None
        source = self.plain if self.plain.exists() else self.source
        try:
            half = logits_of(self.load(source, dtype=torch.bfloat16), self.inputs)
        except Exception as error:
            self.row["original cannot run in bf16"] = str(error)[:200]
            return
        found = correlation(logits_of(self.load(self.out, dtype=torch.bfloat16), self.inputs), self.logits)
        self.checks["bf16"] = found >= min(NEAR_IN_BFLOAT16, correlation(half, self.logits) - 0.05)

    def check_saved(self, quantized: Any) -> None:
        quantized.save_pretrained(self.again)
        reloaded = self.load(self.again)
        if self.inputs is not None:
            self.checks["saves"] = torch.equal(logits_of(reloaded, self.inputs), self.logits)

    def check_dequantized(self, quantized: Any) -> None:
        linears = linear_like(self.original)
        whole = quantized.dequantize() or quantized
        changed, self.checks["no_tensor_lost"] = self.compare(whole.state_dict())
        language = {n: w for n, w in linears.items() if not NOT_LANGUAGE.search(n) and not HEADS.search(n)}
        for share, among in (("share_language", language), ("share_linear", linears)):
            packed = sum(weights for name, weights in among.items() if name in changed)
            self.row[share] = round(packed / max(1, sum(among.values())), 4)
        left: dict[str, int] = {}
        for name in language.keys() - changed:
            kind = re.sub(r"\d+", "*", name)
            left[kind] = left.get(kind, 0) + language[name]
        self.row["left"] = dict(sorted(left.items(), key=lambda each: -each[1])[:6])
        if self.inputs is not None:
            self.checks["equals_dequantize"] = relative(logits_of(whole, self.inputs), self.logits) <= EQUAL

    def compare(self, after: dict[str, Tensor]) -> tuple[set[str], bool]:
        """(names of what was quantized; whether every tensor is there, and is what it was, or close to it)."""
        before = self.original.state_dict()
        changed = {n for n in before.keys() & after.keys() if not torch.equal(before[n].to(after[n].dtype), after[n])}
        wrong = [n for n in changed if before[n].shape != after[n].shape or not _error(before[n], after[n]) < 0.02]
        if wrong or before.keys() != after.keys():
            self.row["state"] = [*wrong, *(before.keys() ^ after.keys())][:5]
        return changed, "state" not in self.row


def inputs_of(model: Any) -> Inputs:
    """The first inputs that give finite logits. Raises RuntimeError with the first failure."""
    failures = []
    for inputs in _recipes(model.config):
        try:
            logits = logits_of(model, inputs)
            assert bool(logits.isfinite().any()), "logits are not finite"
            assert float(logits.std()) > 0, "logits are constant"
            return inputs
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    raise RuntimeError(f"no inputs that run: {failures[0]}")


def _recipes(config: Any) -> Iterator[Inputs]:
    torch.manual_seed(1)
    ids, decoder = torch.randint(20, 180, (1, 12)), torch.randint(20, 180, (1, 6))
    mask = torch.ones_like(ids)
    yield {"input_ids": ids}
    yield {"input_ids": ids, "decoder_input_ids": decoder}
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size = getattr(vision, "image_size", 32) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn(1, getattr(vision, "num_channels", 3) or 3, height, width)
    yield {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    yield {"input_ids": ids, "use_cache": False}
    images = torch.ones(1, 12, 1, dtype=torch.long)
    yield {"pixel_values": pixels[None], "input_ids": ids, "attention_mask": mask, "image_attention_mask": images}
    yield {"pixel_values": pixels, "decoder_input_ids": ids}
    patches = torch.randn(1, 8, 2 + (getattr(vision, "patch_embed_hidden_size", None) or 16 * 16 * 3)).abs()
    yield {"flattened_patches": patches, "decoder_input_ids": ids}
    yield {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
    yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    yield {"pixel_values": pixels, "input_ids": ids, "qformer_input_ids": ids}
    frames = pixels[:, None].repeat(1, 2, 1, 1, 1)
    yield {"pixel_values": frames, "input_ids": ids, "attention_mask": mask, "qformer_input_ids": ids}
    yield {"input_ids": ids, "bbox": torch.zeros(1, 12, 4), "decoder_input_ids": ids}
    places = getattr(config, "latent_query_num", 0)
    wide = torch.cat([ids[:, :1].repeat(1, places), ids], dim=1)
    in_image = (torch.arange(places + 12) < places).long()[None]
    yield {"pixel_values": pixels, "input_ids": wide, "image_embeds_position_mask": in_image}


def logits_of(model: Any, inputs: Inputs) -> Tensor:
    torch.manual_seed(3)
    with torch.inference_mode():
        logits = model(**inputs).logits
    return (logits[0] if isinstance(logits, tuple) else logits).float()


def linear_like(model: Any) -> dict[str, int]:
    """Weights that multiply, but for the output head: of linears, Conv1D, matrices and stacks of other modules."""
    linears, seen = {}, {id(getattr(model.get_output_embeddings(), "weight", None))}
    for prefix, module in model.named_modules():
        multiplies = not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))
        for name, parameter in module.named_parameters(recurse=False):
            matrix = parameter.ndim in (2, 3) and min(parameter.shape[-2:]) >= 2 and not NO_MATRIX.search(name)
            if matrix and multiplies and id(parameter) not in seen and "embed" not in type(module).__name__.lower():
                linears[f"{prefix}.{name}".lstrip(".")] = parameter.numel()
            seen.add(id(parameter))
    return linears


def noisy(original: Any, decoded: Any, seed: int) -> Any:
    """`original` with Gaussian noise of the size of each weight's error: some random models are that sensitive."""
    result, after = copy.deepcopy(original), dict(decoded.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            size = (parameter - after[name]).float().square().mean().sqrt()
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return result


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    keep = a.isfinite() & b.isfinite() & (b.abs() < 1e20)
    a, b = a[keep] - a[keep].mean(), b[keep] - b[keep].mean()
    return float((a @ b) / (a.norm() * b.norm() + 1e-30))


def relative(a: Tensor, b: Tensor) -> float:
    keep = a.isfinite() & b.isfinite() & (b.abs() < 1e20)
    return (
        float((a[keep] - b[keep]).abs().max() / b[keep].abs().max().clamp_min(1e-30)) if bool(keep.any()) else math.inf
    )


def _error(before: Tensor, after: Tensor) -> float:
    before = before.float()
    return float((before - after.float()).square().mean() / before.square().mean().clamp_min(1e-30))


def _tensors(inputs: Inputs | None) -> dict[str, Tensor]:
    return {name: value for name, value in (inputs or {}).items() if isinstance(value, Tensor)}
