"""Whether every way to run a quantized model writes the same greedy tokens: transformers, vLLM, processor and GPU.

    python benchmarks/greedy_agreement.py ARTIFACT --run cpu --run vllm --vllm-python .venv-vllm/bin/python
    python benchmarks/greedy_agreement.py ARTIFACT --run cpu --run cuda --judge-device cuda

Each run writes 64 tokens after each of 8 prompts in a process of its own. The judge is the `ref` backend in float32: it
reads each run's prompts and tokens in one pass, and would itself have written the same tokens if each one is its most
likely next token. Where it is not, the gap between the judge's best logit and that token's says how near the two were.

A gap is explained by rounding if it is at most 2 e, where e bounds the error of a logit: a flip needs two logits to
move together by the gap. After n roundings of unit u, errors grow as u sqrt(n) with LAMBDA standing for the odds
(Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019, theorem
2.4: failure below 2 exp(-LAMBDA^2 / 2) per product). The run rounds every operator's result to its type, and every
product accumulates K terms in float32: e = LAMBDA max|logit| (u_type sqrt(operators) + u_float32 sqrt(sum of K)).
On a GPU a product also rounds its rotated input and its codebook to float16, whatever the type: plus
LAMBDA max|logit| u_float16 sqrt(2 linears). On a processor it may round both to bytes where the type has 16 bits: half
a step of 127.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import device_name, processor, report

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three uses of a paperclip.",
    "Translate 'good morning' into Spanish and German.",
    "What is 17 times 23? Show the steps.",
    "Tell me a short story about a fox and a well.",
    "Name the planets of the solar system in order.",
)
TOKENS = 64
LAMBDA = 5.0  # 2 exp(-12.5): seven in a million
OPERATORS = 17  # of a decoder layer: 7 linears, 2 norms, rotary, 3 in attention, activation, product, 2 sums
RUNS = ("cpu", "ref", "cuda", "vllm")
HALF_PRODUCTS = ("cuda",)  # runs whose products are of float16 values, whatever the type of the tokens
BYTE_PRODUCTS = ("cpu", "vllm")  # runs whose products may be of bytes, unless the tokens are float32
UNIT_OF_BYTES = 0.5 / 127
NAME = "greedy_agreement"


def main(
    artifact: str,
    run: Annotated[list[str], typer.Option("--run", help="cpu, ref, cuda or vllm; repeatable.")] = ["cpu"],  # noqa: B006
    dtype: str = "float32",
    tokens: int = TOKENS,
    judge_device: str = "cpu",
    vllm_python: str = sys.executable,
) -> None:
    if unknown := set(run) - set(RUNS):
        raise typer.BadParameter(f"{unknown.pop()} is not one of {', '.join(RUNS)}")
    prompts = encode_prompts(artifact)
    written = {name: write_tokens(name, artifact, prompts, tokens, dtype, vllm_python) for name in run}
    first = written[run[0]]
    rows: list[dict[str, Any]] = []
    verdicts: dict[str, dict[str, Any]] = {}
    for name, answers in written.items():
        key = json.dumps([name in HALF_PRODUCTS, name in BYTE_PRODUCTS, answers])
        verdicts[key] = verdict = verdicts.get(key) or judge(artifact, prompts, answers, dtype, judge_device, name)
        same = sum(one == other for one, other in zip(first, answers, strict=True))
        rows.append({"run": name, "type": dtype, f"prompts equal to {run[0]}'s": f"{same} of {len(prompts)}"} | verdict)
    title, device = (f"{NAME}_cuda", device_name("cuda")) if "cuda" in run else (NAME, processor())
    report(title, device, rows, artifact=Path(artifact).name, tokens=tokens, judge=judge_device)
    if not all(row["explained"] for row in rows):
        sys.exit("a difference is not explained by rounding")


def encode_prompts(artifact: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact, trust_remote_code=False)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]


def write_tokens(
    run: str, artifact: str, prompts: list[list[int]], tokens: int, dtype: str, vllm_python: str
) -> list[list[int]]:
    """The run's greedy tokens after each prompt, end-of-text tokens ignored; in a process of its own."""
    python = vllm_python if run == "vllm" else sys.executable
    request = {"run": run, "artifact": artifact, "prompts": prompts, "tokens": tokens, "dtype": dtype}
    backend = {"QPALETTE_BACKEND": run} if run != "vllm" else {}
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [python, __file__, "--worker", json.dumps(request)]
    result = subprocess.run(command, env=vllm | os.environ | backend, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"run {run} failed")
    return json.loads(result.stdout.splitlines()[-1])


def work(request: dict[str, Any]) -> list[list[int]]:
    if request["run"] == "vllm":
        return by_vllm(**request)
    return by_transformers(**request)


def by_vllm(artifact: str, prompts: list[list[int]], tokens: int, dtype: str, **_: Any) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    length = max(map(len, prompts)) + tokens
    engine = LLM(artifact, dtype=dtype, max_model_len=length, max_num_seqs=len(prompts), disable_log_stats=True)
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.inference_mode()
def by_transformers(
    run: str, artifact: str, prompts: list[list[int]], tokens: int, dtype: str, **_: Any
) -> list[list[int]]:
    model = load(artifact, "cuda" if run == "cuda" else "cpu", getattr(torch, dtype))
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        result = model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)
        answers.append(result[0, len(prompt) :].tolist())
    return answers


def load(artifact: str, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    import qpalette  # noqa: F401 - registers the method

    return AutoModelForCausalLM.from_pretrained(
        artifact, dtype=dtype, device_map=device, trust_remote_code=False
    ).eval()


@torch.inference_mode()
def judge(
    artifact: str, prompts: list[list[int]], answers: list[list[int]], dtype: str, device: str, run: str = "cpu"
) -> dict[str, Any]:
    """Where an answer first leaves what the reference would write, by how much, and whether rounding explains it."""
    os.environ["QPALETTE_BACKEND"] = "ref"
    model = load(artifact, device, torch.float32)
    texts = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(
        model.device
    )  # at the end: nothing looks there
    every = model(padded).logits
    same, first, largest, bound = 0, "", 0.0, 0.0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = every[number, len(prompt) - 1 : len(prompt) + len(answer) - 1]
        gaps = logits.max(-1).values - logits.gather(1, padded[number, len(prompt) :][: len(answer), None])[:, 0]
        places = gaps.nonzero()
        same += not len(places)
        if len(places):
            place = int(places[0])  # what follows was written after other tokens than the reference's
            largest = max(largest, float(gaps[place]))
            first = first or f"prompt {number}, token {place}, gap {float(gaps[place]):.2g}"
        bound = max(bound, 2 * logit_error(model, float(logits.abs().max()), dtype, run))
    verdict = {"prompts as ref would": f"{same} of {len(prompts)}", "first difference": first or "none"}
    return verdict | {"largest gap": largest, "tolerance": bound, "explained": largest <= bound}


def logit_error(model: Any, largest_logit: float, dtype: str, run: str = "cpu") -> float:
    """e of the introduction."""
    from qpalette.nn import QuantLinear

    inputs = [module.in_features for module in model.modules() if isinstance(module, QuantLinear)]
    operators = OPERATORS * model.config.num_hidden_layers
    relative = unit(getattr(torch, dtype)) * math.sqrt(operators) + unit(torch.float32) * math.sqrt(sum(inputs))
    if run in HALF_PRODUCTS:
        relative += unit(torch.float16) * math.sqrt(2 * len(inputs))
    if run in BYTE_PRODUCTS and dtype != "float32":
        relative += UNIT_OF_BYTES * math.sqrt(2 * len(inputs))
    return LAMBDA * largest_logit * relative


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print("\n" + json.dumps(work(json.loads(sys.argv[2]))))
    else:
        typer.run(main)
