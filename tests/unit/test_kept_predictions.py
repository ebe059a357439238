"""A model that reads each window once predicts what it would predict again, bit for bit, without its body."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qpalette.core.errors import InputError
from qpalette.evaluate.kept import LOGITS, STATES, KeptPredictions
from qpalette.evaluate.metrics import evaluate_models
from qpalette.tuning.options import Silent
from qpalette.tuning.reference import Reference, logits_of

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
# What a class does between its body and its logits: nothing, a cap, a factor, routers; one looks into its body.
CLASSES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def model_of(kind: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **CLASSES[kind])).eval()


def windows(count: int = 2, length: int = 24) -> list[torch.Tensor]:
    return list(torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1)))


def stored_names(folder) -> set[str]:
    from safetensors import safe_open

    return {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", CLASSES)
def test_the_same_logits_with_and_without_the_body(kind, tmp_path):
    model, texts = model_of(kind), windows()
    with torch.inference_mode():
        true = [model(text[None], use_cache=True).logits for text in texts]
    kept = KeptPredictions(model, tmp_path)
    first = [kept(text[None], use_cache=True).logits for text in texts]
    kept.release()
    again = [kept(text[None], use_cache=True).logits for text in reversed(texts)][::-1]
    assert all(map(torch.equal, first, true))
    assert all(map(torch.equal, again, true))
    assert stored_names(tmp_path) == {LOGITS if kind == "opt" else STATES}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_original_of_a_tuning_reads_once_or_keeps_nothing(kind, tmp_path):
    """No class takes the disk that its logits would."""
    model, texts, reads = model_of(kind), windows(), []
    with torch.no_grad():
        true = [logits_of(model, text) for text in texts]
    watch = model.get_input_embeddings().register_forward_hook(lambda *call: reads.append(call))
    reference = Reference(model, texts, tmp_path)
    for _ in range(3):
        assert all(torch.equal(reference.logits(index), true[index]) for index in range(2))
    watch.remove()
    if kind == "opt":
        assert stored_names(tmp_path) == set()
        with pytest.raises(InputError, match="leave --cache away"):
            reference.release(Silent())
        return
    assert len(reads) == 2
    assert stored_names(tmp_path) == {STATES}
    reference.release(Silent())
    assert all(torch.equal(reference.logits(index), true[index]) for index in range(2))


def test_each_window_is_read_once_and_the_body_goes(tmp_path):
    model, texts = model_of("llama"), windows()
    reads = []
    body = model.model
    body.register_forward_hook(lambda *call: reads.append(call))
    kept = KeptPredictions(model, tmp_path)
    other = model_of("llama")
    evaluate_models(kept, None, texts)
    before = len(reads)
    evaluate_models(other, kept, texts)
    evaluate_models(other, kept, texts)
    assert before == len(reads) == len(texts)
    layer = weakref.ref(body.layers[0])
    reads.clear()
    kept.release()
    del body
    gc.collect()
    assert layer() is None, "what released memory would hold"
    assert evaluate_models(other, kept, texts).kl == 0


def test_a_window_that_was_not_read_is_refused(tmp_path):
    kept = KeptPredictions(model_of("llama"), tmp_path)
    kept(windows()[0][None])
    kept.release()
    with pytest.raises(InputError, match="not read this window"):
        kept(windows(3)[2][None])


def test_a_damaged_file_is_named(tmp_path):
    kept = KeptPredictions(model_of("llama"), tmp_path)
    kept(windows()[0][None])
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=file.name):
        kept(windows()[0][None])
