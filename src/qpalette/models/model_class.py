"""The class that transformers has for a checkpoint's config, built without memory for its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from qpalette.core.text import first_line

MAX_REPEATS = 1000  # a corrupt count must not have us build a model of a billion layers or experts
_REPEATED = re.compile(r"(?!.*(size|dim|channel|width)).*(layer|expert|block|depth|stage).*")
# transformers' auto classes and their tables of classes by config, in the order in which they are asked.
AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a Hugging Face config that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and inner else config


def class_of(config: Any) -> type[Any] | None:
    """The class that generates text with a config of transformers: the one that its `architectures` name, or else the
    first of transformers' auto classes. None when there is none."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        takes = getattr(found, "config_class", None)
        if isinstance(takes, type) and isinstance(config, takes) and found.can_generate():  # type: ignore[union-attr]
            return found
    return next((found for auto in AUTO if (found := _class_in(auto, config)) is not None), None)


def _class_in(auto: str, config: Any) -> type[Any] | None:
    """What one auto class makes of a config."""
    import transformers

    mapping = getattr(transformers, AUTO[auto], {})
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def class_name(config: Mapping[str, Any]) -> str:
    """What a program imports from transformers to open a model with this config.json: an auto class that makes the
    class of it, or else that class."""
    model = model_of(config)
    if model is None:
        return next(iter(AUTO))
    return next((auto for auto in AUTO if _class_in(auto, model.config) is type(model)), type(model).__name__)


def config_for(found: type[Any], config: Any) -> Any:
    """The config that a class takes: the whole, or its text part where the class is that of the text alone."""
    text = config.get_text_config()
    alone = isinstance(text, found.config_class) and not isinstance(config, found.config_class)
    return text if alone else config


def build_on_meta(config: Mapping[str, Any]) -> Any | None:
    """The model of a Hugging Face config before anything in it is packed, on the meta device; None when transformers
    has no class for it or cannot build it."""
    return _built(config)[0]


def why_not_built(config: Mapping[str, Any]) -> str:
    """What hinders `build_on_meta`, as part of one line."""
    return _built(config)[1]


def _built(config: Mapping[str, Any]) -> tuple[Any | None, str]:
    """The model; or None, and why."""
    from transformers import AutoConfig

    if reason := too_many(config):
        return None, reason
    plain = {key: _value(each) for key, each in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        parsed = AutoConfig.for_model(**plain)
        found = class_of(parsed)
        if found is None:
            return None, "no class of it generates text"
        with torch.device("meta"):
            return found._from_config(config_for(found, parsed)).eval(), ""
    except Exception as error:  # whatever a model class raises on a config that is incomplete, or of another release
        return None, f"{type(error).__name__}: {first_line(error)}"


def too_many(config: Mapping[str, Any]) -> str | None:
    """Why a model of this config is not to be built, as part of one line: a count in it cannot be true. None: build."""
    repeats = _repeats(config)
    return f"{repeats} layers or experts, and {MAX_REPEATS} are the most" if repeats > MAX_REPEATS else None


def _repeats(config: Mapping[str, Any]) -> int:
    """The largest number in a config, nested ones too, that may say how often a module is there."""
    inner = [_repeats(value) for value in config.values() if isinstance(value, Mapping)]
    counts = [value for key, value in config.items() if type(value) is int and _REPEATED.fullmatch(key)]
    return max((0, *inner, *counts))


def _value(field: Any) -> Any:
    """A field of config.json; numbers that JSON has not are there as {"__float__": "Infinity"}."""
    if isinstance(field, Mapping):
        return float(field["__float__"]) if field.keys() == {"__float__"} else {k: _value(v) for k, v in field.items()}
    return [_value(each) for each in field] if isinstance(field, list) else field


def model_of(config: Mapping[str, Any]) -> Any | None:
    """`build_on_meta`, kept for the next who asks: not to be changed."""
    return _model_of(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _model_of(config_json: str) -> Any | None:
    return build_on_meta(json.loads(config_json))
