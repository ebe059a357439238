"""The contract on a CUDA device: trellis search, rotation, and products with packed weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from qpalette.backends.cuda import decoder_sets
from qpalette.backends.cuda.compiler import INSTALL, compiler_is_installed
from qpalette.backends.cuda.decoder import decoder_spec
from qpalette.backends.cuda.experts import CudaExperts, takes
from qpalette.backends.cuda.layout import LAYOUT, from_chunks, laid_out, to_chunks
from qpalette.backends.cuda.product import CudaProduct
from qpalette.backends.cuda.rotate import ALIGNMENT, aligned
from qpalette.backends.cuda.streams import CudaStream
from qpalette.backends.cuda.trellis_encoder import encode_states
from qpalette.codes import parse_spec
from qpalette.codes.tiles import from_tiles
from qpalette.core.records import TILE, tiles_of
from qpalette.runtime import TILES, Backend, ExpertsProduct, PackedExperts, PackedLinear, Product, Verdict

logger = logging.getLogger(__name__)
LEAST_CAPABILITY = (8, 0)  # bfloat16, and the matrix instructions of the products
DECODED_WEIGHTS = 1 << 22  # of W' at a time: decoding by definition takes many times the memory of its result


class CudaBackend(Backend):
    name = "cuda"
    priority = 20
    layout = LAYOUT
    fuses = True
    stream = CudaStream
    in_int8 = True

    def supports(self, operation: str, spec: str, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return Verdict(False, f"runs on cuda, not on {device.type}")
        if reason := _missing(device):
            return Verdict(False, reason)
        if operation == "encode" and parse_spec(spec).search is None:
            return Verdict(False, f"has no encoder for the family '{parse_spec(spec).family}'")
        if operation == "linear" and decoder_spec(spec) is None:
            return Verdict(False, f"has no decoder for the family '{parse_spec(spec).family}'")
        return Verdict(True)

    def encode(self, spec: str, tiles: torch.Tensor) -> torch.Tensor:
        search = parse_spec(spec).search
        assert search is not None, "supports() said no"
        with torch.cuda.device(tiles.device):
            return search.pack(encode_states(tiles.contiguous(), search).long())

    def decode(self, spec: str, codes: torch.Tensor) -> torch.Tensor:
        return parse_spec(spec).decode(codes)

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return self.linears(x, [packed])

    def linears(self, x: torch.Tensor, members: Sequence[PackedLinear]) -> torch.Tensor:
        return self._prepared(members).joined(x)

    def product(self, members: Sequence[PackedLinear]) -> Product:
        if _is_ready(members):
            return CudaProduct(members)
        return lambda x: self._prepared(members)(x)  # what is laid out anew is not kept: it would not see changes

    def experts(self, experts: PackedExperts) -> ExpertsProduct:
        """Kept for as long as the codes live: under torch.compile it is asked for at each call."""
        if not all(member.layout == LAYOUT for member in experts.members):
            return super().experts(experts)
        key, what = experts.last[0].codes, _identity(experts)
        found = _experts.get(key)
        if found is None or found[0] != what:
            found = what, CudaExperts(experts) if takes(experts) else super().experts(experts)
            _experts[key] = found
        return found[1]

    def _prepared(self, members: Sequence[PackedLinear]) -> CudaProduct:
        if _is_ready(members):
            return CudaProduct(members)
        diagonal = aligned(members[0].diagonal)
        return CudaProduct([laid_out(member).with_(diagonal=diagonal) for member in members], overlap=False)

    def rotated_weight(self, packed: PackedLinear) -> torch.Tensor:
        words, columns = parse_spec(packed.spec).words_per_tile, tiles_of(packed.in_features)
        weight = torch.empty(packed.out_features, packed.in_features, device=packed.codes.device)
        step = max(1, DECODED_WEIGHTS // (TILE * packed.in_features))
        for codes, rows in zip(packed.codes.split(step), weight.split(step * TILE), strict=True):
            stored = codes if packed.layout == TILES else from_chunks(codes, (len(codes), columns, words))
            tiles = self.decode(packed.spec, stored.reshape(-1, words)).reshape(len(codes), columns, -1)
            rows.copy_(from_tiles(tiles, *rows.shape))
        return weight.mul_(packed.scales.view(torch.float16).float()[:, None])

    def to_layout(self, codes: torch.Tensor, spec: str) -> torch.Tensor:
        return to_chunks(codes)

    def expect(self, packed: PackedLinear) -> None:
        decoder = decoder_spec(packed.spec)
        assert decoder is not None, "supports() said no"
        decoder_sets.expect(packed.codes, decoder)

    def tile_rows(
        self, codes: torch.Tensor, rows: torch.Tensor, spec: str, stored_shape: tuple[int, int, int]
    ) -> torch.Tensor:
        return from_chunks(codes[rows], (len(rows), *stored_shape[1:]))

    def from_layout(self, codes: torch.Tensor, spec: str, stored_shape: tuple[int, int, int]) -> torch.Tensor:
        return from_chunks(codes, stored_shape)


_experts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _identity(experts: PackedExperts) -> tuple[object, ...]:
    biases = (bias if bias is None else bias.data_ptr() for bias in (experts.first_bias, experts.last_bias))
    tensors = (tensor for member in experts.members for tensor in (member.codes, member.scales, member.diagonal))
    return experts.gate, *biases, *(tensor.data_ptr() for tensor in tensors)


def _is_ready(members: Sequence[PackedLinear]) -> bool:
    """Whether the kernels can read the members where they lie."""
    return members[0].diagonal.data_ptr() % ALIGNMENT == 0 and all(member.layout == LAYOUT for member in members)


def _missing(device: torch.device) -> str:
    """What a CUDA device, or this installation, lacks for the kernels of this folder; empty if nothing."""
    if torch.version.hip is not None:
        return "needs an NVIDIA device, and this torch is for AMD's"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there is no device {device}: torch finds {torch.cuda.device_count()} CUDA device(s)"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "needs compute capability {}.{}, and {} has {}.{}".format(*LEAST_CAPABILITY, device, *capability)
    if not compiler_is_installed():
        _warn_of_no_compiler()
        return f"has no compiler for its kernels: {INSTALL}"
    return ""


@cache
def _warn_of_no_compiler() -> None:
    """Once: the model answers all the same."""
    logger.warning("CUDA kernels cannot be compiled; plain torch does their work, many times slower: %s", INSTALL)
