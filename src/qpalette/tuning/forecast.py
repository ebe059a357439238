"""What tuning would do and about how long it would take, from headers, one linear and a few trials."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F

from qpalette.core.errors import InputError
from qpalette.evaluate.text_source import check_text
from qpalette.formats import total_bits
from qpalette.models.model_class import text_config
from qpalette.rotate import diagonal_of
from qpalette.runtime import PackedLinear, packed_linear
from qpalette.runtime.device import parse_device
from qpalette.tuning.descent import FLOAT32, room_for_codes, side_by_side
from qpalette.tuning.options import Tuning
from qpalette.tuning.reference import CHUNK, divergence
from qpalette.tuning.run import Subject
from qpalette.tuning.vectors import revised_records, vector_tensors

LOGITS = 4  # of the model, of the original, and the gradient of both a slice and the whole
BACKWARD_OF_ATTENTION = 2.5  # products: five against two


@dataclass(frozen=True)
class Forecast:
    """About; `bits_after` is exact. Seconds are those of all steps, without the text that a model would write."""

    linears: int
    vectors: int  # others: norms, biases
    steps: int
    tokens_per_step: int
    bits_before: Fraction  # per weight of the linears, everything counted
    bits_after: Fraction
    memory_bytes: int
    disk_bytes: int  # beside the output, while it runs
    seconds: float


def forecast(
    model: str | Path,
    reference: str | Path,
    text: str | Path | None = None,
    *,
    tuning: Tuning | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Forecast:
    """Nothing is written, and neither model is loaded. Raises as `tune` does before its work."""
    tuning, place = tuning or Tuning(), parse_device(device)
    check_text(text, reference)
    subject = Subject.open(model, reference, tuning.keep_size)
    records = revised_records(subject.artifact, tuning.keep_size)
    return Forecast(
        linears=len(records),
        vectors=len(vector_tensors(subject.artifact)),
        steps=tuning.steps,
        tokens_per_step=tuning.batch * _length(subject, tuning),
        bits_before=subject.artifact.bits().rate,
        bits_after=total_bits(records.values()).rate,
        memory_bytes=memory_bytes(subject, tuning, dtype, place),
        disk_bytes=_disk(subject, tuning, dtype),
        seconds=_Trial(subject, tuning, place, dtype).seconds(),
    )


def _length(subject: Subject, tuning: Tuning) -> int:
    return min(tuning.window, text_config(subject.original.config).get("max_position_embeddings") or tuning.window)


def _size(subject: Subject, key: str) -> int:
    value = text_config(subject.original.config).get(key)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"the model's config does not say its {key}: what tuning takes is not known beforehand")
    return value


def memory_bytes(subject: Subject, tuning: Tuning, dtype: torch.dtype, device: torch.device) -> int:
    """Both models, what a pass leaves for the backward pass, its logits, and the matrices that stay decoded."""
    length, hidden = _length(subject, tuning), _size(subject, "hidden_size")
    layers, logits = _size(subject, "num_hidden_layers"), FLOAT32 * length * _size(subject, "vocab_size")
    windows = min(tuning.batch, side_by_side(device, logits))
    original = sum(info.nbytes // info.dtype.itemsize for info in subject.original.tensors.values()) * dtype.itemsize
    head = _size(subject, "vocab_size") * hidden * dtype.itemsize
    quantized, records = subject.artifact.inspect().tensor_bytes, subject.artifact.records.values()
    # Of each linear the input times its diagonal and the product before its scales are kept, both in float32.
    kept = sum(2 * record.in_features + 2 * record.out_features for record in records)
    kept *= length * FLOAT32
    activations = kept // layers + layers * length * hidden * dtype.itemsize if tuning.recompute else kept
    working = quantized + windows * (activations + LOGITS * logits)
    beside = head if tuning.cache else original
    decoded = min(sum(record.weights for record in records) * FLOAT32, room_for_codes(device, quantized + beside))
    return max(original, working + beside + decoded)


def _disk(subject: Subject, tuning: Tuning, dtype: torch.dtype) -> int:
    states = 0
    if tuning.windows is not None:
        windows = tuning.windows + tuning.held_out
        states = windows * _length(subject, tuning) * _size(subject, "hidden_size") * dtype.itemsize
    return states + subject.artifact.inspect().tensor_bytes


class _Trial:
    """Times a window's share of each kind of work on the device, once it is warm."""

    def __init__(self, subject: Subject, tuning: Tuning, device: torch.device, dtype: torch.dtype) -> None:
        self.subject, self.tuning, self.device, self.dtype = subject, tuning, device, dtype
        self.length = _length(subject, tuning)

    def seconds(self) -> float:
        """Of all steps and looks."""
        linears, plain = self._linears()
        head, attention, compared = self._head(), self._attention(), self._divergence()
        again = 1 + self.tuning.recompute
        forward, backward = linears[0] + attention, linears[1] + BACKWARD_OF_ATTENTION * attention
        step = again * forward + backward + 3 * head + compared  # the original's head is one of the three
        look = forward + 2 * head + compared
        looks = 1 + -(-self.tuning.steps // self.tuning.every)
        used, seen = self.tuning.steps * self.tuning.batch, looks * self.tuning.held_out
        read = used + seen
        if self.tuning.windows is not None:
            read = min(read, self.tuning.windows + self.tuning.held_out)
        return used * step + seen * look + read * (plain + attention)

    def _linears(self) -> tuple[tuple[float, float], float]:
        """Forward and backward of all packed linears, and forward of the original's."""
        records = self.subject.artifact.records
        name = max(records, key=lambda name: records[name].weights)
        packed, share = self._fitted(name), sum(r.weights for r in records.values()) / records[name].weights
        x = self._random(self.length, packed.in_features).requires_grad_()
        weight = self._random(packed.out_features, packed.in_features)
        forward = self._time(lambda: packed_linear(x, packed))
        both = self._time(lambda: packed_linear(x, packed).sum().backward())
        plain = self._time(lambda: F.linear(x.detach(), weight))
        return (share * forward, share * max(both - forward, forward)), share * plain

    def _fitted(self, name: str) -> PackedLinear:
        stored = self.subject.artifact.read_linear(name)
        scales = stored.scales.view(torch.float16).float().to(self.device).requires_grad_()
        diagonal = diagonal_of(stored.diagonal, stored.in_features).to(self.device).requires_grad_()
        return stored.with_(codes=stored.codes.to(self.device), scales=scales, diagonal=diagonal)

    def _head(self) -> float:
        hidden, vocabulary = _size(self.subject, "hidden_size"), _size(self.subject, "vocab_size")
        x, weight = self._random(self.length, hidden), self._random(vocabulary, hidden)
        return self._time(lambda: F.linear(x, weight))

    def _attention(self) -> float:
        heads = _size(self.subject, "num_attention_heads")
        width = text_config(self.subject.original.config).get("head_dim") or _size(self.subject, "hidden_size") // heads
        q = self._random(1, heads, self.length, width)
        once = self._time(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
        return once * _size(self.subject, "num_hidden_layers")

    def _divergence(self) -> float:
        rows = min(CHUNK, self.length)
        logits = self._random(rows, _size(self.subject, "vocab_size"))
        gradient = torch.empty_like(logits)
        return self._time(lambda: divergence(logits, logits, gradient)) * self.length / rows

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _time(self, work: Callable[[], object]) -> float:
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return time.perf_counter() - start
