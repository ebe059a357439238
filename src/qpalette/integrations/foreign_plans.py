"""A plan in the words of other quantizers: which of their types comes next to the rate of each linear."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import gguf
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qpalette.codes import parse_spec
from qpalette.core.errors import InputError
from qpalette.core.records import LinearRecord
from qpalette.models.experts import EXPERT
from qpalette.models.model_class import text_config

# What llama-quantize makes without an importance matrix. Blocks of 256 inputs must divide the row, or those of 32.
LLAMA_CPP_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q5_0", "Q8_0", "F16")
LLAMA_CPP_NAMES = {"mistral": "llama", "mixtral": "llama", "gpt_oss": "gpt-oss", "nemotron_h": "nemotron_h"}
EXLLAMA_RATES = range(1, 9)


@dataclass(frozen=True)
class ForeignPlan:
    """`text` is the file; `bits` and `planned_bits` the mean rates of codes over its weights, theirs and ours."""

    text: str
    tensors: int
    bits: float
    planned_bits: float


def llama_cpp_plan(config: Mapping[str, Any], records: Mapping[str, LinearRecord]) -> ForeignPlan:
    """Lines `regex=type` for `llama-quantize --tensor-type-file`, or one by one for `--tensor-type`.

    A type is the nearest in bits among those whose blocks divide the row. llama.cpp stacks the experts of a layer: they
    have one type, nearest to their mean. Raises InputError for an architecture or a linear that it has no name for.
    """
    names = _gguf_names(config)
    rates: dict[str, list[tuple[LinearRecord, Fraction]]] = {}
    for linear, record in records.items():
        expert = EXPERT.fullmatch(linear)
        stacked = f"{expert['experts']}.{expert['leaf']}" if expert else linear
        name = names.get_name(stacked)
        if name is None:
            raise InputError(f"llama.cpp has no name for '{linear}'; leave it out of the plan")
        rates.setdefault(name, []).append((record, parse_spec(record.spec).rate))
    lines, weights, bits, planned = [], 0, 0.0, 0.0
    for name, members in rates.items():
        size = sum(_weights(record) for record, _ in members)
        mean = sum(float(rate) * _weights(record) for record, rate in members) / size
        kind = _nearest_type(mean, members[0][0].in_features)
        lines.append(f"^{re.escape(name)}\\.weight$={kind.lower()}\n")
        weights, bits, planned = weights + size, bits + size * _bits(kind), planned + size * mean
    return ForeignPlan("".join(lines), len(lines), bits / weights, planned / weights)


def exllama_plan(records: Mapping[str, LinearRecord], model: str) -> ForeignPlan:
    """The YAML of exllamav3's `util/recompile.py --override`: each linear from the ready model of the nearest rate.

    Those models are called `MODEL-exl3-Nbpw`; edit the paths. EXL3 has whole bits from 1 to 8.
    """
    chosen = {name: min(EXLLAMA_RATES, key=lambda bits: abs(bits - _rate(record))) for name, record in records.items()}
    lines = ["sources:\n"]
    for bits in sorted(set(chosen.values())):
        lines += [f"  - id: {bits}bpw\n", f"    model_dir: {_quoted(f'{model}-exl3-{bits}bpw')}\n"]
    lines.append("overrides:\n")
    for name, bits in chosen.items():
        lines += [f"  - key: {_quoted(name)}\n", f"    source: {bits}bpw\n"]
    weights = sum(map(_weights, records.values()))
    planned = sum(_rate(record) * _weights(record) for record in records.values())
    bits = sum(chosen[name] * _weights(record) for name, record in records.items())
    return ForeignPlan("".join(lines), len(chosen), bits / weights, planned / weights)


def _gguf_names(config: Mapping[str, Any]) -> Any:
    kind = str(text_config(config).get("model_type", config.get("model_type", ""))).removesuffix("_text")
    wanted = LLAMA_CPP_NAMES.get(kind, kind.replace("_", ""))
    architecture = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted), None)
    layers = text_config(config).get("num_hidden_layers")
    if architecture is None or not isinstance(layers, int):
        raise InputError(f"llama.cpp has no architecture for '{kind}'")
    return gguf.get_tensor_name_map(architecture, layers)


def _nearest_type(rate: float, in_features: int) -> str:
    fitting = [kind for kind in LLAMA_CPP_TYPES if in_features % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0]
    return min(fitting, key=lambda kind: abs(_bits(kind) - rate))


def _bits(kind: str) -> float:
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * nbytes / block


def _rate(record: LinearRecord) -> float:
    return float(parse_spec(record.spec).rate)


def _weights(record: LinearRecord) -> int:
    return record.out_features * record.in_features


def _quoted(text: str) -> str:
    """A YAML string in single quotes."""
    return "'" + text.replace("'", "''") + "'"
