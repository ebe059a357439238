"""Config, generation config and tokenizer from the metadata of a GGUF file, with transformers' gaps filled."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import CheckpointError

logger = logging.getLogger(__name__)

# Vocabularies whose merges never cross a digit: `tokenizer.ggml.pre` names that transformers does not act upon.
DIGIT_SPLITTING = frozenset(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"))
PLAIN_BYTE_LEVEL = frozenset(("gpt-2", "mpt", "olmo", "jais", "trillion"))
# Marks of where and how the file was read; a plain directory has none of them.
NOT_CONFIG = ("_model_name_or_path", "transformers_version", "quantization_config")
# Llama 3's rotary scaling: a GGUF file keeps the resulting factors only, and these are what made them.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(file: Path, dtype: torch.dtype, rope_factors: torch.Tensor | None) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file, whose weights will be of `dtype`.

    `rope_factors` (head_dim / 2 divisors of the rotary frequencies) is the file's own tensor, if it has one.
    Raises CheckpointError when transformers cannot tell the config, or the factors are not Llama 3's.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        parsed = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # whatever a config class raises on the metadata of a damaged file
        raise CheckpointError(
            f"{file}: transformers cannot read a config from its metadata ({error}); fetch it again"
        ) from error
    config = {key: value for key, value in json.loads(parsed.to_json_string()).items() if key not in NOT_CONFIG}
    if architecture := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"]):
        config["architectures"] = [architecture]
    config["dtype"] = str(dtype).removeprefix("torch.")
    if rope_factors is not None:
        config["rope_parameters"] = _llama3_rope(file, config, rope_factors.double())
    return config


def save_generation_config(config: dict[str, Any], directory: Path) -> None:
    """Write generation_config.json with the ids of the special tokens."""
    from transformers import GenerationConfig

    ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(directory)


def save_tokenizer(file: Path, config: dict[str, Any], pre: str | None, directory: Path) -> None:
    """Write the tokenizer, with the special tokens of `config`, and its chat template.

    `pre` is the file's `tokenizer.ggml.pre` when the tokenizer is a byte-level one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # as above, for tokenizers
        raise CheckpointError(f"{file}: transformers cannot build its tokenizer ({error}); fetch it again") from error
    for kind in ("bos", "eos", "pad", "unk"):  # older transformers guess them
        token_id = config.get(f"{kind}_token_id")
        if isinstance(token_id, int):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))
    if pre is not None:
        tokenizer.clean_up_tokenization_spaces = False  # it would change what byte-level tokens decode to
        _set_pre_tokenizer(tokenizer, pre)
    tokenizer.save_pretrained(directory)


def _set_pre_tokenizer(tokenizer: Any, pre: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if pre in DIGIT_SPLITTING:
        splits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(splits)
    elif pre not in PLAIN_BYTE_LEVEL and pre not in _names_of_transformers():
        logger.warning("pre-tokenizer %r is unknown: text may be split otherwise than in training", pre)


def _names_of_transformers() -> set[str]:
    """The pre-tokenizers that the installed transformers sets by itself; older ones know none by name."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _llama3_rope(file: Path, config: dict[str, Any], factors: torch.Tensor) -> dict[str, Any]:
    """The rope_parameters that give these factors; transformers ignores the tensor, which changes the model."""
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max()), **LLAMA3_ROPE}
    half = len(factors)
    wavelengths = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    low, high, context = LLAMA3_ROPE.values()
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
    if not torch.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{file}: its rope_freqs are not those of Llama 3, and transformers has no place for them; "
            "give the model's safetensors directory instead"
        )
    return rope
