"""What `generate` and `chat` share: their options, and the checkpoint that these name, ready to answer."""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from qwen2_jax.config import Qwen2Config
from qwen2_jax.json_object import brief
from qwen2_jax.long_context import LongContext

if TYPE_CHECKING:  # only: the options and their help must not wait for JAX
    import jax

    from qwen2_jax.evaluation.paths import Split
    from qwen2_jax.generation import Generation
    from qwen2_jax.generation_config import GenerationConfig
    from qwen2_jax.layers import Options

MAX_NEW_TOKENS = 512
"""Where neither the command line nor the checkpoint gives a number."""


Attention = Literal["dense", "chunked", "pallas", "cudnn"]
Mesh = Annotated[str | None, tyro.conf.arg(metavar="AXIS=N,...", help_behavior_hint="(default: one device)")]


def attention_option() -> Any:
    return tyro.conf.arg(
        metavar="{" + ",".join(get_args(Attention)) + "}", help_behavior_hint="(default: by platform and length)"
    )


def _checkpoints(metavar: str, otherwise: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: the checkpoint's, else {otherwise})")


def split_over(mesh: "jax.sharding.Mesh | None") -> "Split":
    """How a mesh divides the work of attention; all axes are there, as `sharding.make_mesh` makes them."""
    from qwen2_jax.evaluation.paths import Split
    from sharding.logical import ROW_AXES

    if mesh is None:
        return Split()
    by_blocks = "pallas" if mesh.devices.flat[0].platform == "tpu" else "chunked"
    return Split(math.prod(mesh.shape[axis] for axis in ROW_AXES), mesh.shape["tensor"], by_blocks)


def options_over(config: Qwen2Config, mesh: "jax.sharding.Mesh | None", attention: Attention | None) -> "Options":
    """How a model is to be run on a mesh, or on one device. Raises ValueError for a mesh that it does not fit."""
    from qwen2_jax.layers import Options

    if mesh is None:
        return Options(attention=attention)
    from sharding import run_options

    return run_options(config, mesh, rules="serve", attention=attention)


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    model: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Folder of a checkpoint, ours or Hugging Face's, or a hub id such as Qwen/Qwen2-0.5B-Instruct (downloaded)."""
    max_new_tokens: Annotated[int | None, _checkpoints("N", f"{MAX_NEW_TOKENS}, or what the model has room for")] = None
    """Most tokens to add."""
    temperature: Annotated[float | None, _checkpoints("X", "0")] = None
    """0 takes the most probable token; higher is more varied."""
    top_k: Annotated[int | None, _checkpoints("K", "all")] = None
    """Choose among the K most probable tokens; 0 is all."""
    top_p: Annotated[float | None, _checkpoints("P", "1")] = None
    """Choose among the most probable tokens that together reach probability P."""
    repetition_penalty: Annotated[float | None, _checkpoints("R", "1")] = None
    """Above 1 disfavours tokens that are already there."""
    stop_ids: Annotated[tuple[int, ...] | None, _checkpoints("ID ...", "its end-of-text token")] = None
    """Token ids that end an answer; none after the flag lets nothing end it."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of the random choices, 0 or more."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: as stored)"),
    ] = None
    """Of weights and arithmetic."""
    prefill_chunk: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all at once)")] = None
    """Read long prompts in pieces of N tokens, to bound the memory they take."""
    attention: Annotated[Attention | None, attention_option()] = None
    """How attention over a prompt is computed; cudnn needs an NVIDIA GPU, pallas is for TPUs."""
    mesh: Mesh = None
    """Spread the model over all devices, as in tensor=4,expert=2 (also data, fsdp, context); -1 takes what is left."""
    long_context: Annotated[LongContext, tyro.conf.arg(name="")] = dataclasses.field(default_factory=LongContext)


class Session:
    """A checkpoint, ready to answer as the options say.

    Raises:
      OSError, ValueError: if the checkpoint is missing or damaged, or an option does not fit it. Weights are read by
        `params`, when they are first needed, so that other mistakes show without waiting for them.
    """

    def __init__(self, options: SessionOptions):
        from convert.folder import local_folder, read_config
        from qwen2_jax.generation_config import GenerationConfig
        from qwen2_jax.tokenizer import Tokenizer

        if not 0 <= options.seed < 2**31:
            raise ValueError(f"--seed must be from 0 to {2**31 - 1}, got {options.seed}")
        self.options = options
        self.folder = local_folder(options.model)
        self.config = read_config(self.folder)
        self.tokenizer = Tokenizer.from_folder(self.folder)
        self.generation = _chosen(options, GenerationConfig.from_folder(self.folder), self.tokenizer.eos_ids)
        vocab_size, pad_id = self.config.vocab_size, self.generation.pad_id
        if self.tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"{self.folder}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model's embedding only "
                f"{vocab_size} rows; they do not belong together"
            )
        if outside := [id for id in self.generation.eos_ids if not 0 <= id < vocab_size]:
            raise ValueError(f"{outside} cannot end an answer: ids of this vocabulary are 0 to {vocab_size - 1}")
        if pad_id >= vocab_size:
            raise ValueError(
                f"{self.folder}: pad_token_id is {pad_id}, ids of this vocabulary are 0 to {vocab_size - 1}"
            )

    @functools.cached_property
    def mesh(self) -> "jax.sharding.Mesh | None":
        """The devices to spread over. Raises ValueError for a mesh that they do not fit."""
        if self.options.mesh is None:
            return None
        from sharding import make_mesh

        return make_mesh(self.options.mesh)

    @functools.cached_property
    def layer_options(self) -> "Options":
        """How the model is to be run. Raises ValueError as `mesh`, and for one that the model does not fit."""
        return options_over(self.config, self.mesh, self.options.attention)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        from convert import load_checkpoint

        _ = self.layer_options  # a mesh that does not fit shows before the weights are read

        # Not rich's: it hides the cursor, which an interrupt would leave so.
        terminal = sys.stderr.isatty()
        if terminal:
            print(f"loading {self.folder} ...", end="", file=sys.stderr, flush=True)
        params = load_checkpoint(self.folder, dtype=self.options.dtype, mesh=self.mesh)[1]
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return params

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt.

        Raises:
          ValueError: if there are none.
        """
        prompt = self.tokenizer.encode(text)
        if not prompt:
            raise ValueError(f"the prompt {brief(text)} has no tokens; a model continues at least one")
        return prompt

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """
        Raises:
          ValueError: if the model cannot continue one of these prompts (token ids).
        """
        from qwen2_jax.generation import checked_prompts

        for prompt in prompts:
            checked_prompts(self.config_for(prompt), [prompt], None, self.room(prompt))

    def start(self, prompts: Sequence[Sequence[int]], seed: int = 0) -> "Generation":
        """Begins to continue a batch of prompts (token ids) of one `config_for`; `seed` is added to the options'."""
        from qwen2_jax.generation import Generation

        lengths = [len(prompt) for prompt in prompts]
        (config,) = {self.config_for(prompt) for prompt in prompts}
        tokens = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
        return Generation(
            *(config, self.params, tokens, lengths),
            max_new_tokens=[self.room(prompt) for prompt in prompts],
            prefill_chunk=self.options.prefill_chunk,
            options=self.layer_options,
            sampling=self.generation.sampling,
            eos_ids=self.generation.eos_ids,
            pad_id=self.generation.pad_id,
            seed=(self.options.seed + seed) % 2**31,
        )

    def stream(self, prompt: Sequence[int]) -> Iterator[str]:
        """The text that continues one prompt, in pieces, as it is made; without control tokens."""
        from qwen2_jax.generation import stream
        from qwen2_jax.tokenizer import StreamDecoder

        decoder = StreamDecoder(self.tokenizer, control_tokens=False)
        for id in stream(self.start([prompt])):
            if piece := decoder.add([id]):
                yield piece
        yield decoder.finish()

    def until_end(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """A row of the answer up to the id that ended it, and whether one did."""
        ends = [i for i, id in enumerate(ids) if id in self.generation.eos_ids]
        return (list(ids[: ends[0] + 1]), True) if ends else (list(ids), False)

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens to add to a prompt: what was asked for, or what the checkpoint says and the model has."""
        if self.options.max_new_tokens is not None:
            return self.options.max_new_tokens
        most = self.generation.max_new_tokens or MAX_NEW_TOKENS
        reach = self.options.long_context.reach(self.config)
        return most if reach is None else max(1, min(most, reach - len(prompt)))

    def config_for(self, prompt: Sequence[int]) -> Qwen2Config:
        """The model's configuration for a request of this length, as the options of long context say."""
        return self.options.long_context.configure(self.config, len(prompt) + self.room(prompt))


def _chosen(
    options: SessionOptions, checkpoint: "GenerationConfig", end_of_text: tuple[int, ...]
) -> "GenerationConfig":
    """The checkpoint's way to generate, with the options that were given in its place."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    sampling = dataclasses.replace(checkpoint.sampling, **given)
    if sampling.temperature == 0 and (idle := sorted(given.keys() & {"top_k", "top_p"})):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{flags} changes nothing at temperature 0, which always takes the most probable token")
    eos_ids = (checkpoint.eos_ids or end_of_text) if options.stop_ids is None else options.stop_ids
    return dataclasses.replace(checkpoint, sampling=sampling, eos_ids=eos_ids)
