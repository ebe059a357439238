"""Peak memory while quantizing models of growing depth: bounded by the largest tensor group, not by the model.

    python benchmarks/memory.py [--hidden 1024] [--layers 2 --layers 8 --layers 32] [--workers 1]

Each model has random weights and runs in a process of its own, which is measured with its workers; what the libraries
and the compiled search take is the peak of a model of one layer with 64 hidden units, and is shown apart.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from peak_memory import peak_memory
from report import processor, report

import qpalette
from qpalette.storage import StreamingSafetensorsWriter, TensorInfo, open_checkpoint


def write_llama(
    directory: Path, hidden: int, layers: int, inner: int = 0, kv: int = 0, vocabulary: int = 256, scale: float = 1.0
) -> None:
    """A Llama of random bfloat16 weights, written tensor by tensor; heads of 64, untied with more than 256 words."""
    inner, kv, tied = inner or 2 * hidden, kv or hidden, vocabulary <= 256
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocabulary,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": kv // 64, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {"model.norm.weight": (hidden,)} | ({} if tied else {"lm_head.weight": (vocabulary, hidden)})
    for layer in range(layers):
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (inner, hidden)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    infos = [TensorInfo(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a processor draws 8 billion in a minute
    with StreamingSafetensorsWriter(directory / "model.safetensors", infos) as writer:
        for info in infos:
            writer.write(info.name, (scale * torch.randn(info.shape, device=device)).to(torch.bfloat16))


def peak_of_quantizing(source: Path, out: Path, spec: str, workers: int) -> int:
    """Bytes, of processes of their own."""
    command = [sys.executable, __file__, "--measure", source, "--out", out, "--spec", spec, "--workers", workers]
    return peak_memory(list(map(str, command)))[0]


def main(
    hidden: int = 1024,
    layers: Annotated[list[int] | None, typer.Option()] = None,
    spec: str = "tcq-3-L12",
    workers: int = 1,
    measure: Annotated[Path | None, typer.Option(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if measure is not None and out is not None:
        qpalette.quantize(measure, out, spec=spec, workers=workers)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder, "base"), 64, 1)
        base = peak_of_quantizing(Path(folder, "base"), Path(folder, "base-out"), spec, workers)
        for count in layers or [2, 8, 32]:
            source = Path(folder, f"layers-{count}")
            write_llama(source, hidden, count)
            peak = peak_of_quantizing(source, Path(folder, f"out-{count}"), spec, workers)
            checkpoint = open_checkpoint(source)
            rows.append(
                {
                    "layers": count,
                    "model MB": checkpoint.total_bytes / 1e6,
                    "largest tensor MB": max(info.nbytes for info in checkpoint.tensors.values()) / 1e6,
                    "peak MB": peak / 1e6,
                    "above libraries MB": (peak - base) / 1e6,
                }
            )
            report("memory", processor(), rows, hidden=hidden, spec=spec, workers=workers, libraries_mb=base / 1e6)


if __name__ == "__main__":
    typer.run(main)
