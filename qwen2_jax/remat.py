"""What the backward pass keeps of a layer, by name; the rest is computed again."""

from collections.abc import Callable

from jax.ad_checkpoint import checkpoint_policies as policies

_PROJECTIONS = ("query", "key", "value", "attended", "output", "gate", "up")

REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": policies.nothing_saveable,
    "attention": policies.save_only_these_names("attended"),
    "projections": policies.save_only_these_names(*_PROJECTIONS),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_PROJECTIONS),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""From largest to smallest: "none" keeps everything, "projections" every matrix product of a dense layer that the
backward pass reads, so that only what goes element by element is computed again, "attention" the attention output,
"full" only each layer's input; "offload" keeps the projections in the host's memory."""
