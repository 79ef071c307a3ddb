"""Training of a pair: its losses against the official code, its step against Adam by hand, runs that stop and go on."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain", reason="needs the train extra")

from hypervl_jax import config
from hypervl_jax.config import ConfigError, ScreensConfig
from hypervl_jax.data import screens
from hypervl_jax.data.assets import Assets
from hypervl_jax.rescale import evaluate, metrics, train, weights
from hypervl_jax.rescale.irn import Irn
from hypervl_jax.rescale.photographs import batches
from hypervl_jax.rescale.train import PairConfig, PairTrain
from hypervl_jax.runs import TrainError
from hypervl_jax.watch import QUIET, Stopped, Watch

ROOT = Path(__file__).parents[2]
TINY = PairConfig("test", Irn((1,), growth=2), PairTrain(4, 2, 16, lr=1e-3, halve_at=(2,), log_every=1, save_every=2))


class Memory:
    """A `Source` of smooth pictures with edges."""

    def __init__(self, n=3):
        rng = np.random.default_rng(0)
        blocks = (rng.integers(0, 256, (6, 6, 3)).astype(np.uint8) for _ in range(n))
        self.pictures = [np.kron(b, np.ones((7, 7, 1), np.uint8)) for b in blocks]
        self.sizes = np.array([p.shape[:2] for p in self.pictures])

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index]


def with_train(cfg, **changes):
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **changes))


# --- losses and step -------------------------------------------------------------------------------------------------


def test_losses_and_gradients_are_the_official_ones(golden):
    """The published recipe at x4: three terms, and the gradient norm of every parameter."""

    class Given(Irn):
        def up(self, params, lr, key=None):
            return self.inverse(params, jnp.concatenate([lr, jnp.asarray(g["z"])], -1))

    g, want = golden("irn_tiny_x4_blocks22_gc8"), golden("irn_tiny_train_step")
    net = Given((2, 2), growth=8)
    params = weights.fit(net, {k[2:]: v for k, v in g.items() if k.startswith("w/")}, "golden")
    how = train.published(4).train
    gradient = jax.jit(jax.grad(train.losses, has_aux=True), static_argnums=(1, 2))
    grads, told = gradient(params, net, how, jnp.asarray(g["hr"]), jnp.asarray(want["lr_ref"]))
    terms = [told[f"loss_{k}"] for k in ("guide", "latent", "restore")]
    np.testing.assert_allclose(terms, [want["l_fit"], want["l_ce"], want["l_back"]], rtol=1e-5)
    norms = {".".join(p.key for p in path): jnp.linalg.norm(x) for path, x in jax.tree.leaves_with_path(grads)}
    named = {k[2:]: v for k, v in want.items() if k.startswith("g/")}
    assert norms.keys() == named.keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, named[name], rtol=1e-3, err_msg=name)


def test_a_step_is_pytorchs_adam_by_hand():
    """Clipping, then decay added to the gradient, then Adam at a rate that is halved: float64, from the gradients."""
    t = dataclasses.replace(TINY.train, clip=0.5, weight_decay=0.1, halve_at=(1,))
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    opt, (m, v) = train.transform(t).init(state), (dict.fromkeys(params, 0.0) for _ in range(2))
    for step in range(3):
        grads = {k: rng.normal(size=x.shape) for k, x in params.items()}
        moved, opt = train.transform(t).update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), opt, state)
        lr = train.rate(t, step)
        state = jax.tree.map(lambda p, s, lr=lr: p - lr * s, state, moved)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k in params:
            g = grads[k] * min(1, t.clip / norm) + t.weight_decay * params[k]
            m[k], v[k] = t.b1 * m[k] + (1 - t.b1) * g, t.b2 * v[k] + (1 - t.b2) * g * g
            steps = step + 1
            move = m[k] / (1 - t.b1**steps) / (np.sqrt(v[k] / (1 - t.b2**steps)) + 1e-8)
            params[k] = params[k] - t.lr * (0.5 if step >= 1 else 1) * move
    for k in params:
        np.testing.assert_allclose(state[k], params[k], rtol=1e-5)


def test_the_rate_is_halved_where_it_is_said():
    t = train.published(2).train
    steps = (0, 99_999, 100_000, 250_000, 400_000, 499_999)
    np.testing.assert_allclose([train.rate(t, s) for s in steps], 2e-4 / np.array([1, 1, 2, 4, 16, 16]), rtol=1e-6)
    assert train.rate(dataclasses.replace(t, halve_at=()), 10) == np.float32(2e-4)


def test_noise_is_what_the_network_says(shaken):
    """Without noise a key draws nothing; half of it is half as far from the likeliest."""
    nets = {n: Irn((1,), growth=2, noise=n) for n in (0.0, 0.5, 1.0)}
    params, lr = shaken(nets[1.0]), jnp.full((1, 4, 4, 3), 0.5)
    up = {n: net.up(params, lr, jax.random.key(1)) for n, net in nets.items()}
    likeliest = nets[1.0].up(params, lr, None)
    np.testing.assert_array_equal(up[0.0], likeliest)
    assert np.abs(up[0.5] - likeliest).max() > 1e-3
    assert (up[0.5] != up[1.0]).any()


def test_gain_is_above_bicubic(shaken):
    """Of fresh weights by hand: means of 2 x 2 pixels both ways, against bicubic both ways."""
    source = Memory()
    crops = next(batches(source, 2, 16, 2, 0, 1))
    state = train.init_state(TINY)
    net = dataclasses.replace(TINY.net, noise=0.0)
    _, told = jax.jit(train.train_step, static_argnums=3)(
        state, crops.hr, crops.small, dataclasses.replace(TINY, net=net)
    )
    hr = crops.hr / 255
    small = np.round(hr.reshape(2, 8, 2, 8, 2, 3).mean((2, 4)) * 255) / 255
    psnr = -10 * np.log10(((small.repeat(2, 1).repeat(2, 2) - hr) ** 2).mean())
    assert told["psnr"] == pytest.approx(psnr, abs=0.01)
    from hypervl_jax.rescale.resample import bicubic_f32

    plain = np.clip(bicubic_f32(jnp.asarray(crops.small, jnp.float32) / 255, (16, 16)), 0, 1)
    assert told["gain"] == pytest.approx(psnr + 10 * np.log10(((plain - hr) ** 2).mean()), abs=0.01)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps without a stop."""
    out = tmp_path_factory.mktemp("whole")
    return train.run(TINY, Memory(), out, QUIET), out


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def rows(out):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in found]


def test_it_learns_and_writes_what_it_learnt(whole):
    pair, out = whole
    found = weights.recognise(out / "pair.npz")
    assert found.net == TINY.net
    same(found, pair)
    start = train.init_state(TINY).params
    assert any(
        (np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(pair.params), strict=True)
    )
    said = rows(out)
    assert [r["step"] for r in said] == [0, 1, 2, 3]
    assert {"loss_guide", "loss_latent", "loss_restore", "psnr", "gain", "grad_norm", "lr"} <= said[0].keys()
    assert [r["lr"] for r in said] == [np.float32(x) for x in (1e-3, 1e-3, 5e-4, 5e-4)]


def test_two_steps_and_two_more_are_four(whole, tmp_path):
    pair, out = whole
    train.run(with_train(TINY, steps=2), Memory(), tmp_path, QUIET)
    same(train.run(TINY, Memory(), tmp_path, QUIET), pair)
    assert rows(tmp_path) == rows(out)


def test_told_to_stop_it_saves_and_goes_on(whole, tmp_path):
    with pytest.raises(Stopped, match="--max-hours at step 1 of 4; it is saved") as stopped:
        train.run(TINY, Memory(), tmp_path, Watch(progress=False, stop_at=0.0))
    assert stopped.value.exit_code == 75
    assert not (tmp_path / "pair.npz").exists()
    same(train.run(TINY, Memory(), tmp_path, QUIET), whole[0])


def test_a_run_may_change_its_form(whole, tmp_path):
    """As one does that goes on from a CPU's checkpoint in the form that papers have; the same but for rounding."""
    train.run(with_train(TINY, steps=2), Memory(), tmp_path, QUIET)
    plain = dataclasses.replace(TINY, net=dataclasses.replace(TINY.net, form="plain"))
    pair = train.run(plain, Memory(), tmp_path, QUIET)
    for a, b in zip(jax.tree.leaves(pair.params), jax.tree.leaves(whole[0].params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_finished_run_is_left_as_it_is(whole):
    pair, out = whole
    same(train.run(TINY, Memory(), out, QUIET), pair)
    assert len(rows(out)) == 4


@pytest.mark.parametrize(
    ("cfg", "source", "message"),
    [
        (with_train(TINY, lr=2e-3), Memory(), r"train\.lr was 0\.001, is 0\.002"),
        (TINY, Memory(2), "pictures was 3, is 2"),
    ],
)
def test_another_run_is_refused(cfg, source, message, whole):
    before = {p: p.stat().st_mtime_ns for p in whole[1].rglob("*")}
    with pytest.raises(TrainError, match=message):
        train.run(cfg, source, whole[1], QUIET)
    assert {p: p.stat().st_mtime_ns for p in whole[1].rglob("*")} == before


def test_what_is_not_finite_stops_it_and_what_was_saved_stays(tmp_path, monkeypatch):
    plain = train.compiled(TINY)

    def broken(cfg):
        def step(state, hr, small):
            state, told = plain(state, hr, small)
            return state, told | ({"loss_guide": jnp.float32(np.nan)} if int(state.step) == 4 else {})

        return step

    monkeypatch.setattr(train, "compiled", broken)
    with pytest.raises(TrainError, match=r"step 3: loss_guide not finite; begin anew with a lower train\.lr"):
        train.run(TINY, Memory(), tmp_path, QUIET)
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert not (tmp_path / "pair.npz").exists()


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_preset_is_a_value_that_json_holds(name):
    cfg = train.preset(name)
    assert cfg.name == name
    assert config.from_dict(PairConfig, config.to_dict(cfg)) == cfg


@pytest.mark.parametrize("scale", [2, 4])
def test_the_light_pairs_that_ship(scale):
    """They are what the recipe gave, small, and restore a screen of things and letters they never saw."""
    file = weights.SHIPPED / f"light_x{scale}.npz"
    told = json.loads((ROOT / "benchmarks" / "results" / f"light_x{scale}-training.json").read_text())
    pair = weights.recognise(file)
    assert weights.fingerprint(pair) == told["weights"]
    assert config.from_dict(PairConfig, told["config"]) == train.light(scale)
    assert pair.net == train.light(scale).net
    assert file.stat().st_size == told["bytes"] < 700_000
    shape = ScreensConfig(min_side=128, max_side=128, max_area=128**2)
    hr = screens.record(Assets.load(), shape, "test_unseen", 0).image
    small = metrics.to_u8(np.asarray(pair.down(jnp.asarray(hr[None], jnp.float32) / 255)))
    restored = metrics.to_u8(np.asarray(pair.up(jnp.asarray(small, jnp.float32) / 255)))[0]
    plain = evaluate.both_ways(hr, scale)
    assert metrics.psnr(restored, hr, scale) > metrics.psnr(plain.restored, hr, scale) + 3
    assert metrics.psnr(small[0], plain.small) > 30  # it is a picture, not a code


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_train(TINY, crop=15), "crop 15 must be a multiple of the scale 2"),
        (lambda: with_train(TINY, steps=0), "steps must be at least 1"),
        (lambda: with_train(TINY, lr=0.0), "lr and clip must be above 0"),
        (lambda: PairConfig("x", Irn(())), "must be at least 1"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_preset_that_is_none():
    with pytest.raises(ConfigError, match="choose hcd_x2, hcd_x4, light_x2"):
        train.preset("large_x2")
