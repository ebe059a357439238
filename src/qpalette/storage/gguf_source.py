"""A GGUF file, dequantized one tensor at a time into the names and layout of the Hugging Face model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize

from qpalette.core.errors import CheckpointError
from qpalette.storage.base import Checkpoint, TensorInfo, layout_of
from qpalette.storage.gguf_header import check_header
from qpalette.storage.gguf_metadata import read_config, save_generation_config, save_tokenizer

logger = logging.getLogger(__name__)

FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
NO_TOKENIZER = (None, "none", "no_vocab")  # nothing said, or one of llama.cpp's two words for it
LAYER = re.compile(r"blk\.(\d+)\.")
MOST_LAYERS = 256  # twice the deepest model's; transformers takes a time that grows with their square
ROPE_FACTORS = "rope_freqs.weight"  # goes into the config
ROPE_SCALING = re.compile(r"[\w-]+\.rope\.(?:scaling\.(?P<what>\w+)|(?P<old>scale_linear))")
LONG_ROPE = re.compile(r"rope_factors_(?:long|short)\.weight")


class GgufCheckpoint(Checkpoint):
    """Reads one .gguf file through a memory map.

    A quantized file gives float16, a plain one its own float type, so that values are those of transformers'
    `from_pretrained(..., gguf_file=..., quantization_config=GgufConfig(dequantize=True), dtype=...)`.

    Raises CheckpointError when the file is damaged or split, and for models that are not plain decoders.
    """

    format = "gguf"

    def __init__(self, file: Path) -> None:
        self.file = file
        self.files = (file,)
        self._reader = reader = _open_reader(file)
        _check_supported(file, reader)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        self.dtype = _float_type(reader.tensors)
        with _lent(file, reader):
            self.config = read_config(file, self.dtype, _rope_scaling(file, reader), _rope_factors(stored))
            self._processor, names, shapes = _transformers_layout(file, reader, self.config)
        self._stored = {names[name]: tensor for name, tensor in stored.items() if name in names}
        self.tensors = layout_of(TensorInfo(name, shapes[name], self.dtype) for name in self._stored)
        self._check_complete(shapes, set(stored) - set(names) - {ROPE_FACTORS})

    def read(self, name: str) -> torch.Tensor:
        tensor = self._stored.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.file}: there is no tensor {name!r}; the names are those of the model class")
        try:
            weights = dequantize(tensor.data, tensor.tensor_type)
            weights = self._processor.process(weights=weights, name=tensor.name).weights
        except (ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f"{self.file}: tensor {tensor.name!r} ({tensor.tensor_type.name}) cannot be dequantized ({error}); "
                "update gguf, or fetch the file again"
            ) from error
        # The copy comes first: a float32 tensor may be a view of the read-only map.
        result = torch.from_numpy(np.array(weights)).to(self.dtype)
        info = self.tensors[name]
        if tuple(result.shape) != info.shape:
            raise CheckpointError(
                f"{self.file}: tensor {tensor.name!r} has shape {tuple(result.shape)}, but the file's metadata ask for "
                f"{info.shape}; the file is inconsistent, fetch it again"
            )
        if not torch.isfinite(result).all():
            raise CheckpointError(f"{self.file}: tensor {tensor.name!r} is not finite in {self.dtype}; fetch it again")
        return result

    def save_side_files(self, directory: Path) -> None:
        kind = _metadata(self.file, self._reader, "tokenizer.ggml.model")
        if kind in NO_TOKENIZER:
            logger.warning("%s has no tokenizer; none is written", self.file)
        else:
            pre = _metadata(self.file, self._reader, "tokenizer.ggml.pre") if kind == "gpt2" else None
            with _lent(self.file, self._reader):
                save_tokenizer(self.file, self.config, pre, directory)
        save_generation_config(self.config, directory)

    def _check_complete(self, shapes: Mapping[str, tuple[int, ...]], unknown: set[str]) -> None:
        tied = {"lm_head.weight"} if self.config.get("tie_word_embeddings") else set()
        missing = sorted(set(shapes) - set(self.tensors) - tied)
        if missing:
            raise CheckpointError(
                f"{self.file} has no tensor for {', '.join(missing[:3])} ({len(missing)} missing); fetch it again"
            )
        if unknown:
            logger.warning(
                "%s: transformers has no name for %s; they are left out", self.file, ", ".join(sorted(unknown))
            )


class _Reader(GGUFReader):
    """With a plain view of the file: numpy's memory map runs Python at every slice, and each word of a vocabulary is
    several."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)


def _open_reader(file: Path) -> GGUFReader:
    check_header(file)
    try:
        return _Reader(file)
    except Exception as error:  # the reader indexes a raw map: a damaged file may raise anything
        raise CheckpointError(
            f"{file} is truncated or no valid GGUF file ({type(error).__name__}: {error}); fetch it again"
        ) from error


@contextmanager
def _lent(file: Path, reader: GGUFReader) -> Iterator[None]:
    """Transformers takes this reader of `file` meanwhile. It would read the file anew for every config and tokenizer,
    and make the table of names anew for each of the model's modules: most of what opening a file takes."""
    read, names_of = gguf.GGUFReader, gguf.get_tensor_name_map

    def open_reader(path: Any, *rest: Any) -> GGUFReader:
        return reader if Path(path).resolve() == file.resolve() else read(path, *rest)

    library = vars(gguf)
    library |= {"GGUFReader": open_reader, "get_tensor_name_map": lru_cache(names_of)}
    try:
        yield
    finally:
        library |= {"GGUFReader": read, "get_tensor_name_map": names_of}


def _metadata(file: Path, reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: {key} cannot be decoded ({error}); the file is corrupt, fetch it again") from (
            error
        )


def _count(file: Path, reader: GGUFReader, key: str) -> int:
    """A metadata number that may be absent: 0 then."""
    value = _metadata(file, reader, key) or 0
    if not isinstance(value, int):
        raise CheckpointError(f"{file}: {key} is {value!r}, not a number; the file is corrupt, fetch it again")
    return value


def _check_supported(file: Path, reader: GGUFReader) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    architecture = _metadata(file, reader, "general.architecture")
    way_out = "give the model's safetensors directory instead"
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise CheckpointError(f"{file}: transformers cannot read GGUF architecture {architecture!r}; {way_out}")
    if _count(file, reader, f"{architecture}.expert_count"):
        raise CheckpointError(f"{file}: experts are stacked in GGUF files, which is not supported; {way_out}")
    if _count(file, reader, "split.count") > 1:
        raise CheckpointError(f"{file} is one part of a split model; join the parts with `llama-gguf-split --merge`")
    if any(LONG_ROPE.fullmatch(tensor.name) for tensor in reader.tensors):
        raise CheckpointError(f"{file} asks for rope.scaling.type = longrope, which is not read from GGUF; {way_out}")
    # A corrupt count would have us build a model of a billion layers, and none the 32 of transformers' default.
    layers = _count(file, reader, f"{architecture}.block_count")
    present = len({match[1] for tensor in reader.tensors if (match := LAYER.match(tensor.name))})
    if not 1 <= layers <= min(present, MOST_LAYERS):
        raise CheckpointError(
            f"{file} announces {layers} layers and has tensors of {present}, where 1 to {MOST_LAYERS} are read; "
            "it is corrupt, fetch it again"
        )


def _float_type(tensors: list[ReaderTensor]) -> torch.dtype:
    """float16 once anything is quantized; otherwise the half type that the file holds, or float32."""
    types = {tensor.tensor_type for tensor in tensors}
    if types <= set(FLOATS):
        return min((FLOATS[kind] for kind in types), key=lambda dtype: dtype.itemsize, default=torch.float32)
    return torch.float16


def _rope_factors(stored: Mapping[str, ReaderTensor]) -> torch.Tensor | None:
    tensor = stored.get(ROPE_FACTORS)
    return None if tensor is None else torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))


def _rope_scaling(file: Path, reader: GGUFReader) -> dict[str, Any]:
    """Metadata of the rotary positions' scaling, by the last part of their names."""
    matches = map(ROPE_SCALING.fullmatch, reader.fields)
    return {match["what"] or match["old"]: _metadata(file, reader, match[0]) for match in matches if match}


def _transformers_layout(
    file: Path, reader: GGUFReader, config: dict[str, Any]
) -> tuple[Any, dict[str, str], dict[str, tuple[int, ...]]]:
    """What transformers knows: the processor that undoes llama.cpp's layouts, GGUF name to Hugging Face name, and
    the shape of each parameter, from a model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = _metadata(file, reader, "general.architecture")
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
        names = get_gguf_hf_weights_map(model, processor)
    except Exception as error:  # whatever a model class raises on the sizes of a damaged file
        raise CheckpointError(
            f"{file}: transformers cannot build a causal language model from it ({error}); "
            "give the model's safetensors directory instead"
        ) from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return processor, {gguf: name for gguf, name in names.items() if name in shapes}, shapes
