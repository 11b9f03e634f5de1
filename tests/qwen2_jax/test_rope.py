"""Rotary embedding against complex multiplication in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.rope import inverse_frequencies, rotary_tables, rotate


def test_pairs_are_half_a_head_apart():
    head_dim, theta = 8, 1e4
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, head_dim))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 100, 3, 31000, 0]], jnp.int32)
    tables = rotary_tables(positions, inverse_frequencies(head_dim, theta), jnp.ones((1, 1)), jnp.float32)
    got = rotate(x, jax.tree.map(lambda table: table[:, :, None], tables))

    angles = np.asarray(positions)[..., None] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    turned = pairs * np.exp(1j * angles)[:, :, None]
    # A float32 angle of 31,000 is known to 0.002.
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=5e-3)
    np.testing.assert_allclose(got[0], np.concatenate([turned.real, turned.imag], -1)[0], atol=1e-6)


def test_scores_depend_on_distance_only():
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 64))
    frequencies = inverse_frequencies(64, 1e6)

    def score(i, j):
        one = jnp.ones((1, 1, 1))
        turns = [rotary_tables(jnp.array([[[at]]], jnp.int32), frequencies, one, jnp.float32) for at in (i, j)]
        return (rotate(query, turns[0]) * rotate(key, turns[1])).sum()

    np.testing.assert_allclose(score(9, 4), score(1009, 1004), rtol=1e-3)


def test_positions_are_told_apart_in_bfloat16():
    tables = rotary_tables(
        jnp.array([[256, 257]], jnp.int32), inverse_frequencies(64, 1e6), jnp.ones((1, 2)), jnp.bfloat16
    )
    assert tables[0].dtype == jnp.bfloat16
    assert tables[0][0, 0, 0] != tables[0][0, 1, 0]
