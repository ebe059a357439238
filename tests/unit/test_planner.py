"""Budgets, fusion, uniform plans and the bound, on small models and on the published data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from qpalette.codes import parse_spec
from qpalette.core.errors import BudgetError, InputError, SpecError
from qpalette.core.records import LinearGroup, LinearShape
from qpalette.formats import packed_bits
from qpalette.plan import (
    EXPERTS,
    Budget,
    Candidate,
    LatencyProfile,
    Launch,
    Limits,
    Overhead,
    Planner,
    SensitiveLinear,
    Sensitivities,
    Space,
    device_bytes,
    palette_of,
    parse_size,
    readable,
)
from qpalette.plan.tiers import tiers_of

DATA = Path(__file__).parents[2] / "../shared/data"
PALETTE = tuple(Candidate(f"c{bits}", Fraction(bits), 1.2 * 4.0**-bits) for bits in (1, 2, 3, 4))
SHAPES = {"q": (64, 32), "k": (32, 32), "v": (32, 32), "o": (32, 64)}
VALUES = {"q": 0.1, "k": 0.7, "v": 3.0, "o": 0.5}


def small(values=VALUES) -> Sensitivities:
    return Sensitivities(
        tuple(
            SensitiveLinear(LinearShape(name, *SHAPES[name]), "o" if name == "o" else "qkv", value)
            for name, value in values.items()
        )
    )


def linear_profile(setup: float = 1.0) -> LatencyProfile:
    """A launch takes `setup` and a time in proportion to its bits: fusing saves setups."""
    launches = []
    for size in (1, 2, 3):
        for names in itertools.combinations("qkvo", size):
            for candidate in PALETTE:
                segments = tuple((candidate.spec, *SHAPES[name]) for name in names)
                bits = sum(float(candidate.rate) * out * inputs for _, out, inputs in segments)
                launches.append(Launch(segments, 1, setup + bits / 1000))
    return LatencyProfile("test", 0.5, tuple(launches), spread=0.0)


def best_by_force(limit_bits: float) -> float:
    losses = []
    for choice in itertools.product(PALETTE, repeat=len(VALUES)):
        bits = sum(packed_bits(c.rate, *SHAPES[name]).total for name, c in zip(VALUES, choice, strict=True))
        if bits <= limit_bits:
            losses.append(sum(VALUES[name] * c.distortion for name, c in zip(VALUES, choice, strict=True)))
    return min(losses)


@pytest.mark.parametrize("average", ["2.1", "2.6", "3", "3.3"])
def test_a_budget_in_bits_is_spent_exactly(average):
    planner = Planner(small(), Space(PALETTE))
    limit = int(Fraction(average) * planner.weights)
    planned = planner.plan(Limits(bits=limit))
    assert planned.choice.bits <= limit
    assert planned.choice.loss == pytest.approx(best_by_force(limit), rel=1e-12)
    assert planned.optimality_gap == 0
    assert planned.choice.loss == pytest.approx(
        sum(VALUES[name] * {c.spec: c for c in PALETTE}[spec].distortion for name, spec in planned.choice.specs.items())
    )
    assert planned.loss_over_bound > 1, "no code beats information theory"
    assert planned.loss_over_uniform is None or planned.loss_over_uniform <= 1


def test_nothing_beats_the_bound_and_more_bits_never_hurt():
    planner = Planner(small(), Space(palette_of()))
    losses = []
    for tenth in range(18, 80, 3):
        planned = planner.plan(Limits(bits=planner.weights * tenth // 10))
        assert planned.loss_over_bound > 1
        losses.append(planned.choice.loss)
    assert losses == sorted(losses, reverse=True)


def test_where_uniform_is_best_the_plan_is_uniform():
    """Equal sensitivity per weight and a budget that one spec meets exactly: convexity leaves nothing to gain."""
    even = small({name: out * inputs / 100 for name, (out, inputs) in SHAPES.items()})
    planner = Planner(even, Space(PALETTE))
    uniform = planner.uniform(PALETTE[2], timed=False)
    assert uniform is not None
    planned = planner.plan(Limits(bits=uniform.bits))
    assert set(planned.choice.specs.values()) == {"c3"}
    assert planned.loss_over_uniform == 1


def test_fusion_modes_are_ordered_and_keep_the_limit():
    losses = {}
    for fusion in ("none", "same", "free"):
        planner = Planner(small(), Space(PALETTE, linear_profile(), 1, fusion))
        planned = planner.plan(Limits(seconds=16.5))
        assert planned.choice.seconds is not None
        assert planned.choice.seconds <= 16.5
        assert sorted(name for launch in planned.choice.launches for name in launch) == ["k", "o", "q", "v"]
        losses[fusion] = planned.choice.loss
        if fusion == "none":
            assert len(planned.choice.launches) == 4
        if fusion == "same":
            for launch in planned.choice.launches:
                assert len({planned.choice.specs[name] for name in launch}) == 1
    assert losses["free"] < losses["same"] < losses["none"]


def test_free_fusion_against_brute_force():
    """With this profile all of q, k, v in one launch is best, and its time is linear in the bits of each."""
    planner = Planner(small(), Space(PALETTE, linear_profile(), 1, "free"))
    limit = 14.0
    best = min(
        sum(VALUES[name] * c.distortion for name, c in zip("qkvo", choice, strict=True))
        for choice in itertools.product(PALETTE, repeat=4)
        if 0.5
        + 2
        + sum(float(c.rate) * SHAPES[n][0] * SHAPES[n][1] for n, c in zip("qkvo", choice, strict=True)) / 1000
        <= limit
    )
    assert planner.plan(Limits(seconds=limit)).choice.loss == pytest.approx(best, rel=1e-4)


def test_bits_and_time_hold_together():
    planner = Planner(small(), Space(PALETTE, linear_profile(), 1, "same"))
    bits = int(3.2 * planner.weights)
    both = planner.plan(Limits(bits, 17.0))
    assert both.choice.bits <= bits
    assert both.choice.seconds is not None
    assert both.choice.seconds <= 17
    assert both.choice.loss >= max(
        planner.plan(Limits(bits=bits)).choice.loss, planner.plan(Limits(seconds=17.0)).choice.loss
    )


def experts_of(layers: int, sensitivities: Sequence[float]) -> Sensitivities:
    names = (
        (f"m.layers.{layer}.mlp.experts.{expert}.{kind}", sensitivity)
        for layer in range(layers)
        for expert, sensitivity in enumerate(sensitivities)
        for kind in ("up_proj", "down_proj")
    )
    return Sensitivities(tuple(SensitiveLinear(LinearShape(name, 32, 32), name, each) for name, each in names))


def test_experts_share_specs_as_they_are_told():
    known = experts_of(2, [1.0, 900.0, 30.0, 1.1, 1000.0, 28.0])
    limits = Limits(bits=int(2.7 * sum(linear.shape.weights for linear in known.linears)))
    found = {experts: Planner(known, Space(PALETTE, experts=experts)).plan(limits).choice for experts in EXPERTS}
    for layer, kind in itertools.product(range(2), ("up_proj", "down_proj")):
        shared, tiers = (
            [found[way].specs[f"m.layers.{layer}.mlp.experts.{expert}.{kind}"] for expert in range(6)]
            for way in ("shared", "tiers")
        )
        assert len(set(shared)) == 1
        assert [tiers[0], tiers[1], tiers[2]] == [tiers[3], tiers[4], tiers[5]]
    assert found["free"].loss <= found["tiers"].loss < found["shared"].loss
    with pytest.raises(SpecError, match="no way with experts"):
        Space(PALETTE, experts="alone")


def test_tiers_are_the_best_of_all_cuts():
    random = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 10):
        values = np.exp(2 * random.standard_normal(count))

        def loss(tiers: Sequence[int], values: np.ndarray = values) -> float:
            members = [values[np.array(tiers) == tier] for tier in set(tiers)]
            return sum(len(each) * float(np.log(each.mean())) for each in members)

        every = itertools.product(range(3), repeat=count) if count < 10 else [tiers_of(values.tolist())]
        assert loss(tiers_of(values.tolist())) <= min(map(loss, every)) + 1e-9
    assert tiers_of([0.0, 0.0, 0.0, 5.0]) == [*[tiers_of([0.0, 0.0, 0.0, 5.0])[0]] * 3, 2]
    assert tiers_of([]) == []


def test_the_least_is_named_and_can_be_asked_for():
    planner = Planner(small(), Space(PALETTE, linear_profile(), 1, "same"))
    budget, overhead = Budget(bits=Fraction(1)), Overhead(disk=1000)
    with pytest.raises(BudgetError) as error:
        planner.plan(budget.limits(planner.weights, overhead))
    assert error.value.least_bits is not None
    message = str(budget.explain(error.value, planner.weights, overhead))
    least = Fraction(message.split("the least is ")[1].split(" bits")[0])
    planner.plan(Budget(bits=least).limits(planner.weights, overhead))
    size = Budget(size=1001)
    with pytest.raises(BudgetError) as error:
        planner.plan(size.limits(planner.weights, overhead))
    message = str(size.explain(error.value, planner.weights, overhead))
    least_size = parse_size(message.split("a size of ")[1].split(" (")[0])
    planner.plan(Budget(size=least_size).limits(planner.weights, overhead))
    with pytest.raises(BudgetError):
        planner.plan(Budget(size=least_size - 10).limits(planner.weights, overhead))
    fast = Budget(tokens_per_second=1e6)
    with pytest.raises(BudgetError) as error:
        planner.plan(fast.limits(planner.weights, overhead))
    message = str(fast.explain(error.value, planner.weights, overhead))
    most = float(message.split("the most is ")[1].split(" ")[0])
    planner.plan(Budget(tokens_per_second=most).limits(planner.weights, overhead))


def test_limits_that_exclude_each_other_are_told():
    """One spec is small and slow, the other large and fast."""
    palette = (Candidate("c1", Fraction(1), 0.3), Candidate("c4", Fraction(4), 0.004))
    launches = [
        Launch(((spec, *SHAPES[n]),), 1, seconds) for n in "qkvo" for spec, seconds in (("c1", 5.0), ("c4", 1.0))
    ]
    planner = Planner(small(), Space(palette, LatencyProfile("t", 0.0, tuple(launches), spread=0.0), fusion="none"))
    budget = Budget(bits=Fraction(3), tokens_per_second=0.2)
    with pytest.raises(BudgetError) as error:
        planner.plan(budget.limits(planner.weights, Overhead()))
    message = str(budget.explain(error.value, planner.weights, Overhead()))
    assert "the least is" in message
    assert "0.2 tokens/s" in message


def test_wrong_requests_are_named():
    with pytest.raises(SpecError, match="no fusion"):
        Space(PALETTE, fusion="all")
    with pytest.raises(SpecError, match="palette is empty"):
        Space(())
    with pytest.raises(InputError, match="no batch of 7"):
        Space(PALETTE, linear_profile(), 7)
    with pytest.raises(InputError, match="latency profile"):
        Planner(small(), Space(PALETTE)).plan(Limits(seconds=1.0))
    only_q = LatencyProfile("t", 0.0, (Launch((("c1", *SHAPES["q"]),), 1, 1.0),))
    with pytest.raises(InputError, match="no launch of k"):
        Planner(small(), Space(PALETTE, only_q)).plan(Limits(seconds=9.0))
    with pytest.raises(SpecError, match="no family"):
        palette_of(families=["xyz"])
    with pytest.raises(SpecError, match="give a budget"):
        Budget()
    groups = (LinearGroup("g", (LinearShape("q", 64, 32), LinearShape("z", 64, 32))),)
    with pytest.raises(InputError, match="no sensitivity of z"):
        small().of_groups(groups)
    with pytest.raises(InputError, match="64 x 16"):
        small().of_groups((LinearGroup("g", (LinearShape("q", 64, 16),)),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GB", 6 * 10**9),
        ("6 GiB", 6 * 2**30),
        ("1.5G", 15 * 10**8),
        ("800mb", 8 * 10**8),
        ("12345", 12345),
        ("0.5k", 500),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "6 GBB", "-6GB", "six", "1e9", "6 PB"])
def test_sizes_that_mean_nothing(text):
    with pytest.raises(SpecError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1000, 12345, 999_999, 123_456_789, 5_000_000_001])
def test_readable_sizes_can_be_asked_for(nbytes):
    assert parse_size(readable(nbytes, up=True)) >= nbytes
    assert parse_size(readable(nbytes)) == pytest.approx(nbytes, rel=1e-3)


def test_device_memory_of_known_architectures():
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    llama |= {"vocab_size": 128256, "intermediate_size": 14336}
    cache, _ = device_bytes(llama, 8192, 1)
    assert cache == 2 * 2 * 32 * 8 * 128 * 8192  # 1 GiB, the usual figure
    assert device_bytes(llama, 8192, 4)[0] == 4 * cache
    sliding = llama | {"sliding_window": 1024, "layer_types": ["sliding_attention"] * 24 + ["full_attention"] * 8}
    assert device_bytes(sliding, 8192, 1)[0] == cache, "so that it can be cut back"
    linear = llama | {"layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}
    assert device_bytes(linear, 8192, 1)[0] == cache // 4
    assert device_bytes(llama, 7169, 1)[0] == cache, "a cache of 8192 tokens is what generate takes"
    assert device_bytes(llama | {"max_position_embeddings": 7200}, 7169, 1)[0] == cache * 7200 // 8192
    latent = llama | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert device_bytes(latent, 8192, 1)[0] == 2 * 32 * 576 * 8192
    with pytest.raises(InputError, match="no 'vocab_size'"):
        device_bytes({key: value for key, value in llama.items() if key != "vocab_size"}, 8, 1)
    with pytest.raises(InputError, match="at least 1"):
        device_bytes(llama, 0, 1)


def test_profiles_come_back_and_bad_ones_are_named(tmp_path):
    profile = linear_profile()
    file = tmp_path / "p.json"
    file.write_text(profile.to_json())
    assert LatencyProfile.read(file) == profile
    assert profile.seconds([SHAPES["k"], SHAPES["q"]], 1) == profile.seconds([SHAPES["q"], SHAPES["k"]], 1)
    for text, message in [("{", "cannot be read"), ("{}", "profile_version"), ("[]", "profile_version")]:
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            LatencyProfile.read(file)
    good = {"profile_version": 1, "device": "x", "constant_seconds": 0, "launches": []}
    launch = {"segments": [["tcq-3", 8, 8]], "batch": 1, "seconds": 0.1}
    for change, message in [
        ({"launches": []}, "at least one"),
        ({"launches": [{**launch, "batch": 0}]}, "launch 0"),
        ({"launches": [{**launch, "seconds": -1}]}, "launch 0.*positive"),
        ({"launches": [{**launch, "segments": [["tcq-3", 8]]}]}, "segments"),
        ({"launches": [launch], "constant_seconds": "x"}, "constant_seconds"),
        ({"launches": [launch], "constant_seconds": {"8": 0.1}}, "constant_seconds must have the batches"),
        ({"launches": [launch], "constant_seconds": {"1": -1}}, "constant_seconds: 1"),
    ]:
        with pytest.raises(InputError, match=message):
            LatencyProfile.from_dict({**good, **change})


published = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"{DATA} is absent: the published data is not in this repository"
)


@published
def test_published_sensitivities_with_our_palette():
    planner = Planner(Sensitivities.read(DATA / "llama31_8b_sensitivity.csv"), Space(palette_of()))
    for bits, most in {"2.25": 1.105, "3": 1.12, "4": 1.15}.items():
        planned = planner.plan(Limits(bits=int(Fraction(bits) * planner.weights)))
        assert 1 < planned.loss_over_bound <= most
        assert planned.optimality_gap <= 1e-4
        assert float(planned.average_bits) <= float(Fraction(bits)) < 1.002 * float(planned.average_bits)
        specs = planned.choice.specs
        again = sum(x.sensitivity * parse_spec(specs[x.name]).claimed_distortion for x in planner.sensitivities.linears)
        assert planned.choice.loss == pytest.approx(again)
