"""Damages a small GGUF file in every way that a file can be damaged, and opens it.

    python tests/hostile/fuzz_gguf.py --cases 20000

A case may be read or be refused with a CheckpointError, and nothing else: no other exception, no allocation that the
bytes on disk do not justify, and an end. The command prints how often each happened.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from fuzzing import damaged_bytes, main, try_cases
from hypothesis import strategies as st
from limits import bounded

from qpalette.core.errors import CheckpointError
from qpalette.storage import open_checkpoint

WIDTH, INNER, TOKENS = 32, 32, ["<s>", "a", "b", "ab"]
HOSTILE_NUMBERS = [0, 1, 2, 8, 9, 10**6, 2**20, 2**31, 2**32 - 1, 2**40, 2**48, 2**61, 2**63, 2**64 - 1]
HOSTILE_BYTES = [b"\xff" * 8, b"\0" * 8, b"nan\0", b"llama", b"qwen2", b"gemma3", b"mamba", b"t5", b"gpt2"]


def good_file(file: Path) -> bytes:
    """A llama of one layer, written by the library of llama.cpp."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    square = {f"blk.0.{name}.weight": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    square |= {f"blk.0.{name}.weight": (INNER, WIDTH) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    norms = {f"blk.0.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,), **square, **norms}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(np.ones(shape, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def places_of(file: Path) -> list[tuple[int, int]]:
    """(offset, width) of every count, length, type and number in the header."""
    reader = gguf.GGUFReader(file)
    places = []
    for field in [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]:
        offset = field.offset
        for part in field.parts:
            if part.itemsize > 1:
                places += [(offset + i * part.itemsize, part.itemsize) for i in range(len(part))]
            offset += part.nbytes
    return places


with tempfile.TemporaryDirectory() as _folder:
    FILE = good_file(Path(_folder, "good.gguf"))
    PLACES = places_of(Path(_folder, "good.gguf"))


@st.composite
def damaged_numbers(draw: Callable) -> bytes:
    """One to three numbers of the header replaced."""
    content = bytearray(FILE)
    for _ in range(draw(st.integers(1, 3))):
        place, width = draw(st.sampled_from(PLACES))
        before = int.from_bytes(content[place : place + width], "little")
        number = draw(st.sampled_from(HOSTILE_NUMBERS) | st.integers(-2, 2).map(before.__add__) | st.integers(0, 2**64))
        content[place : place + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(content)


@st.composite
def damaged_words(draw: Callable) -> bytes:
    """Bytes of the header overwritten by words that mean something, lengths kept."""
    content, place = bytearray(FILE), draw(st.integers(0, PLACES[-1][0]))
    word = draw(st.sampled_from(HOSTILE_BYTES))
    content[place : place + len(word)] = word
    return bytes(content)


cases = st.one_of(damaged_numbers(), damaged_numbers(), damaged_bytes(FILE), damaged_words(), st.binary(max_size=64))


def read_everything(file: Path) -> str:
    """What opening it and reading every tensor came to."""
    try:
        checkpoint = open_checkpoint(file)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except CheckpointError as error:
        return re.sub(r"'[^']*'|\d+|/[^ ]*", "..", str(error))[:80]
    return "read"


def check(content: bytes, place: Path) -> str:
    """Write `content` and read it. Raises AssertionError on what must not be."""
    file = place.with_suffix(".gguf")
    file.write_bytes(content)
    with bounded(len(content), "gguf"):
        return read_everything(file)


def run(count: int, derandomize: bool) -> Counter[str]:
    """Try `count` cases; how often each thing happened."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "good.gguf")
        file.write_bytes(FILE)
        assert read_everything(file) == "read", "and what transformers imports for it is there from now on"
    return try_cases(cases, check, count, derandomize)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
