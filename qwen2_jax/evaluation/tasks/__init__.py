"""Tasks for the evaluation harness whose programs run in `qwen2_jax.evaluation.sandbox`.

HumanEval and MBPP with the prompts, data and stop strings of the harness's own tasks. Those fetch their metric from the
network and run programs without protection. Name this folder to the harness as `include_path`.
"""
