"""Work, memory and ranks against numbers worked out by hand."""

import dataclasses
import itertools

import pytest

from qwen2_jax.remat import REMAT_POLICIES
from qwen2_jax.sizes import PUBLISHED
from sharding.planner.advice import ways_to_fit
from sharding.planner.chips import CHIPS
from sharding.planner.estimate import estimate
from sharding.planner.request import REMATS, make_request
from sharding.planner.search import all_meshes, search
from sharding.planner.shapes import count
from sharding.planner.tiles import tiled_bytes

FIVE = ["qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen2-72b", "qwen2-57b-a14b"]


def plan(model="qwen2-7b", topology="v5p:2x2x1", mesh="fsdp=4", task="train", batch=8, seq=4096, **options):
    return estimate(make_request(model, topology, mesh, task, batch, seq, **options))


@pytest.mark.parametrize(
    ("model", "gigaflops"), list(zip(FIVE, [3.49, 10.32, 44.89, 444.9, 84.7], strict=True)), ids=FIVE
)
def test_training_flops_per_token_at_4096_causal(model, gigaflops):
    result = plan(model)
    assert result.flops.model / result.tokens / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_training_flops_are_six_for_each_weight_and_token_and_half_of_the_scores():
    result, config = plan(), PUBLISHED["qwen2-7b"]
    embedding = config.vocab_size * config.hidden_size
    biases_and_norms = 28 * ((28 + 2 * 4) * 128 + 2 * 3584) + 3584
    assert result.flops.products == 6 * (count(config) - embedding - biases_and_norms) * 8 * 4096
    assert result.flops.attention == 3 * 8 * 28 * (4 * 28 * 128) * 4096 * 4096 / 2
    assert result.flops.padding == 0


def test_what_is_computed_again_follows_the_policy():
    again = {remat: plan(remat=remat).flops.again for remat in REMATS}
    assert again["none"] == again["projections"] == again["offload"] < again["attention"] < again["full"]
    assert again["full"] < plan().flops.model / 3


def test_padding_of_heads_is_counted():
    result = plan(mesh="tensor=8", topology="v5e:2x4")  # 28 heads are computed as 32
    layer = 2 * 28 * 128 * 3584 * 2  # q and o, forward
    attention = 4 * 28 * 128 * 4096 / 2
    assert result.flops.padding == pytest.approx(8 * 4096 * 28 * 3 * (layer + attention) / 7)


@pytest.mark.parametrize(
    ("model", "bytes_per_token"), list(zip(FIVE, [12_288, 28_672, 57_344, 327_680, 57_344], strict=True)), ids=FIVE
)
def test_cache_bytes_per_token(model, bytes_per_token):
    result = plan(model, topology="v5p:4x4x8", mesh="data=128", task="decode", batch=128, seq=32_768)
    assert result.memory.cache == bytes_per_token * 32_768


def test_decoding_reads_weights_and_cache_once():
    result = plan(topology="H100:1", mesh="", task="decode", batch=1, seq=1)
    assert result.limit == "memory"
    # 14.14 GB: the embedding is not read. 237 tokens a second at 3.35 TB/s.
    assert result.memory_traffic["weights"] == pytest.approx(14.14e9, rel=1e-3)
    assert result.tokens_per_second == pytest.approx(237, rel=5e-3)


def test_few_tokens_meet_few_experts():
    weights = [
        plan("qwen2-57b-a14b", "H100:2", "expert=2", "decode", batch, 16).memory_traffic["weights"] for batch in (2, 64)
    ]
    assert weights[0] < 0.45 * weights[1]


@pytest.mark.parametrize("model", FIVE)
def test_state_of_training_is_twelve_bytes_for_each_parameter(model):
    result = plan(model, "v5p:4x4x8", "fsdp=128", batch=128)
    arguments = result.memory.arguments - result.memory.inputs
    assert arguments == pytest.approx(12 * count(PUBLISHED[model]) / 128, rel=0.2)  # tiles are not full
    assert arguments >= 12 * count(PUBLISHED[model]) / 128
    fewer = plan(model, "v5p:4x4x8", "fsdp=128", batch=128, optimizer="adamw-bf16")
    assert fewer.memory.optimizer < 0.8 * result.memory.optimizer


def test_memory_falls_along_the_policies():
    totals = [plan(remat=remat).memory.total for remat in ("none", "projections", "attention", "full")]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    ("shape", "itemsize", "size"),
    [  # what libtpu 0.0.41 compiled
        ((28, 28, 128, 224), 4, 89_915_392),
        ((28, 4, 128), 2, 28_672),
        ((28, 28, 128), 4, 458_752),
        ((24, 14, 64), 2, 86_016),
        ((28, 224, 14, 64), 2, 12_845_056),
        ((28, 148, 224), 4, 4_358_144),
        ((3584,), 4, 16_384),
        ((224,), 2, 512),
        ((1, 4096), 2, 16_384),
    ],
)
def test_tiles(shape, itemsize, size):
    assert tiled_bytes(shape, itemsize) == size


def test_policies_are_those_of_the_model():
    assert set(REMATS) == set(REMAT_POLICIES)


def test_search_ranks_what_fits_and_prefers_less_traffic():
    request = plan("qwen2-7b", "v5e:4x4", "fsdp=16", batch=16).request
    found = search(request)
    assert found and all(result.headroom > 1.6e9 and result.request.mesh.devices == 16 for result in found)
    speeds = [result.tokens_per_second for result in found]
    assert all(later <= 1.02 * earlier for earlier, later in itertools.pairwise(speeds))
    assert found[0].request.mesh.fsdp >= 8  # 7B on 16 small chips: weights must be split, heads need not
    meshes = {str(mesh) for mesh in all_meshes(request)}
    assert {"fsdp=16", "data=2,fsdp=8", "fsdp=4,tensor=4"} <= meshes and not any("expert" in mesh for mesh in meshes)
    fixed = search(request, meshes=[request.mesh], batches=[16], remats=["full"])
    assert [result.request for result in fixed] == [request]


def test_search_gives_experts_devices_of_their_own():
    request = plan("qwen2-57b-a14b", "v5p:4x4x4", "fsdp=64", batch=64).request
    assert any(result.request.mesh.expert > 1 for result in search(request)[:10])


def test_advice_holds_what_it_promises():
    request = plan("qwen2-7b", "v5e:4x4", "fsdp=16", batch=1024).request
    assert not estimate(request).fits
    texts = " ".join(ways_to_fit(request))
    assert "--batch" in texts and "--topology v5e:" in texts
    smaller = next(text for text in ways_to_fit(request) if text.startswith("--batch")).split()[1]
    assert estimate(dataclasses.replace(request, batch=int(smaller))).fits


def test_bounds_are_ordered_and_chips_differ():
    slow, fast = plan(topology="v5e:2x2"), plan(topology="v6e:2x2")
    for result in (slow, fast):
        assert result.bound <= result.serial and 0 < result.mfu < 1
    assert slow.seconds["compute"] / fast.seconds["compute"] == pytest.approx(CHIPS["v6e"].flops / CHIPS["v5e"].flops)


def mixed():
    """57B-A14B with every other layer dense, and a wide one."""
    config = PUBLISHED["qwen2-57b-a14b"]
    return dataclasses.replace(config, decoder_sparse_step=2, intermediate_size=8 * config.hidden_size)


def memory_of(config, **changes):
    request = plan("qwen2-57b-a14b", "v5p:4x4x8", "fsdp=128", batch=128).request
    return estimate(dataclasses.replace(request, config=config, **changes)).memory


def test_layers_of_two_kinds_have_the_memory_of_the_larger_one():
    sparse = PUBLISHED["qwen2-57b-a14b"]
    wide = mixed()
    assert [wide.is_moe_layer(layer) for layer in range(4)] == [False, True, False, True]
    dense = dataclasses.replace(wide, mlp_only_layers=tuple(range(wide.num_hidden_layers)))
    kinds = [memory_of(config).working for config in (sparse, dense)]
    assert memory_of(wide).working == max(kinds) and kinds[0] != kinds[1]
    # One wide layer is enough.
    first = dataclasses.replace(sparse, intermediate_size=wide.intermediate_size, mlp_only_layers=(0,))
    assert memory_of(first).working == memory_of(wide).working
    assert memory_of(wide, task="prefill").working == max(
        memory_of(config, task="prefill").working for config in (sparse, dense)
    )


@pytest.mark.parametrize("remat", ["projections", "none"])
def test_every_layer_keeps_what_is_its_own(remat):
    sparse, wide = PUBLISHED["qwen2-57b-a14b"], mixed()
    dense = dataclasses.replace(wide, mlp_only_layers=tuple(range(wide.num_hidden_layers)))
    of_sparse, of_dense, of_both = (memory_of(config, remat=remat).saved for config in (sparse, dense, wide))
    assert of_sparse < of_dense and of_both == (of_sparse + of_dense) / 2
