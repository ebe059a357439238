"""A conversation of ten turns as `qpalette chat` holds it, beside transformers' own eager loop.

    python benchmarks/conversation.py ARTIFACT [--device cuda] [--compile background]

Each turn is answered twice, from the same history: by the fast `generate`, whose time is told, and by the plain one.
Where the greedy tokens part, the plain model in float32 says how near the two were: it reads the turn up to there.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from report import device_name, report

import qpalette
from qpalette.cli.answer import Message, prompt_of, stream_answer

TURNS = (
    "Hello! Who are you?",
    "Name three rivers in Europe.",
    "Which of them is the longest?",
    "Tell me a story about a fisherman who lives beside it.",
    "What was his name?",
    "Let him find something in the river.",
    "Explain why the sky is blue, as he would.",
    "Now write the same as a poem.",
    "How many lines did you write?",
    "Thank you. Say goodbye.",
)


def main(
    artifact: str,
    device: str = "cuda",
    compile: Annotated[str, typer.Option(help="never, background or now.")] = "background",
    tokens: int = 96,
    dtype: str = "float16",
    name: str = "conversation",
) -> None:
    kind = getattr(torch, dtype)
    fast, tokenizer = qpalette.load(artifact, device=device, dtype=kind, fast=True, compile=compile)
    plain, _ = qpalette.load(artifact, device=device, dtype=kind)
    judge, _ = qpalette.load(artifact, device=device, dtype=torch.float32)
    history: list[Message] = []
    rows = []
    for turn, text in enumerate(TURNS, 1):
        history.append({"role": "user", "content": text})
        prompt = prompt_of(tokenizer, history)
        answer = stream_answer(fast, tokenizer, prompt, tokens, 0.0, lambda _: None)
        eager = stream_answer(plain, tokenizer, prompt, tokens, 0.0, lambda _: None)
        rows.append(
            {
                "turn": turn,
                "prompt": answer.prompt_tokens,
                "tokens": answer.tokens,
                "first token s": answer.prompt_seconds,
                "tokens/s": answer.tokens_per_second or 0.0,
                "eager first token s": eager.prompt_seconds,
                "eager tokens/s": eager.tokens_per_second or 0.0,
            }
            | parting(judge, tokenizer, prompt, answer.text, eager.text)
        )
        history.append({"role": "assistant", "content": answer.text})
    report(name, device_name(device), rows, artifact=artifact.rpartition("/")[2], dtype=dtype, compile=compile)
    print(json.dumps(history[:4], indent=1))


def parting(judge: Any, tokenizer: Any, prompt: torch.Tensor, one: str, other: str) -> dict[str, Any]:
    """How many tokens are the same, and where they part the gap between the two tokens' logits."""
    if one == other:
        return {"same": "all", "gap": 0.0}
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other))
    shorter = min(len(first), len(second))
    same = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    ids = torch.cat([prompt, torch.tensor([first[:same]], dtype=prompt.dtype)], dim=1).to(judge.device)
    with torch.no_grad():
        logits = judge(ids).logits[0, -1].float()
    ends = [tokens[same] if same < len(tokens) else tokenizer.eos_token_id for tokens in (first, second)]
    return {"same": str(same), "gap": float((logits[ends[0]] - logits[ends[1]]).abs())}


if __name__ == "__main__":
    typer.run(main)
