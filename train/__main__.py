"""What `python -m train` runs: `qwen2-jax train`."""

from qwen2_jax.command import end_process, prepare_process

prepare_process()

from train.cli import main  # noqa: E402  (slower, and the streams must be there before it)

end_process(main())
