"""What a run costs, before anyone pays for it: first by formula, then by what XLA makes of the real program.

Nothing here imports JAX except `compiled` and `hlo`.
"""
