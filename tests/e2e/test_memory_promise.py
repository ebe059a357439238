"""`--memory` with `--context`: what a plan promises is what the model holds that is made by it, at its full context.

Weights are tensors of the model, and the cache is what `generate` has taken: counted, to the byte. What a process has
besides (the interpreter, torch, compiled kernels) is no part of the promise; `benchmarks/memory_promise.py` shows it.
"""

from functools import partial

import pytest
import torch
from tiny_model import VOCABULARY, build
from transformers import AutoConfig

import qpalette
from qpalette.core.mapped import resident_bytes
from qpalette.evaluate import load_model
from qpalette.generation import attach
from qpalette.generation.cache import CodedTokenCache
from qpalette.kvcache import SHAPED, WHITE, Transform, bucket, parse_cache, white
from qpalette.models import find_groups
from qpalette.pipeline.planning import make_plan
from qpalette.plan import (
    Budget,
    SensitiveLinear,
    SensitiveStream,
    Sensitivities,
    Space,
    device_bytes,
    palette_of,
)
from qpalette.storage import open_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, DIM = 4, 64
NOT_STORED = ("inv_freq", "original_inv_freq")  # that a class computes of its config: of the activations' estimate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of rows that every backend takes as they are stored, without padding."""
    directory = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": HEADS * DIM, "intermediate_size": 512, "num_key_value_heads": HEADS}
    model = build("llama", max_position_embeddings=1400, **sizes)
    model.to(torch.bfloat16).save_pretrained(directory)
    return open_checkpoint(directory)


def sensitivities(checkpoint, coded: bool) -> Sensitivities:
    linears = tuple(
        SensitiveLinear(shape, group.name, 1.0 + index)
        for index, group in enumerate(find_groups(checkpoint).groups)
        for shape in group.linears
    )
    streams = tuple(
        SensitiveStream(layer, kind, HEADS, DIM, value)
        for layer in range(2)
        for kind, value in (("keys", 4.0), ("values", 0.5))
    )
    return Sensitivities(linears, {"method": "invented"}, streams=streams if coded else ())


def planned(checkpoint, coded: bool, context: int, batch: int):
    """Within what no choice changes and a room for about 3 bits of each weight, and of each coded number."""
    space = Space(palette_of(families=("nuq",)), batch=batch)

    def plan(memory: int):
        return make_plan(sensitivities(checkpoint, coded), Budget(memory=memory), space, checkpoint, context=context)

    return plan(plan(1 << 40).overhead.memory + (500_000 + batch * 600_000 if coded else 450_000))


def bytes_of(model, stored: bool) -> int:
    """Of parameters and buffers, each once."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return sum(each.nbytes for name, each in tensors.items() if (name.rpartition(".")[2] not in NOT_STORED) == stored)


@pytest.mark.parametrize(("context", "batch"), [(1024, 1), (700, 2), (1300, 1)])
@pytest.mark.parametrize("coded", [False, True], ids=["16 bits", "codes"])
def test_the_promise_is_what_is_held(tmp_path, checkpoint, coded, context, batch):
    found = planned(checkpoint, coded, context, batch)
    (tmp_path / "plan.json").write_text(found.plan.to_json())
    qpalette.quantize(checkpoint.location, tmp_path / "out", plan=tmp_path / "plan.json")
    model = load_model(str(tmp_path / "out"), dtype=torch.bfloat16)[0]
    transforms = [transform(), transform()]
    make = None
    if coded:
        make = lambda config, length: CodedTokenCache(config, length, found.plan.cache, transforms)  # noqa: E731
    loop = attach(model, "never", None, make)
    prompt = torch.randint(3, VOCABULARY, (batch, context - 2))
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, pad_token_id=0)
    assert answer.shape == (batch, context)
    (session,) = loop.loop.sessions

    kept, activations = device_bytes(checkpoint.config, context, batch)
    weights = found.planned.choice.bits // 8 + found.overhead.memory - activations
    if coded:
        space = found.planner.space.cache
        kept = space.fixed_bytes + found.planned.choice.cache_bits // 8
        weights -= space.fixed_bytes
    else:
        weights -= kept
    held = session.inputs.cache.bytes + (sum(map(transform_bytes, transforms)) if coded else 0)
    assert bytes_of(model, stored=True) == weights
    assert held == kept
    assert found.memory_bytes == weights + kept + activations
    beside = bytes_of(model, stored=False) + sum(each.nbytes for each in inputs_of(session))
    assert 0 < beside < activations / 10


@pytest.mark.parametrize(
    "spec", ["vq-3", "vq-3/nuq-2,sinks=9", "balanced:vq4-2", "mean:nuq-4,window=64", "white:vq-2.5,sinks=0,window=7"]
)
def test_a_given_cache_counts_its_own_bytes(checkpoint, spec):
    """Not 16 bits a number, nor those of a cache that would be planned."""
    cache, context, batch = parse_cache(spec), 1300, 2
    space = Space(palette_of(families=("nuq",)), batch=batch)
    found = partial(make_plan, budget=Budget(memory=1 << 40), space=space, checkpoint=checkpoint, context=context)
    given, plain = found(sensitivities(checkpoint, True), cache=cache), found(sensitivities(checkpoint, False))
    assert given.plan.cache is None  # it is not planned
    sixteen = device_bytes(checkpoint.config, context, batch)[0]
    config = AutoConfig.for_model(**checkpoint.config)
    transforms = None if cache.transform == WHITE else [transform(cache.transform) for _ in range(2)]
    held = CodedTokenCache(config, bucket(context, config.max_position_embeddings), cache, transforms)
    for layer in held.layers:
        layer.lazy_initialization(*torch.zeros(2, batch, HEADS, 1, DIM, dtype=torch.bfloat16))
    counted = given.overhead.memory - plain.overhead.memory + sixteen
    assert counted == held.bytes + sum(map(transform_bytes, transforms or ())) < sixteen / 2


def test_codes_are_in_memory_once(tmp_path, checkpoint):
    """Laid out anew on a processor: pages of the file that had them are let go, though norms keep it mapped."""
    qpalette.quantize(checkpoint.location, tmp_path / "out", spec="nuq-4")
    model = load_model(str(tmp_path / "out"), dtype=torch.bfloat16)[0]
    codes = sum(each.nbytes for name, each in model.named_buffers() if name.endswith("qp_codes"))
    file = tmp_path / "out" / "model.safetensors"
    assert codes > file.stat().st_size / 2
    assert resident_bytes(file) < file.stat().st_size - codes / 2


def transform(kind: str = SHAPED) -> Transform:
    """With all that a calibrated one of its kind has."""
    matrix, inverse = (each.expand(HEADS, DIM, DIM).clone() for each in (white(DIM).matrix, white(DIM).inverse))
    shaping = (torch.zeros(HEADS, DIM, DIM), torch.ones(HEADS)) if kind == SHAPED else ()
    return Transform(matrix, inverse, torch.zeros(HEADS, DIM), *shaping)


def transform_bytes(transform: Transform) -> int:
    return sum(each.nbytes for each in vars(transform).values() if isinstance(each, torch.Tensor))


def inputs_of(session) -> list[torch.Tensor]:
    """What a step has besides its cache."""
    found = session.inputs
    return [each for each in (found.token, found.offset, found.mask) if each is not None]
