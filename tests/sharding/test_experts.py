"""Experts on many devices compute what they compute on one, in value and gradient, however the router chooses."""

import collections
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwen2_jax.moe import Experts, Routing, dropped_choices, keep, moe, with_capacity
from qwen2_jax.remat import REMAT_POLICIES
from sharding.expert_split import split_experts
from sharding.experts import ExpertParallel
from sharding.mesh import MeshSpec, make_mesh
from tests.sharding.models import MODELS
from tests.tpu import run_for_tpu

WIDTH, INNER, EXPERTS, CHOICES = 16, 8, 16, 4


def mesh_of(spec):
    return make_mesh(spec, jax.devices()[: MeshSpec.parse(spec).devices])


@functools.cache
def make(batch, length, kind, dtype=jnp.float32, count=EXPERTS):
    """x, routing, experts and the result's gradient; a fifth of the tokens is padding, whose choices are nobody."""
    generator = np.random.default_rng(batch + length)
    x, dout = (jnp.asarray(generator.normal(size=(batch, length, WIDTH)), dtype) for _ in range(2))
    shapes = (count, INNER, WIDTH), (count, INNER, WIDTH), (count, WIDTH, INNER)
    experts = Experts(*(jnp.asarray(generator.normal(size=shape) * 0.3, jnp.float32) for shape in shapes))
    steepness = {"random": 0.0, "skewed": 0.5, "one": 100.0, "nobody": 0.0}[kind]  # "one": all choose the same experts
    scores = generator.normal(size=(batch, length, count)) - steepness * np.arange(count)
    chosen = jnp.asarray(np.argsort(-scores, axis=-1)[..., :CHOICES], jnp.int32)
    weights = jnp.asarray(generator.uniform(0.1, 1.0, size=chosen.shape), dtype)
    real = generator.uniform(size=(batch, length, 1)) > (1.0 if kind == "nobody" else 0.2)
    routing = Routing(weights, chosen, jnp.full((batch, length, count), 1 / count))
    return x, keep(routing, jnp.asarray(real)), experts, dout


def with_gradients(run):
    """Of run(x, routing, experts) -> (value, dropped): these two, and gradients of x, routing weights and experts."""

    @jax.jit
    def all_of_it(x, routing, experts, dout):
        def value(x, weights, experts):
            return run(x, routing._replace(weights=weights), experts)

        out, pull, dropped = jax.vjp(value, x, routing.weights, experts, has_aux=True)
        return out, dropped, *pull(dout)

    return all_of_it


on_one_device = with_gradients(lambda x, routing, experts: (moe(x, routing, experts, "loop"), jnp.int32(0)))


def assert_close(ours, expected):
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-5)
    assert ours[1] == expected[1]
    for mine, other in zip(jax.tree.leaves(ours[2:]), jax.tree.leaves(expected[2:]), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4 * max(1e-3, np.abs(other).max()))


@pytest.mark.parametrize(
    ("spec", "variant", "backend", "shape", "kinds", "slack"),
    [
        ("data=2,fsdp=2,tensor=2", None, "sorted", (8, 64), ["random"], 1.25),
        ("data=2,expert=2,context=2", "exchange", "loop", (8, 64), ["random", "one"], 1.25),
        ("fsdp=2,expert=2,tensor=2", "gather", "loop", (8, 64), ["skewed"], 1.25),
        ("expert=4", "exchange", "sorted", (8, 64), ["random", "one", "nobody"], 0.3),
        ("fsdp=2,expert=4", "exchange", "loop", (8, 64), ["skewed", "one"], 0.3),
        ("expert=4,tensor=2", "gather", "sorted", (8, 64), ["skewed", "one"], 0.3),
        ("expert=8", "exchange", "ragged", (8, 64), ["random", "skewed", "one"], 0.3),
        ("data=2,expert=4", "exchange", "loop", (1, 64), ["skewed"], 1.25),
        ("data=2,expert=4", None, "loop", (3, 5), ["random"], 1.25),
        ("expert=2,context=4", "gather", "loop", (2, 6), ["random"], 1.25),
    ],
)
def test_equals_one_device(spec, variant, backend, shape, kinds, slack):
    run = with_gradients(ExpertParallel(mesh_of(spec), backend, variant, slack))
    for kind in kinds:
        given = make(*shape, kind)
        assert_close(run(*given), on_one_device(*given))


@pytest.mark.parametrize(
    ("devices", "count", "shape"),
    [
        (3, 15, (6, 7)),
        pytest.param(5, 15, (5, 11), marks=pytest.mark.slow),
        pytest.param(6, 12, (6, 13), marks=pytest.mark.slow),
        (7, 14, (2, 77)),  # rows do not divide, so each row is split
    ],
)
def test_exchange_among_any_number_of_devices(devices, count, shape):
    """Neither do the tokens of a device fill whole rounds, nor does their number divide over the devices again."""
    parallel = ExpertParallel(mesh_of(f"expert={devices}"), "sorted", "exchange", slack=0.3)
    split = split_on(f"expert={devices}", *shape, WIDTH, count, CHOICES, variant="exchange", slack=0.3)
    assert split.variant == "exchange" and split.most_rounds > 1
    assert split.tokens % split.slots and split.tokens % devices
    program = None
    for kind in ("random", "skewed", "one"):
        given = make(*shape, kind, count=count)
        if program is None:
            program = with_gradients(parallel).lower(*given).compile()
            assert collectives(program.as_text()).keys() >= {"all-to-all"}
        assert_close(program(*given), on_one_device(*given))


def split_on(spec, batch, length, width=3584, experts=64, choices=8, **how):
    return split_experts(MeshSpec.parse(spec).sizes, (batch, length, width), experts, choices, **how)


def test_the_cases_take_several_rounds_and_batches():
    """Lest the test above should leave them out."""
    tiny = {"width": WIDTH, "experts": EXPERTS, "choices": CHOICES, "slack": 0.3}
    exchange, gather = (split_on("expert=4", 8, 64, variant=variant, **tiny) for variant in ("exchange", "gather"))
    assert (exchange.slots, exchange.most_rounds) == (32, 4)
    assert (exchange.batch, exchange.most_batches) == (256, 2)
    assert (gather.batch, gather.most_batches) == (256, 8)


def test_tokens_go_over_every_axis_that_divides_them():
    split = split_on("data=2,fsdp=2,expert=2,tensor=2,context=2", 8, 64)
    assert (split.rows, split.length, split.partial) == (("data", "fsdp", "expert"), ("context",), ("tensor",))
    assert split.tokens == 32
    long_row = split_on("data=2,expert=4,context=2", 1, 64)
    assert (long_row.rows, long_row.length, long_row.partial) == ((), ("context", "data", "expert"), ())
    decoding = split_on("data=2,expert=4,tensor=2", 1, 1)
    assert (decoding.rows, decoding.length, decoding.partial) == ((), (), ("tensor", "expert"))
    assert decoding.variant == "stay"


def test_variant_by_size():
    """57B-A14B in training: devices that need most of their group's tokens anyway get all of them."""
    assert [split_on(f"expert={n}", n, 4096).variant for n in (1, 4, 8, 16, 64)] == [
        *("stay", "gather", "gather", "exchange", "exchange")
    ]
    assert split_on("expert=64", 64, 1).variant == "gather"  # decoding
    assert split_on("expert=64", 64, 1, variant="exchange").variant == "exchange"
    assert split_on("expert=64", 1, 1, variant="exchange").variant == "stay"


def test_room_for_balanced_routing():
    split = split_on("expert=16", 16, 4096)
    assert split.slots == pytest.approx(1.25 * 4096 * (1 - math.comb(60, 8) / math.comb(64, 8)), abs=8)
    assert split.batch == pytest.approx(1.25 * 4096 * 8, abs=8)
    assert (split.most_rounds, split.most_batches) == (2, 4)
    with_capacity = split_on("expert=16", 16, 4096, capacity_factor=1.0)
    assert with_capacity.slots == 4096 * 8 // 16
    assert (with_capacity.most_rounds, with_capacity.most_batches) == (1, 1)


@pytest.mark.parametrize("variant", ["exchange", "gather"])
def test_bfloat16(variant):
    """As near to float32 as one device comes."""
    given = make(8, 64, "skewed", jnp.bfloat16)
    exact = on_one_device(*jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, given))
    single = on_one_device(*given)
    ours = with_gradients(ExpertParallel(mesh_of("expert=4,tensor=2"), "loop", variant))(*given)
    for mine, other, true in zip(*map(jax.tree.leaves, (ours, single, exact)), strict=True):
        assert mine.dtype == other.dtype
        true = np.asarray(true, np.float32)
        errors = [np.abs(np.asarray(side, np.float32) - true).max() for side in (mine, other)]
        assert errors[0] <= max(2 * errors[1], 2**-8 * np.abs(true).max())


def collectives(text):
    kinds = "all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute|ragged-all-to-all"
    return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


def compiled(run, *arguments):
    return jax.jit(run).lower(*arguments).compile()


@pytest.mark.parametrize(
    ("variant", "forward", "backward"),
    [
        # The weights of gate, up and down go over fsdp. Tokens, their choices and the results go over expert; in the
        # backward pass so do the results' gradients, and the routing weights' as well.
        (
            "exchange",
            {"all-gather": 3, "all-to-all": 3},
            {"all-gather": 3, "reduce-scatter": 3, "all-to-all": 5},
        ),
        (
            "gather",
            {"all-gather": 3 + 3, "reduce-scatter": 1},
            {"all-gather": 3 + 4, "reduce-scatter": 3 + 2},
        ),
    ],
)
def test_only_the_intended_collectives(variant, forward, backward):
    # Without the axes of one device, whose sums XLA leaves in place when it optimizes little.
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    parallel = ExpertParallel(mesh, "loop", variant, slack=2.0)  # room for everything in one round

    def place(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

    x, routing, experts, dout = make(8, 64, "random")
    x, routing, dout = place((x, routing, dout), ("fsdp", "expert"))
    gate, up, down = experts
    experts = Experts(*place((gate, up), "expert", None, "fsdp"), place(down, "expert", "fsdp"))

    def run(x, weights, experts):
        return parallel(x, routing._replace(weights=weights), experts)[0]

    def gradients(x, weights, experts, dout):
        return jax.vjp(run, x, weights, experts)[1](dout)

    given = x, routing.weights, experts
    assert collectives(compiled(run, *given).as_text()) == forward
    assert collectives(compiled(gradients, *given, dout).as_text()) == backward


@pytest.mark.parametrize("variant", ["exchange", "gather"])
def test_memory_does_not_grow_with_what_the_router_may_choose(variant):
    """No buffer has room for all tokens times their choices, or times the experts, though all may choose one device."""
    given = make(8, 256, "one")
    split = split_on("expert=8", 8, 256, WIDTH, EXPERTS, CHOICES, variant=variant)
    run = with_gradients(ExpertParallel(mesh_of("expert=8"), "sorted", variant))
    text = run.lower(*given).compile().as_text()
    shapes = [tuple(map(int, dims.split(","))) for dims in set(re.findall(r"\b(?:f32|bf16|s32)\[([\d,]+)\]", text))]
    seen = 8 * (split.slots or split.tokens)
    largest = max(size for size in map(math.prod, shapes) if size != given[0].size)  # x enters the program whole
    assert largest <= max(seen, split.batch) * WIDTH
    assert 8 * split.tokens * CHOICES * WIDTH > 2 * largest  # what room for every choice would take


@pytest.mark.parametrize("variant", ["exchange", "gather"])
def test_capacity_of_each_device(variant):
    given = make(8, 64, "skewed")
    parallel = ExpertParallel(mesh_of("data=2,expert=4"), "loop", variant)  # one row for each device

    def alone(x, routing, experts):
        kept = jax.vmap(lambda row: with_capacity(row, 1.0))(routing)
        return moe(x, kept, experts, "loop"), dropped_choices(routing, kept)

    expected = with_gradients(alone)(*given)
    assert expected[1] > 0
    assert_close(with_gradients(lambda *given: parallel(*given, 1.0))(*given), expected)


@pytest.mark.parametrize("policy", ["full", "projections"])
def test_no_more_is_kept_than_the_input(policy, capsys):
    parallel = ExpertParallel(mesh_of("expert=4"), "sorted", "exchange")
    x, routing, experts, _ = make(8, 64, "random")

    def loss(x, weights, experts):
        return jnp.sin(parallel(x, routing._replace(weights=weights), experts)[0]).sum()

    print_saved_residuals(jax.checkpoint(loss, policy=REMAT_POLICIES[policy]), x, routing.weights, experts)
    assert "output of" not in capsys.readouterr().out


@pytest.mark.tpu
def test_compiles_for_tpu():
    """Where there is a ragged exchange, rows move by it: tokens and results, and in the backward pass one more."""
    done = run_for_tpu(str(Path(__file__).parent / "compile_experts.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {"forward": {"ragged": 2, "padded": 1}, "backward": {"ragged": 3, "padded": 2}}


@pytest.mark.tpu
def test_shared_expert_waits_for_the_exchange():
    """Nothing keeps the compiler from running it while rows are on their way; the page says that it does not do so."""
    done = run_for_tpu(str(Path(__file__).parent / "compile_shared_expert.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"exchanges": 2, "products": 4, "meanwhile": 0}


def test_is_a_value():
    one, other = (ExpertParallel(mesh_of("expert=4,data=2"), "sorted") for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != ExpertParallel(one.mesh, "loop")


def test_says_what_runs():
    parallel = ExpertParallel(mesh_of("expert=8"), "sorted")
    assert parallel.name == "sorted, 8 devices of expert, exchange or gather by size"
    config = dataclasses.replace(
        MODELS["moe"], hidden_size=1024, num_experts=64, num_experts_per_tok=2, moe_intermediate_size=256
    )
    for shape, how in {(8, 4096): "exchange", (8, 1): "gather", (1, 1): "no token moves"}.items():
        assert parallel.name_for(config, shape) == f"sorted, 8 devices of expert, {how}"
    always = ExpertParallel(mesh_of("expert=8"), "sorted", "gather")
    assert always.name_for(config, (8, 4096)) == always.name == "sorted, 8 devices of expert, gather"


def test_refuses():
    mesh = mesh_of("expert=8")
    with pytest.raises(ValueError, match="moe must be one of"):
        ExpertParallel(mesh, "dense")
    with pytest.raises(ValueError, match="variant must be one of exchange, gather, or None to choose by size"):
        ExpertParallel(mesh, variant="all-to-all")
    with pytest.raises(ValueError, match="slack must be positive, got 0"):
        ExpertParallel(mesh, slack=0)
    x, routing, experts, _ = make(8, 64, "random")
    with pytest.raises(ValueError, match="12 experts do not divide over 8 devices; use expert=6"):
        ExpertParallel(mesh)(x, routing, jax.tree.map(lambda kernel: kernel[:12], experts))
    with pytest.raises(ValueError, match="4 inner units of an expert do not divide over 8 devices; use tensor=4"):
        ExpertParallel(mesh_of("tensor=8"))(
            x, routing, Experts(experts.gate[:, :4], experts.up[:, :4], experts.down[..., :4])
        )
