"""Damages a small quantized model in every way that a file can be damaged, and reads it.

    python tests/hostile/fuzz_artifacts.py --cases 20000

A case may be read or be refused with an ArtifactError (as a source: a CheckpointError), and nothing else: no other
exception, and no allocation that the bytes on disk do not justify. The command prints how often each happened.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fuzzing import damaged_bytes, main, try_cases
from hypothesis import strategies as st
from limits import bounded
from safetensors.torch import save

from qpalette.core.errors import ArtifactError, CheckpointError
from qpalette.core.records import LinearRecord
from qpalette.formats import QuantizationFormat, expected_tensors, open_artifact
from qpalette.models import find_groups
from qpalette.storage import open_checkpoint

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
RECORDS = {UP: LinearRecord("tcq-3.25", 40, 36, "h36", 0), DOWN: LinearRecord("nuq-4", 36, 40, "h20xh2", 0)}
HOSTILE_NUMBERS = [0, -1, 1, 16, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, 1e308, float("inf"), float("nan")]
HOSTILE_WORDS = ["", "h2", "h1000000000", "tcq-3.25-L99", "nuq-" + "9" * 300, "F32", "I32", "../x", "\x00", "é" * 300]


def good_weights() -> bytes:
    tensors = {
        f"{name}.{suffix}": torch.ones(shape, dtype=dtype)
        for name, record in RECORDS.items()
        for suffix, (dtype, shape) in expected_tensors(record).items()
    }
    return save(tensors | {f"{UP}.bias": torch.zeros(40), "model.norm.weight": torch.ones(36, dtype=torch.bfloat16)})


def good_config() -> dict[str, Any]:
    sizes = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 1}
    return {"model_type": "llama", **sizes, "quantization_config": QuantizationFormat.of(RECORDS).to_dict()}


WEIGHTS, CONFIG = good_weights(), good_config()
HEADER_BYTES = int.from_bytes(WEIGHTS[:8], "little")
HEADER = json.loads(WEIGHTS[8 : 8 + HEADER_BYTES])

plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
scalars = plain | st.sampled_from([*HOSTILE_NUMBERS, *HOSTILE_WORDS])
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged_json(draw: Callable, value: Any) -> Any:
    """A copy of `value` with one to three nodes replaced, removed, doubled or renamed."""
    result = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        node = result
        while isinstance(node, (dict, list)) and len(node):
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], (dict, list)) or not len(node[key]) or draw(st.integers(0, 3)) == 0:
                how = draw(st.integers(0, 4))
                if how == 0:
                    node.pop(key)
                elif how == 1 and isinstance(node, dict):
                    node[draw(st.text(max_size=12) | st.sampled_from(HOSTILE_WORDS))] = node[key]
                elif how == 2 and isinstance(node[key], int):
                    node[key] += draw(st.integers(-2, 2))
                else:
                    node[key] = draw(json_values)
                break
            node = node[key]
    return result


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + WEIGHTS[8 + HEADER_BYTES :]


def with_quantization(value: Any) -> bytes:
    return json.dumps(CONFIG | {"quantization_config": value}).encode()


config_text = st.one_of(
    damaged_json(CONFIG).map(lambda value: json.dumps(value).encode()),
    damaged_json(CONFIG["quantization_config"]).map(with_quantization),
    damaged_bytes(json.dumps(CONFIG).encode()),
    st.integers(1, 100_000).map(lambda depth: b"[" * depth),
)
weights = st.one_of(damaged_json(HEADER).map(with_header), damaged_bytes(WEIGHTS), st.binary(max_size=64))
index = st.one_of(
    damaged_json({"weight_map": {"a": "model.safetensors"}}).map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=64),
)
cases = st.one_of(
    st.fixed_dictionaries({"config.json": config_text}),
    st.fixed_dictionaries({"model.safetensors": weights}),
    st.fixed_dictionaries({"model.safetensors": weights, "config.json": config_text}),
    st.fixed_dictionaries({"model.safetensors.index.json": index}),
)


def read_everything(directory: Path) -> str:
    """What reading it as an artifact, and then as a source, came to."""
    result = "read"
    try:
        artifact = open_artifact(directory)
        artifact.inspect()
        for name in artifact.stored:
            artifact.read(name)
        for name in artifact.records:
            artifact.read_linear(name)
    except ArtifactError as error:
        result = re.sub(r"'[^']*'|\d+|/[^ ]*", "..", str(error))[:60]
    config = directory / "config.json"
    with suppress(ValueError, RecursionError, AttributeError):  # else it stays as damaged as it is
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_bytes()).items() if "quant" not in k}))
    with suppress(CheckpointError):
        checkpoint = open_checkpoint(directory)
        for name in checkpoint.tensors:
            checkpoint.read(name)
        find_groups(checkpoint)
    return result


def check(files: dict[str, bytes], directory: Path) -> str:
    """Write the good model with `files` in place of its own, and read it. Raises AssertionError on what must not be."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    everything = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": WEIGHTS} | files
    for name, content in everything.items():
        (directory / name).write_bytes(content)
    with bounded(sum(map(len, everything.values()))):
        return read_everything(directory)


def run(count: int, derandomize: bool) -> Counter[str]:
    """Try `count` cases; how often each thing happened."""
    return try_cases(cases, check, count, derandomize)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
