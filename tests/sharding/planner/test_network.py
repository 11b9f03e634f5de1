"""Links of mesh axes, and what collectives cost on them, by hand."""

import math

import numpy as np
import pytest
from jax._src.mesh_utils import _create_device_mesh_for_nd_torus

from sharding.mesh import MeshSpec
from sharding.planner.chips import CHIPS, grown, parse_topology
from sharding.planner.network import assign, collective, networks


@pytest.mark.parametrize("shape", [(4, 4, 8), (2, 2, 1), (2, 4, 4), (16, 16, 1), (8, 16, 1), (4, 8, 8)], ids=str)
def test_axes_take_the_dims_that_jax_gives_them(shape):
    devices = math.prod(shape)
    generator = np.random.default_rng(0)
    for _ in range(12):
        sizes, left = [], devices
        for _ in range(4):
            sizes.append(int(generator.choice([n for n in range(1, left + 1) if left % n == 0])))
            left //= sizes[-1]
        sizes.append(left)
        grid = np.arange(devices).reshape(shape)
        _, expected = _create_device_mesh_for_nd_torus(grid, sizes, allow_split_physical_axes=True)
        ours = assign(shape, sizes)
        np.testing.assert_array_equal(np.array([ours[axis] for axis in range(5)]).T, expected)


def test_a_ring_of_sixteen_gathers_in_both_directions():
    network = networks(parse_topology("v5e:16x16"), MeshSpec(fsdp=16, tensor=16))["tensor"]
    link, size = CHIPS["v5e"].link_bandwidth, 16e9
    traffic = collective("all-gather", size, network)
    assert traffic.inside == size * 15 / 16 and traffic.across == 0
    assert traffic.inside_seconds == pytest.approx(size * 15 / 16 / (2 * link))
    assert collective("all-reduce", size, network).inside_seconds == pytest.approx(2 * traffic.inside_seconds)
    # A message between two of 16 passes 4 on average, each device's share goes through 2 links.
    assert collective("all-to-all", size, network).inside_seconds == pytest.approx(size * 4 / (2 * link))


def test_two_dims_gather_twice_as_fast_and_a_line_half_as_fast():
    link = CHIPS["v5p"].link_bandwidth
    plane = networks(parse_topology("v5p:4x4x8"), MeshSpec(fsdp=16, tensor=8))["fsdp"]
    assert plane.inside == 16 and sum(lane.bandwidth for lane in plane.lanes) == 4 * link
    line = networks(parse_topology("v5p:2x2x4"), MeshSpec(fsdp=4, tensor=4))["tensor"]
    assert line.inside == 4 and sum(lane.bandwidth for lane in line.lanes) <= 2 * link


def test_slices_talk_over_the_network_and_each_byte_crosses_once():
    place = parse_topology("v5e:16x16", slices=2)
    network = networks(place, MeshSpec(data=2, fsdp=32, tensor=8))
    assert (network["data"].slices, network["fsdp"].slices, network["tensor"].slices) == (2, 1, 1)
    traffic = collective("all-reduce", 8e9, network["data"])
    assert traffic.inside == 0 and traffic.across == 8e9
    assert traffic.across_seconds == pytest.approx(8e9 / CHIPS["v5e"].network_bandwidth)
    nodes = networks(parse_topology("H100:16"), MeshSpec(fsdp=16))["fsdp"]
    traffic = collective("all-gather", 16e9, nodes)
    assert (traffic.across, traffic.inside) == (1e9, 14e9)


def test_topologies_grow():
    assert grown(parse_topology("v5e:4x4")) == parse_topology("v5e:4x8")
    assert grown(parse_topology("v5p:2x4x4")) == parse_topology("v5p:4x4x4")
    assert grown(parse_topology("v5p:4x4x8")) == parse_topology("v5p:4x8x8")
    assert grown(parse_topology("v5e:16x16")) is None
    assert grown(parse_topology("H100:4")) == parse_topology("H100:8")
    assert grown(parse_topology("H100:8")) == parse_topology("H100:16")
    assert parse_topology("h200:16").devices == 16 and str(parse_topology("v5e:4x4", 3)) == "3 slices of v5e:4x4"
