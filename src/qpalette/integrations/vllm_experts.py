"""Packed experts in vLLM, through its door for them: all experts of a layer on a rank are one operator.

Under expert parallelism a rank holds whole experts; under tensor parallelism its tiles of each, cut as those of other
linears are: what experts compute first by rows, the last by columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import Parameter
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from qpalette.core.errors import ArtifactError, UnsupportedError
from qpalette.core.records import LinearRecord
from qpalette.formats.parts import parts_of
from qpalette.integrations.vllm_shares import Door, Share, add_to_compile_cache_key, copy_into, cut, loads_dummies
from qpalette.nn import QuantLinear
from qpalette.runtime import Gate, PackedExperts, PreparedExperts

GATES = {
    "silu": Gate("silu"),
    "gelu": Gate("gelu"),
    "gelu_tanh": Gate("gelu_tanh"),
    "relu2_no_mul": Gate("relu2", gated=False),
}
FIRST, LAST = ("w1", "w3"), "w2"  # vLLM's names of gate, up and down


class QPaletteExpertsMethod(FusedMoEMethodBase):
    """Runs the experts of one layer, whose records are `records`: "3.gate_proj" and the like.

    Raises UnsupportedError for a layer whose experts do what the operator does not.
    """

    def __init__(self, layer: Any, prefix: str, records: Mapping[str, LinearRecord]) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.records = prefix, records
        leaves = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        self.leaves = {shard: leaf for shard, leaf in zip((*FIRST, LAST), leaves, strict=True) if leaf is not None}
        activation = layer.activation.value
        if activation not in GATES:
            raise UnsupportedError(f"{prefix}: packed experts with the activation '{activation}' do not run in vLLM")
        self.gate = GATES[activation]
        refused = {
            "biases": self.moe.has_bias,
            "router weights on the input": layer.apply_router_weight_on_input,
            "a limit of their activation": layer.swiglu_limit is not None,
            "gate and up in one matrix": any(name.rpartition(".")[2] not in self.leaves.values() for name in records),
        }
        if found := [what for what, present in refused.items() if present]:
            raise UnsupportedError(f"{prefix}: packed experts with {found[0]} do not run in vLLM: use transformers")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Raises UnsupportedError when this tensor parallelism cannot cut the tiles or the rotation, ArtifactError when
        an expert is not packed or of another shape."""
        inner, parallel = intermediate_size_per_partition, self.moe.moe_parallel_config
        first = Share(((parallel.tp_rank * inner, inner),), 0, hidden_size)
        last = Share(((0, hidden_size),), parallel.tp_rank * inner, inner)
        self.shares = {shard: last if shard == LAST else first for shard in self.leaves}
        self.local = self._local_experts(layer)
        layer.packed_experts = nn.ModuleList(
            nn.ModuleDict({shard: self._linear(expert, shard) for shard in self.leaves}) for expert in self.local
        )
        self.missing = {
            (expert, shard, part.suffix)
            for expert in self.local
            for shard in self.leaves
            for part in parts_of(self.records[self._name(expert, shard)])
        }
        self.expected = len(self.missing)
        self.gets_no_weights = loads_dummies()
        add_to_compile_cache_key({record.spec for record in self.records.values()})
        types = {part.suffix: part.dtype for record in self.records.values() for part in parts_of(record)}
        for suffix, dtype in types.items():
            for stack in ("w13", "w2"):
                layer.register_parameter(f"{stack}_{suffix}", Door(self._loader(layer, suffix), dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the codes out for the best backend. Raises ArtifactError when only some tensors were loaded."""
        if self.missing and not (len(self.missing) == self.expected and self.gets_no_weights):
            expert, shard, suffix = min(self.missing)
            name = f"{self.prefix}.{self._name(expert, shard)}.{suffix}"
            raise ArtifactError(f"tensor '{name}' was not loaded; download the model again")
        for expert, linears in zip(self.local, layer.packed_experts, strict=True):
            for shard, linear in linears.items():
                linear.check_values(f"{self.prefix}.{self._name(expert, shard)}")
                linear.prepare()
        first = [shard for shard in FIRST if shard in self.leaves]
        packed = PackedExperts(
            first=[[linears[shard].stored for shard in first] for linears in layer.packed_experts],
            last=[linears[LAST].stored for linears in layer.packed_experts],
            gate=self.gate,
        )
        self.prepared = PreparedExperts(packed)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [tokens, K] -> [tokens, K], of this rank's experts or its part of each; vLLM adds ranks up."""
        index = topk_ids.long()
        if layer.expert_map is not None:  # of all experts -> of this rank's, -1 for those of others
            index = layer.expert_map[index].long()
        return self.prepared(x, index, topk_weights)

    def _local_experts(self, layer: Any) -> list[int]:
        """Their numbers in the checkpoint, in the order of this rank."""
        places = {
            place: expert
            for expert in range(layer.global_num_experts)
            if (place := layer._map_global_expert_id_to_local_expert_id(expert)) >= 0
        }
        return [places[place] for place in sorted(places)]

    def _name(self, expert: int, shard: str) -> str:
        return f"{expert}.{self.leaves[shard]}"

    def _linear(self, expert: int, shard: str) -> QuantLinear:
        name, share = self._name(expert, shard), self.shares[shard]
        record = self.records.get(name)
        if record is None:
            raise ArtifactError(f"expert linear '{self.prefix}.{name}' is not packed, and others of its layer are")
        inner = self.moe.intermediate_size
        wanted = (share.out_features, inner) if shard == LAST else (inner, share.columns)
        if (record.out_features, record.in_features) != wanted:
            raise ArtifactError(
                f"expert linear '{self.prefix}.{name}' is {wanted[0]} x {wanted[1]} in vLLM's model, but "
                f"{record.out_features} x {record.in_features} in quantization_config"
            )
        return QuantLinear(share.record_of(f"{self.prefix}.{name}", record))

    def _loader(self, layer: Any, suffix: str) -> Callable[..., bool]:
        def load(
            param: Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            """Whether the expert is one of this rank's."""
            if expert_id not in self.local:
                return False
            linear = layer.packed_experts[self.local.index(expert_id)][shard_id]
            name = f"{self.prefix}.{self._name(expert_id, shard_id)}.{suffix}"
            copy_into(name, getattr(linear, suffix), cut(suffix, loaded_weight, self.shares[shard_id]))
            self.missing.discard((expert_id, shard_id, suffix))
            return True

        return load
