"""Models of odd widths: quantize a tiny random model of the real class, load it, compare strictly, generate.

    python benchmarks/odd_widths.py [--only qwen3_moe] [--spec tcq-3-L12]

Each row is checked, not only printed: a tensor that is lost, or logits that are not those of the decoded weights, end
the command with an error. The widths are odd on purpose.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import processor, report
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import qpalette
from qpalette.formats import Artifact, DequantizedCheckpoint, open_artifact
from qpalette.models import find_groups, tensors_of
from qpalette.storage import Checkpoint, export_checkpoint, open_checkpoint

VOCABULARY = 128
IDS = torch.arange(1, 13)[None]
COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 44}


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    hidden: int
    inner: int
    extra: dict[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()


CASES = (
    Case("Llama", "llama", 96, 172),  # 11008 = 2^8 * 43
    Case("Mistral", "mistral", 80, 136),  # 17408 = 2^10 * 17
    Case("Qwen2.5 (biases)", "qwen2", 112, 148),  # 18944 = 2^9 * 37
    Case("Qwen3, head packed", "qwen3", 80, 152, also=("lm_head",)),  # 9728 = 2^9 * 19
    Case("Phi-3 (fused qkv, gate_up)", "phi3", 96, 140),  # 17920 = 2^9 * 35
    Case("Gemma 3 (tied), embedding packed", "gemma3_text", 84, 84, also=("embed_tokens",)),  # 5376 = 2^8 * 21
    Case("OLMo 2", "olmo2", 80, 108),  # 27648 = 2^10 * 27
    Case("GLM-4", "glm4", 64, 107 * 2),  # 13696 = 2^7 * 107
    Case("GPT-OSS (2880 wide, stacked experts)", "gpt_oss", 2880, 48, MOE | {"num_hidden_layers": 1}),
    Case("Mixtral (experts)", "mixtral", 64, 88, MOE),  # 2816 = 2^8 * 11
    Case("Qwen3-MoE (experts)", "qwen3_moe", 96, 96, MOE),
    Case(
        "Qwen3-Next (hybrid)",
        "qwen3_next",
        96,
        96,
        MOE
        | {
            "shared_expert_intermediate_size": 44,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Case(
        "Nemotron-H (hybrid, Mamba)",
        "nemotron_h",
        84,
        116,  # 2688 = 2^7 * 21, 3712 = 2^7 * 29
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 44,
            "moe_shared_expert_intermediate_size": 44,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "num_hidden_layers": 3,
            "n_group": 1,
            "topk_group": 1,
        },
        also=("embeddings", "lm_head"),
    ),
)


def write_model(case: Case, directory: Path) -> None:
    """A random model of the real class, saved as transformers does: experts under their names of the hub."""
    torch.manual_seed(0)
    sizes = COMMON | {"hidden_size": case.hidden, "intermediate_size": case.inner} | case.extra
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(case.model_type, **sizes), trust_remote_code=False
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)


def check(case: Case, spec: str, folder: Path) -> dict[str, Any]:
    """One row of the table. Raises AssertionError when the quantized model is not what its weights mean."""
    source, out, plain = folder / "source", folder / "out", folder / "plain"
    write_model(case, source)
    start = time.perf_counter()
    quantized: Any = qpalette.quantize(source, out, spec=spec, also=case.also)
    seconds = time.perf_counter() - start
    artifact, checkpoint = open_artifact(out), open_checkpoint(source)
    check_nothing_is_lost(artifact, checkpoint)

    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert model.dtype == torch.float32
    # Decoded without the runtime's modules, written under the source's names, and loaded by transformers alone.
    export_checkpoint(DequantizedCheckpoint(artifact, torch.float32), plain)
    decoded: Any = AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=False)
    with torch.inference_mode():
        result, wanted = model(IDS).logits, decoded(IDS).logits
        original = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)(IDS).logits
    difference, allowed = float((result - wanted).abs().max()), tolerance(artifact, wanted)
    assert difference <= allowed, f"{case.name}: logits differ by {difference}, {allowed} allowed"
    assert (wanted - original).abs().max() > allowed, "quantizing changes the model"
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(IDS, **options)
    assert torch.equal(tokens, decoded.generate(IDS, **options)), f"{case.name}: other tokens are generated"

    grouping = find_groups(checkpoint)
    parameters = sum(info.nbytes // info.dtype.itemsize for info in checkpoint.tensors.values())
    optional = sum(group.weights for group in grouping.optional)
    packed = {name: r.out_features * r.in_features for name, r in artifact.records.items()}
    of_layers = sum(weights for name, weights in packed.items() if ".layers." in name)
    carried = {name: why for name, why in grouping.reasons.items() if name in artifact.stored}
    return {
        "architecture": case.name,
        "linears": len(packed),
        "bits": float(quantized.rate),
        "of layers": f"{100 * of_layers / (parameters - optional):.1f} %",
        "of all": f"{100 * sum(packed.values()) / parameters:.1f} %",
        "difference": difference,
        "allowed": allowed,
        "generates": tokens.shape[1] - IDS.shape[1],
        "lost": 0,
        "seconds": round(seconds, 1),
        "in 16 bits": sorted({f"{re.sub(r'.*[.]layers[.][0-9]+[.]', '', n)}: {why}" for n, why in carried.items()}),
    }


def check_nothing_is_lost(artifact: Artifact, checkpoint: Checkpoint) -> None:
    """Every tensor of the source is there, byte for byte, or packed; every matrix that is not packed has a reason."""
    packed = {tensor for name in artifact.records for tensor in tensors_of(checkpoint, name)}
    reasons = find_groups(checkpoint).reasons
    for name, info in checkpoint.tensors.items():
        if name in packed:
            continue
        assert torch.equal(artifact.read(name), checkpoint.read(name)), name
        assert len(info.shape) < 2 or reasons[name], name
    assert packed <= checkpoint.tensors.keys()


def tolerance(artifact: Artifact, wanted: torch.Tensor) -> float:
    """First-order bound of the rounding along the path: each product of K terms adds K roundings of float32."""
    terms = sum(record.in_features for record in artifact.records.values())
    return torch.finfo(torch.float32).eps * terms * float(wanted.abs().max())


def main(only: Annotated[list[str] | None, typer.Option()] = None, spec: str = "tcq-3-L12") -> None:
    rows = []
    for case in CASES:
        if only and case.model_type not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(check(case, spec, Path(folder)))
    kept = {row["architecture"]: row.pop("in 16 bits") for row in rows}
    report("odd_widths" if not only else "odd_widths-some", processor(), rows, spec=spec, in_16_bits=kept)
    for name, reasons in kept.items():
        print(f"{name}: in 16 bits {'; '.join(reasons)}")


if __name__ == "__main__":
    typer.run(main)
