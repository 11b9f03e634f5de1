"""What an upcycled model computes at first, that it trains, and that transformers loads it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_checkpoint
from convert.conversion import convert_to_hf
from convert.upcycle import Recipe, upcycle
from qwen2_jax.model import Qwen2

SIZES = dict(experts=6, top_k=2, expert_width=20, shared_width=56)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24)).astype(np.int32)


@pytest.fixture
def dense(make_hf, tools):
    """A dense model in float32 whose numbers are of the size that training leaves."""
    tensors = tools.random_tensors(tools.configs["dense"], "float32")
    for name, tensor in tensors.items():
        tensor *= 1.0 if "norm" in name else 0.15
    return make_hf("dense", name="dense", dtype="float32", tensors=tensors)


def logits(config, params):
    return np.asarray(jax.jit(Qwen2(config).apply)({"params": params}, TOKENS).logits)


def times_found(dense_rows, rows):
    """How often each dense unit is among an expert's, by its row of the gate matrix."""
    places = {row.tobytes(): i for i, row in enumerate(np.asarray(dense_rows))}
    found = [places[row.tobytes()] for row in np.asarray(rows).reshape(-1, rows.shape[-1])]
    return np.bincount(found, minlength=len(places))


@pytest.mark.parametrize(
    ("top_k", "norm_topk", "shared"),
    [(6, False, "preserve"), (6, True, "copy"), (2, False, "copy"), (2, True, "preserve")],
)
def test_equal_routing_is_a_dense_model(top_k, norm_topk, shared, dense, tmp_path):
    """With nothing drawn anew and a router of zeros, every chosen expert has weight 1/E (or 1/k), so that the block is
    the dense FFN with each unit's contribution multiplied by a number that follows from how often it was cut out:

        sum_u f_u(x) * (weight * m_u + 1/2 * s_u)

    f_u is what unit u adds to the dense FFN's output, m_u how often it is among the chosen experts (of equal ones the
    first are chosen), s_u the factor of its column in the shared expert, summed over its copies.
    """
    recipe = Recipe(
        **{**SIZES, "top_k": top_k}, norm_topk=norm_topk, shared=shared, reinit_fraction=0.0, router_std=0.0
    )
    upcycle(dense, tmp_path / "moe", recipe)
    config, params = load_checkpoint(tmp_path / "moe")
    dense_config, expected = load_checkpoint(dense)
    weight = 1 / top_k if norm_topk else 1 / 6
    for layer in range(2):
        moe, mlp = params[f"layers_{layer}"]["moe"], expected[f"layers_{layer}"]["mlp"]
        m = times_found(mlp["gate"]["kernel"], moe["experts"]["gate"][:top_k])
        twice = times_found(mlp["gate"]["kernel"], moe["shared_expert"]["gate"]["kernel"])
        assert (m.sum(), sorted(set(twice))) == (20 * top_k, [1, 2])
        assert set(m) == ({2, 3} if top_k == 6 else {0, 1})  # 2.5 copies of 48 units are 6 experts
        factors = weight * m + (1.0 if shared == "preserve" else 0.5 * twice)
        mlp["down"]["kernel"] = mlp["down"]["kernel"] * factors.astype(np.float32)[None]
    expected_logits = logits(dense_config, expected)
    np.testing.assert_allclose(logits(config, params), expected_logits, atol=2e-5 * np.abs(expected_logits).max())


@pytest.mark.parametrize("reinit", ["unit", "entry"])
def test_it_trains(reinit, dense, tmp_path):
    """Plain gradient descent: finite gradients for every parameter, none of them dead, and the loss falls."""
    from train.loss import next_token_loss, next_token_targets

    upcycle(dense, tmp_path / "moe", Recipe(**SIZES, reinit=reinit))
    config, params = load_checkpoint(tmp_path / "moe", stacked=True)
    tokens = jnp.asarray(TOKENS)

    @jax.jit
    def step(params):
        def loss(params):
            output = Qwen2(config).apply({"params": params}, tokens)
            return next_token_loss(config, output, next_token_targets(tokens)).total

        value, gradients = jax.value_and_grad(loss)(params)
        return value, gradients, jax.tree.map(lambda weight, slope: weight - 0.3 * slope, params, gradients)

    losses = []
    for _ in range(4):
        value, gradients, params = step(params)
        losses.append(float(value))
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            assert np.isfinite(gradient).all(), path
            assert np.any(gradient), path
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.torch
@pytest.mark.parametrize("spelling", [[], ["--fused-experts"]])
def test_transformers_computes_the_same(spelling, dense, tmp_path, run):
    import torch
    import transformers

    upcycle(dense, tmp_path / "moe", Recipe(**SIZES))
    assert run("to-hf", tmp_path / "moe", tmp_path / "hf", *spelling)[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(model) is transformers.Qwen2MoeForCausalLM
    model.eval().set_experts_implementation("eager")
    with torch.no_grad():
        theirs = model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    ours = logits(*load_checkpoint(tmp_path / "moe"))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_export_and_back(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", Recipe(**SIZES), dtype="bfloat16")
    convert_to_hf(tmp_path / "moe", tmp_path / "hf")
    a, b = (load_checkpoint(tmp_path / name) for name in ("moe", "hf"))
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
