"""The training loss equals that of transformers, in chunks and on a mesh too, and ignores what it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen2_jax import Output, Qwen2
from qwen2_jax.sizes import PUBLISHED
from sharding import make_mesh
from sharding.planner.hlo import arrays, collectives, parse
from train import IGNORE, next_token_loss, next_token_targets
from train.loss import cross_entropy, split_over
from train.step import Batch, Step, objective

B, T, D, V = 8, 12, 16, 64


@functools.cache
def inputs():
    """Hidden states, head and targets, 5 of 96 of which do not count."""
    keys = jax.random.split(jax.random.key(0), 3)
    targets = jax.random.randint(keys[2], (B, T), 0, V, jnp.int32).at[:5, 3].set(IGNORE)
    return jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D)), targets


def plain(hidden, head, targets):
    log_probabilities = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden, head, precision="highest"))
    chosen = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(targets != IGNORE, chosen, 0.0).sum()


def assert_equal_to_plain(loss):
    """The sum, and what it is differentiated to when it is scaled."""
    hidden, head, targets = inputs()
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda *x, f=f: 0.1 * f(*x, targets), argnums=(0, 1)))(hidden, head)
        for f in (loss, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


@pytest.mark.torch
@pytest.mark.parametrize("variant", ["dense", "tied", "moe"])
def test_equals_transformers(variant, tmp_path):
    import torch

    from convert import load_checkpoint
    from qwen2_jax.model import stack_layers
    from tests.oracles import huggingface

    theirs = huggingface.build(variant, tmp_path / "weights")
    config, params = load_checkpoint(tmp_path / "weights")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 17), dtype=np.int32)
    extra = {"output_router_logits": True} if config.is_moe else {}
    expected = theirs.model(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long(), **extra).loss
    expected.backward()
    with torch.no_grad():
        for parameter in theirs.model.parameters():
            parameter.copy_(parameter.grad)
    theirs.model.save_pretrained(tmp_path / "gradients")
    _, expected_gradients = load_checkpoint(tmp_path / "gradients")

    targets = next_token_targets(jnp.asarray(tokens))
    output = jax.jit(Qwen2(config).apply)({"params": params}, tokens)
    loss = next_token_loss(config, output, targets)
    np.testing.assert_allclose(loss.total, expected.item(), rtol=1e-5)
    assert loss.targets == 3 * 16
    assert (loss.total != loss.cross_entropy) == config.is_moe

    batch, how = Batch(jnp.asarray(tokens), targets), Step(dtype=jnp.float32, chunk=15)
    in_chunks = jax.jit(jax.value_and_grad(lambda params: objective(config, params, batch, how)[0]))
    total, gradients = in_chunks(stack_layers(params, config))
    np.testing.assert_allclose(total, expected.item(), rtol=1e-5)
    jax.tree.map(
        lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max()),
        gradients,
        stack_layers(expected_gradients, config),
    )


@pytest.mark.parametrize("chunk", [1, 24, 40, 1000])
def test_chunks_equal_the_whole(chunk):
    assert_equal_to_plain(lambda *x: cross_entropy(*x, chunk))
    hidden, head, targets = inputs()
    np.testing.assert_allclose(cross_entropy(hidden, head, targets, chunk), plain(hidden, head, targets), rtol=1e-6)


@pytest.mark.parametrize(
    "mesh", ["data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2", "fsdp=8", "expert=4,context=2"]
)
def test_a_mesh_equals_one_device(mesh):
    config = PUBLISHED["qwen2-0.5b"]
    split = split_over(config, make_mesh(mesh), (B, T))
    assert_equal_to_plain(lambda *x: cross_entropy(*x, 4, split))


def test_rows_that_are_not_split():
    """Two rows do not go around eight devices: the gradient of the head is then whole on each."""
    hidden, head, targets = (x[:2] if x.shape[0] == B else x for x in inputs())
    split = split_over(PUBLISHED["qwen2-0.5b"], make_mesh("fsdp=4,data=2"), targets.shape)
    assert split.rows == ("data",) and split.embed == ()
    ours, theirs = (
        jax.jit(jax.grad(f, argnums=1))(hidden, head, targets) for f in (lambda *x: cross_entropy(*x, 4, split), plain)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_logits_are_not_gathered():
    mesh = make_mesh("fsdp=2,tensor=4")
    split = split_over(PUBLISHED["qwen2-0.5b"], mesh, (B, T))
    hidden, head, targets = inputs()
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    given = place(hidden, "fsdp"), place(head, "tensor", "fsdp"), place(targets, "fsdp")
    gradients = jax.jit(jax.value_and_grad(lambda *x: cross_entropy(*x, 8, split), argnums=(0, 1)))
    found = collectives(parse(gradients.lower(*given).compile().as_text()), dict(mesh.shape))
    rows, chunk, chunks = B // 2, 2, T // 2
    over = {axis: [one for one in found if one.axes == (axis,) and one.shape != "f32[]"] for axis in ("fsdp", "tensor")}
    assert {(one.kind, one.shape, one.count) for one in over["fsdp"]} == {
        ("all-gather", f"f32[{V // 4},{D}]", 1),
        ("reduce-scatter", f"f32[{V // 4},{D}]", 1),
    }
    assert {one.kind for one in over["tensor"]} == {"all-reduce"}
    assert {array for one in over["tensor"] for array in arrays(one.shape)} == {
        ("f32", (rows, chunk)),  # a maximum and two sums
        ("f32", (rows, chunk, D)),  # the gradient of the hidden states
    }
    assert max(one.count for one in over["tensor"]) <= 3 * chunks


def test_memory_of_the_real_vocabulary():
    """Temporaries stay far below one [B, T, V] array; the gradients themselves are results."""
    vocabulary, tokens = 151936, 2048
    shapes = ((4, tokens // 4, 32), jnp.bfloat16), ((vocabulary, 32), jnp.float32), ((4, tokens // 4), jnp.int32)
    gradients = jax.jit(jax.grad(lambda *x: cross_entropy(*x, 64), argnums=(0, 1)))
    compiled = gradients.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.15 * tokens * vocabulary * 4


def test_the_head_is_summed_in_float32():
    """Of 4096 equal gradients of 1/2, bfloat16 would lose all after the 256th or so."""
    hidden = jnp.ones((1, 4096, 1), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda head: cross_entropy(hidden, head, jnp.zeros((1, 4096), jnp.int32), 16)))(
        jnp.zeros((2, 1))
    )
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, [[-2048], [2048]])


def test_targets_stop_at_documents_and_padding():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0]], jnp.int32)
    assert next_token_targets(tokens).tolist() == [[6, 7, 8, 9, 0, IGNORE]]
    segments = jnp.array([[1, 1, 2, 2, 2, 0]], jnp.int32)
    assert next_token_targets(tokens, segments).tolist() == [[6, IGNORE, 8, 9, IGNORE, IGNORE]]


def test_ignored_targets_have_no_gradient():
    config = PUBLISHED["qwen2-0.5b"]

    def total(logits):
        output = Output(logits, hidden=None, cache=None, aux_loss=jnp.zeros(()))
        return next_token_loss(config, output, jnp.array([[1, IGNORE, 2]], jnp.int32)).total

    gradient = jax.grad(total)(jax.random.normal(jax.random.key(0), (1, 3, 7)))
    assert np.abs(gradient[0, 0]).max() > 0
    assert np.all(gradient[0, 1] == 0)
