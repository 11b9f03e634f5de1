"""Which path attention takes is told for every part of a batch."""

from qwen2_jax.evaluation.completion import Programs
from qwen2_jax.evaluation.completion_plan import Shape, Sizes
from qwen2_jax.evaluation.paths import Paths
from qwen2_jax.layers import Options


def test_prefixes_prompts_and_answers(config):
    by_cudnn = Paths(config, "bfloat16", Options(), "cudnn")
    assert by_cudnn.completions(Programs(Shape(0, 128, 32, 0), Sizes(0, 4), None, None)) == ("cudnn", "dense")
    # cuDNN sees no cache: neither behind a prefix, nor behind another piece of one.
    behind = Programs(Shape(256, 128, 32, 2), Sizes(2, 4), None, None)
    assert by_cudnn.completions(behind) == ("cudnn", "dense", "dense")
    in_pieces = Programs(Shape(256, 128, 32, 2), Sizes(2, 4), 64, 32)
    assert by_cudnn.completions(in_pieces) == ("dense", "dense", "dense")
    long = Programs(Shape(0, 32768, 32, 0), Sizes(0, 4), 4096, None)
    assert Paths(config, "bfloat16", Options(), None).completions(long)[0] == "chunked"
