"""What is timed: a model from disk, or one of random weights built from a config: speed does not depend on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qpalette.bench.presets import PRESETS
from qpalette.core.errors import CheckpointError, InputError, SpecError
from qpalette.core.records import LinearRecord
from qpalette.core.text import first_line
from qpalette.formats.packed import QuantizationFormat
from qpalette.formats.parts import parts_of, total_bits
from qpalette.integrations import attention as _grouped  # noqa: F401 - makes "grouped" known to transformers
from qpalette.kvcache import CachePlan
from qpalette.models import Grouping, find_groups
from qpalette.models.model_class import class_of
from qpalette.nn import QuantExperts
from qpalette.plan import Plan
from qpalette.rotate import rotation_for
from qpalette.storage import Checkpoint, TensorInfo, local_path, open_checkpoint
from qpalette.storage.base import layout_of


@dataclass(frozen=True)
class Candidate:
    """A model to time. It is not kept: two candidates need not fit on the device together."""

    name: str
    make: Callable[[], Any]
    random_weights: bool
    bits_per_weight: float | None = None  # of the quantized linears, everything counted; None where none is
    caches: tuple[CachePlan | None, ...] = (None,)  # to time it with: of codes; None: keys and values as they are
    road: str | None = None  # of its prompts: `runtime/prefill.py`; None: the present one

    def build(self) -> Any:
        """The model on its device, in evaluation mode."""
        return self.make().eval()

    def title(self, cache: CachePlan | None) -> str:
        """What it is called with one of its caches."""
        name = self.name if self.road is None else f"{self.name}, prompts {self.road}"
        return name if cache is None else f"{name}, cache {cache}"


class _Sketch(Checkpoint):
    """A checkpoint that was never written: the tensors that a config implies."""

    format = "safetensors"
    files = ()

    def __init__(self, config: Any) -> None:
        self.config = config.to_dict()
        self.tensors = layout_of(
            TensorInfo(name, tuple(tensor.shape), torch.float16)
            for name, tensor in _skeleton(config).state_dict().items()
        )

    def read(self, name: str) -> torch.Tensor:
        raise CheckpointError(f"{name} was never written: this checkpoint is a config alone")

    def save_side_files(self, directory: Path) -> None:
        raise CheckpointError("there is nothing to save: this checkpoint is a config alone")


def read_config(name: str) -> Any:
    """The transformers config of a preset ("llama-3.1-8b"), a config.json or a directory with one.

    A quantization_config in it is dropped: what is measured is said elsewhere. Raises InputError.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    try:
        if name in PRESETS:
            fields = dict(PRESETS[name])
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        if not path.exists():
            raise InputError(f"'{name}' is neither a config.json nor a preset: known are {', '.join(PRESETS)}")
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # whatever a config class raises on nonsense
        raise InputError(f"transformers cannot read the config {name} ({first_line(error)})") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def first_layers(config: Any, layers: int) -> Any:
    """The config of a model that ends after so many layers. Raises InputError for a number that it does not have."""
    present = config.num_hidden_layers
    if not 1 <= layers <= present:
        raise InputError(f"the model has {present} layers, and --layers is {layers}")
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == present and name.endswith("layer_types"):
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def config_of(model: str) -> Any:
    """The transformers config of a preset, as `read_config`, or of any checkpoint: directory, .gguf, Hub id.

    Raises InputError and CheckpointError.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if model in PRESETS or (path.exists() and path.suffix != ".gguf"):
        return read_config(model)
    return AutoConfig.for_model(**open_checkpoint(model).config)


def groups_of(config: Any, also: Sequence[str] = ()) -> Grouping:
    """The linears of a model with this config, as `find_groups` finds them in its checkpoint."""
    return find_groups(_Sketch(config), also=also)


def with_head(plan: Plan, config: Any, spec: str) -> Plan:
    """The plan, and `spec` for the output head: for the embedding, where the two are one."""
    inner = {linear.name for group in groups_of(config).groups for linear in group.linears}
    every = {linear.name for group in groups_of(config, ["lm_head"]).groups for linear in group.linears}
    return replace(plan, specs={**plan.specs, **dict.fromkeys(every - inner, spec)}, prediction={})


def records_of(config: Any, plan: Plan) -> dict[str, LinearRecord]:
    """Every linear of the plan; it may name the head, too. Raises SpecError on a name that is no matrix."""
    skeleton = _skeleton(config).state_dict()
    found = {linear.name: (group.name, linear) for group in groups_of(config).groups for linear in group.linears}
    records = {}
    for name, spec in plan.specs.items():
        weight = skeleton.get(f"{name}.weight")  # experts are parts of a tensor, and the head is in no group
        if name in found:
            group, shape = found[name][0], (found[name][1].out_features, found[name][1].in_features)
        elif weight is not None and weight.ndim == 2:
            group, shape = name, (weight.shape[0], weight.shape[1])
        else:
            raise SpecError(f"the plan names '{name}', which is no linear of this config")
        records[name] = LinearRecord(spec, *shape, rotation_for(shape[1], plan.rotation).name, plan.seed, group)
    return records


def from_directory(name: str, path: str, dtype: torch.dtype, device: torch.device, attention: str | None) -> Candidate:
    """A quantized directory, a checkpoint, a GGUF file or a Hub id, as `load_model` opens it."""
    from qpalette.evaluate import bits_per_weight, is_artifact, load_model

    place = local_path(path)

    def build() -> Any:
        model, _ = load_model(place, device, dtype)
        if attention is not None:
            with _attention_told(attention):
                model.set_attn_implementation(attention)
        return model

    return Candidate(
        name, build, random_weights=False, bits_per_weight=bits_per_weight(place) if is_artifact(place) else None
    )


def from_config(
    name: str, config: Any, plan: Plan | None, dtype: torch.dtype, device: torch.device, attention: str | None
) -> Candidate:
    """Random weights: packed codes for the linears of `plan`, `dtype` for everything else."""
    if plan is None:
        return Candidate(name, lambda: _plain(config, dtype, device, attention), random_weights=True)
    records = records_of(config, plan)
    return Candidate(
        name,
        lambda: _packed(config, records, dtype, device, attention),
        random_weights=True,
        bits_per_weight=float(total_bits(records.values()).rate),
    )


def _skeleton(config: Any) -> Any:
    """The model on the meta device: names and shapes."""
    with torch.device("meta"):
        return _class(config)._from_config(config)


def _plain(config: Any, dtype: torch.dtype, device: torch.device, attention: str | None) -> Any:
    with device, _attention_told(attention):
        return _class(config)._from_config(config, dtype=dtype, **_attention(attention))


def _class(config: Any) -> Any:
    """Raises InputError when transformers has no class that generates text with this config."""
    found = class_of(config)
    if found is None:
        raise InputError(f"transformers has no class that generates text from a config of type '{config.model_type}'")
    return found


def _packed(
    config: Any,
    records: Mapping[str, LinearRecord],
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
) -> Any:
    """Through the loader that a checkpoint goes through: its tensors are random, nothing else differs."""
    config = copy.deepcopy(config)
    config.quantization_config = QuantizationFormat.of(records, {"source": "random weights"}).to_dict()
    tensors: dict[str, torch.Tensor] = {}
    for name, record in records.items():
        tensors |= {f"{name}.{part.suffix}": part.random(record, device) for part in parts_of(record)}
    place = {"": device.index or 0} if device.type == "cuda" else {"": str(device)}
    with _attention_told(attention):
        model = type(_skeleton(config)).from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, device_map=place, **_attention(attention)
        )
    for module in model.modules():
        if isinstance(module, QuantExperts):  # of these transformers does not know how biases begin
            for bias in module.parameters(recurse=False):
                torch.nn.init.zeros_(bias)
    return model


@contextmanager
def _attention_told(name: str | None) -> Iterator[None]:
    """Raises InputError for an attention that transformers does not know, or that is not installed."""
    try:
        yield
    except (ValueError, ImportError) as error:
        if name is None:
            raise
        raise InputError(f"--attention {name}: {first_line(error)}") from error


def _attention(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"attn_implementation": name}
