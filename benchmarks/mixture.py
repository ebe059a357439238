"""A mixture of experts that is trained, then quantized: what calibration, a plan, and a rate for each expert are worth.

    python benchmarks/mixture.py --train TRAIN --text TEST --device cuda [--steps 400] [--bits 2.5 --bits 3]

A Qwen3-MoE of 8 experts, top 2, some 20 M parameters, trained on TRAIN with its own byte-pair tokenizer. KL from it is
measured on TEST. Each budget, everything counted: data-free and on both sides, uniform; planned, with the experts of a
layer sharing their specs, in tiers, and each with its own. The model stays in `--work`.

    python benchmarks/mixture.py --dense --train TRAIN --device cuda --work DIR [--width 320]

trains a Qwen2 of about that size, whose keys have large biases, in `DIR/model`, and nothing else: for
`benchmarks/cache.py`, and of 512, of which llama.cpp's blocks of 256 are parts, for `benchmarks/cpu_peers.py`.
"""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import device_name, report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen3MoeConfig

import qpalette
from qpalette.api import calibrated_sensitivities
from qpalette.calibration import HessianStore
from qpalette.evaluate import bits_per_weight, evaluate_models, load_model, token_windows
from qpalette.pipeline.planning import make_plan
from qpalette.plan import EXPERTS, Budget, Plan, Space, palette_of
from qpalette.storage import open_checkpoint

SIZES: dict[str, Any] = {
    **{"hidden_size": 320, "moe_intermediate_size": 448, "num_hidden_layers": 6, "num_experts": 8},
    **{"num_experts_per_tok": 2, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 64},
    **{"norm_topk_prob": True, "output_router_logits": True, "router_aux_loss_coef": 0.01, "tie_word_embeddings": True},
}
DENSE: dict[str, Any] = {
    **{"intermediate_size": 1024, "num_hidden_layers": 10},
    **{"tie_word_embeddings": True, "max_position_embeddings": 2048},
}
HEAD = 64  # of the dense one
KEY_BIAS = 8.0  # they begin so far from 0: training alone leaves them small, and those of Qwen2 are not
VOCABULARY, RATE, TOGETHER = 2048, 1e-3, 8192  # tokens of a step
WINDOW, LONG = 256, 2048  # tokens of a text: of the mixture; of the other one, as long as its cache is measured


def tokenizer_of(text: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def train(text: Path, directory: Path, device: str, steps: int, width: int = 0) -> dict[str, float]:
    """Writes the checkpoint, of a mixture or, with a `width`, a dense one; returns what it cost, and its last loss."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(text)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"], device=device)
    config: Any = Qwen3MoeConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **SIZES)
    if width:
        heads = {"num_attention_heads": width // HEAD, "num_key_value_heads": width // HEAD}
        config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=width, **heads, **DENSE)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(device)
    for layer in model.model.layers if width else ():
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=KEY_BIAS)
    window = LONG if width else WINDOW
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    start, loss = time.perf_counter(), torch.zeros(())
    for step in range(steps):
        first = torch.randint(0, len(ids) - window, (TOGETHER // window, 1), device=device)
        chosen = ids[first + torch.arange(window, device=device)]
        loss = model(input_ids=chosen, labels=chosen).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)
    if not width:
        model.config.output_router_logits = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"seconds to train": round(time.perf_counter() - start, 1), "last loss": round(loss.item(), 3)}


def main(
    train_text: Annotated[Path, typer.Option("--train")],
    text: Annotated[Path | None, typer.Option("--text")] = None,
    dense: Annotated[bool, typer.Option("--dense")] = False,
    width: Annotated[int, typer.Option(help="Of the dense one.")] = 320,
    device: str = "cpu",
    steps: int = 400,
    bits: Annotated[list[str] | None, typer.Option()] = None,
    tokens: int = 131_072,
    windows: int = 16,
    effort: str = "standard",
    work: Path = Path("out/mixture"),
    name: str = "mixture",
) -> None:
    source, moments, facts = work / "model", work / "moments", {"steps": steps, "effort": effort, "tokens": tokens}
    if not source.exists():
        facts |= train(train_text, source, device, steps, width if dense else 0)
    if dense:
        print(facts)
        return
    if text is None:
        raise typer.BadParameter("a mixture is measured on --text")
    reference, tokenizer = load_model(source, device)
    facts["parameters"] = sum(parameter.numel() for parameter in reference.parameters())
    tests = token_windows(text, tokenizer, 1024, windows)
    qpalette.calibrate(source, moments, train_text, tokens=tokens, window=1024, device=device)
    known = calibrated_sensitivities(source, moments, device=device)
    store, checkpoint, rows = HessianStore.open(moments), open_checkpoint(source), []

    def add(bits: str, choice: str, predicted: float | None = None, **options: Any) -> None:
        out = work / f"{bits}-{choice}".replace(" ", "-")
        if not out.exists():
            qpalette.quantize(source, out, device=device, **options)
        found = evaluate_models(load_model(out, device)[0], reference, tests)
        rows.append({"bits asked": bits, "choice": choice, "bits": bits_per_weight(out), "KL": found.kl})
        rows[-1] |= {"predicted": predicted, "perplexity": found.perplexity, "original": found.reference_perplexity}
        report(name, device_name(device), rows, model="Qwen3-MoE, trained", text=text.name, **facts)

    for budget in bits or ["2.5", "3"]:
        made = {
            experts: make_plan(
                known, Budget(Fraction(budget)), Space(palette_of(effort), experts=experts), checkpoint, hessians=store
            )
            for experts in EXPERTS
        }
        uniform = made["free"].planned.uniform
        assert uniform is not None
        add(budget, "uniform, data-free", plan=Plan(uniform.specs))
        add(budget, "uniform, both sides", uniform.loss, plan=Plan(uniform.specs), calibration=moments)
        for experts, found in made.items():
            loss = found.planned.choice.loss
            add(budget, f"planned, experts {experts}", loss, plan=found.plan, calibration=moments)


if __name__ == "__main__":
    typer.run(main)
