"""How tests compile for CPUs."""

import jax

QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
"""For XLA_FLAGS: the older emitters, which newer versions do not have, take half as long to compile."""
