from qwen2_jax.cli import main

raise SystemExit(main())
