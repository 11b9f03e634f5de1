"""Several ways to run one model beyond its trained length, side by side."""

import dataclasses
from typing import Annotated

import tyro

from qwen2_jax.config import Qwen2Config
from qwen2_jax.long_context import MODES, READERS, LongContext, LongContextNumbers, refuse_idle

CHECKPOINT = "checkpoint"
"""The mode that config.json asks for."""


@dataclasses.dataclass(frozen=True)
class Modes(LongContextNumbers):
    """Which ways to compare. An option applies to those modes of the list that know it."""

    mode: Annotated[str, tyro.conf.arg(metavar="MODE,...")] = CHECKPOINT
    """One or more of plain, yarn, dca, dca-temperature, dca-yarn, and checkpoint (what config.json says)."""

    @property
    def names(self) -> tuple[str, ...]:
        """The modes in order, each once.

        Raises:
          ValueError: for one that does not exist.
        """
        names = tuple(dict.fromkeys(name.strip() for name in self.mode.split(",")))
        if unknown := [name for name in names if name not in (CHECKPOINT, *MODES)]:
            raise ValueError(
                f"there is no mode {unknown[0]!r}; the modes are {', '.join((CHECKPOINT, *MODES))}; write several with "
                "commas between them"
            )
        return names

    def long_contexts(self) -> dict[str, LongContext]:
        """By mode, with the options that the mode knows.

        Raises:
          ValueError: for a mode that does not exist, or an option that none of the modes knows.
        """
        names = self.names
        refuse_idle(self, names)
        given = {name: value for name in READERS if (value := getattr(self, name)) is not None}
        contexts = {CHECKPOINT: LongContext()}
        for mode in MODES:
            contexts[mode] = LongContext(mode, **{name: given[name] for name in given if mode in READERS[name]})
        return {name: contexts[name] for name in names}

    def trained(self, config: Qwen2Config) -> int:
        """Tokens of the longest inputs that the model was trained on, as far as the options and config.json tell."""
        return LongContext(trained_length=self.trained_length).trained(config)


def reaching(config: Qwen2Config, long_context: LongContext, length: int) -> Qwen2Config:
    """The configuration for inputs of `length` tokens, even if the model declares fewer positions: how it does beyond
    them is what an evaluation is to find out.

    Raises:
      ValueError: as `LongContext.configure`.
    """
    configured = long_context.configure(config, length)
    return dataclasses.replace(configured, max_position_embeddings=max(config.max_position_embeddings, length))
