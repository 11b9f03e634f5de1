"""The one table of names: where every tensor of a Hugging Face checkpoint lives in our parameter tree.

Both sides store a matrix as [out, in], so a tensor and its place in our tree hold the same numbers in the same order
and differ at most in where axes are split. An array of ours is therefore a list of pieces, each a run of consecutive
numbers in one Hugging Face tensor; reading and writing both follow that list, in one direction or the other.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qwen2_jax.config import Qwen2Config
from qwen2_jax.json_object import brief

Shape = tuple[int, ...]


class Row(NamedTuple):
    """One line of the table. `axes` are ours; parentheses mark those that are one axis on the other side."""

    path: str
    name: str
    axes: str


# Letters of the axis legend; Fe and Fs are the widths of one routed expert and of the shared expert.
_ENDS = (
    Row("embed.embedding", "model.embed_tokens.weight", "V D"),
    Row("norm.scale", "model.norm.weight", "D"),
    Row("lm_head.kernel", "lm_head.weight", "V D"),
)
_ATTENTION = (
    Row("attn.q.kernel", "self_attn.q_proj.weight", "(N H) D"),
    Row("attn.q.bias", "self_attn.q_proj.bias", "(N H)"),
    Row("attn.k.kernel", "self_attn.k_proj.weight", "(K H) D"),
    Row("attn.k.bias", "self_attn.k_proj.bias", "(K H)"),
    Row("attn.v.kernel", "self_attn.v_proj.weight", "(K H) D"),
    Row("attn.v.bias", "self_attn.v_proj.bias", "(K H)"),
    Row("attn.o.kernel", "self_attn.o_proj.weight", "D (N H)"),
)
_DENSE = (
    Row("mlp.gate.kernel", "mlp.gate_proj.weight", "F D"),
    Row("mlp.up.kernel", "mlp.up_proj.weight", "F D"),
    Row("mlp.down.kernel", "mlp.down_proj.weight", "D F"),
)
_SPARSE = (
    Row("moe.router.kernel", "mlp.gate.weight", "E D"),
    Row("moe.experts.gate", "mlp.experts.{expert}.gate_proj.weight", "E Fe D"),
    Row("moe.experts.up", "mlp.experts.{expert}.up_proj.weight", "E Fe D"),
    Row("moe.experts.down", "mlp.experts.{expert}.down_proj.weight", "E D Fe"),
    Row("moe.shared_expert.gate.kernel", "mlp.shared_expert.gate_proj.weight", "Fs D"),
    Row("moe.shared_expert.up.kernel", "mlp.shared_expert.up_proj.weight", "Fs D"),
    Row("moe.shared_expert.down.kernel", "mlp.shared_expert.down_proj.weight", "D Fs"),
    Row("moe.shared_expert_gate.kernel", "mlp.shared_expert_gate.weight", "1 D"),
)
_NORMS = (
    Row("attn_norm.scale", "input_layernorm.weight", "D"),
    Row("mlp_norm.scale", "post_attention_layernorm.weight", "D"),
)

# transformers 5 keeps a layer's experts in two tensors: (name, position of ours among the parts on axis 1, parts).
_FUSED = {
    "moe.experts.gate": ("mlp.experts.gate_up_proj", 0, 2),
    "moe.experts.up": ("mlp.experts.gate_up_proj", 1, 2),
    "moe.experts.down": ("mlp.experts.down_proj", 0, 1),
}

# Written by early exporters, computed from the config by everybody: the only tensors that may be left unread.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Piece(NamedTuple):
    """`size` consecutive numbers: in our array from `start` on, in tensor `name` (of `shape`) from `offset` on."""

    start: int
    size: int
    name: str
    shape: Shape
    offset: int


@dataclasses.dataclass(frozen=True)
class Array:
    """One parameter: its dotted path in our tree, its shape, and the Hugging Face tensors that hold its numbers."""

    path: str
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def overlaps(self, start: int, stop: int) -> Iterator[Piece]:
        """The parts of the pieces within numbers [start, stop) of this array; their `start` counts from `start`."""
        for piece in self.pieces:
            low, high = max(start, piece.start), min(stop, piece.start + piece.size)
            if low < high:
                offset = piece.offset + low - piece.start
                yield Piece(low - start, high - low, piece.name, piece.shape, offset)


def arrays_of(config: Qwen2Config, fused_experts: bool = False) -> dict[str, Array]:
    """Every parameter of a model, by dotted path of the per-layer tree.

    Args:
      config: the model.
      fused_experts: whether the Hugging Face side holds all experts of a layer in one tensor (transformers 5 in memory)
        rather than one tensor per expert (every published checkpoint).
    """
    sizes = _axis_sizes(config)
    head = _ENDS[:2] if config.tie_word_embeddings else _ENDS
    attention = [row for row in _ATTENTION if config.qkv_bias or not row.path.endswith("bias")]
    arrays = [_array(row, sizes, "", "", fused_experts) for row in head[:1]]
    for layer in range(config.num_hidden_layers):
        for row in (*attention, *(_SPARSE if config.is_moe_layer(layer) else _DENSE), *_NORMS):
            arrays.append(_array(row, sizes, f"layers_{layer}.", f"model.layers.{layer}.", fused_experts))
    arrays += [_array(row, sizes, "", "", fused_experts) for row in head[1:]]
    return {array.path: array for array in arrays}


def check_counts(where: str, config: Qwen2Config, present: int, experts: int | None = None) -> None:
    """Refuses a config.json that belongs to an altogether larger model, before a table of its size is built.

    Args:
      where: the folder.
      config: the model.
      present: how many tensors there are.
      experts: how many experts a tensor holds at most; None if each expert has tensors of its own.

    Raises:
      ValueError: if there are far too few tensors for its layers or experts.
    """
    most = 2 * present + 100  # whatever is nearer than this is reported tensor by tensor
    layers, each = config.num_hidden_layers, config.num_experts
    sparse = sum(config.is_moe_layer(layer) for layer in range(layers)) if layers <= most else 0
    if layers > most or (sparse and (3 * sparse * each > most if experts is None else each > experts + most)):
        raise ValueError(
            f"{where}: config.json has num_hidden_layers {brief(layers)} and num_experts {brief(each)}, but the "
            f"weights are only {present} tensors; they do not belong together"
        )


def tensors_of(arrays: Mapping[str, Array]) -> dict[str, Shape]:
    """The Hugging Face tensors that hold `arrays`, by name, in the order in which transformers writes them."""
    shapes = {piece.name: piece.shape for array in arrays.values() for piece in array.pieces}
    if not any(".experts." in name for name in shapes):
        return shapes
    # transformers converts experts on the way out, and thereby sorts the names: experts of one kind side by side.
    return dict(sorted(shapes.items(), key=lambda item: _kind_and_expert(item[0])))


def kind_of(name: str) -> str:
    """A tensor's name without the number of its expert: the experts of a layer that hold the same matrix share it."""
    return _kind_and_expert(name)[0]


def _kind_and_expert(name: str) -> tuple[str, int]:
    expert = re.search(r"(?<=\.experts\.)(\d+)\.", name)
    return (name[: expert.start()] + name[expert.end() :], int(expert[1])) if expert else (name, 0)


def _axis_sizes(config: Qwen2Config) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
        "E": config.num_experts,
        "Fe": config.moe_intermediate_size,
        "Fs": config.shared_expert_intermediate_size,
    }


def _array(row: Row, sizes: Mapping[str, int], path_prefix: str, name_prefix: str, fused_experts: bool) -> Array:
    shape = tuple(sizes[axis] for axis in re.findall(r"[A-Z][a-z]?", row.axes))
    path, size = path_prefix + row.path, math.prod(shape)
    if "{expert}" not in row.name:
        groups = re.findall(r"\(.*?\)|\w+", row.axes)
        merged = tuple(math.prod(sizes.get(axis, 1) for axis in re.findall(r"\w+", group)) for group in groups)
        return Array(path, shape, (Piece(0, size, name_prefix + row.name, merged, 0),))
    experts, rows, columns = shape
    each = rows * columns
    if fused_experts:
        name, part, parts = _FUSED[row.path]
        whole = (experts, parts * rows, columns)
        pieces = [Piece(e * each, each, name_prefix + name, whole, (e * parts + part) * each) for e in range(experts)]
    else:
        names = [name_prefix + row.name.format(expert=e) for e in range(experts)]
        pieces = [Piece(e * each, each, name, (rows, columns), 0) for e, name in enumerate(names)]
    return Array(path, shape, tuple(pieces))
