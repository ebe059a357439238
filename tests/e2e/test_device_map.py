"""`device_map="auto"` places a packed model by the bytes that it has, fractions of a byte per weight included."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from tiny_model import save_pair
from transformers import AutoModelForCausalLM
from transformers.integrations import accelerate

import qpalette  # noqa: F401 - registers the method


@pytest.mark.parametrize("spec", ["nuq-3", "tcq-3.25-L12"])
def test_auto_counts_the_stored_bytes(spec, tmp_path, monkeypatch):
    packed, _ = save_pair(tmp_path, "llama", spec)
    counted, count = [], accelerate.compute_module_sizes

    def spy(*arguments, **options):
        sizes = count(*arguments, **options)
        counted.append(sizes[0][""])
        return sizes

    monkeypatch.setattr(accelerate, "compute_module_sizes", spy)
    model = AutoModelForCausalLM.from_pretrained(packed, device_map="auto")
    stored = sum(tensor.nbytes for tensor in load_file(packed / "model.safetensors").values())
    computed = sum(tensor.nbytes for name, tensor in model.named_buffers() if name.endswith("inv_freq"))
    assert counted[0] == stored + computed
