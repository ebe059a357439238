"""Text without any data: sampled from the model itself."""

from __future__ import annotations

from typing import Any

import torch


@torch.inference_mode()
def sample_windows(model: Any, count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """`count` windows of `length` tokens that `model` writes at temperature 1, int64 [length] each.

    Every window starts after the BOS token (EOS, or token 0, in a model without one), which is not part of it, and
    goes on past an end of text, as running text does. The same model, seed and torch give the same windows.
    """
    generator = torch.Generator().manual_seed(seed)
    token = torch.full((count, 1), _start_token(model.config))
    written, cache = [], None
    for _ in range(length):
        output = model(token.to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()
        token = torch.multinomial(probabilities, 1, generator=generator)
        written.append(token)
    return list(torch.cat(written, dim=1))


def _start_token(config: Any) -> int:
    text_config = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(text_config, name, None)
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return 0
