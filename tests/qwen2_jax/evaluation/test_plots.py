"""Pictures are written, whole, for every number of modes, lengths and depths."""

import struct

import pytest

from qwen2_jax.evaluation.plots import plot_needle, plot_perplexity

MODES = ["plain", "yarn", "dca", "dca-temperature", "dca-yarn", "checkpoint"]


def size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("modes, lengths, depths", [(1, 1, 1), (4, 3, 5), (6, 2, 1)])
def test_needle(modes, lengths, depths, tmp_path):
    cells = [(m, 64 << i, d / 4) for m in MODES[:modes] for i in range(lengths) for d in range(depths)]
    table = [
        {"mode": mode, "length": length, "depth": depth, "score": (i % 5) / 4, "samples": 1}
        for i, (mode, length, depth) in enumerate(cells)
    ]
    report = {"table": table, "trained_length": 64, "settings": {"model": "path/of/model", "task": "needle"}}
    plot_needle(report, tmp_path / "a.png")
    plot_needle({"table": table[:-1] or table}, tmp_path / "b.png")  # a cell is missing
    assert all(300 < side < 4000 for name in ("a.png", "b.png") for side in size(tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("modes, error", [(1, None), (6, 0.25)])
def test_perplexity(modes, error, tmp_path):
    table = [
        {"mode": mode, "first": 1 + 8 * i, "last": 8 + 8 * i, "loss": 3 - i / 9, "loss_error": error, "perplexity": 9.0}
        for mode in MODES[:modes]
        for i in range(4)
    ]
    plot_perplexity({"table": table, "trained_length": 16}, tmp_path / "a.png")
    assert size(tmp_path / "a.png") == (1200, 675)
    with pytest.raises(OSError):
        plot_perplexity({"table": table}, tmp_path / "nowhere" / "a.png")
