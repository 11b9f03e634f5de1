"""How to run a model beyond the length it was trained on: options of a run, turned into a configuration."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import tyro

from qwen2_jax.config import Qwen2Config
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.yarn import Yarn

Mode = Literal["plain", "yarn", "dca", "dca-temperature", "dca-yarn"]
MODES: tuple[Mode, ...] = get_args(Mode)

READERS: Mapping[str, tuple[Mode, ...]] = {
    "trained_length": ("yarn", "dca", "dca-temperature", "dca-yarn"),
    "yarn_factor": ("yarn", "dca-yarn"),
    "chunk_size": ("dca", "dca-temperature", "dca-yarn"),
    "local_size": ("dca", "dca-temperature", "dca-yarn"),
    "temperature_of": ("dca-temperature",),
}
"""The modes that read each option of `LongContext`."""

YARN_FACTORS = (1, 2, 4, 8, 16, 32)
"""What a factor is picked from for a request; each is one compiled program more at most."""

_LOCAL_SHARE = 32
"""local_size is this part of chunk_size by default, as in Qwen2.5-1M."""

_TRAINED_LENGTH = 32768
"""Of every Qwen2: the base models declare 131,072 positions but were trained on 32,768 (report, section 3.2)."""


def _option(metavar: str, default: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContextNumbers:
    """The numbers of the modes; None leaves one to the checkpoint's config.json."""

    trained_length: Annotated[int | None, _option("N", "the checkpoint's, at most 32,768")] = None
    """Tokens of the longest inputs trained on."""
    yarn_factor: Annotated[float | Literal["auto"] | None, _option("{X,auto}", "the checkpoint's, else auto")] = None
    """Of YaRN; auto takes for each request the smallest of 1, 2, 4, ... 32 that reaches its length."""
    chunk_size: Annotated[int | None, _option("N", "the checkpoint's, else the trained length")] = None
    """Of Dual Chunk Attention, the largest distance that RoPE gets to see."""
    local_size: Annotated[int | None, _option("N", "the checkpoint's, else a 32nd of the chunk size")] = None
    """Of Dual Chunk Attention, the distance that stays exact across chunks."""
    temperature_of: Annotated[Literal["query", "prompt"] | None, _option("{query,prompt}", "query")] = None
    """What Dual Chunk Attention's temperature follows: each query's own place, or the whole prompt's length."""


@dataclasses.dataclass(frozen=True)
class LongContext(LongContextNumbers):
    """What to do about inputs longer than the trained length. None leaves it to the checkpoint's config.json.

    The trained length is what the checkpoint's YaRN or Dual Chunk block says, else its max_position_embeddings, but at
    most 32,768. A factor of 1 is plain RoPE, so that short inputs are computed as they were trained. No released
    program runs Dual Chunk Attention with YaRN's frequencies. `DualChunk.temperature` explains the temperature.
    """

    mode: Annotated[Mode | None, _option("{" + ",".join(MODES) + "}", "what config.json asks for")] = None
    """Plain RoPE; YaRN; Dual Chunk Attention without or with temperature, or (experimental) with YaRN's frequencies."""

    def configure(self, config: Qwen2Config, length: int) -> Qwen2Config:
        """The configuration for a request of `length` tokens, prompt and answer together.

        Raises:
          ValueError: for an option that the mode cannot honour, numbers out of range, or a length out of reach.
        """
        mode = self.mode or _mode_of(config)
        refuse_idle(self, [mode])
        if self.trained_length is not None and self.trained_length < 1:
            raise ValueError(f"the trained length must be at least 1, got {self.trained_length}")
        return dataclasses.replace(
            config,
            yarn=self._yarn(config, length) if mode in READERS["yarn_factor"] else None,
            dual_chunk=self._dual_chunk(config) if mode in READERS["chunk_size"] else None,
        )

    def reach(self, config: Qwen2Config) -> int | None:
        """The longest request that `configure` has a configuration for; None if there is no bound."""
        if (self.mode or _mode_of(config)) in READERS["yarn_factor"] and self._factor(config) == "auto":
            return YARN_FACTORS[-1] * self.trained(config)
        return self.configure(config, 1).max_length

    def trained(self, config: Qwen2Config) -> int:
        """Tokens of the longest inputs that the model was trained on."""
        if self.trained_length is not None:
            return self.trained_length
        if config.yarn is not None:
            return config.yarn.original_max_position_embeddings
        if config.dual_chunk is not None and config.dual_chunk.original_max_position_embeddings:
            return config.dual_chunk.original_max_position_embeddings
        return min(config.max_position_embeddings, _TRAINED_LENGTH)

    def _factor(self, config: Qwen2Config) -> float | Literal["auto"]:
        if self.yarn_factor is not None:
            return self.yarn_factor
        return "auto" if config.yarn is None else config.yarn.factor

    def _yarn(self, config: Qwen2Config, length: int) -> Yarn | None:
        trained, factor = self.trained(config), self._factor(config)
        if factor == "auto":
            reaching = [candidate for candidate in YARN_FACTORS if candidate * trained >= length]
            if not reaching:
                raise ValueError(
                    f"{length} tokens are more than {YARN_FACTORS[-1]} times the trained length of {trained}; shorten "
                    "the input, or use Dual Chunk Attention (mode dca)"
                )
            factor = reaching[0]
        yarn = config.yarn or Yarn(float(factor), trained)
        if yarn.factor != factor:  # a fixed attention factor is that of its factor
            yarn = dataclasses.replace(yarn, factor=float(factor), attention_factor=None)
        yarn = dataclasses.replace(yarn, original_max_position_embeddings=trained)
        # The same numbers as plain RoPE: let it be the same program too.
        return None if yarn.factor == 1 and yarn.attention_scale == 1 and yarn != config.yarn else yarn

    def _dual_chunk(self, config: Qwen2Config) -> DualChunk:
        trained, known = self.trained(config), config.dual_chunk
        if self.chunk_size is not None and self.chunk_size > trained:
            raise ValueError(
                f"chunk_size ({self.chunk_size}) must not exceed the trained length ({trained}): RoPE would see "
                "distances that it never saw; give the trained_length if the model was trained on more"
            )
        block = known or DualChunk(trained, trained // _LOCAL_SHARE)
        if self.chunk_size is not None and self.chunk_size != block.chunk_size:
            block = DualChunk(self.chunk_size, self.chunk_size // _LOCAL_SHARE, temperature=block.temperature)
        if self.local_size is not None:
            block = dataclasses.replace(block, local_size=self.local_size)
        if self.temperature_of is not None:
            block = dataclasses.replace(block, temperature=self.temperature_of)
        original = known.original_max_position_embeddings if known else 0
        tempered = original > 0 if self.mode is None else self.mode == "dca-temperature"
        if self.trained_length is not None or original == 0:
            original = trained
        return dataclasses.replace(block, original_max_position_embeddings=original if tempered else 0)


def refuse_idle(numbers: LongContextNumbers, modes: Sequence[str]) -> None:
    """Raises ValueError for numbers that no one of `modes` reads: a mistake, not a wish."""
    idle = [
        name
        for name, readers in READERS.items()
        if getattr(numbers, name) is not None and not any(mode in readers for mode in modes)
    ]
    if idle:
        needed = " or ".join(dict.fromkeys(itertools.chain.from_iterable(READERS[name] for name in idle)))
        raise ValueError(f"mode {', '.join(modes)} does not read {' and '.join(idle)}; mode {needed} does")


def _mode_of(config: Qwen2Config) -> Mode:
    if config.dual_chunk is None:
        return "plain" if config.yarn is None else "yarn"
    if config.yarn is not None:
        return "dca-yarn"
    return "dca-temperature" if config.dual_chunk.original_max_position_embeddings else "dca"
