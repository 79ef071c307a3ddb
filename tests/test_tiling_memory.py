"""The benchmark of tiling memory, and what all benchmarks share."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.model import layers


def test_attention_in_query_chunks_is_attention(load):
    chunks = load("tiling_memory").in_query_chunks(4)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 3, 16, 8)) for key in keys)
    mask = jnp.arange(16)[None, None] < jnp.array([16, 11])[:, None, None]
    np.testing.assert_allclose(chunks(q, k, v, mask), layers.attention(q, k, v, mask), atol=1e-6)


def drawn(shapes):
    """Random arguments for an encoder."""
    leaves, tree = jax.tree.flatten(shapes[0])
    rng = np.random.default_rng(0)
    params = tree.unflatten([jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype) for leaf in leaves])
    tiles = jnp.asarray(rng.integers(0, 256, shapes[1].shape), jnp.uint8)
    return params, tiles, jnp.ones(shapes[2].shape, bool)


@pytest.mark.parametrize("branch", ["base", "large"])
@pytest.mark.parametrize("ways", [("serial", "batched"), ("whole", "flash", "chunked")])
def test_ways_to_encode_the_same_pixels_give_the_same_features(load, tiny_config, branch, ways):
    """Tiles one after another or at once; the whole picture with any attention."""
    benchmark = load("tiling_memory")
    first, *others = (benchmark.encoder(tiny_config.model, branch, way, 2) for way in ways)
    given = drawn(first[1])
    assert given[1].shape[:2] == ((4, 32) if "serial" in ways else (1, 64))
    want = first[0](*given)
    for run, shapes in others:
        assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(jnp.shape, given)
        np.testing.assert_allclose(run(*given), want, atol=1e-5 * np.abs(want).max())


def row(tiles, **found):
    return {"side": 32 * int(tiles**0.5), "tiles": tiles, "bytes": found}


def test_analysis_of_the_tiny_encoders_meets_its_bars(load, tiny_config):
    benchmark = load("tiling_memory")
    for branch in ("base", "large"):
        rows = benchmark.analyse(tiny_config.model, branch, (2, 6))
        assert [(r["side"], r["tiles"], set(r["bytes"])) for r in rows] == [
            (64, 4, set(benchmark.WAYS)),
            (192, 36, set(benchmark.WAYS)),
        ]
        bars = {bar.name: bar for bar in benchmark.bars(branch, rows)}
        assert all(bar.ok for bar in bars.values())
        found = rows[-1]["bytes"]
        assert found["flash"] <= found["whole"]
        assert found["chunked"] < found["whole"] / 2
        assert rows[-1]["over_serial"]["whole"] == found["whole"] / found["serial"]
        rows[0]["bytes"]["serial"] /= 2  # memory that doubles with the picture must not pass
        assert [bar.name for bar in benchmark.bars(branch, rows) if not bar.ok] == [f"{branch}.serial_flat"]


def test_bars_of_runs(load):
    """Over serial tiles is told of the largest picture that ran as a whole."""
    benchmark = load("tiling_memory")
    rows = [row(1, serial=50, whole=100), row(4, serial=60, whole=300), row(9, serial=55, whole=None)]
    for r in rows:
        r["over_serial"] = benchmark.over_serial(r["bytes"])
    assert [r["over_serial"]["whole"] for r in rows] == [2, 5, None]
    assert [(bar.figure, bar.target, bar.ok) for bar in benchmark.run_bars("base", rows)] == [
        (50 / 60, 0.85, False),
        (5, 4, True),
    ]
    rows[2]["bytes"]["serial"] = 100
    rows[1]["over_serial"]["whole"] = 3
    assert not any(bar.ok for bar in benchmark.run_bars("base", rows))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a run")
def test_the_peak_of_a_run_sees_what_the_analysis_sees(load, tiny_config):
    """4,096 patches: the scores of the whole picture are most of what it takes."""
    benchmark = load("tiling_memory")
    whole, seconds = benchmark.measure(tiny_config.model, "base", "whole", 16)
    serial, _ = benchmark.measure(tiny_config.model, "base", "serial", 16)
    scores = tiny_config.model.base.heads * 4096**2 * 4
    assert whole > 0.9 * scores
    assert serial < whole / 4
    assert seconds > 0


def test_what_does_not_fit_is_left_out_and_said(load, tiny_config, capsys):
    benchmark = load("tiling_memory")
    (found,) = benchmark.measured(tiny_config.model, "base", [row(4, **dict.fromkeys(benchmark.WAYS, 1 << 60))])
    assert set(found["bytes"].values()) == set(found["seconds"].values()) == {None}
    assert set(found["over_serial"].values()) == {None}
    benchmark.table("peak", [found], "bytes", 1e6)
    assert capsys.readouterr().out.split()[-11:] == ["64", "4", *"-" * 9]


@pytest.mark.slow
def test_quick_run_writes_both_branches(load, tmp_path, monkeypatch):
    benchmark = load("tiling_memory")
    monkeypatch.setattr(sys, "argv", ["benchmarks/tiling_memory.py", "--quick", "--out", str(tmp_path)])
    assert benchmark.main() == 0
    metrics = json.loads((tmp_path / "tiling_memory-cpu.json").read_text())["metrics"]
    for branch in ("base", "large"):
        (ran,) = metrics[branch]["measured"]
        assert all(ran["seconds"][way] > 0 for way in benchmark.WAYS)


def test_results_file_and_exit_status(load, tmp_path, capsys, monkeypatch):
    common = load("common")
    monkeypatch.setattr(sys, "argv", ["benchmarks/thing.py", "--quick"])
    args = common.arguments("doc", ["--quick", "--out", str(tmp_path)])
    good, bad = common.Bar("good", 0.96, 0.95), common.Bar("bad", 0.2, 0.1, "<=")
    assert common.finish("thing", {"x": [1]}, [good], args, seeds=[3]) == 0
    assert common.finish("thing", {"x": [1]}, [good, bad], args, seeds=[3]) == 1
    result = json.loads((tmp_path / "thing-cpu.json").read_text())
    assert result["metrics"] == {"x": [1]}
    assert result["seeds"] == [3]
    assert result["command"] == "python benchmarks/thing.py --quick"
    assert result["machine"]["kind"] == "cpu"
    assert {"python", "jax", "flax"} <= set(result["versions"])
    assert len(result["commit"].removesuffix("+changes")) == 40 or result["commit"] == "unknown"
    assert [bar["ok"] for bar in result["bars"]] == [True, False]
    assert capsys.readouterr().out.endswith("bar good: 0.96 >= 0.95 ok\nbar bad: 0.2 <= 0.1 falls short\n")


def test_a_figure_that_is_not_a_number_falls_short(load):
    common = load("common")
    assert not common.Bar("x", float("nan"), 0).ok
    assert not common.Bar("x", float("nan"), 0, "<=").ok
