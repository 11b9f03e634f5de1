"""Meshes from text, and models that do not fit them."""

import dataclasses
import re

import jax
import pytest

from qwen2_jax.heads import HeadLayout
from qwen2_jax.sizes import published
from sharding import MeshSpec, make_mesh
from sharding.checks import check_divides, layout_on
from sharding.mesh import MESH_AXES, across_slices
from sharding.run import run_options

MODELS = ["qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen2-72b", "qwen2-57b-a14b"]


def test_parse():
    spec = MeshSpec.parse("data=2, fsdp=-1,tensor=2")
    assert spec == MeshSpec(data=2, fsdp=-1, tensor=2)
    assert spec.resolve(16) == MeshSpec(data=2, fsdp=4, tensor=2)
    assert str(spec.resolve(16)) == "data=2,fsdp=4,tensor=2"
    assert MeshSpec.parse(str(spec)) == spec
    assert str(MeshSpec.parse("")) == "data=1"


def test_make_mesh():
    mesh = make_mesh("fsdp=-1,tensor=2")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert mesh.axis_names == MESH_AXES
    assert make_mesh("tensor=2", jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "unknown mesh axis 'model' in 'model=2'; known are data, fsdp, expert, context, tensor"),
        ("fsdp=2,fsdp=4", "mesh axis fsdp stands twice"),
        ("fsdp", "'fsdp' in 'fsdp' is not an axis and its size"),
        ("fsdp=two", "'fsdp=two' in 'fsdp=two' is not an axis and its size"),
        ("fsdp=0", "fsdp=0: an axis of a mesh has 1 device or more, or -1"),
        ("fsdp=-2", "fsdp=-2: an axis"),
        ("fsdp=-1,data=-1", "only one axis of a mesh can take what is left (-1), got data and fsdp"),
        ("fsdp=3", "mesh fsdp=3 is 3 devices, but there are 8; -1 for one of them fills the rest"),
        ("tensor=3,fsdp=-1", "mesh fsdp=-1,tensor=3 is 3 devices, but there are 8 (and fsdp cannot fill the rest)"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(text)


def test_slices():
    """`data` goes around slices, and `fsdp` where there is not enough of it."""
    assert across_slices(MeshSpec(data=4, fsdp=8), 2) == (2, 1, 1, 1, 1)
    assert across_slices(MeshSpec(data=2, fsdp=8), 4) == (2, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="does not go around 4 slices: data times fsdp must be a multiple of them"):
        across_slices(MeshSpec(data=2, tensor=4), 4)


def test_devices_of_several_slices():
    """Neighbours along every axis but the outermost are in one slice."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        process_index: int
        platform: str = "gpu"
        device_kind: str = "H100"

    devices = [Device(i, i // 4, i // 4) for i in range(8)]
    mesh = make_mesh("data=2,fsdp=2,tensor=2", devices)
    slices = [[device.slice_index for device in part.ravel()] for part in mesh.devices]
    assert slices == [[0] * 4, [1] * 4]


@pytest.mark.parametrize(
    ("model", "devices", "layout"),
    [
        ("qwen2-7b", 4, HeadLayout(1, 7)),
        ("qwen2-7b", 8, HeadLayout(2, 8)),  # 28 heads become 32
        ("qwen2-7b", 28, HeadLayout(7, 7)),
        ("qwen2-7b", 16, HeadLayout(4, 8)),
        ("qwen2-0.5b", 7, HeadLayout(7, 7)),
        ("qwen2-1.5b", 4, HeadLayout(2, 6)),
        ("qwen2-72b", 16, HeadLayout(2, 8)),
    ],
)
def test_heads_over_devices(model, devices, layout):
    assert layout_on(published(model), MeshSpec(tensor=devices)) == layout


@pytest.mark.parametrize(
    ("model", "spec", "batch", "length", "message"),
    [
        ("qwen2-7b", "expert=4", None, None, "expert=4 splits experts, but this model is dense; use fsdp=4"),
        ("qwen2-7b", "fsdp=2,expert=5", None, None, "this model is dense; use data=5"),  # fsdp=10 would not fit
        ("qwen2-7b", "fsdp=5", None, None, "hidden_size 3584 does not divide over fsdp=5; use fsdp=4 or 7"),
        (
            "qwen2-57b-a14b",
            "expert=24",
            None,
            None,
            "num_experts 64 does not divide over expert=24; use expert=16 or 32",
        ),
        ("qwen2-7b", "tensor=64", None, None, "28 query heads over 4 key/value heads.*use tensor=32"),
        (
            "qwen2-0.5b",
            "tensor=3",
            None,
            None,
            "vocab_size 151936 .* tensor=3, intermediate_size 4864 .* tensor=3; use tensor=2 or 4",
        ),
        (
            "qwen2-7b",
            "data=4,fsdp=2",
            12,
            None,
            "a batch of 12 rows does not divide over data x fsdp x expert = 8; use 8 or 16",
        ),
        ("qwen2-7b", "context=4", 1, 1020, "1020 tokens do not divide over context=4 in halves; use a multiple of 8"),
    ],
)
def test_models_that_do_not_fit(model, spec, batch, length, message):
    spec = MeshSpec.parse(spec)
    with pytest.raises(ValueError, match=message) as caught:
        check_divides(published(model), spec, batch, length)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", ["fsdp", "expert", "tensor"])
@pytest.mark.parametrize("model", MODELS)
def test_every_size_that_is_offered_fits(model, axis):
    config = published(model)
    for count in range(2, 67):
        try:
            check_divides(config, MeshSpec(**{axis: count}))
        except ValueError as error:
            other, sizes = re.findall(r"use (\w+)=([\d or]+)$", str(error))[0]
            for size in map(int, sizes.split(" or ")):
                check_divides(config, MeshSpec(**{other: size}))


@pytest.mark.parametrize("model", MODELS)
def test_models_that_fit(model):
    check_divides(published(model), MeshSpec(data=2, fsdp=4, tensor=2, context=2), 8, 32)


def test_run_options():
    mesh = make_mesh("fsdp=4,tensor=2")
    config = published("qwen2-7b")
    assert run_options(config, mesh) == run_options(config, make_mesh("fsdp=4,tensor=2"))  # one compiled program
    assert hash(run_options(config, mesh)) == hash(run_options(config, mesh))
    assert run_options(config, mesh, rules="serve") != run_options(config, mesh)
    with pytest.raises(ValueError, match="rules must be one of train, serve, got 'inference'"):
        run_options(config, mesh, rules="inference")
    with pytest.raises(ValueError, match="attention must be one of"):
        run_options(config, mesh, attention="flash")
