"""VRC as a product: label rules, target rescaling, labelling through any model, learning, what it saves."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervl_jax import compress, image
from hypervl_jax.compress import CompressError, LabelSet
from hypervl_jax.config import VrcConfig, VrcTrainConfig
from hypervl_jax.model import vrc
from hypervl_jax.presets import tiny

GRID = (0.1, 0.25, 0.5, 0.75, 1.0)
HOW = VrcTrainConfig(ratios=GRID, batch=16)

# --- the label rule --------------------------------------------------------------------------------------------------

#        losses at the five ratios          first  suffix
RULES = [
    ([9.0, 5.0, 2.0, 1.0, 1.0], 0.75, 0.75),
    ([1.0, 1.0, 1.0, 1.0, 1.0], 0.1, 0.1),
    ([9.0, 8.0, 7.0, 6.0, 1.0], 1.0, 1.0),
    ([9.0, 1.0, 3.0, 1.0, 1.0], 0.25, 0.75),  # a lucky hit at .25: first falls for it, suffix does not
    ([0.5, 9.0, 0.5, 0.5, 1.0], 0.1, 0.5),  # smaller can be better
    ([9.0, 1.04, 1.06, 1.0, 1.0], 0.25, 0.75),  # either side of the tolerance
]


@pytest.mark.parametrize(("losses", "first", "suffix"), RULES)
def test_label_rules(losses, first, suffix):
    losses = np.array(losses)
    assert compress.label(losses, GRID, 1.05, 0.0, "first") == first
    assert compress.label(losses, GRID, 1.05, 0.0, "suffix") == suffix


def test_rules_apply_along_the_last_axis():
    losses = np.array([row[0] for row in RULES]).reshape(2, 3, 5)
    want = np.array([row[2] for row in RULES]).reshape(2, 3)
    np.testing.assert_array_equal(compress.label(losses, GRID, 1.05, 0.0, "suffix"), want)


def test_the_printed_max_rule_is_degenerate():
    """max{ratio: loss ratio within tolerance}, as the pages about the paper print it, labels everything 1."""
    losses = np.random.default_rng(0).exponential(size=(1000, len(GRID)))
    within = losses / losses[:, -1:] <= 1.05
    assert all(max(np.array(GRID)[row]) == 1.0 for row in within)
    assert 0.1 < np.mean(compress.label(losses, GRID, 1.05, 0.02, "first")) < 0.9


def test_the_floor_forgives_what_nobody_notices():
    losses = np.array([0.5, 0.0011, 0.0010, 0.0010, 0.0010])  # 10 % worse than almost nothing
    assert compress.label(losses, GRID, 1.05, 0.0, "suffix") == 0.5
    assert compress.label(losses, GRID, 1.05, 0.02, "suffix") == 0.25


@given(st.lists(st.floats(0, 20), min_size=5, max_size=5), st.floats(1, 2), st.floats(0, 0.1))
def test_label_properties(losses, tolerance, floor):
    losses = np.array(losses)
    first = compress.label(losses, GRID, tolerance, floor, "first")
    suffix = compress.label(losses, GRID, tolerance, floor, "suffix")
    assert first <= suffix <= 1
    assert compress.label(losses, GRID, tolerance + 0.5, floor, "suffix") <= suffix  # tolerance only ever shrinks
    chosen = losses[GRID.index(suffix) :]
    assert (chosen + floor <= tolerance * (losses[-1] + floor) * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("ratios", "tolerance", "cure"),
    [((0.5, 0.1, 1.0), 1.05, "rise"), ((0.1, 0.5), 1.05, "exactly 1"), ((0.5, 1.0), 0.9, "at least 1")],
)
def test_label_refuses_nonsense(ratios, tolerance, cure):
    with pytest.raises(CompressError, match=cure):
        compress.label(np.ones(len(ratios)), ratios, tolerance, 0.0, "first")


# --- labelling pictures ----------------------------------------------------------------------------------------------


def analytic(need):
    """Losses of a model that answers well from ratio `need` [N] or [N Q] on."""
    return lambda indices, ratio: np.where(ratio >= need[indices], 0.2, 3.0)


def test_label_images_in_batches_reduces_over_questions():
    need = np.array([[0.1, 0.5], [0.25, 0.25], [1.0, 0.1], [np.nan, 0.75]] * 10)

    def loss_at(indices, ratio):
        return np.where(np.isnan(need[indices]), np.nan, analytic(need)(indices, ratio))

    got = compress.label_images(40, loss_at, HOW, progress=False)
    assert got.losses.shape == (40, 2, 5)
    np.testing.assert_array_equal(got.labels, [0.5, 0.25, 1.0, 0.75] * 10)
    mean = compress.label_images(40, loss_at, replace(HOW, reduce="mean"), progress=False, batch=7)
    np.testing.assert_allclose(mean.labels, [0.3, 0.25, 0.55, 0.75] * 10)


def test_the_grid_is_asked_once_a_ratio_and_picture():
    asked = []

    def loss_at(indices, ratio):
        asked.extend((int(i), ratio) for i in indices)
        return np.ones(len(indices))

    compress.label_images(10, loss_at, HOW, progress=False, batch=4)
    assert sorted(asked) == sorted((i, r) for i in range(10) for r in GRID)


def test_questions_that_need_no_picture_are_dropped():
    need = np.array([[0.1, 0.5], [0.1, 0.1], [0.25, 1.0]])
    blind = np.array([[0.21, 4.0], [0.2, 0.21], [4.0, 0.2]])  # 0.2 is the loss at full size
    got = compress.label_images(3, analytic(need), HOW, progress=False, blind=blind)
    np.testing.assert_array_equal(got.labels, [0.5, np.nan, 0.25])
    np.testing.assert_array_equal(got.kept, [True, False, True])
    np.testing.assert_array_equal(np.isnan(got.losses[..., 0]), [[True, False], [True, True], [False, True]])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_named(broken):
    def loss_at(indices, ratio):
        return np.where((indices == 17) & (ratio == 0.5), broken, 1.0)

    with pytest.raises(CompressError, match="number 17"):
        compress.label_images(20, loss_at, HOW, progress=False)


def test_losses_of_the_wrong_shape_are_refused():
    with pytest.raises(CompressError, match=re.escape("found [3]")):
        compress.label_images(20, lambda i, r: np.ones(3), HOW, progress=False)


def test_label_sets_survive_a_file(tmp_path):
    want = compress.label_images(3, analytic(np.array([0.1, 0.5, 1.0])), HOW, progress=False)
    want.save(tmp_path / "labels")
    got = LabelSet.load(tmp_path / "labels")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "shape"])
def test_damaged_label_files_are_refused(tmp_path, damage):
    path = tmp_path / "labels.npz"
    good = compress.label_images(3, analytic(np.array([0.1, 0.5, 1.0])), HOW, progress=False)
    good.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("losses")
    elif damage == "pickle":
        np.savez(path, **good._replace(labels=np.array([{}], dtype=object))._asdict())
    else:
        good._replace(labels=np.ones(2)).save(path)
    with pytest.raises(CompressError, match=re.escape(str(path))):
        LabelSet.load(path)


# --- ratio and target ------------------------------------------------------------------------------------------------


@given(st.sampled_from(["R1", "R2", "none"]), st.floats(0.1, 1), st.tuples(st.integers(1, 9000), st.integers(1, 9000)))
def test_unrescale_inverts_rescale(form, alpha, size):
    cfg = VrcConfig(rescale=form)
    assert compress.unrescale(compress.rescale(alpha, size, cfg), size, cfg) == pytest.approx(alpha, rel=1e-12)


def test_rescale_by_hand():
    size, small = (384 * 3, 384 * 2), (100, 200)
    assert compress.rescale(0.5, size, VrcConfig(rescale="R1")) == 3.0  # six proxies of area
    assert compress.rescale(0.5, size, VrcConfig(rescale="R2")) == 1.5  # three proxies long
    assert compress.rescale(0.5, size, VrcConfig(rescale="none")) == 0.5
    assert compress.rescale(0.5, small, VrcConfig(rescale="R2")) == 0.5  # no larger than the proxy
    both = compress.rescale(np.array([0.5, 0.5]), np.array([size, small]), VrcConfig())
    np.testing.assert_array_equal(both, [1.5, 0.5])


def test_ratios_are_clipped():
    cfg = VrcConfig()
    np.testing.assert_array_equal(compress.unrescale([0.0, 0.01, 0.3, 9.0], (384, 384), cfg), [0.1, 0.1, 0.3, 1.0])
    with pytest.raises(CompressError, match="height, width"):
        compress.rescale(0.5, (0, 10), cfg)


# --- learning --------------------------------------------------------------------------------------------------------

CFG = replace(tiny().model.vrc, hidden=24)  # its own config: compiled functions are cached by it


def pages(rng, n):
    """Pages of small print, which bear no shrinking, and pages of big blobs, which do; u8[n S S 3], ratios [n]."""
    fine = rng.random(n) < 0.5
    cell = np.where(fine, 2, 16)
    dots = rng.random((n, CFG.side, CFG.side)) < 0.5
    at = np.arange(CFG.side) // cell[:, None]
    ink = dots[np.arange(n)[:, None, None], at[:, :, None], at[:, None, :]]
    colour = rng.integers(80, 256, (n, 1, 1, 3))
    return (ink[..., None] * colour).astype(np.uint8), np.where(fine, 0.9, 0.2)


@pytest.fixture(scope="module")
def shallow():
    """A trunk of eight blocks instead of eighteen: every kind is in it, and it compiles in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vrc, "TRUNK", vrc.TRUNK[:7] + vrc.TRUNK[-1:])
        yield


@pytest.fixture(scope="module")
def learned(shallow):
    rng = np.random.default_rng(0)
    proxies, ratios = pages(rng, 256)
    how = VrcTrainConfig(steps=40, batch=16, lr=3e-3)
    params = jax.jit(lambda k: vrc.init(k, CFG))(jax.random.key(0))
    targets = compress.rescale(ratios, (CFG.side, CFG.side), CFG)
    return compress.train(jax.random.key(0), params, proxies, targets, CFG, how, progress=False)


def test_vrc_learns_to_tell_small_print_from_big_blobs(learned):
    params, history = learned
    proxies, ratios = pages(np.random.default_rng(1), 64)
    alpha = compress.predict_proxies(params, CFG, proxies)
    predicted = compress.unrescale(alpha, (CFG.side, CFG.side), CFG)
    constant = np.abs(ratios - ratios.mean()).mean()
    assert np.abs(predicted - ratios).mean() < 0.5 * constant
    assert compress.spearman(predicted, ratios) > 0.7
    assert len(history) == 40
    assert history[-10:].mean() < 0.3 * history[:10].mean()


def test_predict_is_the_proxy_the_network_and_the_inverse(learned):
    params, _ = learned
    rng = np.random.default_rng(2)
    proxies, ratios = pages(rng, 8)
    fine, blobs = proxies[ratios.argmax()], proxies[ratios.argmin()]
    assert compress.predict(params, CFG, fine) > 2 * compress.predict(params, CFG, blobs)
    wide = np.concatenate([fine] * 4, axis=1)  # side 64: four proxies long
    alpha = compress.predict_proxies(params, CFG, image.proxy(wide, CFG.side)[None])
    assert compress.predict(params, CFG, wide) == compress.unrescale(alpha[0], wide.shape[:2], CFG)
    assert compress.predict(params, CFG, fine, scale=10.0) == 1.0
    assert compress.predict(params, CFG, fine, scale=1e-6) == CFG.min_ratio


def test_unusable_training_data_is_refused():
    how = VrcTrainConfig(batch=2)
    proxies, targets = np.zeros((4, CFG.side, CFG.side, 3), np.uint8), np.ones(4)
    for bad in [(proxies[:1], targets[:1]), (proxies[:, 1:], targets), (proxies, targets[1:])]:
        with pytest.raises(CompressError, match="at least one batch"):
            compress.train(jax.random.key(0), {}, *bad, CFG, how, progress=False)
    with pytest.raises(CompressError, match="kept"):
        compress.train(jax.random.key(0), {}, proxies, targets * np.nan, CFG, how, progress=False)


# --- what it bought --------------------------------------------------------------------------------------------------


def bench(n=400):
    """Pictures that need ratio `need`: tokens grow with the ratio, answers are right from `need` on."""
    need = np.random.default_rng(0).choice(GRID, n)
    tokens = np.broadcast_to(np.array(GRID) * 100, (n, len(GRID))).copy()
    return need, tokens, (np.array(GRID) >= need[:, None]).astype(float)


def test_an_oracle_saves_without_loss_and_beats_constants():
    need, tokens, correct = bench()
    got = compress.saving_retention(need, GRID, tokens, correct)
    assert got.retained == 1
    assert got.saved == pytest.approx(1 - need.mean())
    assert got.constant < 0.65


def test_a_constant_is_exactly_as_good_as_the_best_constant():
    _, tokens, correct = bench()
    for ratio in GRID:
        got = compress.saving_retention(np.full(len(tokens), ratio), GRID, tokens, correct)
        assert got.retained <= got.constant + 1e-12
        assert got.saved == pytest.approx(1 - ratio)


def test_a_coin_between_two_constants_is_no_better_than_their_mixture():
    """The baseline may mix too, so randomness alone never looks like skill."""
    _, tokens, correct = bench(20_000)
    coin = np.random.default_rng(1).choice([0.1, 1.0], 20_000)
    got = compress.saving_retention(coin, GRID, tokens, correct)
    assert got.retained <= got.constant + 0.01


def test_predictions_count_as_the_next_ratio_up():
    _, tokens, correct = bench()
    up = compress.saving_retention(np.full(len(tokens), 0.3), GRID, tokens, correct)
    assert up == compress.saving_retention(np.full(len(tokens), 0.5), GRID, tokens, correct)
    with pytest.raises(CompressError, match=re.escape("(0, 1]")):
        compress.saving_retention(np.full(len(tokens), 1.2), GRID, tokens, correct)


def test_calibrate_finds_the_least_factor_that_retains_enough():
    need, tokens, correct = bench()
    scale = compress.calibrate(need * 0.6, GRID, tokens, correct, retain=0.987)
    for factor, enough in ((scale, True), (scale / 1.05, False)):
        predicted = np.minimum(need * 0.6 * factor, 1.0)
        assert (compress.saving_retention(predicted, GRID, tokens, correct).retained >= 0.987) == enough
    with pytest.raises(CompressError, match="no factor"):
        compress.calibrate(np.full(len(need), 0.01), GRID, tokens, correct)


def test_calibrate_passes_over_a_factor_that_passed_by_luck():
    ratios, tokens = (0.25, 0.5, 1.0), np.tile([1.0, 2.0, 4.0], (10, 1))
    correct = np.ones((10, 3))
    correct[:, 1] = 0  # every picture is right at a quarter, none at half
    scale = compress.calibrate(np.full(10, 0.5), ratios, tokens, correct)
    assert 0.5 * scale > 0.5


def test_spearman_by_hand():
    assert compress.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert compress.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert compress.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)  # a tie
    assert compress.spearman([10, 20, 30, 40, 50], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert np.isnan(compress.spearman([1, 2, 3], [1, 1, 1]))


def test_what_vrc_learns_from_is_varied_and_padding_stays_black():
    rng, proxies = np.random.default_rng(0), np.zeros((8, 6, 6, 3), np.uint8)
    proxies[:, :2, :3] = [200, 100, 50]
    got, mirrored = compress.varied(rng, proxies)
    for p, (down, across) in zip(got, mirrored, strict=True):
        assert (p[:2] > 0).any() != down
        assert (p[:, :3] > 0).any() != across
    assert {(p > 0).any(-1).sum() for p in got} == {6}  # as much picture as there was
    assert len({p.tobytes() for p in got}) == 8
    assert got.max() <= 200
    assert (proxies[:, :2, :3] == [200, 100, 50]).all()
