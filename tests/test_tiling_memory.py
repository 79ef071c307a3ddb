"""The benchmark of tiling memory, and what all benchmarks share."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hypervl_jax.model import hypervl, layers


def test_attention_in_query_chunks_is_attention(load):
    chunks = load("tiling_memory").in_query_chunks(4)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 3, 16, 8)) for key in keys)
    mask = jnp.arange(16)[None, None] < jnp.array([16, 11])[:, None, None]
    np.testing.assert_allclose(chunks(q, k, v, mask), layers.attention(q, k, v, mask), atol=1e-6)


def test_chunked_encoder_is_the_encoder(load, tiny_config):
    cfg = tiny_config.model
    shapes = load("tiling_memory").bench.encoder_shapes(cfg, "base", 2)
    leaves, tree = jax.tree.flatten(shapes[0])
    rng = np.random.default_rng(0)
    params = tree.unflatten([jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype) for leaf in leaves])
    tiles = jnp.asarray(rng.integers(0, 256, (2, 32, 32, 3)), jnp.uint8)
    mask = jnp.arange(16)[None] < jnp.array([16, 6])[:, None]
    got = load("tiling_memory").chunked(cfg, 4)(params, tiles, mask)
    np.testing.assert_allclose(got, hypervl.encode_batch(params, cfg, "base", tiles, mask), atol=1e-5)


def test_analysis_of_the_tiny_encoder_meets_the_flat_bars(load, tiny_config):
    benchmark = load("tiling_memory")
    rows = benchmark.analyse(tiny_config.model, (2, 6))
    bars = {bar.name: bar for bar in benchmark.bars("tiny", rows)}
    assert bars["tiny.serial_flat"].ok
    assert bars["tiny.whole_grows"].ok
    rows[0]["serial"] /= 2  # memory that doubles with the picture must not pass
    assert not next(bar for bar in benchmark.bars("tiny", rows) if bar.name == "tiny.serial_flat").ok


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
