"""Moments of both sides against sums of explicit inputs and gradients; interruptions; experts; the files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from qpalette.calibration import collect_hessians, hessians, sums
from qpalette.calibration.equalize import equalize
from qpalette.calibration.feedback import LOUD
from qpalette.calibration.hessians import (
    Calibration,
    HessianStore,
    pack_symmetric,
    packed_length,
    row_blocks,
    unpack_symmetric,
)
from qpalette.calibration.taps import Weight, weights_of
from qpalette.core.errors import HessianError
from qpalette.core.records import LinearGroup, LinearShape
from qpalette.models.resolver import Place

VOCABULARY = 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
}


def group(name: str, *linears: str, rows: int = 32, columns: int = 32) -> LinearGroup:
    return LinearGroup(name, tuple(LinearShape(linear, rows, columns) for linear in linears))


LAYER = "model.layers.{}"
QKV = LinearGroup(
    "qkv",
    tuple(
        LinearShape(f"{LAYER.format(1)}.self_attn.{leaf}_proj", rows, 32)
        for leaf, rows in (("q", 32), ("k", 16), ("v", 16))
    ),
)
OUT = group("o", f"{LAYER.format(0)}.self_attn.o_proj")
GATE_UP = group("gu", *(f"{LAYER.format(1)}.mlp.{leaf}_proj" for leaf in ("gate", "up")), rows=48)
DOWN = group("down", f"{LAYER.format(1)}.mlp.down_proj", columns=48)
GROUPS = (OUT, QKV, GATE_UP, DOWN)


def calibration(sides: int = 2, **changes: object) -> Calibration:
    return Calibration(
        **({"source": "f00d", "text_sha256": "cafe", "tokens": 60, "window": 20, "sides": sides} | changes)
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    return list(torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1)))


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Inputs and gradients at the outputs, by torch's own hooks on the modules."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        keep = found.setdefault(name, [])
        handles.append(module.register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0].detach()[0].double())))
        handles.append(
            module.register_full_backward_hook(lambda _, x, g, keep=keep: keep.append(g[0].detach()[0].double()))
        )
    yield found
    for handle in handles:
        handle.remove()


def backward(model: nn.Module, window: torch.Tensor, seed: int) -> None:
    logits = model(window[None]).logits[0, :-1]
    uniform = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(seed))
    labels = (logits.softmax(-1).cumsum(-1) < uniform).sum(-1)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    model.zero_grad()


def explicit(model: nn.Module, windows: list[torch.Tensor], groups: tuple[LinearGroup, ...]):
    """H_I by group and H_O by linear, float64, token by token."""
    inputs = {g.name: torch.zeros(g.in_features, g.in_features, dtype=torch.float64) for g in groups}
    outputs = {}
    for number, window in enumerate(windows):
        names = [linear.name for g in groups for linear in g.linears]
        with recorded(model, names) as found:
            backward(model, window, number)
        for g in groups:
            weights = [model.get_submodule(linear.name).weight.detach().double() for linear in g.linears]
            scale = equalize(weights)
            for linear, weight in zip(g.linears, weights, strict=True):
                x, gradient = found[linear.name]
                rows = (weight / scale).square().mean(1)
                total = outputs.setdefault(linear.name, torch.zeros(len(rows), len(rows), dtype=torch.float64))
                for token, slope in zip(x, gradient, strict=True):
                    inputs[g.name] += float(slope.square() @ rows) * torch.outer(token, token)
                    total += float((token * scale).square().sum()) * torch.outer(slope, slope)
    return inputs, outputs


def seen(directory, of: LinearGroup) -> int:
    metadata = [safe_open(file, "pt").metadata() for file in directory.glob("*.safetensors")]
    return next(int(facts["seen"]) for facts in metadata if facts["group"] == of.name)


def files(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_moments_are_the_sums_of_weighed_inputs_and_gradients(model, windows, tmp_path):
    store = HessianStore(tmp_path, calibration())
    collect_hessians(model, windows, GROUPS, store)
    inputs, outputs = explicit(model, windows, GROUPS)
    for g in GROUPS:
        found = store.read(g).double()
        torch.testing.assert_close(found, inputs[g.name], rtol=1e-4, atol=1e-5 * float(found.abs().max()))
        for linear in g.linears:
            (block,) = store.read_outputs(g, linear.name)
            expected = outputs[linear.name]
            torch.testing.assert_close(block.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_with_more_draws_of_labels_the_sums_are_of_all_of_them(model, windows, tmp_path):
    """And a token that is read again is no other token."""
    one, two = (HessianStore(tmp_path / str(draws), calibration(draws=draws)) for draws in (1, 2))
    collect_hessians(model, windows, GROUPS, one)
    collect_hessians(model, windows, GROUPS, two)
    inputs, outputs = explicit(model, [*windows, *windows], GROUPS)
    for g in GROUPS:
        expected = inputs[g.name]
        torch.testing.assert_close(two.read(g).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert not torch.allclose(two.read(g), 2 * one.read(g), rtol=1e-3)
        for linear in g.linears:
            (block,) = two.read_outputs(g, linear.name)
            expected = outputs[linear.name]
            torch.testing.assert_close(block.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert seen(tmp_path / "2", g) == seen(tmp_path / "1", g) == sum(map(len, windows))


def test_no_token_drowns_the_others():
    """One token whose gradient, or input, is a thousand times the others' counts for LOUD times the mean of all."""
    torch.manual_seed(0)
    weights = {DOWN.linears[0].name: Weight(nn.Parameter(torch.randn(32, 48)), Place("down"))}
    x, gradient = torch.randn(64, 48), torch.randn(64, 32)
    x[5] *= 1e3
    gradient[0] *= 1e3
    found = sums.GroupSums(DOWN, weights, two_sided=True)
    found.add(DOWN.linears[0].name, x, gradient)
    values = weights[DOWN.linears[0].name].values.double()
    scale = equalize([values])
    of_inputs = gradient.double().square() @ (values / scale).square().mean(1)
    of_outputs = (x.double() * scale).square().sum(1)
    of_inputs[0], of_outputs[5] = LOUD * of_inputs.mean(), LOUD * of_outputs.mean()
    (read,), ((written,),) = found.inputs.values(), found.outputs.values()
    expected = x.double().T @ (of_inputs[:, None] * x)
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    expected = gradient.double().T @ (of_outputs[:, None] * gradient)
    torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_siblings_have_a_matrix_each_where_gradients_weigh(model, windows, tmp_path):
    """What v's gradients say of the input is not q's business; all of it is the group's."""
    store = HessianStore(tmp_path, calibration())
    collect_hessians(model, windows, [QKV], store)
    mine = [store.read(QKV, linear.name) for linear in QKV.linears]
    assert not torch.allclose(mine[0] / mine[0].trace(), mine[2] / mine[2].trace(), rtol=1e-2)
    torch.testing.assert_close(sum(mine), store.read(QKV))


def test_the_traces_of_both_sides_are_the_loss_of_unshaped_noise(model, windows, tmp_path):
    """tr(H_I diag(c)) = tr(H_O diag(r)): of a linear that is alone, both are sum (g^T diag(r) g) (x^T diag(c) x)."""
    store = HessianStore(tmp_path, calibration())
    collect_hessians(model, windows, [DOWN], store)
    weight = model.get_submodule(DOWN.linears[0].name).weight.detach().double()
    scale = equalize([weight])
    (outputs,) = store.read_outputs(DOWN, DOWN.linears[0].name)
    read = (store.read(DOWN).double().diagonal() * scale.square()).sum()
    written = (outputs.double().diagonal() * (weight / scale).square().mean(1)).sum()
    assert float(read) == pytest.approx(float(written), rel=1e-4)


def test_rows_in_blocks_have_the_diagonal_blocks(model, windows, tmp_path, monkeypatch):
    whole, cut = (HessianStore(tmp_path / name, calibration()) for name in ("whole", "cut"))
    collect_hessians(model, windows, [GATE_UP], whole)
    monkeypatch.setattr(hessians, "BLOCK_TILES", 2)
    collect_hessians(model, windows, [GATE_UP], cut)
    name = GATE_UP.linears[1].name
    blocks = cut.read_outputs(GATE_UP, name)
    assert [len(block) for block in blocks] == [32, 16]
    monkeypatch.undo()
    (matrix,) = whole.read_outputs(GATE_UP, name)
    for block, rows in zip(blocks, (slice(0, 32), slice(32, 48)), strict=True):
        torch.testing.assert_close(block, matrix[rows, rows], rtol=1e-4, atol=1e-5 * float(matrix.abs().max()))


@pytest.mark.parametrize("rows", [16, 20, 2048, 2049, 4100, 11008, 14336])
def test_row_blocks_are_tiles_of_one_height(rows):
    blocks = row_blocks(rows)
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, rows)
    heights = [block.stop - block.start for block in blocks]
    assert len(set(heights[:-1])) <= 1
    assert all(height % 16 == 0 and height <= 2048 for height in heights[:-1])
    assert 0 < heights[-1] <= heights[0] <= 2048
    assert len(blocks) == -(-rows // 2048)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize(("budget", "stop"), [(1 << 30, 1), (1 << 30, 3), (1, 2), (1, 3), (1, 4)])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(model, windows, tmp_path, monkeypatch, sides, budget, stop):
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == stop:
            raise Killed

    monkeypatch.setattr(sums, "SPACING", 0)
    whole, killed = (HessianStore(tmp_path / name, calibration(sides)) for name in ("whole", "killed"))
    collect_hessians(model, windows, GROUPS, whole, memory_budget_bytes=budget)
    options = {"memory_budget_bytes": budget}
    with pytest.raises(Killed):
        collect_hessians(model, windows, GROUPS, killed, progress=kill, **options)
    seen: list[int] = []
    collect_hessians(model, windows, GROUPS, killed, progress=lambda done, total: seen.append(done), **options)
    passes = 4 if budget == 1 else 1
    assert len(seen) == 3 * passes - stop, "no window is read twice"
    assert files(killed.directory) == files(whole.directory)


def test_sums_of_another_calibration_are_not_gone_on_with(model, windows, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        raise Killed

    monkeypatch.setattr(sums, "SPACING", 0)
    with pytest.raises(Killed):
        collect_hessians(model, windows, GROUPS, HessianStore(tmp_path / "a", calibration(seed=1)), progress=kill)
    for name in ("a", "b"):
        collect_hessians(model, windows, GROUPS, HessianStore(tmp_path / name, calibration()))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_calibration_of_one_side_is_not_mixed_with_one_of_two(model, windows, tmp_path):
    collect_hessians(model, windows, GROUPS, HessianStore(tmp_path, calibration(1)))
    with pytest.raises(HessianError, match="another sides"):
        collect_hessians(model, windows, GROUPS, HessianStore(tmp_path, calibration(2)))
    assert HessianStore.open(tmp_path).read_outputs(QKV, QKV.linears[0].name) == []


# --- experts -----------------------------------------------------------------------------------------------------

EXPERTS = "model.layers.1.block_sparse_moe.experts"
FIRST_LINEARS = LinearGroup(
    "first", tuple(LinearShape(f"{EXPERTS}.{e}.{leaf}", 48, 32) for e in range(4) for leaf in ("w1", "w3"))
)
LAST = tuple(group(f"{EXPERTS}.{e}.w2", f"{EXPERTS}.{e}.w2", columns=48) for e in range(4))


def routed(mixtral, windows) -> list[int]:
    """Tokens of each expert in layer 1."""
    counts = torch.zeros(4, dtype=torch.int64)

    def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        counts.add_(torch.bincount(args[1].flatten(), minlength=4))

    handle = mixtral.model.layers[1].mlp.experts.register_forward_pre_hook(count)
    with torch.no_grad():
        for window in windows:
            mixtral(window[None])
    handle.remove()
    return counts.tolist()


@pytest.mark.parametrize("sides", [1, 2])
def test_an_expert_has_the_moments_of_the_tokens_that_are_routed_to_it(mixtral, windows, tmp_path, sides, monkeypatch):
    seen: dict[str, int] = {}
    monkeypatch.setattr("qpalette.calibration.collect.fill_up", lambda found: [seen.update(g.seen) for g in found])
    store = HessianStore(tmp_path, calibration(sides))
    collect_hessians(mixtral, windows, [FIRST_LINEARS, *LAST], store)
    for expert, count in enumerate(routed(mixtral, windows)):
        assert {seen[f"{EXPERTS}.{expert}.{leaf}"] for leaf in ("w1", "w3", "w2")} == {count}
        assert store.expert_tokens[f"{EXPERTS}.{expert}"] == count
    if sides == 2:
        traces = [store.read_outputs(g, g.linears[0].name)[0].trace() for g in LAST]
        assert all(trace > 0 for trace in traces)
        first = [store.read_outputs(FIRST_LINEARS, linear.name)[0] for linear in FIRST_LINEARS.linears]
        assert not torch.allclose(first[0], first[1]), "gate and up are rows of one product"


def test_moments_of_hidden_states_are_filled_up_with_those_of_the_layer(mixtral, windows, tmp_path, monkeypatch):
    """H_O of last linears: every expert writes the same hidden state."""
    plain, pooled = of_experts(mixtral, windows, tmp_path, monkeypatch, LAST)
    counts = routed(mixtral, windows)
    assert min(counts) < 32
    moments = [plain.read_outputs(g, g.linears[0].name)[0].double() for g in LAST]
    pool = sum(moments) / sum(counts)
    for g, moment, count in zip(LAST, moments, counts, strict=True):
        (found,) = pooled.read_outputs(g, g.linears[0].name)
        expected = moment + pool * max(0, 32 - count)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(pool.max()))


def test_moments_of_neurons_are_shrunk_towards_their_own_diagonals(mixtral, windows, tmp_path, monkeypatch):
    """H_I of last linears and H_O of first ones: no neuron of another expert says anything of them."""
    plain, shrunk = of_experts(mixtral, windows, tmp_path, monkeypatch, [FIRST_LINEARS, *LAST])
    counts = routed(mixtral, windows)
    first = {
        leaf: [linear.name for linear in FIRST_LINEARS.linears if linear.name.endswith(leaf)] for leaf in ("w1", "w3")
    }
    for read in (
        lambda store: [store.read(g) for g in LAST],
        *(lambda store, of=of: [store.read_outputs(FIRST_LINEARS, name)[0] for name in of] for of in first.values()),
    ):
        before, after = ([matrix.double() for matrix in read(store)] for store in (plain, shrunk))
        even = sum(matrix.diagonal().mean() for matrix in before) / sum(counts)
        for own, found, count in zip(before, after, counts, strict=True):
            assert count < 2 * len(own)
            off = ~torch.eye(len(own), dtype=torch.bool)
            torch.testing.assert_close(found[off], own[off])
            token = (own.diagonal() + sums.EVEN_TOKENS * even) / (count + sums.EVEN_TOKENS)
            torch.testing.assert_close(
                found.diagonal(), own.diagonal() + (2 * len(own) - count) * token, rtol=1e-5, atol=0
            )


def test_an_expert_without_tokens_is_rounded_without_feedback():
    """All directions are alike to it: of 4 experts one saw nothing."""
    counted = [(torch.ones(8, 8, dtype=torch.float64) * (index > 0), 5 * (index > 0)) for index in range(4)]
    sums._shrink(counted)
    moment = counted[0][0]
    torch.testing.assert_close(moment, moment[0, 0] * torch.eye(8, dtype=torch.float64))
    assert moment[0, 0] > 0


@pytest.mark.parametrize("sides", [1, 2])
def test_experts_that_no_token_reached_are_named_and_can_be_rounded(mixtral, tmp_path, sides, caplog):
    same = [torch.full((6,), 3)]
    idle = [expert for expert, count in enumerate(routed(mixtral, same)) if count == 0]
    assert idle
    store = HessianStore(tmp_path, calibration(sides))
    collect_hessians(mixtral, same, [FIRST_LINEARS, *LAST], store)
    assert f"{EXPERTS}: {len(idle)} of 4 saw no token of the text ({', '.join(map(str, idle))})" in caplog.text
    for expert in idle:
        moments = [store.read(LAST[expert]), *store.read_outputs(LAST[expert], LAST[expert].linears[0].name)]
        assert all(moment.isfinite().all() and moment.trace() > 0 for moment in moments)


def of_experts(mixtral, windows, tmp_path, monkeypatch, groups):
    """(a store of sums as they are, one of sums that were filled up)"""
    plain, filled = (HessianStore(tmp_path / name, calibration()) for name in ("plain", "filled"))
    collect_hessians(mixtral, windows, groups, filled)
    monkeypatch.setattr("qpalette.calibration.collect.fill_up", lambda found: None)
    collect_hessians(mixtral, windows, groups, plain)
    return plain, filled


def test_experts_of_a_layer_come_in_one_pass(mixtral, windows, tmp_path):
    one, many = (HessianStore(tmp_path / name, calibration()) for name in ("one", "many"))
    collect_hessians(mixtral, windows, [FIRST_LINEARS, *LAST], one)
    collect_hessians(mixtral, windows, [FIRST_LINEARS, *LAST], many, memory_budget_bytes=1)
    assert files(one.directory) == files(many.directory)


def test_the_experts_implementation_comes_back(mixtral, windows, tmp_path):
    before = mixtral.config._experts_implementation
    collect_hessians(mixtral, windows, LAST, HessianStore(tmp_path, calibration()))
    assert mixtral.config._experts_implementation == before


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 16, 255, 256, 257, 600])
def test_a_symmetric_matrix_comes_back(size):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    symmetric = matrix + matrix.T
    packed = pack_symmetric(symmetric)
    assert packed.shape == (packed_length(size),)
    assert torch.equal(unpack_symmetric(packed, size), symmetric)
    upper = unpack_symmetric(pack_symmetric(matrix), size)
    assert torch.equal(upper, matrix.triu() + matrix.triu(1).T), "the lower triangle does not matter"
    assert len(packed) <= size * size * (size + 256) / (2 * size) + 256


def test_a_file_of_version_1_stays_readable(tmp_path):
    """As releases before moments of both sides wrote it."""
    stored = torch.eye(32) + 0.5
    digest = hashlib.sha256(stored.numpy().tobytes()).hexdigest()
    about = {"source": "f00d", "text_sha256": "cafe", "tokens": "60", "window": "20"}
    metadata = {"group": "qkv", **about, "seen": "60", "sha256": digest}
    name = hashlib.sha256(b"qkv").hexdigest()[:40]
    save_file({"sum": stored}, tmp_path / f"{name}.safetensors", metadata)
    store = HessianStore.open(tmp_path)
    assert store.calibration == calibration(sides=1)
    assert torch.equal(store.read(QKV), stored)
    assert store.identity(QKV) == digest
    assert store.read_outputs(QKV, QKV.linears[0].name) == []


def test_a_file_of_a_later_version_is_told(tmp_path):
    store = HessianStore(tmp_path, calibration(1))
    metadata = {"version": "3", "group": "o", "source": "f00d", "text_sha256": "cafe", "tokens": "60", "window": "20"}
    save_file({"x": torch.zeros(1)}, tmp_path / f"{hashlib.sha256(b'o').hexdigest()[:40]}.safetensors", metadata)
    with pytest.raises(HessianError, match="version 3, and this release reads up to 2"):
        store.read(OUT)


def test_a_flipped_bit_of_any_matrix_is_found(model, windows, tmp_path):
    store = HessianStore(tmp_path, calibration())
    collect_hessians(model, windows, [QKV], store)
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    start = len(intact) - 4 * sum(packed_length(n) for n in (32, 32, 32, 32, 16, 16))
    for place in range(start, len(intact), 997):
        file.write_bytes(intact[:place] + bytes([intact[place] ^ 64]) + intact[place + 1 :])
        with pytest.raises(HessianError):
            store.read(QKV), [store.read_outputs(QKV, linear.name) for linear in QKV.linears]


def test_taps_see_every_linear_by_the_address_of_its_weight(model):
    weights = weights_of(model, [linear.name for g in GROUPS for linear in g.linears])
    assert len({weight.address for weight in weights.values()}) == len(weights)
