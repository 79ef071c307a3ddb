"""Ways of making the small picture, their figures, and the picture of all of them."""

import numpy as np
import pytest

from hypervl_jax.rescale import compare, evaluate, metrics, tiles
from hypervl_jax.rescale.evaluate import Outcome
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.pairs import Bicubic, Pair

PAIR = Pair(Bicubic(2), {})
RNG = np.random.default_rng(0)


def test_ways_are_those_there_are_steps_for():
    def names(*steps):
        return list(evaluate.ways(HcdConfig(*steps)))

    assert names(15, 15) == ["plain", "LR15", "HR15+LR15"]
    assert names(0, 5) == ["plain", "LR5"]
    assert names(3, 0) == ["plain", "HR3"]
    assert names(0, 0) == list(evaluate.ways(None)) == ["plain"]
    assert evaluate.ways(HcdConfig(2, 3))["LR3"] == HcdConfig(0, 3)


def test_outcomes_are_what_tiles_give_and_walks_are_counted():
    hr = RNG.integers(0, 256, (40, 36, 3), np.uint8)
    some, ticks = evaluate.ways(HcdConfig(0, 2)), []
    found = evaluate.outcomes(PAIR, hr, some, tick=lambda: ticks.append(1))
    assert len(ticks) == (1 + 1) + (1 + 2 + 1)  # down, up; shrunk, two steps, up
    np.testing.assert_array_equal(found["plain"].small, tiles.down(PAIR, hr))
    np.testing.assert_array_equal(found["LR2"].restored, tiles.up(PAIR, found["LR2"].small))
    rows = evaluate.figures(hr, found, 2)
    assert rows["plain"]["psnr_y"] == metrics.psnr(found["plain"].restored, hr, 2)
    assert rows["LR2"]["lr_psnr"] == metrics.psnr(found["LR2"].small, found["plain"].small, channel="rgb")
    twice = {way: {k: 3 * v for k, v in row.items()} for way, row in rows.items()}
    assert evaluate.means([rows, twice])["LR2"]["ssim_y"] == pytest.approx(2 * rows["LR2"]["ssim_y"])


def test_a_line_has_its_numbers():
    rows = {"plain": {"psnr_y": 31.23456, "ssim_y": 0.91239}, "LR1": {"psnr_y": 32.5, "ssim_y": 0.95}}
    assert evaluate.line("a" * 30, rows).split() == ["a" * 24, "31.235", "0.9124", "32.500", "0.9500"]
    assert len(evaluate.line("", rows)) == len(evaluate.heading(rows))


@pytest.mark.parametrize(("size", "at"), [((100, 200), (150, 80)), ((100, 200), (0, 0)), ((100, 200), (199, 99))])
def test_the_part_is_around_the_point_and_inside(size, at):
    rows, columns = compare.part(np.zeros(size, np.float32), at)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (64, 64)
    assert 0 <= rows.start <= at[1] < rows.stop <= 100
    assert 0 <= columns.start <= at[0] < columns.stop <= 200


def test_the_part_is_where_it_is_most_wrong():
    error = np.zeros((150, 300), np.float32)
    error[90:100, 200:215] = 1
    rows, columns = compare.part(error, None)
    assert rows.start <= 90 < 100 <= rows.stop
    assert columns.start <= 200 < 215 <= columns.stop
    rows, columns = compare.part(error[:20, :300], None)
    assert rows == slice(0, 20)


def test_the_drawing_shows_every_way_and_what_is_wrong_with_it():
    hr = np.full((96, 128, 3), 90, np.uint8)
    wrong = hr.copy()
    wrong[60:70, 100:110] += 50
    found = {"plain": Outcome(hr[::2, ::2], wrong), "better": Outcome(hr[::2, ::2], hr)}
    rows = {way: {"psnr_y": 30.0, "ssim_y": 0.9} for way in found}
    drawn = compare.draw(hr, found, rows)
    assert drawn.shape[1] == 3 * compare.WIDTH + 2 * (compare.GAP + compare.MARGIN)
    _, plain, better = (
        drawn[:, compare.MARGIN + i * (compare.WIDTH + compare.GAP) :][:, : compare.WIDTH] for i in range(3)
    )
    below = plain.shape[0] // 2  # the lower half has the maps of errors
    assert (plain[below:] == 255).all(-1).sum() > (better[below:] == 255).all(-1).sum()  # white on black
    assert (drawn == compare.FRAME).all(-1).any()


@pytest.mark.parametrize("size", [(24, 40_000), (40_000, 140)])
def test_a_part_of_less_than_a_pixel_of_the_whole_is_marked(size):
    hr = np.full((*size, 3), 90, np.uint8)
    found, rows = {"plain": Outcome(hr[::2, ::2], hr)}, {"plain": {"psnr_y": np.inf, "ssim_y": 1.0}}
    for at in ((0, 0), (size[1] // 2, size[0] // 2), (size[1] - 1, size[0] - 1)):
        assert (compare.draw(hr, found, rows, at) == compare.FRAME).all(-1).any()


def test_a_grey_map_needs_no_error():
    hr = np.full((20, 20, 3), 90, np.uint8)
    row = {"psnr_y": np.inf, "ssim_y": 1.0}
    drawn = compare.draw(hr, {"plain": Outcome(hr[::2, ::2], hr)}, {"plain": row})
    assert drawn.dtype == np.uint8
