"""What is split over which axis on every mesh of the tests, written out; how a program splits its activations."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh import MESH_AXES
from sharding.placement import MeshPlacement

# A dim is split over the axes with these first letters: `ct` over context and tensor, `.` over none.
_WEIGHTS = """
mesh                     V,D F,D q:N,H,D k:K,H,D o:D,N,H D,F  E,F,D E,D,F E,D
data=8                   .,.     .,.,.   .,.,.   .,.,.   .,.  .,.,. .,.,. .,.
fsdp=8                   .,f     .,.,f   .,.,f   f,.,.   f,.  .,.,f .,f,. .,f
tensor=8                 t,.     .,t,.   .,t,.   .,.,t   .,t  .,t,. .,.,t .,.
context=8                .,.     .,.,.   .,.,.   .,.,.   .,.  .,.,. .,.,. .,.
data=2,fsdp=4            .,f     .,.,f   .,.,f   f,.,.   f,.  .,.,f .,f,. .,f
fsdp=4,tensor=2          t,f     t,.,f   t,.,f   f,t,.   f,t  .,t,f .,f,t .,f
data=4,context=2         .,.     .,.,.   .,.,.   .,.,.   .,.  .,.,. .,.,. .,.
data=2,fsdp=2,tensor=2   t,f     t,.,f   t,.,f   f,t,.   f,t  .,t,f .,f,t .,f
fsdp=2,context=2,tensor=2 t,f    t,.,f   t,.,f   f,t,.   f,t  .,t,f .,f,t .,f
data=2,tensor=4          t,.     .,t,.   .,t,.   .,.,t   .,t  .,t,. .,.,t .,.
fsdp=2,context=4         .,f     .,.,f   .,.,f   f,.,.   f,.  .,.,f .,f,. .,f
context=2,tensor=4       t,.     .,t,.   .,t,.   .,.,t   .,t  .,t,. .,.,t .,.
expert=8                 .,.     .,.,.   .,.,.   .,.,.   .,.  e,.,. e,.,. .,.
data=2,expert=4          .,.     .,.,.   .,.,.   .,.,.   .,.  e,.,. e,.,. .,.
fsdp=2,expert=2,tensor=2 t,f     t,.,f   t,.,f   f,t,.   f,t  e,t,f e,f,t .,f
expert=2,context=4       .,.     .,.,.   .,.,.   .,.,.   .,.  e,.,. e,.,. .,.
expert=4,tensor=2        t,.     t,.,.   t,.,.   .,t,.   .,t  e,t,. e,.,t .,.
"""
_ACTIVATIONS = """
mesh                      tokens:B,T residual:B,T,D inside:B,T,D heads:B,T,N,H mlp:B,T,F logits:B,T,V cache:B,K,S,H
data=8                    d,.        d,.,.          d,.,.        d,.,.,.       d,.,.     d,.,.        d,.,.,.
fsdp=8                    f,.        f,.,.          f,.,.        f,.,.,.       f,.,.     f,.,.        f,.,.,.
tensor=8                  .,.        .,t,.          .,.,.        .,.,t,.       .,.,t     .,.,t        .,t,.,.
context=8                 .,c        .,c,.          .,c,.        .,c,.,.       .,c,.     .,c,.        .,.,c,.
data=2,fsdp=4             df,.       df,.,.         df,.,.       df,.,.,.      df,.,.    df,.,.       df,.,.,.
fsdp=4,tensor=2           f,.        f,t,.          f,.,.        f,.,t,.       f,.,t     f,.,t        f,t,.,.
data=4,context=2          d,c        d,c,.          d,c,.        d,c,.,.       d,c,.     d,c,.        d,.,c,.
data=2,fsdp=2,tensor=2    df,.       df,t,.         df,.,.       df,.,t,.      df,.,t    df,.,t       df,t,.,.
fsdp=2,context=2,tensor=2 f,c        f,ct,.         f,c,.        f,c,t,.       f,c,t     f,c,t        f,t,c,.
data=2,tensor=4           d,.        d,t,.          d,.,.        d,.,t,.       d,.,t     d,.,t        d,t,.,.
fsdp=2,context=4          f,c        f,c,.          f,c,.        f,c,.,.       f,c,.     f,c,.        f,.,c,.
context=2,tensor=4        .,c        .,ct,.         .,c,.        .,c,t,.       .,c,t     .,c,t        .,t,c,.
expert=8                  e,.        e,.,.          e,.,.        e,.,.,.       e,.,.     e,.,.        e,.,.,.
data=2,expert=4           de,.       de,.,.         de,.,.       de,.,.,.      de,.,.    de,.,.       de,.,.,.
fsdp=2,expert=2,tensor=2  fe,.       fe,t,.         fe,.,.       fe,.,t,.      fe,.,t    fe,.,t       fe,t,.,.
expert=2,context=4        e,c        e,c,.          e,c,.        e,c,.,.       e,c,.     e,c,.        e,.,c,.
expert=4,tensor=2         e,.        e,t,.          e,.,.        e,.,t,.       e,.,t     e,.,t        e,t,.,.
"""
_COLUMN = {
    "embed.embedding": 0,
    "lm_head.kernel": 0,
    "gate.kernel": 0,
    "up.kernel": 0,
    "q.kernel": 1,
    "q.bias": 1,
    "k.kernel": 2,
    "k.bias": 2,
    "v.kernel": 2,
    "v.bias": 2,
    "o.kernel": 3,
    "down.kernel": 4,
    "experts.gate": 5,
    "experts.up": 5,
    "experts.down": 6,
    "router.kernel": 7,
}


def _rows(table: str) -> dict[str, list[tuple[Any, ...]]]:
    letters = {axis[0]: axis for axis in MESH_AXES}

    def dims(cell: str) -> tuple[Any, ...]:
        return tuple(tuple(letters[letter] for letter in dim if letter != ".") or None for dim in cell.split(","))

    lines = table.strip().splitlines()[1:]
    return {mesh: [dims(cell) for cell in cells] for mesh, *cells in map(str.split, lines)}


WEIGHTS, ACTIVATIONS = _rows(_WEIGHTS), _rows(_ACTIVATIONS)
TOKENS, RESIDUAL, INSIDE, HEADS, MLP, LOGITS, CACHE = range(7)
_AXES = {  # the names that the model gives to activations
    ("batch", "residual", "embed"): RESIDUAL,
    ("batch", "length", "embed"): INSIDE,
    ("batch", "length", "heads", "head_dim"): HEADS,
    ("batch", "length", "kv_heads", "head_dim"): HEADS,
    ("batch", "length", "mlp"): MLP,
    ("batch", "length", "vocab"): LOGITS,
}


def assert_split(found: jax.sharding.Sharding, dims: tuple[Any, ...], mesh: Mesh, what: object) -> None:
    assert found.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*dims)), len(dims)), (
        f"{what}: {found} and not {dims}"
    )


def assert_weights(shardings: Any, spec: str, mesh: Mesh) -> None:
    """Of every leaf of a tree that has the form of stacked parameters: themselves, their gradients, AdamW's moments."""

    def check(path, found):
        *parents, kind, name = (key.key for key in path)
        if name == "scale":  # of a norm
            dims: tuple[Any, ...] = (None,)
        elif kind == "shared_expert_gate":  # [D]
            dims = WEIGHTS[spec][7][1:]
        else:
            dims = WEIGHTS[spec][_COLUMN[f"{kind}.{name}"]]
            dims = dims[:-1] if name == "bias" else dims
        assert_split(found, (None, *dims) if "layers" in parents else dims, mesh, path)

    jax.tree_util.tree_map_with_path(check, shardings)


# With later ones, Flax's scan looks for what its layers share in a trial run, and refuses what has effects.
_CAN_WATCH = jax.__version_info__ < (0, 11)


@dataclasses.dataclass(frozen=True, eq=False)
class Watched(MeshPlacement):
    """A placement that notes how the compiled program splits each activation; each makes programs of its own."""

    seen: list[tuple[tuple[str | None, ...], jax.sharding.Sharding]] = dataclasses.field(default_factory=list)

    def activation(self, x, axes):
        placed = super().activation(x, axes)
        if _CAN_WATCH:
            jax.debug.inspect_array_sharding(placed, callback=lambda found: self.seen.append((tuple(axes), found)))
        return placed

    def assert_activations(self, spec: str) -> None:
        if not _CAN_WATCH:
            return
        assert {_AXES.get(axes) for axes, _ in self.seen} >= {RESIDUAL, INSIDE, HEADS, MLP, LOGITS}
        for axes, found in self.seen:
            assert_split(found, ACTIVATIONS[spec][_AXES[axes]], self.mesh, axes)
