"""Decoded weights beside what the packages that write them decode, bit for bit. What is not installed is skipped.

The development extras have compressed-tensors and bitsandbytes; of gptqmodel and autoawq `pip install --no-deps` is
enough here, and what gptqmodel then misses (pypcre, logbar and others).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qpalette.storage import open_checkpoint
from quantized_sources import UP, Source

ROWS, COLUMNS, GROUP = 64, 128, 32


def decoded(directory: Path, tensors: dict[str, torch.Tensor], said: dict[str, Any]) -> torch.Tensor:
    source = Source({f"{UP}.{name}": tensor for name, tensor in tensors.items()}, said, torch.empty(0))
    return open_checkpoint(source.write(directory)).read(source.name)


def gaussian(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)


GROUPS = {"strategy": "group", "group_size": GROUP}
COMPRESSED = [
    *(("pack-quantized", {"num_bits": bits, **GROUPS, "symmetric": each}) for bits in (2, 4, 8) for each in (1, 0)),
    *(("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": each}) for each in (1, 0)),
    *(("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": each}) for each in (1, 0)),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}),
    ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", **GROUPS}),
    ("mxfp8-quantized", {"num_bits": 8, "type": "float", **GROUPS, "scale_dtype": torch.uint8}),
]


@pytest.mark.parametrize(("kind", "scheme"), COMPRESSED, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_tensors(kind, scheme, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**scheme)
    weight = gaussian(dtype)
    blocks = {"tensor": (ROWS, COLUMNS), "channel": (1, COLUMNS), "block": scheme.get("block_structure")}
    height, width = blocks.get(scheme["strategy"]) or (1, scheme["group_size"])
    grid = weight.view(ROWS // height, height, COLUMNS // width, width)
    low, high = grid.amin((1, 3)), grid.amax((1, 3))
    largest = torch.maximum(low.abs(), high.abs()).float()
    state = {"weight": weight}
    if kind.startswith("nvfp4"):
        state["weight_global_scale"] = (448 * 6 / largest.max()).reshape(1)
        state["weight_scale"] = (largest / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    elif kind.startswith("mx"):
        state["weight_scale"] = torch.exp2(torch.ceil(torch.log2(largest / (6 if "4" in kind else 448))))
    else:
        state["weight_scale"], zeros = calculate_qparams(low, high, args)
        state |= {} if args.symmetric else {"weight_zero_point": zeros.to(torch.int8)}
    compressor = BaseCompressor.get_value_from_registry(kind)
    whole = QuantizationScheme(targets=["Linear"], weights=args)
    stored = compressor.compress(state, whole)
    expected = compressor.decompress(stored, whole)["weight"]

    groups = {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}}
    said = {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}
    found = decoded(tmp_path, stored, said)
    assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_blocks(kind, nested, dtype, tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    codes, state = functional.quantize_4bit(gaussian(dtype), quant_type=kind, compress_statistics=nested)
    tensors = {"weight": codes} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    found = decoded(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert found.dtype == dtype
    assert torch.equal(found, functional.dequantize_4bit(codes, state))


def test_bitsandbytes_rows(tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    codes, scale, _ = functional.int8_vectorwise_quant(gaussian(torch.float16))
    found = decoded(tmp_path, {"weight": codes, "SCB": scale}, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert torch.equal(found, functional.int8_vectorwise_dequant(codes, scale).bfloat16())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptqmodel(version, bits, symmetric, ordered, tmp_path):
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    sizes = {"in_features": COLUMNS, "out_features": ROWS, "bits": bits, "group_size": GROUP}
    options = sizes | {"sym": symmetric, "desc_act": ordered, "register_buffers": True}
    linear = nn.Linear(COLUMNS, ROWS, bias=False).half()
    linear.weight.data = gaussian(torch.float16)
    groups = torch.arange(COLUMNS) // GROUP
    if ordered:
        groups = groups[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))]
    levels, count = 2**bits - 1, COLUMNS // GROUP
    parts = [linear.weight.data[:, groups == group].float() for group in range(count)]
    low, high = (torch.stack([getattr(part, side)(1) for part in parts], 1) for side in ("amin", "amax"))
    scales = 2 * torch.maximum(-low, high) / levels if symmetric else (high.clamp(min=0) - low.clamp(max=0)) / levels
    zeros = torch.full_like(scales, (levels + 1) / 2) if symmetric else (-low / scales).round().clamp(1, levels)
    packed = TorchLinear(**options)
    packed.pack_block(linear, scales.half(), zeros, groups.int())
    tensors = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.post_init()
    expected = packed.dequantize_weight().T
    if version == 1:
        older = TorchLinear(**options)
        older.load_state_dict(tensors)
        convert_gptq_v2_to_v1_format_module(older, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        tensors = dict(older.state_dict())
    said = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": ordered, "sym": symmetric}
    found = decoded(tmp_path, tensors, said | {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"})
    assert torch.equal(found, expected)


def test_autoawq(tmp_path, monkeypatch):
    gemm = pytest.importorskip("awq.modules.linear.gemm")
    from awq.utils.packing_utils import dequantize_gemm

    monkeypatch.setattr(gemm, "get_best_device", lambda: "cpu")
    linear = nn.Linear(COLUMNS, ROWS, bias=False).half()
    linear.weight.data = gaussian(torch.float16)
    parts = linear.weight.data.view(ROWS, -1, GROUP)
    scales = (parts.amax(2) - parts.amin(2)) / 14
    zeros = (-parts.amin(2) / scales).round().clamp(0, 15)
    packed = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    said = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    found = decoded(tmp_path, dict(packed.state_dict()), said)
    assert torch.equal(found, dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).T)
