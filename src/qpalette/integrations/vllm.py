"""vLLM: serves packed checkpoints through the entry point group `vllm.general_plugins`; vLLM itself stays as it is.

A layer that vLLM fuses (q/k/v, gate/up) keeps one packed part for each linear of the checkpoint, so that each may have
a quantizer of its own. Under tensor parallelism a part holds this rank's tiles: whole rows of tiles where vLLM splits
the outputs, whole columns where it splits the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import Parameter
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from qpalette.core.errors import ArtifactError
from qpalette.core.records import LinearRecord
from qpalette.formats.packed import METHOD, QuantizationFormat
from qpalette.formats.parts import parts_of
from qpalette.formats.reader import open_artifact
from qpalette.integrations.vllm_experts import QPaletteExpertsMethod
from qpalette.integrations.vllm_shares import (
    WEIGHT,
    Door,
    Share,
    add_to_compile_cache_key,
    copy_into,
    cut,
    loads_dummies,
)
from qpalette.nn import PackedModule, QuantEmbedding, QuantLinear
from qpalette.runtime import packed_linear, packed_linears

QKV = {"q": 0, "k": 1, "v": 2}


class QPaletteVllmConfig(QuantizationConfig):
    """`quantization_config` of config.json for vLLM. Of module level: vLLM pickles it for its workers."""

    def __init__(self, records: dict[str, LinearRecord]) -> None:
        super().__init__()
        self.records = records
        self.ties_packed_embedding = False  # as soon as the embedding is met, which comes before the head
        self.tied = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QPaletteVllmConfig:
        """Raises ArtifactError naming the field that is wrong."""
        return cls(QuantizationFormat.parse(config).records)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has it

    def maybe_update_config(self, model_name: str, hf_config: Any = None, *args: Any, **kwargs: Any) -> None:
        """Checks the headers of a local directory. Raises ArtifactError naming the tensor that is wrong."""
        self.tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        if Path(model_name).is_dir():
            open_artifact(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Checkpoint names become vLLM's where the two differ, as in multimodal models."""
        self.records = hf_to_vllm_mapper.apply_dict(self.records)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer that holds a packed linear; the ordinary one for other linears, None for the rest.

        Raises as `QPaletteExpertsMethod` for packed experts.
        """
        names = self._checkpoint_names(prefix)
        packed = [name for name in names if name in self.records]
        if isinstance(layer, ParallelLMHead) and self.ties_packed_embedding and not packed:
            return TiedHeadMethod()
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            return self._embedding_method(packed)
        if isinstance(layer, (LinearBase, ParallelLMHead)) and packed:
            return QPaletteLinearMethod([(name, self.records.get(name)) for name in names])
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        start = f"{prefix}."
        experts = {name[len(start) :]: record for name, record in self.records.items() if name.startswith(start)}
        if isinstance(layer, RoutedExperts) and experts:
            return QPaletteExpertsMethod(layer, prefix, experts)
        return None

    def _embedding_method(self, packed: list[str]) -> Any:
        """Llama's embedding has no prefix in vLLM; the only packed table that is called one is meant then."""
        named = packed or [name for name in self.records if "embed" in name.rpartition(".")[2]]
        if len(named) != 1:
            return None
        self.ties_packed_embedding = self.tied
        return QPaletteEmbeddingMethod((named[0], self.records[named[0]]), self.tied)

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """The linears of the checkpoint that a layer of vLLM's is made of."""
        parent, dot, last = prefix.rpartition(".")
        if prefix in self.records:  # fused in the checkpoint, too
            return [prefix]
        return [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]


class PlainPart(nn.Module):
    """A linear that the plan left as it is, beside packed ones in the same fused layer."""

    weight: torch.Tensor

    def __init__(self, share: Share, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer(WEIGHT, torch.zeros(share.out_features, share.columns, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class QPaletteLinearMethod(LinearMethodBase):
    """Runs one layer of vLLM's, made of the linears `members`: (checkpoint name, record, None for a plain one)."""

    def __init__(self, members: Sequence[tuple[str, LinearRecord | None]]) -> None:
        self.members = members

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Raises UnsupportedError when this tensor parallelism cannot cut the tiles or the rotation."""
        self.shares = _shares(layer, self.members, input_size_per_partition, output_partition_sizes, input_size)
        self.missing = {part: _tensors(record) for part, (_, record) in enumerate(self.members)}
        layer.packed_parts = nn.ModuleList(
            self._part(name, record, share, params_dtype)
            for (name, record), share in zip(self.members, self.shares, strict=True)
        )
        layer.one_launch = False
        self.gets_no_weights = loads_dummies()
        add_to_compile_cache_key({part.record.spec for part in layer.packed_parts if isinstance(part, PackedModule)})
        for suffix in {suffix for suffixes in self.missing.values() for suffix in suffixes}:
            dtype = next(getattr(part, suffix).dtype for part in layer.packed_parts if hasattr(part, suffix))
            layer.register_parameter(suffix, Door(self._loader(layer, suffix), dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the codes out for the best backend. Raises ArtifactError when only some tensors were loaded."""
        absent = [f"{self.members[part][0]}.{suffix}" for part, left in self.missing.items() for suffix in left]
        total = sum(len(_tensors(record)) for _, record in self.members)
        if absent and not (len(absent) == total and self.gets_no_weights):
            raise ArtifactError(f"tensor '{sorted(absent)[0]}' was not loaded; download the model again")
        for (name, _), part in zip(self.members, layer.packed_parts, strict=True):
            if isinstance(part, PackedModule):
                part.check_values(name)
                part.prepare()
        layer.one_launch = _fuse(list(layer.packed_parts))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K of this rank] -> [..., M of this rank]: the parts' outputs side by side."""
        if layer.one_launch:
            result = packed_linears(x, [part.packed for part in layer.packed_parts])
        else:
            outputs = [part(x) for part in layer.packed_parts]
            result = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return result if bias is None else result + bias

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        raise ArtifactError(f"linear '{self.members[0][0]}' is packed, but config.json ties it to the embeddings")

    def _part(self, name: str, record: LinearRecord | None, share: Share, dtype: torch.dtype) -> nn.Module:
        if record is None:
            return PlainPart(share, dtype)
        return QuantLinear(share.record_of(name, record))

    def _loader(self, layer: Any, suffix: str) -> Callable[..., None]:
        def load(parameter: Parameter, loaded: torch.Tensor, shard_id: Any = None) -> None:
            part = self._part_of(layer, shard_id)
            share, module = self.shares[part], layer.packed_parts[part]
            copy_into(f"{self.members[part][0]}.{suffix}", getattr(module, suffix), cut(suffix, loaded, share))
            self.missing[part].discard(suffix)

        return load

    def _part_of(self, layer: Any, shard_id: Any) -> int:
        """vLLM says which linear a tensor belongs to as "q", as a place, as a tuple of places, or not at all."""
        if shard_id is None or len(self.members) == 1:
            return 0
        place = QKV.get(shard_id, shard_id) if isinstance(shard_id, str) else shard_id
        place = place[0] if isinstance(place, tuple) else place
        return next(part for part, places in enumerate(self._places(layer)) if place in places)

    def _places(self, layer: Any) -> Iterator[range]:
        """The output partitions that each member covers."""
        first = 0
        for share in self.shares:
            yield range(first, first + len(share.rows))
            first += len(share.rows)


class QPaletteEmbeddingMethod(QPaletteLinearMethod):
    """Looks rows up in a packed table; `tied` lays it out for the head, too, which multiplies by it."""

    def __init__(self, member: tuple[str, LinearRecord], tied: bool) -> None:
        super().__init__([member])
        self.tied = tied

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        return layer.packed_parts[0](ids)

    def _part(self, name: str, record: LinearRecord | None, share: Share, dtype: torch.dtype) -> nn.Module:
        assert record is not None, "a method of a packed table"
        return QuantEmbedding(share.record_of(name, record), multiplied=self.tied, dtype=dtype)


class TiedHeadMethod(QuantizeMethodBase):
    """An output head that multiplies by the packed table of the embedding; it has no tensor of its own."""

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Nothing: `tie_weights` says where the table is."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.table = (embed_tokens.packed_parts[0],)  # in a tuple: not a child
        return layer

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = packed_linear(x, layer.table[0].packed)
        return result if bias is None else result + bias


def _fuse(parts: list[Any]) -> bool:
    """Whether one launch can serve all: one rotation, one layout, and a backend that gains from it."""
    first = parts[0]
    return len(parts) > 1 and all(
        isinstance(part, QuantLinear)
        and part.backend.fuses
        and (part.record.rotation, part.layout) == (first.record.rotation, first.layout)
        and part.record.group == first.record.group
        and torch.equal(part.stored.diagonal, first.stored.diagonal)
        for part in parts
    )


def _tensors(record: LinearRecord | None) -> set[str]:
    return {WEIGHT} if record is None else {part.suffix for part in parts_of(record)}


def _shares(
    layer: Any,
    members: Sequence[tuple[str, LinearRecord | None]],
    columns: int,
    sizes: Sequence[int],
    in_features: int,
) -> list[Share]:
    """One for each member, which takes as many of the layer's output partitions as its rows fill.

    Raises ArtifactError when the layer has another shape than the record.
    """
    replicas = (
        [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas] if isinstance(layer, QKVParallelLinear) else []
    )
    split = isinstance(layer, (ColumnParallelLinear, VocabParallelEmbedding))
    rank, ranks = (layer.tp_rank, layer.tp_size) if split else (0, 1)
    column = layer.tp_rank * columns if columns < in_features else 0
    partitions = list(zip(sizes, replicas or [1] * len(sizes), strict=True))
    shares: list[Share] = []
    for name, record in members:
        last = len(shares) == len(members) - 1
        rows: list[tuple[int, int]] = []
        start = 0
        while partitions and (last or not rows or (record is not None and start < record.out_features)):
            size, copies = partitions.pop(0)
            rows.append((start + rank // copies * size, size))
            start += size * ranks // copies
        padded = isinstance(layer, VocabParallelEmbedding)  # vLLM rounds the vocabulary up
        if record is not None and (record.in_features != in_features or not (padded or start == record.out_features)):
            raise ArtifactError(
                f"linear '{name}' is {start} x {in_features} in vLLM's model, but {record.out_features} x "
                f"{record.in_features} in quantization_config"
            )
        shares.append(Share(tuple(rows), column, columns))
    return shares


def register() -> None:
    """The entry point. vLLM calls it in every process; a second call changes nothing."""
    register_quantization_config(METHOD)(QPaletteVllmConfig)
