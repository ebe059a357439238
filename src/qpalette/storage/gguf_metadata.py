"""Config, generation config and tokenizer from the metadata of a GGUF file, with transformers' gaps filled."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qpalette.core.errors import CheckpointError
from qpalette.storage.gguf_rope import scaled_rope

logger = logging.getLogger(__name__)

# Vocabularies whose merges never cross a digit: `tokenizer.ggml.pre` names that transformers does not act upon.
DIGIT_SPLITTING = frozenset(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"))
PLAIN_BYTE_LEVEL = frozenset(("gpt-2", "mpt", "olmo", "jais", "trillion"))
# Marks of where and how the file was read; a plain directory has none of them.
NOT_CONFIG = ("_model_name_or_path", "transformers_version", "quantization_config")


def read_config(
    file: Path, dtype: torch.dtype, rope_scaling: Mapping[str, Any], rope_factors: torch.Tensor | None
) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file, whose weights will be of `dtype`.

    `rope_scaling` and `rope_factors` are what `scaled_rope` takes. Raises CheckpointError when transformers cannot tell
    the config, or cannot have the scaling.
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
    if (rope := scaled_rope(file, config, rope_scaling, rope_factors)) is not None:
        config["rope_parameters"] = rope
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
