"""A list of modes: each gets the options that it knows, and none is given in vain."""

import pytest

from qwen2_jax.evaluation.modes import Modes, reaching
from qwen2_jax.long_context import LongContext


def test_options_go_to_the_modes_that_know_them():
    modes = Modes(
        "plain, yarn,dca-temperature,plain,checkpoint",
        trained_length=64,
        yarn_factor="auto",
        chunk_size=48,
        local_size=8,
        temperature_of="prompt",
    )
    assert modes.names == ("plain", "yarn", "dca-temperature", "checkpoint")
    assert modes.long_contexts() == {
        "plain": LongContext("plain"),
        "yarn": LongContext("yarn", trained_length=64, yarn_factor="auto"),
        "dca-temperature": LongContext(
            "dca-temperature", trained_length=64, chunk_size=48, local_size=8, temperature_of="prompt"
        ),
        "checkpoint": LongContext(None),
    }


@pytest.mark.parametrize(
    "modes, complaint",
    [
        (Modes("plain,ntk"), "there is no mode 'ntk'; the modes are checkpoint, plain, yarn"),
        (Modes(""), "there is no mode ''"),
        (Modes("plain,dca", yarn_factor=2), "mode plain, dca does not read yarn_factor; mode yarn or dca-yarn does"),
        (Modes("yarn,dca", temperature_of="query"), "does not read temperature_of; mode dca-temperature does"),
        (Modes(chunk_size=64), "mode checkpoint does not read chunk_size"),
    ],
)
def test_what_no_mode_knows_is_refused(modes, complaint):
    with pytest.raises(ValueError, match=complaint):
        modes.long_contexts()


def test_models_reach_beyond_what_they_declare(config):
    contexts = Modes("plain,yarn,dca", chunk_size=48, local_size=8).long_contexts()
    configs = {name: reaching(config, context, 500) for name, context in contexts.items()}
    assert all(reached.max_position_embeddings == 500 for reached in configs.values())
    assert configs["plain"].yarn is None and configs["plain"].dual_chunk is None
    # Both follow the trained length, not the one that is reached for.
    assert configs["yarn"].yarn.factor == 4 and configs["yarn"].yarn.original_max_position_embeddings == 128
    assert configs["dca"].dual_chunk.chunk_size == 48
    assert reaching(config, contexts["plain"], 100) == config
    assert Modes().trained(config) == 128 and Modes(trained_length=7).trained(config) == 7
