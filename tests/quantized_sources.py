"""Small weights in every source format, written number by number from the published layouts, and what they mean."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BF16, F16 = torch.bfloat16, torch.float16


@dataclass
class Source:
    """A stored model: a linear, what it means, and a norm beside it."""

    tensors: dict[str, torch.Tensor]
    quantization: dict[str, Any]
    weight: torch.Tensor
    name: str = "model.layers.0.mlp.up_proj.weight"
    optional: tuple[str, ...] = ()  # stored tensors without which it means the same
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors | {"model.norm.weight": torch.ones(8, dtype=BF16)}, directory / "model.safetensors")
        config = {"model_type": "llama", "dtype": "bfloat16"} | self.config
        if self.quantization:
            config["quantization_config"] = self.quantization
        (directory / "config.json").write_text(json.dumps(config))
        return directory


def numbers(seed: int, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) * 0.01 + 0.001


def words(values: list[int], bits: int) -> list[int]:
    """Numbers of `bits` bits as a stream, cut into signed words of 32 bits."""
    stream = sum(value << (place * bits) for place, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return list(struct.unpack(f"<{count}i", stream.to_bytes(4 * count, "little")))


def packed_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32)


def fp4_bytes(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def fp4_values(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor([-FP4[code & 7] if code & 8 else FP4[code] for code in codes.flatten().tolist()]).view(
        codes.shape
    )


def by_block(numbers_of: torch.Tensor, grid: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Number by number, each times the scale of its block, in float32."""
    result = torch.empty(numbers_of.shape)
    for row in range(numbers_of.shape[0]):
        for column in range(numbers_of.shape[1]):
            result[row, column] = numbers_of[row, column] * grid[row // block[0], column // block[1]]
    return result


def fp8_values(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 40).to(torch.float8_e4m3fn)


UP = "model.layers.0.mlp.up_proj"
FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


def fp8_blocks(dtype: torch.dtype = torch.float32) -> Source:
    codes = fp8_values(40, 80)  # the last blocks are cut, as in DeepSeek-V3's kv_a_proj
    grid = scales(3, 3).to(dtype)
    weight = by_block(codes.float(), grid.float(), (16, 32)).to(BF16)
    return Source({f"{UP}.weight": codes, f"{UP}.weight_scale_inv": grid}, FP8_BLOCKS, weight)


def fp8_exponents(as_bytes: bool) -> Source:
    codes, exponents = fp8_values(32, 64), numbers(1, 110, 125, 2, 2).to(torch.uint8)
    grid = torch.tensor([[2.0 ** (code - 127) for code in row] for row in exponents.tolist()])
    stored = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    weight = by_block(codes.float(), grid, (16, 32)).to(BF16)
    return Source({f"{UP}.weight": codes, f"{UP}.scale": stored}, FP8_BLOCKS | {"scale_fmt": "ue8m0"}, weight)


def fp8_channels() -> Source:
    codes, grid = fp8_values(32, 48), scales(32, 1)
    weight = by_block(codes.float(), grid, (1, 48)).to(BF16)
    tensors = {f"{UP}.weight": codes, f"{UP}.weight_scale": grid, f"{UP}.input_scale": torch.ones(1)}
    return Source(tensors, {"quant_method": "fbgemm_fp8"}, weight, optional=(f"{UP}.input_scale",))


def fp8_tensor() -> Source:
    codes, grid = fp8_values(32, 48), scales(1)
    weight = by_block(codes.float(), grid[:, None], (32, 48)).to(BF16)
    tensors = {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": grid[0], f"{UP}.activation_scale": torch.tensor(1.0)}
    said = FP8_BLOCKS | {"weight_block_size": None, "activation_scheme": "static"}
    return Source(tensors, said, weight, optional=(f"{UP}.activation_scale",))


def fp8_experts() -> Source:
    name, codes, grid = "model.layers.0.mlp.experts.gate_up_proj", fp8_values(3, 32, 64), scales(3, 2, 2)
    weight = torch.stack([by_block(c.float(), g, (16, 32)) for c, g in zip(codes, grid, strict=True)]).to(BF16)
    return Source({name: codes, f"{name}_scale_inv": grid}, FP8_BLOCKS, weight, name)


def fp4_experts() -> Source:
    name, codes = "model.layers.0.ffn.experts.0.w1", numbers(5, 0, 16, 32, 64)
    exponents = numbers(1, 110, 125, 32, 2).to(torch.uint8)
    grid = torch.tensor([[2.0 ** (code - 127) for code in row] for row in exponents.tolist()])
    weight = by_block(fp4_values(codes), grid, (1, 32)).to(BF16)
    tensors = {
        f"{name}.weight": fp4_bytes(codes).view(torch.int8),
        f"{name}.scale": exponents.view(torch.float8_e8m0fnu),
    }
    return Source(tensors, FP8_BLOCKS | {"expert_dtype": "fp4", "scale_fmt": "ue8m0"}, weight, f"{name}.weight")


def mxfp4() -> Source:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes, exponents = numbers(5, 0, 16, 2, 24, 96), numbers(1, 118, 125, 2, 24, 3).to(torch.uint8)
    values = fp4_values(codes) * torch.tensor(2.0) ** (exponents.float() - 127).repeat_interleave(32, 2)
    tensors = {f"{name}_blocks": fp4_bytes(codes).view(2, 24, 3, 16), f"{name}_scales": exponents}
    return Source(tensors, {"quant_method": "mxfp4"}, values.mT.to(BF16), name)


def gptq(bits: int, version: int, ordered: bool, symmetric: bool) -> Source:
    outputs, inputs, group = 32, 96, 32
    codes = numbers(bits, 0, 2**bits, outputs, inputs)
    groups = torch.arange(inputs) // group
    if ordered:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    zeros = numbers(7, 1, 2**bits, 3, outputs)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    grid = scales(3, outputs).half()
    weight = torch.empty(outputs, inputs)
    for column in range(inputs):
        place = groups[column]
        weight[:, column] = (codes[:, column] - zeros[place]) * grid[place].float()
    tensors = {
        f"{UP}.qweight": packed_rows(codes, bits).T,
        f"{UP}.qzeros": packed_rows(zeros - (1 if version == 1 else 0), bits),
        f"{UP}.scales": grid,
        f"{UP}.g_idx": groups.int(),
    }
    said = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered, "sym": symmetric}
    said |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return Source(tensors, said, weight.half(), optional=() if ordered else (f"{UP}.g_idx",))


def awq() -> Source:
    outputs, inputs, group = 32, 64, 32
    codes, zeros, grid = numbers(1, 0, 16, inputs, outputs), numbers(2, 0, 16, 2, outputs), scales(2, outputs).half()
    weight = (codes - zeros.repeat_interleave(group, 0)) * grid.float().repeat_interleave(group, 0)
    order = [block + place for block in range(0, outputs, 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    tensors = {
        f"{UP}.qweight": packed_rows(codes[:, order], 4),
        f"{UP}.qzeros": packed_rows(zeros[:, order], 4),
        f"{UP}.scales": grid,
    }
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Source(tensors, said, weight.T.half())


def compressed(weights: dict[str, Any], kind: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> Source:
    said = {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"]}
    said |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    return Source({f"{UP}.{name}": tensor for name, tensor in tensors.items()}, said, weight)


def pack_quantized(bits: int, symmetric: bool, ordered: bool = False) -> Source:
    rows, columns, group = 40, 96, 32
    codes, grid, middle = numbers(1, 0, 2**bits, rows, columns), scales(rows, 3).to(BF16), 2 ** (bits - 1)
    zeros = torch.full((rows, 3), middle) if symmetric else numbers(2, 0, 2**bits, rows, 3)
    groups = torch.arange(columns) // group
    tensors = {"weight_packed": packed_rows(codes, bits), "weight_scale": grid}
    tensors["weight_shape"] = torch.tensor([rows, columns])
    if ordered:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        tensors["weight_g_idx"] = groups.int()
    if not symmetric:
        tensors["weight_zero_point"] = packed_rows(zeros.T, bits).T
    weight = ((codes - zeros[:, groups]) * grid.float()[:, groups]).to(BF16)
    said = {"type": "int", "num_bits": bits, "strategy": "group", "group_size": group, "symmetric": symmetric}
    return compressed(said | ({"actorder": "group"} if ordered else {}), "pack-quantized", tensors, weight)


def int_quantized() -> Source:
    codes, grid, zeros = numbers(1, -128, 128, 24, 48), scales(24, 1), numbers(2, -5, 6, 24, 1)
    tensors = {"weight": codes.to(torch.int8), "weight_scale": grid, "weight_zero_point": zeros.to(torch.int8)}
    said = {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": False}
    return compressed(said, "int-quantized", tensors, ((codes - zeros) * grid).to(BF16))


def float_quantized() -> Source:
    codes, grid = fp8_values(24, 48), scales(24, 1).to(BF16)
    said = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True}
    weight = by_block(codes.float(), grid.float(), (1, 48)).to(BF16)
    return compressed(said, "float-quantized", {"weight": codes, "weight_scale": grid}, weight)


def nvfp4() -> Source:
    codes, grid = numbers(1, 0, 16, 24, 64), (scales(24, 4) * 20000).to(torch.float8_e4m3fn)
    whole = torch.tensor([700.0])
    tensors = {"weight_packed": fp4_bytes(codes), "weight_scale": grid, "weight_global_scale": whole}
    said = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    weight = by_block(fp4_values(codes), grid.float() / whole, (1, 16)).to(BF16)
    return compressed(said, "nvfp4-pack-quantized", tensors, weight)


def mx_compressed(bits: int) -> Source:
    exponents = numbers(1, 118, 125, 24, 2).to(torch.uint8)
    grid = torch.tensor(2.0) ** (exponents.float() - 127)
    codes = numbers(1, 0, 16, 24, 64) if bits == 4 else fp8_values(24, 64)
    values = fp4_values(codes) if bits == 4 else codes.float()
    tensors = {"weight_packed": fp4_bytes(codes)} if bits == 4 else {"weight": codes}
    said = {"type": "float", "num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": True}
    weight = by_block(values, grid, (1, 32)).to(BF16)
    return compressed(said, f"mxfp{bits}", tensors | {"weight_scale": exponents}, weight)


def bitsandbytes_blocks(nested: bool) -> Source:
    shape, block = (24, 48), 64
    codes, table = numbers(1, 0, 16, *shape), torch.linspace(-1, 1, 16) ** 3
    count = codes.numel() // block
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": list(shape)}
    tensors = {"weight": (codes.flatten()[::2] << 4 | codes.flatten()[1::2]).to(torch.uint8)[:, None]}
    absmax = scales(count)
    if nested:
        inner = numbers(3, 0, 256, count)
        tensors |= {"weight.absmax": inner.to(torch.uint8), "weight.nested_absmax": torch.tensor([0.002])}
        tensors["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.01}
        absmax = tensors["weight.nested_quant_map"][inner] * 0.002 + 0.01
    else:
        tensors["weight.absmax"] = absmax
    tensors["weight.quant_map"] = table
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    weight = (table[codes] * absmax.repeat_interleave(block).view(shape)).half()
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return Source({f"{UP}.{name}": tensor for name, tensor in tensors.items()}, said, weight)


def bitsandbytes_rows() -> Source:
    codes, scale = numbers(1, -127, 128, 24, 48).to(torch.int8), scales(24)
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    weight = (codes.float() * scale[:, None] * 7.874015718698502e-3).to(BF16)
    said = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    stored = {f"{UP}.{name}": tensor for name, tensor in tensors.items()}
    return Source(stored, said, weight, optional=(f"{UP}.weight_format",))


SOURCES: dict[str, Callable[[], Source]] = {
    "fp8 blocks": fp8_blocks,
    "fp8 blocks, bfloat16 scales": lambda: fp8_blocks(BF16),
    "fp8 exponents": lambda: fp8_exponents(False),
    "fp8 exponents as bytes": lambda: fp8_exponents(True),
    "fp8 channels": fp8_channels,
    "fp8 tensor": fp8_tensor,
    "fp8 experts in a stack": fp8_experts,
    "fp4 experts": fp4_experts,
    "mxfp4": mxfp4,
    **{
        f"gptq v{version}, {bits} bits{', ordered' * ordered}{', symmetric' * symmetric}": (
            lambda bits=bits, version=version, ordered=ordered, symmetric=symmetric: gptq(
                bits, version, ordered, symmetric
            )
        )
        for bits, version, ordered, symmetric in (
            *((2, 1, False, False), (3, 1, True, False), (4, 1, False, True), (8, 1, True, True)),
            *((3, 2, False, True), (4, 2, True, False)),
        )
    },
    "awq": awq,
    "int4 pack-quantized": lambda: pack_quantized(4, True),
    "int4 pack-quantized, zero points": lambda: pack_quantized(4, False),
    "int4 pack-quantized, ordered": lambda: pack_quantized(4, False, True),
    "int8 pack-quantized": lambda: pack_quantized(8, True),
    "int8": int_quantized,
    "fp8 compressed": float_quantized,
    "nvfp4": nvfp4,
    "mxfp4 compressed": lambda: mx_compressed(4),
    "mxfp8 compressed": lambda: mx_compressed(8),
    "nf4": lambda: bitsandbytes_blocks(False),
    "nf4 nested": lambda: bitsandbytes_blocks(True),
    "int8 bitsandbytes": bitsandbytes_rows,
}
