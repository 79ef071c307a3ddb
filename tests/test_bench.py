"""Memory by compiler analysis: serial tiles are flat, the whole picture is not, and attention is counted."""

import jax
import jax.numpy as jnp
import pytest

from hypervl_jax import bench


def test_serial_memory_is_flat_and_the_whole_picture_grows_faster_than_its_area(tiny_config):
    cfg = tiny_config.model
    rows = bench.memory_curve(cfg, [64, 190])
    assert [(r["side"], r["tiles"]) for r in rows] == [(64, 4), (192, 36)]
    small, large = rows
    assert large["serial_mb"] <= 1.05 * small["serial_mb"]
    assert large["whole_mb"] > 2 * 9 * small["whole_mb"]
    scores = 4 * cfg.base.heads * (192 // cfg.base.patch) ** 4  # bytes of one layer's scores: they must be counted
    assert large["whole_mb"] * 1e6 > scores


def test_serial_memory_holds_no_copy_of_the_tiles(tiny_config):
    cfg = tiny_config.model
    few, many = (bench.serial_bytes(cfg, n, dtype=jnp.float32) for n in (4, 36))
    assert many - few < 32 * 32**2 * 3 * 4 / 10


def test_shapes_are_those_of_the_real_parameters(tiny_config):
    from hypervl_jax.model import hypervl

    cfg = tiny_config.model
    params, tiles, mask = bench.encoder_shapes(cfg, "large", 3)
    real = jax.eval_shape(lambda key: hypervl.init(key, cfg), jax.random.key(0))["large"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params["large"]) == jax.tree.map(
        lambda a: (a.shape, a.dtype), real
    )
    assert (tiles.shape, mask.shape) == ((3, 32, 32, 3), (3, 16))


def test_temporaries_count_what_is_allocated_and_nothing_else():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    assert bench.temporary_bytes(lambda a: a + 1, x) < 1000
    assert bench.temporary_bytes(lambda a: jnp.sort(a @ a, axis=0) @ a, x) == pytest.approx(256 * 256 * 4, rel=1.1)


def test_a_command_does_not_tell_where_things_are():
    assert bench.told(["hypervl", "quickstart", "--out", "/home/me", "--steps", "9"]) == "hypervl quickstart --steps 9"
    assert bench.told(["hypervl", "train", "nano", "--data=/home/me", "--out=x"]) == "hypervl train nano"
    assert bench.told(["hypervl", "ask", "a b.png", "--data"]) == "hypervl ask 'a b.png'"
