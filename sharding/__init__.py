"""Where arrays live: meshes, the model's logical axes on them, and plans for meshes that are not here."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy import lazy_names

if TYPE_CHECKING:
    from sharding.mesh import MeshSpec, make_mesh
    from sharding.rules import batch_sharding, cache_shardings, optimizer_shardings, param_shardings
    from sharding.run import run_options

__all__ = [
    "MeshSpec",
    "batch_sharding",
    "cache_shardings",
    "make_mesh",
    "optimizer_shardings",
    "param_shardings",
    "run_options",
]

# Found on first use: the planner's formula answers without JAX.
__getattr__ = lazy_names(
    __name__,
    {
        "MeshSpec": "mesh",
        "batch_sharding": "rules",
        "cache_shardings": "rules",
        "make_mesh": "mesh",
        "optimizer_shardings": "rules",
        "param_shardings": "rules",
        "run_options": "run",
    },
)
