"""What a token costs, against sums by hand; chips by the names that JAX gives them."""

import math
import types

import jax
import pytest

from qwen2_jax.sizes import published
from sharding.planner.chips import CHIP_OF_KIND, CHIPS, chip_of
from sharding.planner.shapes import count_active
from train.report.throughput import peak_memory, work


def device(kind="TPU v5", memory=None):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: memory)


def test_mfu_by_hand():
    layer = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864  # q and o, k and v, the MLP
    multiplied = 24 * layer + 151_936 * 896  # the head is the embedding
    seen = 4096 / 2  # keys that a query sees on average
    attention = 3 * 24 * 2 * (2 * seen * 14 * 64)  # forward and twice backward; scores and sums; a multiply and an add
    got = work(published("qwen2-0.5b"), 4096, [device()] * 4)
    assert got.products == 6 * multiplied and got.attention == attention and got.peak == 4 * 459e12
    assert math.isclose(got.mfu_6n(200_000), 0.322850, rel_tol=1e-5)
    assert math.isclose(got.mfu(200_000), 0.380419, rel_tol=1e-5)


def test_only_chosen_experts_count():
    config = published("qwen2-57b-a14b")
    got = work(config, 4096, [device("NVIDIA H100 80GB HBM3")])
    multiplied = count_active(config) - config.vocab_size * config.hidden_size  # the embedding is only looked up
    assert math.isclose(got.products, 6 * multiplied, rel_tol=1e-4)  # norms and biases are no products


def test_rows_twice_as_long_cost_twice_the_attention():
    config = published("qwen2-7b")
    short, long = (work(config, seq, [device()]) for seq in (4096, 8192))
    assert long.products == short.products and long.attention == 2 * short.attention


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v3", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_no_mfu_without_the_chip(kind):
    got = work(published("qwen2-0.5b"), 4096, [device(kind)])
    assert chip_of(kind) is None
    assert got.peak is None and got.mfu(1e5) is None and got.mfu_6n(1e5) is None and got.products > 0


def test_every_chip_of_the_planner_is_known():
    assert set(CHIP_OF_KIND.values()) == set(CHIPS)


def test_memory():
    assert peak_memory(jax.devices("cpu")) is None
    one, other = device(memory={"bytes_in_use": 1, "peak_bytes_in_use": 5}), device(memory={"peak_bytes_in_use": 7})
    assert peak_memory([one, other]) == 7
    assert peak_memory([device(memory={"bytes_in_use": 1})]) is None
