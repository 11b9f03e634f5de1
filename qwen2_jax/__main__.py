"""What `python -m qwen2_jax` and the `qwen2-jax` script run."""

import signal

# Before the slower imports: Ctrl-C ends the process on the spot, without a traceback, also in the middle of XLA's work.
# Jobs that go on, or have something to put away, ask for KeyboardInterrupt. Where the caller ignores it, so do we.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from qwen2_jax.cli import main

if __name__ == "__main__":
    main()
