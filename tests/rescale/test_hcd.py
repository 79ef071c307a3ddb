"""HCD: the official algorithm's numbers, and what its options promise."""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.rescale import hcd, metrics, pairs, weights
from hypervl_jax.rescale.hcd import Descent, HcdConfig
from hypervl_jax.rescale.irn import firn
from hypervl_jax.rescale.layers import haar
from hypervl_jax.rescale.pairs import Pair, noise, quantise, shrunk

ZERO = HcdConfig(hr=Descent(start="zero", quantise=True), lr=Descent(start="zero"), z="fixed")


# --- the golden trace: FIRN x4 with its real weights, start 0, one given z --------------------------------------------


@pytest.fixture(scope="module")
def trace(golden):
    return golden("firn_x4_butterfly64")


@pytest.fixture(scope="module")
def firn_given(rescaling, trace, given):
    """(pair, picture) of the trace."""
    params = weights.load(firn(), rescaling / "weights" / "firn_x4.npz").params
    pair = Pair(given((8, 8), "light"), {"net": params, "z": jnp.asarray(trace["z"])})
    return pair, jnp.asarray(trace["hr_u8"][None], jnp.float32) / 255


# A sample of the small picture between two 8-bit values sends the loop of the large picture elsewhere. Its course is
# compared while all machines agree on it, five steps; what comes later starts at the official code's pictures.
# (Moving the picture by 1e-7 changes the first five losses by 4e-7, the fifteenth by 3e-3.)
SAME = 5


@pytest.fixture(scope="module")
def whole(firn_given):
    return hcd.descend(*firn_given, ZERO)


@pytest.fixture(scope="module")
def second(firn_given, trace):
    """What the second loop makes of the small picture that the official one began with: {steps: (move, seen)}."""
    pair, hr = firn_given
    scene = hcd.Scene(pair, jnp.asarray(trace["hcd_lr_start"]), hr, jnp.float32(1), pairs.keys(jax.random.key(0), 1))
    return {
        n: hcd._loop(scene, dataclasses.replace(ZERO, lr_steps=n), "lr", "host", hcd.WHOLE.look) for n in (1, 5, 15)
    }


def test_the_first_losses_and_gradients_are_those_of_the_official_loop(whole, trace):
    seen = whole.hr_trace
    np.testing.assert_allclose(seen.loss[:SAME, 0], trace["hcd_hr_loss"][:SAME], rtol=1e-4)
    np.testing.assert_allclose(seen.grad_norm[:SAME, 0], trace["hcd_hr_gradnorm"][:SAME], rtol=5e-3)
    np.testing.assert_allclose(seen.loss[:, 0], trace["hcd_hr_loss"][:15], rtol=1e-2)


@pytest.mark.parametrize("steps", [1, 5, 15])
def test_where_the_official_loop_came_to_loss_and_gradient_are_its_own(firn_given, trace, steps):
    pair, hr = firn_given
    scene = hcd.Scene(pair, hr, hr, jnp.float32(1), pairs.keys(jax.random.key(0), 1))
    loss, grad = hcd.look(scene, hcd.step_of(ZERO, "hr"), "hr", jnp.asarray(trace[f"hcd_hr_delta{steps}"]), steps)
    assert float(loss[0]) == pytest.approx(float(trace["hcd_hr_loss"][steps]), rel=1e-4)
    if steps < 15:
        assert float(jnp.linalg.norm(grad)) == pytest.approx(float(trace["hcd_hr_gradnorm"][steps]), rel=1e-3)


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-4), (5, 1e-2)])
def test_the_large_picture_moves_as_in_the_official_loop(firn_given, trace, close, steps, tolerance):
    pair, hr = firn_given
    moved = hcd.descend(pair, hr, dataclasses.replace(ZERO, hr_steps=steps, lr_steps=0)).hr - hr
    close(moved, trace[f"hcd_hr_delta{steps}"], tolerance)


def test_the_small_picture_is_the_official_one_where_the_large_one_is(firn_given, trace):
    pair, hr = firn_given
    np.testing.assert_allclose(quantise(pair.down(hr + trace["hcd_hr_delta15"])), trace["hcd_lr_start"], atol=1e-6)


def test_the_second_loop_sees_what_the_official_one_saw(second, trace):
    seen = second[15][1]
    np.testing.assert_allclose(seen.loss[:, 0], trace["hcd_lr_loss"][:15], rtol=1e-3)
    np.testing.assert_allclose(seen.grad_norm[:, 0], trace["hcd_lr_gradnorm"], rtol=1e-2)


@pytest.mark.parametrize("steps", [1, 5, 15])
def test_the_small_picture_moves_as_in_the_official_loop(second, trace, steps):
    """In 8 bits: at most one sample in a hundred may have been rounded the other way."""
    start = jnp.asarray(trace["hcd_lr_start"])
    got, want = (quantise(start + x) for x in (second[steps][0], trace[f"hcd_lr_delta{steps}"]))
    off = np.abs(np.asarray(got) - np.asarray(want))
    assert off.max() < 1.01 / 255
    assert (off > 1e-6).mean() <= 0.01


def test_the_restored_picture_is_better_by_as_much_as_the_official_one(firn_given, whole, second, trace):
    pair, hr = firn_given
    up = jax.jit(pair.net.up)
    original = metrics.to_u8(np.asarray(hr[0]))
    plain = hcd.descend(pair, hr, HcdConfig(hr_steps=0, lr_steps=0)).lr
    same = quantise(jnp.asarray(trace["hcd_lr_start"]) + second[15][0])
    restored = {n: metrics.to_u8(np.asarray(up(pair.params, x)[0])) for n, x in (("plain", plain), ("same", same))}
    for measure, name, tolerance in ((metrics.psnr, "psnr", 0.01), (metrics.ssim, "ssim", 1e-3)):
        assert measure(restored["plain"], original, 4) == pytest.approx(trace[f"{name}_y_before"], abs=tolerance)
        assert measure(restored["same"], original, 4) == pytest.approx(trace[f"{name}_y_after"], abs=tolerance)
    own = metrics.to_u8(np.asarray(up(pair.params, whole.lr)[0]))  # 0.66 dB better in the official code
    assert metrics.psnr(own, original, 4) == pytest.approx(trace["psnr_y_after"], abs=0.1)


# --- options, on a network whose numbers can be worked out -----------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """Down: the mean of 2 x 2 cells. Up: every pixel four times, times a weight, plus noise."""

    scale: int = 2

    def init(self, key):
        return {"gain": jnp.float32(0.8)}

    def down(self, params, hr):
        shrunk(hr, self.scale)
        return haar(hr)[..., :3]

    def up(self, params, lr, key=None):
        hr = params["gain"] * lr.repeat(2, 1).repeat(2, 2)
        return hr + 0.1 * noise(key, hr.shape)


PAIR = Pair(Toy(), Toy().init(None))
PLAIN = dataclasses.replace(ZERO, z="zero")


@pytest.fixture(scope="module")
def pictures():
    return jnp.asarray(np.random.default_rng(0).random((3, 6, 8, 3)), jnp.float32)


def oracle(hr, config):
    """The large and the small picture, and the losses, for one image and z = 0; float64, gradients by hand."""
    gain, luma = float(PAIR.params["gain"]), np.array(metrics.LUMA) / 255
    spread = lambda x: x.repeat(2, 0).repeat(2, 1)  # noqa: E731
    fold = lambda x: x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, 3).sum((1, 3))  # noqa: E731
    rounded = lambda x: np.rint(255 * np.clip(x, 0, 1)) / 255  # noqa: E731
    size = 1.0 if config.eps_mode == "absolute" else (hr.shape[0] * hr.shape[1]) ** 0.5 / 256

    def loop(base, target, how, steps, down):
        delta, m, v, losses, seen = np.zeros_like(base), 0, 0, [], []
        for t in range(1, steps + (how.keep == "best") + 1):
            x = fold(base + delta) / 4 if down else base + delta
            error = gain * spread(rounded(x) if how.quantise else x) - target
            loss, slope = {
                hcd.mse: lambda e: ((e**2).mean(), 2 * e / e.size),
                hcd.mae: lambda e: (np.abs(e).mean(), np.sign(e) / e.size),
                hcd.mse_y: lambda e: (((e @ luma) ** 2).mean(), 2 * (e @ luma)[..., None] * luma / (e.size / 3)),
            }[config.loss](error)
            losses.append(loss)
            seen.append(delta)
            g = gain * fold(slope)
            g = spread(g) / 4 if down else g
            if how.optimiser == "adam":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                move, length = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), how.alpha
            elif how.norm == "linf":
                move, length = np.sign(g), how.alpha
            else:
                move, length = g / np.linalg.norm(g), how.alpha * size
            delta = delta - length * move
            if how.norm == "linf":
                delta = np.clip(delta, -how.eps, how.eps)
            else:
                delta = delta * min(1, how.eps * size / np.linalg.norm(delta))
            delta = np.clip(delta, -base, 1 - base)
        return (seen[int(np.argmin(losses))] if how.keep == "best" else delta), losses

    delta, hr_losses = loop(hr, hr, config.hr, config.hr_steps, down=True) if config.hr_steps else (0, [])
    moved = hr + delta
    small = rounded(fold(moved) / 4)
    target = hr if config.target == "original" else moved
    delta, lr_losses = loop(small, target, config.lr, config.lr_steps, down=False) if config.lr_steps else (0, [])
    return moved, rounded(small + delta), hr_losses, lr_losses


def only(**changes):
    """The small picture's loop alone, with a changed step."""
    return dataclasses.replace(PLAIN, hr_steps=0, lr_steps=4, lr=Descent(**({"start": "zero"} | changes)))


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        dataclasses.replace(PLAIN, hr_steps=3, lr_steps=4, eps_mode="rms", target="collaborative"),
        dataclasses.replace(PLAIN, hr_steps=0, lr_steps=3, loss=hcd.mae),
        dataclasses.replace(PLAIN, hr_steps=0, lr_steps=3, loss=hcd.mse_y),
        only(norm="linf", eps=0.05, alpha=0.02),
        only(optimiser="adam", eps=math.inf, alpha=1 / 255),
        only(quantise=True, keep="best", alpha=0.9, eps=2.0),
    ],
    ids=["official", "rms collaborative", "l1", "luma", "linf", "adam", "rounded best"],
)
def test_against_the_algorithm_by_hand(pictures, config):
    got = hcd.descend(PAIR, pictures, config)
    for i, picture in enumerate(np.asarray(pictures, np.float64)):
        hr, lr, hr_losses, lr_losses = oracle(picture, config)
        np.testing.assert_allclose(got.hr[i], hr, atol=2e-5)
        assert np.abs(np.asarray(got.lr[i]) - lr).max() < 1.01 / 255
        assert (np.abs(np.asarray(got.lr[i]) - lr) > 1e-6).mean() < 0.05  # a tie may round the other way
        np.testing.assert_allclose(got.hr_trace.loss[:, i], hr_losses, rtol=1e-3)
        np.testing.assert_allclose(got.lr_trace.loss[:, i], lr_losses, rtol=1e-3)


def test_a_batch_equals_its_images_one_by_one(pictures):
    """Starts, noise, norms and budgets are each image's own."""
    key = jax.random.split(jax.random.key(1), 3)
    config = HcdConfig(hr_steps=2, lr_steps=3)
    together = hcd.descend(PAIR, pictures, config, key)
    for i in range(3):
        alone = hcd.descend(PAIR, pictures[i : i + 1], config, key[i : i + 1])
        np.testing.assert_allclose(together.hr[i], alone.hr[0], atol=1e-6)
        np.testing.assert_allclose(together.lr[i], alone.lr[0], atol=1e-6)
        np.testing.assert_allclose(together.lr_trace.loss[:, i], alone.lr_trace.loss[:, 0], rtol=1e-5)


def test_keys_are_one_or_one_an_image_new_or_old(pictures):
    new, old = jax.random.key(7), jax.random.PRNGKey(7)
    np.testing.assert_array_equal(noise(new, (3, 2)), noise(old, (3, 2)))
    np.testing.assert_array_equal(noise(new, (3, 2)), noise(jax.random.split(old, 3), (3, 2)))
    with pytest.raises(ValueError, match="2 keys for 3 images"):
        hcd.descend(PAIR, pictures, HcdConfig(), jax.random.split(new, 2))


def test_drivers_agree_and_the_whole_is_one_program(pictures):
    config = HcdConfig(hr_steps=2, lr_steps=3, patience=2)
    key = jax.random.key(3)
    host = hcd.descend(PAIR, pictures, config, key, driver="host")
    jitted = jax.jit(lambda pair, hr: hcd.descend(pair, hr, config, key))(PAIR, pictures)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), host, jitted)


def test_vmap_over_pairs_of_one_network(pictures):
    """Weights are an argument as any other."""
    gains = jnp.array([0.5, 0.8])
    many = jax.vmap(lambda g: hcd.descend(Pair(Toy(), {"gain": g}), pictures, PLAIN, driver="scan").hr)(gains)
    np.testing.assert_allclose(many[1], hcd.descend(PAIR, pictures, PLAIN).hr, atol=1e-5)
    assert np.abs(np.asarray(many[0] - many[1])).max() > 1e-3


def test_it_can_be_differentiated(pictures):
    config = dataclasses.replace(PLAIN, hr_steps=2, lr_steps=2)

    def loss(gain):
        hr = hcd.descend(Pair(Toy(), {"gain": gain}), pictures, config).hr
        return (hr - pictures).sum()  # small: no digits are lost

    at, step = jnp.float32(0.8), 1e-2
    numeric = (loss(at + step) - loss(at - step)) / (2 * step)
    assert jax.grad(loss)(at) == pytest.approx(float(numeric), rel=0.1)


def test_the_budget_holds(pictures):
    for seed in range(3):
        out = hcd.descend(PAIR, pictures, HcdConfig(hr_steps=5, lr_steps=0), jax.random.key(seed))
        assert np.linalg.norm(np.asarray(out.hr - pictures).reshape(3, -1), axis=1).max() <= 0.3 + 1e-5
        assert 0 <= out.hr.min() <= out.hr.max() <= 1


def test_the_random_start_is_inside_the_budget_and_differs(pictures):
    tiny = HcdConfig(hr_steps=1, lr_steps=0, hr=Descent(alpha=1e-9, quantise=True))
    a, b = (np.asarray(hcd.descend(PAIR, pictures, tiny, jax.random.key(i)).hr - pictures) for i in (0, 1))
    lengths = np.linalg.norm(a.reshape(3, -1), axis=1)
    assert (lengths > 1e-4).all()
    assert (lengths <= 0.3 + 1e-5).all()
    assert np.ptp(lengths) > 1e-3
    assert np.abs(a - b).max() > 1e-3


def test_the_rms_budget_is_the_same_for_every_size():
    def moved(side):
        hr = jnp.full((1, side, side, 3), 0.5)
        config = dataclasses.replace(PLAIN, hr_steps=8, lr_steps=0, eps_mode="rms")
        return float(jnp.sqrt(((hcd.descend(PAIR, hr, config).hr - hr) ** 2).mean()))

    assert moved(4) == pytest.approx(moved(16), rel=1e-3)
    assert moved(16) == pytest.approx(0.3 / (3 * 256**2) ** 0.5, rel=1e-3)


def test_no_steps_is_the_plain_small_picture(pictures):
    out = hcd.descend(PAIR, pictures, HcdConfig(hr_steps=0, lr_steps=0))
    np.testing.assert_array_equal(out.lr, quantise(PAIR.down(pictures)))
    np.testing.assert_array_equal(out.hr, pictures)
    assert out.hr_trace.loss.shape == (0, 3)


def test_the_result_has_eight_bits(pictures):
    lr = 255 * np.asarray(hcd.descend(PAIR, pictures).lr)
    np.testing.assert_allclose(lr, np.rint(lr), atol=1e-4)


def test_fixed_noise_is_what_up_draws_from_the_same_key(pictures):
    """A descent by almost nothing, whose last loss is that of restoring its own result."""
    key = jax.random.split(jax.random.key(5), 3)
    config = dataclasses.replace(ZERO, hr_steps=0, lr_steps=2, lr=Descent(alpha=1e-9, start="zero"))
    out = hcd.descend(PAIR, pictures, config, key)
    np.testing.assert_allclose(out.lr_trace.loss[-1], hcd.mse(PAIR.up(out.lr, key), pictures), rtol=1e-4)
    fresh = hcd.descend(PAIR, pictures, dataclasses.replace(config, z="fresh"), key).lr_trace.loss
    assert np.abs(np.asarray(fresh[0] - fresh[1])).min() > 1e-6


def test_an_image_rests_after_its_patience(pictures):
    """Steps as long as the budget overshoot at once: the loss rises, and the loop ends before its steps are over."""
    config = only(alpha=3.0, eps=3.0)
    config = dataclasses.replace(config, lr_steps=50, patience=3)
    out = hcd.descend(PAIR, pictures, config)
    assert len(out.lr_trace.loss) < 50
    scanned = hcd.descend(PAIR, pictures, config, driver="scan")
    assert len(scanned.lr_trace.loss) == 50
    assert np.isnan(np.asarray(scanned.lr_trace.loss[-1])).all()
    np.testing.assert_allclose(scanned.lr, out.lr, atol=1e-6)


def test_a_loss_of_ones_own(pictures):
    """Restoring the left half alone leaves the right half as it was."""
    left = lambda a, b: ((a - b)[:, :, :4] ** 2).mean((1, 2, 3))  # noqa: E731
    out = hcd.descend(PAIR, pictures, dataclasses.replace(PLAIN, loss=left))
    np.testing.assert_array_equal(out.hr[:, :, 4:], pictures[:, :, 4:])
    assert np.abs(np.asarray(out.hr - pictures)[:, :, :4]).max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Descent(eps=0.0), "must be above 0"),
        (lambda: Descent(alpha=math.inf), "alpha finite"),
        (lambda: Descent(eps=math.inf), 'choose start "zero"'),
        (lambda: HcdConfig(lr_steps=-1), "at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="no multiple of 2"):
        hcd.descend(PAIR, jnp.zeros((1, 3, 4, 3)))
