"""A transformers cache whose keys and values are codes: static, croppable, and compileable.

What `update` gives back are all keys and values, decoded: any attention function of transformers reads them, with
its sliding windows, soft caps and learned sinks. For one new token they are decoded when something looks at them
(`CodedStates`), and not where a backend attends to codes; under torch.compile that takes the attention function
"grouped".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from qpalette.core.errors import InputError, UnsupportedError
from qpalette.kvcache import WHITE, CachePlan, Stream, Transform, white
from qpalette.nn.coded_states import READER, CodedPair, CodedStates
from qpalette.runtime import select


@dataclass(frozen=True)
class LayerCoding:
    """How one layer of a cache is coded: the plan, which of how many layers, and the transform of its keys; None: the
    plan's is white, which needs no calibration."""

    plan: CachePlan
    layer: int
    layers: int
    keys: Transform | None

    def streams(self, keys: Tensor, values: Tensor, length: int) -> tuple[Stream, Stream]:
        """For tensors like these, [batch, heads, tokens, dim]."""
        formats = self.plan.formats(self.layer, self.layers, (keys.shape[-1], values.shape[-1]))
        transforms = (self.keys or white(keys.shape[-1]), white(values.shape[-1]))
        key, value = (
            select("cache", format.code.name, like.device).stream(
                format, transform, self.plan.exact, (*like.shape[:2], length), like.dtype, like.device
            )
            for format, transform, like in zip(formats, transforms, (keys, values), strict=True)
        )
        return key, value


class CodedLayer(StaticLayer):
    """`max_cache_len` tokens of one layer. Memory is taken at the first tokens; addresses stay.

    A layer of a sliding window keeps all its tokens, and the mask says which are read: so it can be cut back.

    own_exact: the tokens of a call of several are read as they come, not from their codes; a prompt is so faster and
    better than what follows it. False where codes are measured.
    """

    is_croppable = True

    def __init__(
        self, config: Any, max_cache_len: int, coding: LayerCoding, starts: Tensor | None, own_exact: bool
    ) -> None:
        super().__init__(max_cache_len)
        self.config = config  # of the text model: which attention function reads is said there, and may change
        self.coding, self.given_starts, self.own_exact = coding, starts, own_exact
        self.reads_alone = False  # the mask of the call to come is for its own tokens: there are no others

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for tokens like these, [batch, heads, tokens, dim]. Raises InputError for a mask of another batch."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.key_stream, self.value_stream = self.coding.streams(key_states, value_states, self.max_cache_len)
        self.starts = _starts_of(self.given_starts, self.batch_size).to(self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for memory in (*self.memory, self.starts, self.cumulative_length):
                torch._dynamo.mark_static_address(memory)
        self.is_initialized = True

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (self.key_stream, self.value_stream) if self.is_initialized else ()

    @property
    def memory(self) -> tuple[Tensor, ...]:
        return (*self.key_stream.memory, *self.value_stream.memory)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Code the new tokens; all `max_cache_len` keys and values, of which those that are not written are zeros or
        what was cut off: the mask hides them; of a first prompt, its own. Raises InputError for tokens that have no
        room; a compiled or captured step, which cannot look, leaves that to the device."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        if not self.key_stream.refuses:
            self._check_room(count)
        tokens = torch.arange(count, device=self.device) + self.cumulative_length
        self.key_stream.write_both(self.value_stream, key_states, value_states, tokens, self.starts)
        self.cumulative_length.add_(count)
        alone, self.reads_alone = self.reads_alone, False
        if alone:
            return key_states, value_states
        pair = CodedPair(self.key_stream, self.value_stream, self.cumulative_length, self.starts)
        if count == 1 and self.key_stream.is_fused:
            if not torch.compiler.is_compiling():
                return CodedStates.of(pair)
            if self.config._attn_implementation == READER:
                return pair, pair
        keys, values = pair.decoded()
        if self.own_exact and count > 1:
            return keys.index_copy(2, tokens, key_states), values.index_copy(2, tokens, value_states)
        return keys, values

    def _check_room(self, count: int) -> None:
        if self.coding.layer or not _may_look(self.cumulative_length):
            return  # one layer stands for all: to look makes the host wait
        if (needed := int(self.cumulative_length) + count) > self.max_cache_len:
            raise InputError(f"the cache has room for {self.max_cache_len} tokens, not for {needed}: make it longer")

    def set_length(self, tokens: int) -> None:
        """The first `tokens` count; what follows is written over."""
        self.cumulative_length.fill_(tokens)
        for stream in self.streams:
            stream.cut(self.cumulative_length)

    def set_starts(self, starts: Tensor | None) -> None:
        """The first token of each sequence to come, int64 [batch]; None: 0."""
        self.given_starts = starts
        if self.is_initialized:
            self.starts.copy_(_starts_of(starts, self.batch_size))

    def take_memory(self, other: CodedLayer) -> None:
        """As for the tokens of another layer."""
        key, value = (stream.ring[:, :, :0] for stream in other.streams)
        self.lazy_initialization(key, value)

    def copy(self, other: CodedLayer, tokens: int) -> None:
        """The first `tokens` of another layer, which become the length."""
        for mine, theirs in zip(self.streams, other.streams, strict=True):
            mine.copy(theirs, tokens)
        self.starts.copy_(other.starts)
        self.set_length(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Without the last -tokens_to_remove tokens. Raises ValueError for a positive number, as transformers does."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
        for stream in self.streams:
            stream.cut(self.cumulative_length)

    def reset(self) -> None:
        """Empty, with the same memory."""
        self.cumulative_length.zero_()
        for stream in self.streams:
            stream.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on as what beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These sequences, int64 [n]; of another number than before they are in other memory."""
        if not self.is_initialized:
            return
        chosen = indices.to(self.device)
        for stream in self.streams:
            stream.select(chosen)
        starts = self.starts[chosen]
        self.starts = self.starts.copy_(starts) if len(chosen) == self.batch_size else starts
        self.batch_size = len(chosen)


class CodedCache(Cache):
    """Room for `length` tokens of every sequence of a model with this `config`.

    transforms: of each layer's keys, unless the plan's transform is white. padding: the attention mask of prompts that
    are padded on the left, [batch, tokens]: the exact first tokens are then those that it does not hide.

    Raises UnsupportedError, naming what it is, for a model whose cache is not keys and values of heads alone;
    SpecError for a plan of another number of layers, InputError for a length below 1.
    """

    layers: list[CodedLayer]  # type: ignore[assignment]  # transformers allows more

    def __init__(
        self,
        config: Any,
        plan: CachePlan,
        length: int,
        transforms: Sequence[Transform] | None = None,
        padding: Tensor | None = None,
        own_exact: bool = True,
    ) -> None:
        if length < 1:
            raise InputError(f"a cache must have room for at least 1 token, got {length}")
        count = check_cacheable(config)
        starts = None if padding is None else padding.long().argmax(-1)
        self.plan, self.length = plan, length
        codings = codings_of(plan, count, transforms)
        text = config.get_text_config(decoder=True)
        super().__init__(layers=[CodedLayer(text, length, coding, starts, own_exact) for coding in codings])
        self.own_exact = own_exact

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As transformers'; asked before the layers take the tokens. A prompt that comes first reads itself alone: its
        mask is a triangle, which attention functions know without a mask, and nothing is decoded."""
        length = self.layers[layer_idx].cumulative_length
        alone = self.own_exact and query_length > 1 and _may_look(length) and int(length) == 0
        for layer in self.layers:
            layer.reads_alone = alone
        return (query_length, 0) if alone else super().get_mask_sizes(query_length, layer_idx)

    @property
    def feed(self) -> int | None:
        """How many tokens may come at a time so that each reads what it would when it comes alone, or less: one that is
        followed by others reads fewer exact tokens of the window. None: any number."""
        window = self.plan.exact.window
        return max(1, window // 2) if window else None

    @property
    def bytes(self) -> int:
        """Of everything that it holds; 0 before the first tokens."""
        return sum(memory.nbytes for layer in self.layers if layer.is_initialized for memory in layer.memory)

    @property
    def bits(self) -> Fraction:
        """Stored bits per cached number, codes, scales and padding, without exact tokens. Known from the first tokens
        on."""
        return self.plan.bits(
            [(layer.num_heads, *(stream.format.dim for stream in layer.streams)) for layer in self.layers]  # type: ignore[misc]
        )


def codings_of(plan: CachePlan, layers: int, transforms: Sequence[Transform] | None) -> list[LayerCoding]:
    """Of each layer. Raises SpecError for a plan of another number of layers; AssertionError where transforms lack."""
    assert plan.transform == WHITE or transforms is not None, "calibrated transforms are needed"
    keys: Sequence[Transform | None] = [None] * layers if transforms is None else transforms
    plan.of_layer(0, layers)
    return [LayerCoding(plan, layer, layers, keys[layer]) for layer in range(layers)]


def check_cacheable(config: Any) -> int:
    """How many layers there are to cache. Raises UnsupportedError, naming what a coded cache does not do."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{config.model_type} attends to an encoder, too: a coded cache is for decoders alone")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(f"{text.model_type} has latent attention, whose cache is no keys and values")
    layers = StaticCache(config=config, max_cache_len=1).layers
    strange = [type(layer).__name__ for layer in layers if type(layer) not in (StaticLayer, StaticSlidingWindowLayer)]
    if strange:
        raise UnsupportedError(f"{text.model_type} has layers of {strange[0]}, which a coded cache cannot hold")
    return len(layers)


def _starts_of(given: Tensor | None, batch: int) -> Tensor:
    """int64 [batch]: the first token of each sequence; beams are copies of a sequence, side by side."""
    if given is None:
        return torch.zeros(batch, dtype=torch.int64)
    if batch % len(given):
        raise InputError(f"the cache was given the mask of {len(given)} sequences, and gets {batch}")
    return given.repeat_interleave(batch // len(given))


def _may_look(like: Tensor) -> bool:
    """Whether the host may ask for a number of the device: it is neither compiled nor captured what runs."""
    if torch.compiler.is_compiling():
        return False
    return like.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
