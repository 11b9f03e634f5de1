"""One of the processes of a cluster that JAX knows by its environment; run by test_processes.py."""

import jax

from sharding.processes import join_processes, leave_processes

assert join_processes(required=True)
print(jax.process_index(), jax.process_count(), jax.device_count())
leave_processes()
