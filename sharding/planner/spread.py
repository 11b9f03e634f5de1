"""How much of everything one device has, by the rules that the program itself is sharded by."""

import functools
import math

from sharding.checks import layout_on
from sharding.logical import RULES, activation_axes, weight_axes
from sharding.planner.request import Request
from sharding.planner.shapes import Weight, weights


class Spread:
    """One run's arrays on its mesh. Counts are those of one device unless they say otherwise."""

    def __init__(self, request: Request):
        config = request.config
        self.request = request
        self.sizes = request.mesh.sizes
        self.rules = RULES["train" if request.training else "serve"]
        self.weights = weights(config)
        layout = layout_on(config, request.mesh)
        group = layout.group or config.queries_per_kv
        tensor = self.sizes["tensor"]
        self.query_heads = config.num_key_value_heads * group // tensor
        """Padding included."""
        self.kv_heads = config.num_key_value_heads * layout.copies // tensor
        """Copies included."""
        self.rows = request.batch // self.ways("batch", request.batch)
        self.tokens = self.rows * (request.queries // self.ways("length", request.queries))
        """Inside a layer."""
        self.residual = self.rows * (request.queries // self.ways("residual", request.queries))
        """Tokens between layers."""
        self.slots = request.seq // self.ways("cache", request.seq)
        """Of the cache, per row."""
        self.vocab = config.vocab_size // tensor

    @property
    def tensor(self) -> int:
        return self.sizes["tensor"]

    def ways(self, axis: str, size: int) -> int:
        """Into how many parts an activation's dim of `size` with this logical axis is split."""
        ((*names,),) = activation_axes((axis,), (size,), self.sizes, self.rules)
        return math.prod(self.sizes[name] for name in names)

    @functools.cached_property
    def copies(self) -> int:
        """Devices that compute the same tokens, because there are too few rows to split (serving only)."""
        used = self.ways("batch", self.request.batch) * self.ways("length", self.request.queries) * self.tensor
        return self.request.topology.devices // used

    def stored(self, weight: Weight) -> tuple[int, ...]:
        """The shape of the part of a weight that one device stores, layers apart."""
        return self._part(weight, gathered=False)

    def gathered(self, weight: Weight) -> tuple[int, ...]:
        """The same once it is put together over `fsdp`, as products read it."""
        return self._part(weight, gathered=True)

    def split_by_width(self, weight: Weight) -> bool:
        """Whether a weight of heads that do not divide over `tensor` is stored over it along their width."""
        names = weight_axes(weight.axes, weight.shape, self.sizes)
        return any(axis == "head_dim" and name for axis, name in zip(weight.axes, names, strict=True))

    def _part(self, weight: Weight, gathered: bool) -> tuple[int, ...]:
        names = weight_axes(weight.axes, weight.shape, self.sizes)
        return tuple(
            size if name is None or (gathered and name == "fsdp") else size // self.sizes[name]
            for size, name in zip(weight.shape, names, strict=True)
        )
