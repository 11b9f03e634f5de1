"""The numbers of an upcycled model, against what the recipe says of them."""

import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pytest

from convert import upcycle_recipe
from convert.checkpoint import open_checkpoint
from convert.names import arrays_of
from convert.upcycle import Recipe, upcycle
from convert.upcycled_source import UpcycledSource
from qwen2_jax.config import Qwen2Config
from qwen2_jax.sizes import PUBLISHED

WIDTH, EXPERTS, EXPERT, SHARED = 48, 6, 20, 56  # 120 units of routed experts from 2.5 copies of 48
SIZES = dict(experts=EXPERTS, top_k=2, expert_width=EXPERT, shared_width=SHARED)
KINDS = ("gate", "up", "down")


def array(source, path):
    out = np.empty(source.arrays[path].size, source.dtypes[path])
    source.read(path, 0, out)
    return out.reshape(source.arrays[path].shape)


def dense_units(dense, layer):
    """By kind, the bytes of each unit's row (of down: column) -> its number."""
    units = {}
    for kind in KINDS:
        matrix = array(dense, f"layers_{layer}.mlp.{kind}.kernel")
        rows = matrix.T if kind == "down" else matrix
        units[kind] = {row.tobytes(): i for i, row in enumerate(rows)}
        assert len(units[kind]) == WIDTH
    return units


def found(units, matrix, kind):
    """Which dense unit each unit of one expert's matrix is; -1 for none."""
    return [units[kind].get(row.tobytes(), -1) for row in (matrix.T if kind == "down" else matrix)]


@pytest.fixture
def upcycled(make_hf):
    """upcycled(recipe fields, dtype=, tensors=, ...) -> (dense source, upcycled source)."""

    def make(dtype="float32", tensors=None, name="hf", hf=None, **fields):
        dense = open_checkpoint(make_hf("dense", name=name, dtype=dtype, tensors=tensors, **(hf or {})))
        return dense, UpcycledSource(dense, Recipe(**{**SIZES, **fields}))

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.33, 1.0])
def test_kept_units_are_the_dense_ones(fraction, dtype, upcycled):
    """They stand where the cut copies have them: each copy's units are distinct, and gate, up and down agree."""
    dense, moe = upcycled(dtype, reinit_fraction=fraction)
    orders = []
    for layer in range(2):
        units = dense_units(dense, layer)
        experts = {kind: array(moe, f"layers_{layer}.moe.experts.{kind}") for kind in KINDS}
        places = []
        for e in range(EXPERTS):
            gate, up, down = (found(units, experts[kind][e], kind) for kind in KINDS)
            assert gate == up == down
            assert gate.count(-1) == round(EXPERT * fraction)
            places += gate
        for copy in range(0, len(places), WIDTH):
            kept = [unit for unit in places[copy : copy + WIDTH] if unit >= 0]
            assert len(set(kept)) == len(kept)
            orders.append(places[copy : copy + WIDTH])
    if fraction == 0:
        assert [len(order) for order in orders] == [48, 48, 24] * 2
        assert len(set(map(tuple, orders))) == 6
        assert list(range(48)) not in orders
    if 0 < fraction < 1:  # other units in other experts
        drawn = {tuple(np.flatnonzero(np.array(order) < 0)) for order in np.split(np.array(places), EXPERTS)}
        assert len(drawn) == EXPERTS


def test_single_numbers_drawn_anew(upcycled):
    """About half of the entries of every unit, other ones in gate, up and down."""
    _, whole = upcycled(reinit_fraction=0.0)
    _, moe = upcycled(reinit="entry", name="again")
    masks = []
    for kind in KINDS:
        path = f"layers_1.moe.experts.{kind}"
        changed = array(moe, path) != array(whole, path)
        assert changed.mean() == pytest.approx(0.5, abs=0.03)
        per_unit = changed.mean(axis=1 if kind == "down" else 2)
        assert (per_unit.min() > 0.1, per_unit.max() < 0.9) == (True, True)
        masks.append(changed.swapaxes(1, 2) if kind == "down" else changed)
    for a, b in itertools.combinations(masks, 2):
        assert (a == b).mean() == pytest.approx(0.5, abs=0.03)
    _, every = upcycled(reinit="entry", reinit_fraction=1.0, name="every")
    assert (array(every, path) != array(whole, path)).all()


@pytest.mark.parametrize("reinit", ["unit", "entry"])
@pytest.mark.parametrize(
    ("option", "expected"),
    [({}, (0.05, 0.05, 0.05)), ({"reinit_std": 0.3}, (0.3, 0.3, 0.3)), ({"reinit_std": "match"}, (1.0, 2.0, 4.0))],
    ids=["default", "number", "match"],
)
def test_what_is_drawn(option, expected, reinit, upcycled, tools):
    """Normal numbers of the standard deviation asked for, in every expert and kind; all of them different ones."""
    hf = {"initializer_range": 0.05, "hidden_size": 128}
    tensors = tools.random_tensors({**tools.configs["dense"], **hf}, "float32")
    for name in tensors:
        tensors[name] *= {"gate": 1, "up": 2, "down": 4}.get(name.split("mlp.")[-1].partition("_")[0], 1)
    _, whole = upcycled(tensors=tensors, hf=hf, reinit_fraction=0.0)
    _, moe = upcycled(tensors=tensors, hf=hf, reinit=reinit, name="again", **option)
    seen = []
    for kind, std in zip(KINDS, expected, strict=True):
        for layer in range(2):
            path = f"layers_{layer}.moe.experts.{kind}"
            drawn = array(moe, path)[array(moe, path) != array(whole, path)]
            assert drawn.size == pytest.approx(EXPERTS * EXPERT * 128 / 2, rel=0.05)
            scaled = drawn / std
            assert scaled.std() == pytest.approx(1, abs=0.05)
            assert scaled.mean() == pytest.approx(0, abs=0.05)
            assert (np.abs(scaled) < 1).mean() == pytest.approx(0.683, abs=0.02)
            seen.append(scaled)
    assert np.unique(np.concatenate(seen)).size > 0.99 * sum(map(len, seen))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("width", [20, 48, 56, 150])
def test_shared_expert(width, dtype, upcycled):
    """Gate and up are dense units, each as often as the next or once more; down is scaled so that, behind a gate of
    1/2, the copies of a unit contribute together what it did."""
    dense, moe = upcycled(dtype, shared_width=width)
    _, copied = upcycled(dtype, shared_width=width, shared="copy", name="again")
    for layer in range(2):
        units, prefix = dense_units(dense, layer), f"layers_{layer}.moe.shared_expert"
        places = found(units, array(moe, f"{prefix}.gate.kernel"), "gate")
        counts = np.bincount(places, minlength=WIDTH)
        assert places == found(units, array(moe, f"{prefix}.up.kernel"), "up")
        assert places == found(units, array(copied, f"{prefix}.down.kernel"), "down")
        assert len(places) == width
        assert counts.max() - counts.min() <= 1
        down, original = array(moe, f"{prefix}.down.kernel"), array(dense, f"layers_{layer}.mlp.down.kernel")
        expected = original[:, places].astype(np.float32) * (2 / counts[places]).astype(np.float32)
        np.testing.assert_array_equal(down, expected.astype(down.dtype))


def test_routers_and_gates(upcycled):
    _, moe = upcycled(experts=200, router_std=0.5)
    routers = [array(moe, f"layers_{layer}.moe.router.kernel") for layer in range(2)]
    assert np.std(routers) == pytest.approx(0.5, rel=0.03)
    assert np.unique(routers).size > 12_000
    _, moe = upcycled(name="default")
    assert np.std([array(moe, f"layers_{layer}.moe.router.kernel") for layer in range(2)]) == pytest.approx(
        0.02, rel=0.1
    )
    assert not array(moe, "layers_1.moe.shared_expert_gate.kernel").any()


def test_all_else_stays(upcycled):
    dense, moe = upcycled("bfloat16")
    others = [path for path in moe.arrays if ".moe." not in path]
    assert others == [path for path in dense.arrays if ".mlp." not in path]
    for path in others:
        assert array(moe, path).tobytes() == array(dense, path).tobytes()


def test_config():
    # As transformers 5 writes it, with fields left to the defaults of a dense model.
    hf = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "eos_token_id": 7, "layer_types": None}
    base = {"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": None, **hf}
    dense = Qwen2Config.from_hf(base)
    config = upcycle_recipe.upcycled_config(dense, Recipe(**SIZES, norm_topk=True))
    written = config.to_hf()
    assert Qwen2Config.from_hf(written) == config
    assert (written["architectures"], written["model_type"]) == (["Qwen2MoeForCausalLM"], "qwen2_moe")
    assert (written["eos_token_id"], written["rope_parameters"]) == (7, hf["rope_parameters"])
    assert "rope_theta" not in written
    moe = {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 56,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    assert {key: written[key] for key in moe} == moe
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "qkv_bias")
    assert [getattr(config, name) for name in same] == [getattr(dense, name) for name in same]


def test_shape_of_the_published_model():
    recipe = Recipe(experts=64, top_k=8, expert_width=2560, shared_width=20480)
    config = upcycle_recipe.upcycled_config(PUBLISHED["qwen2-7b"], recipe)
    assert config == dataclasses.replace(PUBLISHED["qwen2-57b-a14b"], vocab_size=152064)
    # That one's 57,408,658,944 parameters and 128 rows more in the embedding and the head.
    assert sum(array.size for array in arrays_of(config).values()) == 57_408_658_944 + 2 * 128 * 3584


def test_any_run_of_numbers(upcycled):
    """A read may begin and end anywhere, as those of chunks of any size do."""
    draw = np.random.default_rng(0)
    for reinit in ("unit", "entry"):
        _, moe = upcycled(reinit=reinit, name=reinit)
        for path in (path for path in moe.arrays if path.startswith("layers_1.moe")):
            whole = array(moe, path).ravel()
            for _ in range(8):
                start, stop = np.sort(draw.choice(whole.size + 1, 2, replace=False))
                out = np.empty(stop - start, whole.dtype)
                moe.read(path, int(start), out)
                np.testing.assert_array_equal(out, whole[start:stop])


def test_the_seed_decides(upcycled):
    sources = [upcycled(seed=seed, name=str(i))[1] for i, seed in enumerate((3, 3, 4))]
    for path in ("layers_0.moe.experts.gate", "layers_0.moe.router.kernel", "layers_0.moe.shared_expert.up.kernel"):
        a, b, c = (array(source, path) for source in sources)
        assert (a == b).all()
        assert (a != c).mean() > 0.9


def test_what_a_seed_draws_stays_the_same(make_hf, tools, tmp_path):
    """Unfinished work must not be gone on with by other numbers: if this fails, `_VERSION` of the job goes up."""
    shapes = tools.spec_shapes(tools.configs["dense"])
    numbers = {name: np.arange(np.prod(shape)) % 1009 for name, shape in shapes.items()}
    tensors = {name: (numbers[name] / 1024).astype(np.float32).reshape(shape) for name, shape in shapes.items()}
    folder = make_hf("dense", dtype="float32", tensors=tensors)
    digests = []
    for reinit in ("unit", "entry"):
        upcycle(folder, tmp_path / reinit, Recipe(**SIZES, reinit=reinit))
        manifest = json.loads((tmp_path / reinit / "manifest.json").read_bytes())
        arrays = {path: entry["sha256"] for path, entry in manifest["arrays"].items()}
        digests.append(hashlib.sha256(json.dumps(arrays).encode()).hexdigest()[:16])
    assert digests == ["9b47f94c8069825b", "95f5f588b23defcd"]


def test_a_matrix_that_cannot_be_read_leaves_no_wrong_one(upcycled, monkeypatch):
    """Threads that are still at work after one has failed must not take the rest of another matrix for theirs."""
    monkeypatch.setattr("convert.chunks.chunk_shape.__defaults__", (2000,))
    dense, moe = upcycled()
    gate, up = (array(moe, f"layers_0.moe.experts.{kind}") for kind in ("gate", "up"))
    original, left = dense.read, 2

    def read(path, start, out):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("the disk is gone")
        original(path, start, out)

    array(moe, "layers_0.moe.experts.gate")
    with monkeypatch.context() as patch:
        patch.setattr(dense, "read", read)
        with pytest.raises(OSError):
            array(moe, "layers_0.moe.experts.up")
    np.testing.assert_array_equal(array(moe, "layers_0.moe.experts.gate"), gate)
    np.testing.assert_array_equal(array(moe, "layers_0.moe.experts.up"), up)


def test_each_dense_matrix_is_read_once(make_hf, tmp_path, monkeypatch):
    from convert.hugging_face import HuggingFaceSource

    monkeypatch.setattr("convert.stream.cores", lambda: 1)
    original, read = HuggingFaceSource.read, {}

    def spy(self, path, start, out):
        read[path] = read.get(path, 0) + out.size
        original(self, path, start, out)

    monkeypatch.setattr(HuggingFaceSource, "read", spy)
    folder = make_hf("dense")
    upcycle(folder, tmp_path / "moe", Recipe(**SIZES))
    assert read == {path: array.size for path, array in open_checkpoint(folder).arrays.items()}
