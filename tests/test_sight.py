import jax
import numpy as np
import pytest

from hypervl_jax import compress, image, sight
from hypervl_jax.config import VrcConfig, VrcTrainConfig
from hypervl_jax.data.screens import Screen, Thing
from hypervl_jax.model import vrc

SIDE = 64
CFG = VrcConfig(multiplier=0.1, side=SIDE, hidden=8)


def screen(size: tuple[int, int], *things: Thing) -> Screen:
    return Screen(np.full((*size, 3), 255, np.uint8), things, (), "", 0.0)


def test_a_things_box_lies_where_its_proxy_shows_it():
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[40:80, 20:120] = 255
    found = sight.of_screens([Screen(pixels, (Thing("cat", "picture", (20, 40, 120, 80), "x"),), (), "", 0.0)],
                             ("dog", "cat"), SIDE, 2)  # fmt: skip
    x0, y0, x1, y1 = found.boxes[0, 0]
    assert found.names.tolist() == [[1, -1]]
    bright = np.argwhere(found.proxies[0].mean(-1) > 128)
    np.testing.assert_allclose([y0, x0], bright.min(0), atol=0.75)
    np.testing.assert_allclose([y1, x1], bright.max(0) + 1, atol=0.75)
    assert found.sizes[0, 0] == pytest.approx(np.log2((x1 - x0) / vrc.CELL))


def test_a_number_is_one_name_and_as_large_as_it_is_high():
    small = screen((40, 30), Thing("472", "digit", (2, 5, 26, 13), "font"))
    found = sight.of_screens([small], ("dog", "cat"), SIDE, 1)
    assert found.names.tolist() == [[2]]
    assert found.boxes[0, 0].tolist() == [2, 5, 26, 13]  # smaller than the proxy: unscaled, at the top left
    assert found.sizes[0, 0] == pytest.approx(np.log2(8 / 32))


def test_shares_are_areas_and_sum_to_one():
    got = sight.shares(np.array([[16.0, 0, 48, 32], [0, 16, 8, 48], [0, 0, 0, 0]]), SIDE)
    np.testing.assert_allclose(got, [[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]])
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, SIDE + 1, (20, 2, 2)), 1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1]], -1)
    count = np.zeros((20, 2, 2))
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        for x in range(x0, x1):
            for y in range(y0, y1):
                count[i, y // 32, x // 32] += 1
    count = count.reshape(20, 4) / np.maximum(count.sum((1, 2)), 1)[:, None]
    np.testing.assert_allclose(sight.shares(boxes.astype(float), SIDE), count, atol=1e-6)


def test_boxes_are_mirrored_with_their_picture():
    rng = np.random.default_rng(3)
    proxies, boxes = np.zeros((8, SIDE, SIDE, 3), np.uint8), np.array([[4.0, 10, 30, 22]])
    proxies[:, 10:22, 4:30] = 200
    got, mirrored = compress.varied(rng, proxies)
    assert len({tuple(m) for m in mirrored}) > 2
    for proxy, flips in zip(got, mirrored, strict=True):
        where = np.argwhere(proxy.any(-1))
        (y0, x0), (y1, x1) = where.min(0), where.max(0) + 1
        np.testing.assert_array_equal(sight._flip(boxes, SIDE, flips), [[x0, y0, x1, y1]])


def test_a_trunk_learns_what_stands_where_and_how_large():
    """Bright and dark squares of two sizes at random places; nothing but the cells that hold them tells which."""
    rng, screens = np.random.default_rng(0), []
    for _ in range(256):
        pixels, size, dark = np.full((SIDE, SIDE, 3), 120, np.uint8), rng.choice([8, 24]), rng.random() < 0.5
        x, y = rng.integers(0, SIDE - size, 2)
        box = (int(x), int(y), int(x + size), int(y + size))
        pixels[y : y + size, x : x + size] = 0 if dark else 250
        screens.append(Screen(pixels, (Thing("moon" if dark else "sun", "picture", box, "x"),), (), "", 0.0))
    seen = sight.of_screens(screens, ("sun", "moon"), SIDE, 1)
    how = VrcTrainConfig(batch=32, sight_steps=100, sight_lr=1e-2)
    start = vrc.init(jax.random.key(0), CFG)
    params, history = sight.train(jax.random.key(1), start, seen, 3, CFG, how, progress=False)
    assert history.shape == (100, 2)
    assert history[0, 0] == pytest.approx(np.log(3), rel=1e-4)
    assert (history[-20:].mean(0) < (0.6, 0.3)).all(), history[-20:].mean(0)  # 0.69 nats and 0.63 by guessing
    assert jax.tree.structure(params) == jax.tree.structure(start)
    for head in ("pool", "hidden", "out"):  # the trunk alone has learnt
        jax.tree.map(np.testing.assert_array_equal, params[head], start[head])


def test_too_little_to_learn_from_is_refused():
    start = vrc.init(jax.random.key(0), CFG)
    for screens in ([screen((40, 40))] * 4, [screen((40, 40))] * 64):
        seen = sight.of_screens(screens, ("cat",), SIDE, 1)
        with pytest.raises(compress.CompressError, match="too little"):
            sight.train(jax.random.key(0), start, seen, 2, CFG, VrcTrainConfig(sight_steps=1), progress=False)


def test_the_proxys_place_is_that_of_the_picture():
    for size in ((30, 20), (64, 64), (200, 33), (33, 2000)):
        top, left, h, w = image.proxy_place(size, SIDE)
        seen = image.proxy(np.full((*size, 3), 255, np.uint8), SIDE).any(-1)
        assert seen[top : top + h, left : left + w].all()
        assert seen.sum() == h * w
