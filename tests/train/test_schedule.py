"""Learning rates equal the papers' formulas in float64, of the number of updates made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.schedule import LearningRate

UPDATES = 1000


def oracle(options: LearningRate) -> np.ndarray:
    """[UPDATES + 5] float64."""
    rates = []
    for n in range(UPDATES + 5):
        if n < options.warm_up:
            factor = (n + 1) / options.warm_up
        elif options.kind == "cosine" and options.warm_up < UPDATES:
            done = min(1, (n - options.warm_up) / (UPDATES - options.warm_up))
            factor = options.final + (1 - options.final) * 0.5 * (1 + np.cos(np.pi * done))
        elif options.kind == "wsd" and n > UPDATES - options.decay:
            done = min(1, (n - (UPDATES - options.decay)) / options.decay)
            factor = options.final + (1 - options.final) * (1 - np.sqrt(done))
        else:
            factor = 1.0
        rates.append(options.peak * factor)
    return np.array(rates, np.float64)


@pytest.mark.parametrize(
    "options",
    [
        LearningRate(),
        LearningRate(7e-5, warm_up=40, final=0.0),
        LearningRate(1e-3, warm_up=UPDATES),
        LearningRate(2e-4, "wsd", warm_up=17, decay=100, final=0.0),
        LearningRate(2e-4, "wsd", warm_up=900, decay=100, final=0.02),
        LearningRate(3e-4, "constant", warm_up=10),
        LearningRate(3e-4, "constant"),
    ],
)
def test_equals_the_formula(options):
    rates = jax.jit(jax.vmap(options.over(UPDATES)))(jnp.arange(UPDATES + 5, dtype=jnp.int32))
    assert rates.dtype == jnp.float32
    expected = oracle(options)
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-7 * options.peak)
    assert np.all(rates[:UPDATES] > 0), "no update is wasted"
    assert np.isclose(max(rates), options.peak, rtol=1e-6)


def test_what_does_not_fit_is_named():
    for wrong, message in (
        (dict(peak=0.0), "peak.*positive.*got 0.0"),
        (dict(kind="step"), "one of cosine, wsd, constant, got 'step'"),
        (dict(final=1.5), "from 0 to 1, got 1.5"),
        (dict(warm_up=-1), "0 or more updates, got -1"),
        (dict(kind="wsd"), "with wsd, got 0"),
        (dict(decay=5), "with cosine, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            LearningRate(**wrong)
    with pytest.raises(ValueError, match="warm_up of 8 and decay of 3 updates do not fit into 10"):
        LearningRate(kind="wsd", warm_up=8, decay=3).over(10)
