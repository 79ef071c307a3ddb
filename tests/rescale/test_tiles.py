"""Tiled equals whole: every pixel once, no seam, one program a shape, HCD over tiles as HCD over the picture."""

import tracemalloc
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.rescale import hcd, metrics, tiles, weights
from hypervl_jax.rescale.aidn import Aidn
from hypervl_jax.rescale.hcd import Descent, HcdConfig
from hypervl_jax.rescale.irn import Irn, firn
from hypervl_jax.rescale.pairs import Bicubic, Pair
from hypervl_jax.rescale.tiles import LEAST, OVERLAP

STILL = HcdConfig(2, 2, Descent(start="zero", quantise=True), Descent(start="zero"), eps_mode="rms", z="zero")


@dataclass(frozen=True)
class Quiet(Irn):
    """Without noise, so that tiles can be held against the whole to the bit."""

    def up(self, params, lr, key=None):
        return super().up(params, lr, None)


@pytest.fixture(scope="module")
def pair(shaken):
    return Pair(net := Quiet((1,), growth=2), shaken(net))


def smooth(height, width, seed=0):
    """A picture with large and small things in it."""
    rng = np.random.default_rng(seed)
    x = sum(
        np.kron(rng.random((-(-height // n), -(-width // n), 3)), np.ones((n, n, 1)))[:height, :width]
        for n in (1, 4, 16, 64)
    )
    return np.rint(255 * x / 4).astype(np.uint8)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("tile", [LEAST, 200, 384])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (63, 64), (65, 64), (200, 131), (313, 97)])
def test_tiles_cover_every_pixel_once_and_far_from_their_borders(size, tile, scale):
    """No tile sticks out, all are of one size, and what is kept has half an overlap around it where the picture has."""
    seen, shapes = np.zeros(size, int), set()
    for t in tiles.grid(size, scale, tile):
        seen[t.written(1)] += 1
        shapes.add((t.rows[1] - t.rows[0], t.columns[1] - t.columns[0]))
        for n, (start, stop), (first, last) in zip(
            size, (t.rows, t.columns), (t.kept_rows, t.kept_columns), strict=True
        ):
            assert 0 <= start <= first < last <= stop <= n
            assert stop - start <= tile // scale
            assert start == 0 or first - start >= OVERLAP // scale // 2
            assert stop == n or stop - last >= OVERLAP // scale // 2
    assert (seen == 1).all()
    assert len(shapes) == 1


def test_tiles_that_are_all_overlap_are_refused():
    with pytest.raises(ValueError, match="at least 128"):
        tiles.grid((10, 10), 2, LEAST - 1)


def test_a_scale_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match="whole number"):
        tiles.whole_scale(Pair(Aidn(2.5), {}))


def test_down_and_up_equal_the_whole(pair):
    """Within one level, where a tie is rounded the other way: what a tile does not see is too far away to matter."""
    hr = smooth(200, 260)
    small = tiles.down(pair, hr, LEAST)
    whole = metrics.to_u8(np.asarray(pair.down(jnp.asarray(hr[None], jnp.float32) / 255)[0]))
    assert np.abs(small.astype(int) - whole).max() <= 1
    assert (small != whole).mean() < 1e-3
    restored = tiles.up(pair, small, tile=LEAST)
    whole = metrics.to_u8(np.asarray(pair.up(jnp.asarray(small[None], jnp.float32) / 255)[0]))
    assert np.abs(restored.astype(int) - whole).max() <= 1
    assert (restored != whole).mean() < 1e-3


def test_hcd_over_tiles_is_hcd_over_the_picture(pair):
    """Its path, not only its end: norms and budget are those of the whole."""
    hr = smooth(132, 200, seed=1)
    ticks = []
    got = tiles.descend(pair, hr, STILL, tile=LEAST, tick=lambda: ticks.append(1))
    want = metrics.to_u8(np.asarray(hcd.descend(pair, jnp.asarray(hr[None], jnp.float32) / 255, STILL).lr[0]))
    plain = tiles.down(pair, hr, LEAST)
    assert (want != plain).mean() > 0.01
    assert (got != want).mean() < 0.05 * (want != plain).mean()
    assert abs(metrics.psnr(got, plain) - metrics.psnr(want, plain)) < 0.02
    assert len(ticks) == len(tiles.grid((66, 100), 2, LEAST)) * tiles.steps(STILL) > tiles.steps(STILL) == 5


def test_noise_is_of_the_key_and_of_the_tile(tiny_pair):
    lr = np.full((64, 100, 3), 128, np.uint8)
    a, b, c = (tiles.up(tiny_pair, lr, jax.random.key(k), LEAST) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.5
    left, right = a[:, :60], a[:, -60:]
    assert (left != right).mean() > 0.5


def test_a_program_serves_every_picture_of_more_than_a_tile(pair):
    before = tiles._down._cache_size(), tiles._up._cache_size()
    for size in ((130, 140), (200, 260), (1, 300)):
        tiles.up(pair, tiles.down(pair, smooth(*(n + n % 2 for n in size)), LEAST), tile=LEAST)
    used = tiles._down._cache_size() - before[0], tiles._up._cache_size() - before[1]
    assert max(used) <= 2  # whole tiles, and the picture that is thinner than one


def test_memory_is_that_of_the_pictures():
    """On the host, beside the tile: what comes in is there already, what goes out is as large as it must be."""
    pair, peaks = Pair(Bicubic(2), {}), []
    for side in (512, 1024):
        hr = smooth(side, side)
        tiles.down(pair, hr, LEAST)
        tracemalloc.start()
        tiles.down(pair, hr, LEAST)
        peaks.append(tracemalloc.get_traced_memory()[1] - hr.nbytes // 4)
        tracemalloc.stop()
    assert abs(peaks[1] - peaks[0]) < 300_000  # of 2.4 MB more that come in


def test_the_time_is_told_before(pair):
    one = tiles.seconds(pair, (64, 64), replace(STILL, hr_steps=0, lr_steps=1), LEAST)
    assert 0 < one < 60
    assert tiles.seconds(pair, (64, 64), replace(STILL, hr_steps=0, lr_steps=0), LEAST) == 0


def test_steps_count_the_last_look_of_the_best():
    best = replace(STILL, lr=Descent(start="zero", keep="best"))
    assert tiles.steps(best) == 6
    assert tiles.steps(replace(best, hr_steps=0, lr_steps=0)) == 1


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(rescaling):
    from hypervl_jax import image

    pair = weights.load(firn(), rescaling / "weights" / "firn_x4.npz")
    return pair, metrics.modcrop(image.load(rescaling / "Set5" / "bird.png"), 4)[:200, :200]


def test_a_tiled_picture_is_worth_the_whole(real):
    """FIRN x4, within 0.02 dB; the noise is another, so pixels are not."""
    pair, hr = real
    found = []
    for tile in (144, 200):
        small = tiles.down(pair, hr, tile)
        found.append(metrics.psnr(tiles.up(pair, small, tile=tile), hr, 4))
    assert abs(found[0] - found[1]) < 0.02
    assert min(found) > 34


@pytest.mark.slow
def test_tiled_hcd_is_worth_the_whole(real):
    pair, hr = real
    config = HcdConfig(3, 3, eps_mode="rms")
    smalls = [tiles.down(pair, hr), *(tiles.descend(pair, hr, config, tile=t) for t in (144, 200))]
    plain, tiled, whole = (metrics.psnr(tiles.up(pair, small), hr, 4) for small in smalls)
    assert abs(tiled - whole) < 0.02
    assert min(tiled, whole) > plain + 0.3
