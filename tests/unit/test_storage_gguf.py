"""GGUF in: the same values and the same tokens as the model that was written, one tensor at a time."""

import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qpalette.core.errors import CheckpointError
from qpalette.storage import export_checkpoint, gguf_source, open_checkpoint
from qpalette.storage.gguf_header import check_header
from qpalette.storage.gguf_rope import scaled_rope

try:
    from transformers import GgufConfig

    DEQUANTIZE = {"quantization_config": GgufConfig(dequantize=True)}
except ImportError:  # older transformers always dequantize
    DEQUANTIZE = {}

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 64, 4, 2, 96, 2
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "Ġ 1", "1 2"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]


def llama_cpp_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k, for its own rotary layout."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def model_tensors(tied: bool, biases: bool) -> dict[str, np.ndarray]:
    """A llama in Hugging Face's layout, keyed by GGUF names."""
    generator = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (kv, HIDDEN),
            f"blk.{i}.attn_v.weight": (kv, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
            f"blk.{i}.ffn_up.weight": (FEED_FORWARD, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, FEED_FORWARD),
        }
        if biases:
            shapes |= {f"blk.{i}.attn_{x}.bias": (kv if x != "q" else HIDDEN,) for x in "qkv"}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    file: Path,
    architecture: str = "llama",
    tied: bool = True,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    pre: str = "smollm",
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, int | float | str] | None = None,
    layers: int = LAYERS,
) -> Path:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT)
    for key, value in (metadata or {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, tensor in {**model_tensors(tied, architecture == "qwen2"), **(extra or {})}.items():
        if name in drop:
            continue
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            tensor = llama_cpp_permutation(tensor, HEADS if ".attn_q." in name else KV_HEADS)
        stored = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("architecture", "tied", "kind", "dtype"),
    [
        ("llama", True, gguf.GGMLQuantizationType.Q8_0, torch.float16),
        ("llama", False, gguf.GGMLQuantizationType.Q4_1, torch.float16),
        ("qwen2", False, gguf.GGMLQuantizationType.Q4_0, torch.float16),
        ("llama", True, gguf.GGMLQuantizationType.BF16, torch.bfloat16),
        ("llama", True, gguf.GGMLQuantizationType.F32, torch.float32),
    ],
)
def test_values_and_config_are_those_of_transformers(tmp_path, architecture, tied, kind, dtype):
    (tmp_path / "in").mkdir()
    file = write_gguf(tmp_path / "in" / "tiny.gguf", architecture, tied, kind)
    checkpoint = open_checkpoint(tmp_path / "in")
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **DEQUANTIZE)
    parameters = dict(reference.named_parameters())
    assert set(checkpoint.tensors) == set(parameters)
    for name, info in checkpoint.tensors.items():
        read = checkpoint.read(name)
        assert (read.shape, read.dtype) == (info.shape, info.dtype) == (parameters[name].shape, dtype)
        assert torch.equal(read, parameters[name]), name
        read.zero_()
        assert torch.equal(checkpoint.read(name), parameters[name])

    export_checkpoint(checkpoint, tmp_path / "out")
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert exported.dtype == dtype
    assert exported.config.tie_word_embeddings == tied
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, reference(ids).logits)


def test_query_and_key_rows_are_back_in_hugging_face_order(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.F32))
    original = model_tensors(tied=True, biases=False)
    for projection in "qkv":
        read = checkpoint.read(f"model.layers.1.self_attn.{projection}_proj.weight")
        assert np.array_equal(read.numpy(), original[f"blk.1.attn_{projection}.weight"])


def test_config_and_side_files_are_complete_and_have_no_stale_marks(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf"))
    export_checkpoint(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float16"
    assert config["rope_parameters"]["rope_theta"] == 500000.0
    assert "quantization_config" not in config
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    for ids in (config, generation):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 0)
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_digits_are_split_as_the_vocabulary_was_trained(tmp_path):
    """'a  1' is cut before the digit, so that both blanks merge; byte-level alone gives a blank and ' 1'."""
    export_checkpoint(open_checkpoint(write_gguf(tmp_path / "tiny.gguf")), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    assert tokenizer.tokenize("12") == ["1", "2"]
    assert tokenizer.decode(tokenizer("a  12<|im_end|>")["input_ids"]) == "a  12<|im_end|>"
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", TOKENS[0])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_an_unknown_pre_tokenizer_is_kept_with_a_warning(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    open_checkpoint(write_gguf(tmp_path / "tiny.gguf", pre="novel")).save_side_files(tmp_path / "out")
    assert "pre-tokenizer 'novel' is unknown" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("12") == ["12"]


def test_llama3_rope_factors_become_config(tmp_path):
    """transformers ignores rope_freqs.weight; these factors are what its own llama3 scaling computes."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    head = HIDDEN // HEADS
    factors = (1 / 500000.0 ** (torch.arange(0, head, 2) / head) / scaled).numpy()
    assert factors.max() > 7.9
    assert factors.min() < 1.1
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", extra={"rope_freqs.weight": factors}))
    assert checkpoint.config["rope_parameters"] == pytest.approx(rope)
    odd = write_gguf(tmp_path / "b.gguf", extra={"rope_freqs.weight": np.linspace(1, 3, head // 2, dtype=np.float32)})
    with pytest.raises(CheckpointError, match="rope_freqs are not those of Llama 3"):
        open_checkpoint(odd)


def rope_metadata(**given: int | float | str) -> dict[str, int | float | str]:
    return {f"llama.rope.scaling.{key}": value for key, value in given.items()}


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        (rope_metadata(type="none"), {"rope_type": "default"}),
        (rope_metadata(type="linear", factor=1.0), {"rope_type": "default"}),
        (rope_metadata(type="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (rope_metadata(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (rope_metadata(factor=4.0, original_context_length=32), {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            rope_metadata(type="yarn", factor=4.0, original_context_length=32, attn_factor=1.0),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            rope_metadata(type="yarn", factor=4.0, original_context_length=32, yarn_beta_fast=16.0, attn_factor=0.5),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "attention_factor": 0.5 * (1 + 0.1 * np.log(4)),
            },
        ),
    ],
)
def test_scaled_positions_become_config(tmp_path, metadata, rope):
    """What transformers leaves out: without it the model answers, and wrongly beyond its first context."""
    config = open_checkpoint(write_gguf(tmp_path / "a.gguf", metadata=metadata)).config
    assert config["rope_parameters"] == pytest.approx(rope | {"rope_theta": 500000.0})
    assert AutoConfig.for_model(**config).rope_parameters == config["rope_parameters"]


def test_only_full_attention_is_scaled(tmp_path):
    """Of a model with two kinds of layers: llama.cpp leaves sliding windows as they are."""
    own = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    scaled = scaled_rope(tmp_path, {"rope_parameters": own}, {"type": "linear", "factor": 8.0}, None)
    assert scaled == own | {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        (rope_metadata(type="longrope", factor=4.0), "longrope"),
        (rope_metadata(type="yarn", factor=4.0), "original_context_length"),
        (rope_metadata(type="yarn", original_context_length=32), "factor = None"),
        (rope_metadata(type="linear", factor=4.0, attn_factor=2.0), "attn_factor = 2"),
        (rope_metadata(type="linear", factor=4.0, alpha=100.0), "alpha = 100"),
        (
            rope_metadata(type="yarn", factor=4.0, original_context_length=32, yarn_log_multiplier=0.5),
            "yarn_log_multiplier = 0.5",
        ),
    ],
)
def test_positions_that_transformers_cannot_have_are_refused(tmp_path, metadata, what):
    with pytest.raises(CheckpointError, match=rf"{what}.*give the model's safetensors directory"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", metadata=metadata))


def test_the_factors_of_long_positions_are_refused(tmp_path):
    extra = {f"rope_factors_{kind}.weight": np.ones(HIDDEN // HEADS // 2, np.float32) for kind in ("long", "short")}
    with pytest.raises(CheckpointError, match="longrope"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", extra=extra))


def test_missing_and_unknown_tensors(tmp_path, caplog):
    with pytest.raises(CheckpointError, match=r"no tensor for model.layers.1.mlp.up_proj.weight \(1 missing\)"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", drop=("blk.1.ffn_up.weight",)))
    open_checkpoint(write_gguf(tmp_path / "b.gguf", extra={"blk.9.nextn.weight": np.zeros((32, 32), np.float32)}))
    assert "no name for blk.9.nextn.weight" in caplog.text


def test_a_tensor_of_another_shape_than_the_metadata_say(tmp_path):
    wrong = {"blk.1.ffn_up.weight": np.zeros((32, HIDDEN), np.float32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", extra=wrong))
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_up.weight' has shape \(32, 64\)"):
        checkpoint.read("model.layers.1.mlp.up_proj.weight")


def test_values_that_float16_cannot_hold(tmp_path):
    huge = {"blk.1.ffn_norm.weight": np.full(HIDDEN, 1e6, np.float32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", extra=huge))
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_norm.weight' is not finite in torch.float16"):
        checkpoint.read("model.layers.1.post_attention_layernorm.weight")


def test_damaged_files(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for size in (0, 3, 24, 300, 5000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is truncated or no valid GGUF file"):
            open_checkpoint(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"nope" + whole[4:])
    with pytest.raises(CheckpointError, match="no valid GGUF file"):
        open_checkpoint(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole.replace(b"llama", b"\xff\xff\xff\xff\xff", 1))
    with pytest.raises(CheckpointError, match=r"general.architecture cannot be decoded"):
        open_checkpoint(tmp_path / "cut.gguf")


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"  # no tensor; the first metadata's name
UINT8, STRING, ARRAY = (int(kind).to_bytes(4, "little") for kind in (0, 8, 9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + ARRAY + UINT8 + struct.pack("<Q", 1 << 20) + bytes(99), "announces 1048576 bytes, and 99 are left"),
        (HEADER + ARRAY + UINT8 + struct.pack("<Q", 1 << 40), "arrays announce 1099511627776 items"),
        (HEADER + ARRAY + UINT8 + struct.pack("<Q", 3 << 20) + bytes(3 << 20), "items, and 2097152 are the most"),
        (HEADER + ARRAY + STRING + struct.pack("<Q", 1 << 20) + bytes(64), "requires a buffer"),
        (HEADER + ARRAY + ARRAY + struct.pack("<Q", 1), "unknown type 9"),
        (HEADER + STRING + struct.pack("<Q", 1 << 63), "announces 9223372036854775808 bytes, and 0 are left"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "and 65536 are the most"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "and 65536 are the most"),
        (b"GGUF" + struct.pack("<IQQQI", 3, 1, 0, 0, 1 << 31), "a tensor of 2147483648 dimensions"),
    ],
)
def test_a_header_that_announces_more_than_there_is(tmp_path, content, message, monkeypatch):
    def parse(file: Path) -> None:
        raise AssertionError("the library must not see it: it builds objects for all that is announced")

    monkeypatch.setattr("qpalette.storage.gguf_source.GGUFReader", parse)
    (tmp_path / "bomb.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bomb\.gguf is truncated or no valid GGUF file") as caught:
        open_checkpoint(tmp_path / "bomb.gguf")
    assert message in str(caught.value)


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_headers_of_either_byte_order_are_walked(tmp_path, order):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=order)
    writer.add_token_list(TOKENS)
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_bool("yes", True)
    writer.add_tensor("a", np.ones((3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_header(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "novel"}, "cannot read GGUF architecture 'novel'"),
        ({"metadata": {"llama.expert_count": 8}}, "experts are stacked in GGUF files"),
        ({"layers": 2**31}, "announces 2147483648 layers and has tensors of 2, where 1 to 256 are read"),
        ({"layers": 0}, "announces 0 layers and has tensors of 2"),
        ({"extra": {f"blk.{i}.attn_norm.weight": np.ones(4) for i in range(2, 300)}, "layers": 300}, "tensors of 300"),
        ({"metadata": {"split.count": 2}}, "join the parts with `llama-gguf-split --merge`"),
    ],
)
def test_files_that_are_refused(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", **options))


def test_metadata_are_read_once_and_again_where_the_file_has_changed(tmp_path, monkeypatch):
    readers = []

    def counted(file: Path) -> gguf.GGUFReader:
        readers.append(file)
        return gguf.GGUFReader(file)

    monkeypatch.setattr(gguf_source, "_Reader", counted)
    file = write_gguf(tmp_path / "model.gguf")
    first = open_checkpoint(file)
    first.config["hidden_size"] = 1  # of this one alone
    again = open_checkpoint(file)
    assert len(readers) == 1
    assert again.config["hidden_size"] == HIDDEN
    write_gguf(file, tied=False)
    assert "lm_head.weight" in open_checkpoint(file).tensors
    assert len(readers) == 2


def test_transformers_reads_no_file_again_and_the_library_is_as_before(tmp_path, monkeypatch):
    opened = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path, *rest):
            opened.append(Path(path))
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    names_of = gguf.get_tensor_name_map
    file, other = write_gguf(tmp_path / "model.gguf"), write_gguf(tmp_path / "other.gguf", tied=False)
    checkpoint = open_checkpoint(file)
    checkpoint.save_side_files(tmp_path)
    assert opened == []
    with suppress(KeyError), gguf_source._lent(file, checkpoint._reader):
        assert len(gguf.GGUFReader(other).tensors) != len(gguf.GGUFReader(file).tensors)
        raise KeyError
    assert opened == [other]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (Counted, names_of)


def test_a_directory_with_several_files_asks_for_one(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(CheckpointError, match=r"several GGUF files; name one: a.gguf, b.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.real_model
def test_the_demo_model_speaks_from_its_export(tmp_path):
    source = os.environ.get("QPALETTE_DEMO_MODEL") or Path(__file__).parents[2] / "models"
    if not Path(source).is_file() and not any(Path(source).glob("*.gguf")):
        pytest.skip("no demo model: set QPALETTE_DEMO_MODEL to its .gguf file, or run `make model`")
    export_checkpoint(open_checkpoint(source), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a  1")["input_ids"] == [81, 256, 33]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.float().generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
