"""The text of compiled programs is read right: on snippets of both compilers, and on programs whose truth is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen2_jax.sizes import published
from sharding import make_mesh
from sharding.mesh import MeshSpec
from sharding.planner.chips import parse_topology
from sharding.planner.hlo import (
    Collective,
    arrays,
    axes_of,
    bytes_of,
    collectives,
    loops_of_unknown_length,
    one_trip,
    parse,
)
from sharding.planner.hlo_flops import flops
from sharding.planner.request import Request
from sharding.planner.suspicions import suspicions

MESH = {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("attributes", "axes", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}, x=1", ("tensor",), 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", ("fsdp",), 4),
        ("replica_groups=[8,2]<=[16]", ("tensor",), 2),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",), 4),
        ("replica_groups=[8,2]<=[2,8]T(1,0), dimensions={1}", ("data",), 2),
        ("replica_groups=[2,8]<=[2,4,2]T(2,0,1)", ("data", "fsdp"), 8),
        ("replica_groups={}", ("data", "fsdp", "tensor"), 16),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'expert'=1,'context'=1,'tensor'=2] {'fsdp'}, x", ("fsdp",), 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'tensor','data'}", ("data", "tensor"), 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp':(2)2}", ("fsdp",), 2),
        ("replica_groups=mesh['axis_0'=16] {'axis_0':(2)4}, x", ("fsdp",), 4),
        ("replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}", ("data", "fsdp"), 8),
        ("replica_groups=mesh['a'=2,'b'=8], device_ids=([16]<=[8,2]T(1,0)) {'a'}", ("tensor",), 2),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", ("fsdp",), 2),
        ("replica_groups={{0},{1},{2},{3}}", (), 1),
    ],
)
def test_axes(attributes, axes, devices):
    assert axes_of(attributes, MESH) == (axes, devices)


def test_shapes():
    text = "(s32[]{:T(128)}, bf16[2,4096,18944]{2,1,0:T(8,128)(2,1)S(1)}, /*index=2*/pred[7]{0}, token[])"
    assert arrays(text) == [("s32", ()), ("bf16", (2, 4096, 18944)), ("pred", (7,))]
    assert bytes_of(text) == 4 + 2 * 2 * 4096 * 18944 + 7
    assert bytes_of("s4[3,3]{1,0}") == 5
    assert bytes_of("f32[<=16,2]") == 128


# As libtpu writes a layer's loop: no known_trip_count, a reduce-scatter as a fusion, an asynchronous gather.
LIBTPU = """\
HloModule jit_step, is_scheduled=true

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.2 = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter.1 (input.1: f32[28,128,3584]) -> f32[28,128,896] {
  %input.1 = f32[28,128,3584]{2,1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[28,128,3584]{2,1,0:T(8,128)} all-reduce(%input.1), channel_id=1, replica_groups={{0,1,2,3}}, \
use_global_device_ids=true, to_apply=%add.1
  %zero = u32[] constant(0)
  ROOT %part = f32[28,128,896]{2,1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero, %zero), \
dynamic_slice_sizes={28,128,896}
}

%body.1 (p: (s32[], bf16[1,28,128,896], f32[28,128,3584])) -> (s32[], bf16[1,28,128,896], f32[28,128,3584]) {
  %p = (s32[]{:T(128)}, bf16[1,28,128,896]{3,2,1,0}, /*index=2*/f32[28,128,3584]{2,1,0}) parameter(0)
  %w = bf16[1,28,128,896]{3,2,1,0} get-tuple-element(%p), index=1
  %g = f32[28,128,3584]{2,1,0} get-tuple-element(%p), index=2
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %ags = (bf16[1,28,128,896]{3,2,1,0}, bf16[1,28,128,3584]{3,2,1,0}) all-gather-start(%w), dimensions={3}, \
replica_groups=mesh['fsdp'=4] {'fsdp'}
  %agd = bf16[1,28,128,3584]{3,2,1,0} all-gather-done(%ags)
  %fusion.1 = f32[28,128,896]{2,1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel = f32[28,128,3584]{2,1,0} custom-call(%agd), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"b","cost_estimate":{"flops":"1000","transcendentals":"5"}}}
  ROOT %out = (s32[]{:T(128)}, bf16[1,28,128,896]{3,2,1,0}, f32[28,128,3584]{2,1,0}) tuple(%i, %w, %kernel)
}

%cond.1 (q: (s32[], bf16[1,28,128,896], f32[28,128,3584])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %q = (s32[]{:T(128)}, bf16[1,28,128,896]{3,2,1,0}, f32[28,128,3584]{2,1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main.1 (a: bf16[1,28,128,896], b: f32[28,128,3584]) -> f32[28,128,3584] {
  %a = bf16[1,28,128,896]{3,2,1,0} parameter(0)
  %b = f32[28,128,3584]{2,1,0} parameter(1)
  %first = s32[]{:T(128)} constant(4)
  %start = s32[]{:T(128)} copy(%first)
  %tuple.1 = (s32[]{:T(128)}, bf16[1,28,128,896]{3,2,1,0}, f32[28,128,3584]{2,1,0}) tuple(%start, %a, %b)
  %while.1 = (s32[]{:T(128)}, bf16[1,28,128,896]{3,2,1,0}, f32[28,128,3584]{2,1,0}) while(%tuple.1), \
condition=%cond.1, body=%body.1, metadata={op_name="jit(step)/while"}
  ROOT %result = f32[28,128,3584]{2,1,0} get-tuple-element(%while.1), index=2
}
"""


def test_a_loop_as_libtpu_writes_it():
    program, trips = parse(LIBTPU), 28 - 4
    elements = 28 * 128 * 3584
    assert collectives(program, {"fsdp": 4}) == [
        Collective("reduce-scatter", ("fsdp",), "f32[28,128,3584]", trips, trips * elements * 3, in_loop=True),
        Collective("all-gather", ("fsdp",), "bf16[1,28,128,3584]", trips, trips * elements * 2 * 3 // 4, in_loop=True),
    ]
    assert flops(program) == trips * 1000
    assert loops_of_unknown_length(program) == 0
    open_ended = parse(LIBTPU.replace("%limit = s32[]{:T(128)} constant(28)", "%limit = s32[]{:T(128)} get-limit()"))
    assert loops_of_unknown_length(open_ended) == 1
    assert flops(open_ended) == 0
    # A decode loop is counted by its steps.
    step = one_trip(open_ended)
    assert flops(step) == 1000 and loops_of_unknown_length(step) == 0
    assert [(one.kind, one.count) for one in collectives(step, {"fsdp": 4})] == [
        ("reduce-scatter", 1),
        ("all-gather", 1),
    ]


@pytest.mark.parametrize(("step", "trips"), [(1, 24), (2, 12), (5, 5)])
def test_an_unrolled_loop(step, trips):
    counted = f"%by = s32[]{{:T(128)}} constant({step})\n  %next = s32[]{{:T(128)}} add(%i, %by)\n  ROOT %out ="
    program = parse(LIBTPU.replace("ROOT %out =", counted).replace("tuple(%i,", "tuple(%next,"))
    assert flops(program) == trips * 1000


WINDOWED = """\
%windowed_dot_general_body_rs.1 (p: (s32[], f32[512,8192])) -> (s32[], f32[512,8192]) {
  %p = (s32[], f32[512,8192]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[512,8192]{1,0} get-tuple-element(%p), index=1
  %by = s32[] constant(2)
  %next = s32[] add(%i, %by)
  %inside = f32[512,8192]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %out = (s32[], f32[512,8192]{1,0}) tuple(%next, %inside)
}

%windowed_dot_general_cond_rs.1 (q: (s32[], f32[512,8192])) -> pred[] {
  %limit = s32[] constant(4)
  %q = (s32[], f32[512,8192]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%at, %limit), direction=LT
}

%layer (r: (s32[], f32[512,8192])) -> (s32[], f32[512,8192]) {
  %r = (s32[], f32[512,8192]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%r), index=0
  %y = f32[512,8192]{1,0} get-tuple-element(%r), index=1
  %zero = s32[] constant(0)
  %start = (s32[], f32[512,8192]{1,0}) tuple(%zero, %y)
  %loop = (s32[], f32[512,8192]{1,0}) while(%start), condition=%windowed_dot_general_cond_rs.1, \
body=%windowed_dot_general_body_rs.1, metadata={op_name="jit(step)/while/body/mlp/down/dot_general"}
  %partial = f32[512,8192]{1,0} get-tuple-element(%loop), index=1
  %behind = f32[512,8192]{1,0} collective-permute(%partial), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, \
metadata={op_name="jit(step)/while/body/mlp/down/dot_general"}
  %moved = f32[512,8192]{1,0} collective-permute(%behind), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, \
metadata={op_name="jit(step)/while/body/sharding_constraint"}
  ROOT %result = (s32[], f32[512,8192]{1,0}) tuple(%n, %moved)
}

%more (s: (s32[], f32[512,8192])) -> pred[] {
  %layers = s32[] constant(80)
  %s = (s32[], f32[512,8192]{1,0}) parameter(0)
  %l = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%l, %layers), direction=LT
}

ENTRY %main (a: (s32[], f32[512,8192])) -> (s32[], f32[512,8192]) {
  %a = (s32[], f32[512,8192]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[512,8192]{1,0}) while(%a), condition=%more, body=%layer
}
"""


def test_permutes_that_belong_to_a_product_are_not_suspicious():
    program = parse(WINDOWED)
    own, moved = collectives(program, {"tensor": 4})
    assert (own.windowed, own.count) == (True, 80 * (2 + 1))
    assert (moved.windowed, moved.count) == (False, 80)
    assert suspicions(planned(tensor=4), program, [own]) == []
    (line,) = suspicions(planned(tensor=4), program, [moved])
    assert "activations change their place in every layer" in line


ASYNCHRONOUS = """\
%part (w: bf16[8,4]) -> bf16[8,16] {
  %w = bf16[8,4]{1,0} parameter(0)
  ROOT %ag = bf16[8,16]{1,0} all-gather(%w), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,16] {
  %a = bf16[8,4]{1,0} parameter(0)
  %start = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%part
  %done = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%part
  ROOT %alone = bf16[8,16]{1,0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}
}
"""


def test_what_is_shown_in_several_fusions_counts_once():
    (found,) = collectives(parse(ASYNCHRONOUS), {"fsdp": 4})
    assert (found.kind, found.shape, found.count) == ("all-gather", "bf16[8,16]", 2)  # and the one outside of fusions


CONVOLUTION = """\
ENTRY %main (a: bf16[2,4096,3584,1], b: bf16[2,4096,28,128]) -> f32[3584,28,128,1] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}
"""


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "products"),
    [
        # A product with heads as a window (libtpu), which slides over padding but for one place each.
        (
            *("bf16[2,4096,3584,1]", "bf16[2,4096,28,128]", "f32[3584,28,128,1]"),
            "window={size=28x2 pad=27_27x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1",
            2 * 4096 * 3584 * 28 * 128,
        ),
        ("f32[8,16]", "f32[16,32]", "f32[8,32]", "dim_labels=bf_io->bf", 8 * 16 * 32),
        ("f32[1,5,3]", "f32[2,3,7]", "f32[1,4,7]", "window={size=2}, dim_labels=b0f_0io->b0f", 4 * 2 * 3 * 7),
        ("f32[1,5,3]", "f32[3,3,7]", "f32[1,3,7]", "window={size=3 stride=2 pad=1_1}, dim_labels=b0f_0io->b0f", 7 * 21),
    ],
)
def test_products_written_as_convolutions(left, right, out, attributes, products):
    text = CONVOLUTION.format(left=left, right=right, out=out, attributes=attributes)
    assert flops(parse(text)) == 2 * products


def test_a_program_compiled_here():
    """A loop over weights split over fsdp: gathered for their product, the activations added up over tensor."""
    mesh, layers = make_mesh("data=2,fsdp=2,tensor=2"), 5
    spec = PartitionSpec
    rows, split = spec(("data", "fsdp"), "tensor"), spec(None, "tensor", "fsdp")

    def run(x, weights):
        def layer(x, weight):
            return jax.lax.psum(x @ jax.lax.all_gather(weight, "fsdp", axis=1, tiled=True), "tensor")[:, :8], None

        x, _ = jax.lax.scan(layer, x, weights)
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(rows, split), out_specs=rows, check_vma=False)
    shapes = ((16, 16), rows), ((layers, 16, 16), split)
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, at)) for shape, at in shapes)
    program = parse(jax.jit(mapped).lower(*arguments).compile().as_text())
    assert set(collectives(program, dict(mesh.shape))) == {
        Collective("all-gather", ("fsdp",), "f32[8,16]", layers, layers * 8 * 16 * 4 // 2, in_loop=True),
        Collective("all-reduce", ("tensor",), "f32[4,16]", layers, layers * 4 * 16 * 4, in_loop=True),
        Collective("collective-permute", ("data",), "f32[4,8]", 1, 4 * 8 * 4, in_loop=False),
    }
    assert flops(program) == layers * 2 * 4 * 8 * 16
    assert loops_of_unknown_length(program) == 0


def planned(**mesh: int) -> Request:
    spec = MeshSpec(**mesh)
    return Request("m", published("qwen2-57b-a14b"), parse_topology("v5p:2x2x1"), spec, "train", 8, 4096)


@pytest.mark.parametrize(
    ("kind", "axes", "shape", "in_loop", "words"),
    [
        ("all-gather", ("fsdp",), "bf16[28,28,128,3584]", False, "weight of all layers is gathered whole over fsdp"),
        ("all-gather", ("fsdp",), "f32[3584,28,128]", True, "gathered over fsdp in float32"),
        ("all-gather", ("expert",), "bf16[64,2560,3584]", True, "all experts' weights are gathered over expert"),
        ("all-reduce", ("fsdp",), "f32[151936,3584]", False, "a gradient is added up whole over fsdp"),
        (
            "collective-permute",
            ("tensor",),
            "bf16[2,4096,3584]",
            True,
            "change their place in every layer, over tensor",
        ),
        ("all-to-all", ("fsdp",), "bf16[2,4096,3584]", True, "change their place in every layer, over fsdp"),
        ("all-gather", ("fsdp",), "bf16[151936,3584]", False, None),
        ("all-gather", ("fsdp",), "bf16[1,28,128,3584]", True, None),
        ("reduce-scatter", ("fsdp",), "f32[3584,28,128]", True, None),
        ("all-reduce", ("fsdp",), "f32[3584]", True, None),
        ("all-reduce", ("tensor",), "f32[2,4096,3584]", True, None),
        ("all-to-all", ("expert",), "bf16[2,4096,3584]", True, None),
        ("collective-permute", ("context",), "bf16[2,4096,3584]", True, None),
        ("all-to-all", ("fsdp",), "bf16[2,4096,3584]", False, None),
    ],
)
def test_suspicious_collectives(kind, axes, shape, in_loop, words):
    one = Collective(kind, axes, shape, 1, 1, in_loop)
    found = suspicions(planned(fsdp=2, expert=2), parse("ENTRY %e (a: f32[]) -> f32[] {\n}"), [one])
    assert (words is None and not found) or (len(found) == 1 and words in found[0])


@pytest.mark.parametrize(
    ("shape", "dense"),
    [
        ("bf16[8192,64,3584]", True),
        ("bf16[2,64,4096,2560]", True),
        ("f32[32,8192,2560]", True),
        ("bf16[64,2560,3584]", False),
        ("bf16[32,2560,3584]", False),
        ("bf16[65536,3584]", False),
        ("bf16[8192,8,3584]", False),
        ("f32[8192,64]", False),
    ],
)
def test_dense_expert_buffers(shape, dense):
    program = parse("ENTRY %e (a: f32[]) -> f32[] {\n  ROOT %x = " + shape + "{0} parameter(0)\n}")
    found = suspicions(planned(fsdp=2, expert=2), program, [])
    assert found == ([f"an array holds every token for every expert: {shape}"] if dense else [])
