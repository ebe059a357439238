"""The model class that transformers builds for a checkpoint: which of its modules can be packed, and where they are."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from qpalette.core.records import LinearShape

logger = logging.getLogger(__name__)

NOT_LANGUAGE = re.compile(r"vision|visual|audio|image|multi_modal|(^|\.)mm_")
LAYER_PATH = re.compile(r"(?:.*?\.)?(?P<path>(?P<layer>(?:layers|layer|blocks|block|h)\.\d+)\..+)")
MAX_LAYERS = 1000  # a corrupt count must not have us build a model of a billion layers
# One expert's linear in a checkpoint, and a tensor that stacks those of all experts.
EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<index>\d+)\.(?P<leaf>\w+)")
STACKED = re.compile(r"(?P<experts>.*\bexperts)\.(?P<leaf>gate_up_proj|up_proj|down_proj)")
# What an expert computes first, in the order in which its activation takes them; what comes last is DOWN.
FIRST = (("gate_proj", "up_proj"), ("w1", "w3"), ("gate_up_proj",), ("up_proj",))
DOWN = ("down_proj", "w2")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a Hugging Face config that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and inner else config


def build_on_meta(config: Mapping[str, Any]) -> nn.Module | None:
    """The causal language model of a Hugging Face config, without memory for its weights; None when there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = text_config(config).get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        return None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    except Exception as error:  # whatever a model class raises on a config that is incomplete, or of another release
        logger.info("transformers builds no model of %r (%s)", config.get("model_type"), error)
        return None


class Modules:
    """Finds the modules of a model by the names that a checkpoint gives to their weights.

    transformers renames while it loads: a prefix comes or goes, `block_sparse_moe` becomes `mlp`. What stays is the
    path from the numbered layer on, except for experts, of which a layer has one module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.all = dict(model.named_modules())
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._by_path: dict[str, str] = {}
        self._experts_of: dict[str, list[str]] = {}
        self._outside: dict[str, list[str]] = {}  # last part of the name -> embeddings and heads
        for name, module in self.all.items():
            match = LAYER_PATH.fullmatch(name)
            if NOT_LANGUAGE.search(name):
                continue
            if match is None and isinstance(module, nn.Embedding | nn.Linear):
                self._outside.setdefault(name.rpartition(".")[2], []).append(name)
            if match is None:
                continue
            self._by_path.setdefault(match["path"], name)
            if holds_experts(module):
                self._experts_of.setdefault(match["layer"], []).append(name)

    def find(self, name: str) -> str | None:
        """The module whose weight the checkpoint calls `name` + ".weight"."""
        candidates = (name, name.removeprefix(self._prefix), self._prefix + name)
        found = next((candidate for candidate in candidates if candidate in self.all), None)
        if found is not None:
            return found
        if match := LAYER_PATH.fullmatch(name):
            return self._by_path.get(match["path"])
        alike = self._outside.get(name.rpartition(".")[2], [])
        return alike[0] if len(alike) == 1 and not NOT_LANGUAGE.search(name) else None

    def find_experts(self, name: str) -> str | None:
        """The module that holds the expert's linear `name`."""
        expert, layer = EXPERT.fullmatch(name), LAYER_PATH.fullmatch(name)
        if expert is None or layer is None:
            return None
        exact = self.find(expert["experts"])
        if exact is not None and holds_experts(self.all[exact]):
            return exact
        candidates = self._experts_of.get(layer["layer"], [])
        return candidates[0] if len(candidates) == 1 else None


def holds_experts(module: nn.Module) -> bool:
    """Whether the weights of all experts are parameters of `module`, [experts, rows, columns] each, computed as usual:
    what `use_experts_implementation` of transformers marks, no norm after the experts."""
    if not hasattr(module, "has_gate") or getattr(module, "has_post_expert_norm", False):
        return False
    first = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    weights = (first, getattr(module, "down_proj", None))
    return all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights)


def modules_of_class(config: Mapping[str, Any]) -> Modules | None:
    """The modules of the class that a config names, without weights; None when transformers cannot build it."""
    return _modules_of_class(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _modules_of_class(config_json: str) -> Modules | None:
    model = build_on_meta(json.loads(config_json))
    return None if model is None else Modules(model)


def unstack(config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> list[LinearShape]:
    """The linear of each expert in the stacked tensor `name`; none if it is something else."""
    match, modules = STACKED.fullmatch(name), modules_of_class(config) if len(shape) == 3 else None
    if match is None or modules is None:
        return []
    # Only with gate and up in one can a reader of the packed model tell that its experts were stacked.
    holder = modules.find_experts(f"{match['experts']}.0.{match['leaf']}")
    module = None if holder is None else modules.all[holder]
    if module is None or not hasattr(module, "gate_up_proj") or tuple(getattr(module, match["leaf"]).shape) != shape:
        return []
    rows, columns = reversed(shape[1:]) if module.is_transposed else shape[1:]
    return [LinearShape(f"{match['experts']}.{index}.{match['leaf']}", rows, columns) for index in range(shape[0])]


def stored_transposed(config: Mapping[str, Any], linear: str) -> bool:
    """Whether the stacked tensor of an expert's linear holds in_features x out_features."""
    modules = modules_of_class(config)
    holder = None if modules is None else modules.find_experts(linear)
    return bool(modules and holder and modules.all[holder].is_transposed)


def why_not_packable(modules: Modules, name: str, shape: tuple[int, ...]) -> str | None:
    """Why the weight of `name`, out_features x in_features, cannot run packed; None when it can."""
    if modules.find_experts(name) is not None:
        return None
    found = modules.find(name)
    if found is None:
        return "no module of the model class"
    module = modules.all[found]
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__}, not an nn.Linear"
    return None if tuple(module.weight.shape) == shape else "of another shape than the model class has"
