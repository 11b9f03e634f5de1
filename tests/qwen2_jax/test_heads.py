"""Layouts of heads, and the numbers staying the same under them."""

import jax
import numpy as np
import pytest

from qwen2_jax import Qwen2, Qwen2Config
from qwen2_jax.cache import empty_cache
from qwen2_jax.heads import HeadLayout, head_layout
from qwen2_jax.layers import Options
from qwen2_jax.model import init_params
from tests.qwen2_jax.shapes import SMALL

CONFIG = Qwen2Config(**{**SMALL, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2})


def test_every_layout_divides_and_wastes_least():
    for heads, kv_heads in ((28, 4), (14, 2), (12, 2), (64, 8), (16, 16), (6, 2), (7, 1)):
        own = heads // kv_heads
        for devices in range(1, 65):
            try:
                layout = head_layout(heads, kv_heads, devices)
            except ValueError:
                assert all(
                    kv_heads * copies % devices or group % copies
                    for group in range(own, 2 * own)
                    for copies in range(1, group + 1)
                )
                continue
            assert kv_heads * layout.copies % devices == 0
            assert layout.group % layout.copies == 0
            assert own <= layout.group < 2 * own


@pytest.mark.parametrize("layout", [HeadLayout(1, 3), HeadLayout(3, 3), HeadLayout(2, 4), HeadLayout(1, 5)])
def test_equals_the_model_without(layout):
    params = init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases that are not zero
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab_size)

    @jax.jit
    def run(params):
        results = []
        for options in (Options(), Options(heads=layout)):
            model = Qwen2(CONFIG, options=options)

            def loss(params, model=model):
                logits = model.apply({"params": params}, tokens).logits
                return (logits**2).sum(), logits

            results.append(jax.value_and_grad(loss, has_aux=True)(params))
            cache = empty_cache(CONFIG, 2, 9, "float32", layout=options.heads)
            results[-1] += (model.apply({"params": params}, tokens, cache=cache).logits,)
        return results

    (_, expected, cached), ours = run(params)[0], run(params)[1]
    scale = max(float(abs(x).max()) for x in jax.tree.leaves(expected))
    np.testing.assert_allclose(ours[0][1], run(params)[0][0][1], atol=1e-4)
    np.testing.assert_allclose(ours[2], cached, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / scale, b / scale, atol=1e-6), ours[1], expected)


@pytest.mark.parametrize(("cached", "computed"), [(HeadLayout(3, 3), HeadLayout()), (HeadLayout(), HeadLayout(3, 3))])
def test_a_cache_of_another_layout_is_refused(cached, computed):
    params = init_params(CONFIG, jax.random.key(0))
    cache = empty_cache(CONFIG, 2, 9, "float32", layout=cached)
    model = Qwen2(CONFIG, options=Options(heads=computed))
    with pytest.raises(ValueError, match=r"the cache is for 2 rows and . key/value heads, got 2 and .; make it by"):
        model.apply({"params": params}, np.ones((2, 3), np.int32), cache=cache)
