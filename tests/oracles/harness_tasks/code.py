"""Runs what the model wrote, with its test."""

from qwen2_jax.evaluation.sandbox import run_program


def passed(doc, results):
    program = f"def add(a, b):\n    return{results[0]}\nassert add({doc['a']}, {doc['b']}) == {doc['a'] + doc['b']}\n"
    return {"passed": float(run_program(program).passed)}
