"""Training: what each job moves, where gradients go, resuming bit for bit, stopping when the loss is not finite."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import checkpoint, losses, tensors, train, watch
from hypervl_jax.checkpoint import CheckpointError
from hypervl_jax.config import BRANCHES, ConfigError, Rule
from hypervl_jax.data import feeds, pipeline, sheets
from hypervl_jax.model import hypervl
from hypervl_jax.train import Job, TrainError
from hypervl_jax.watch import QUIET

NAMES, LARGE, BASE = Job(BRANCHES, stage0=True), Job(("large",)), Job(("base",))


@pytest.fixture(scope="module")
def cfg(tiny_config):
    """Four steps, stage 0, Large, Base, Large, in one bucket, so that there are three programs to compile."""
    return replace(
        tiny_config,
        data=replace(tiny_config.data, tile_buckets=(5,), lengths=(128,)),
        train=replace(tiny_config.train, steps=4, stage0_steps=1, save_every=2, log_every=1),
    )


@pytest.fixture(scope="module")
def run(cfg, tiny_source, tiny_sheets, tiny_tokenizer, tiny_classes):
    def run(out, cfg=cfg, classes=tiny_classes, watch=QUIET, change=lambda feed: feed):
        feed = feeds.Screens(cfg, tiny_source, tiny_sheets, tiny_tokenizer, classes)
        return train.run(cfg, change(feed), out, watch)

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """(folder, last state) of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


@pytest.fixture(scope="module")
def batch(cfg, tiny_source, tiny_tokenizer, tiny_classes):
    rest = cfg.model.policy, cfg.model.text, tiny_tokenizer, tiny_classes
    return jax.tree.map(jnp.asarray, next(pipeline.batches(tiny_source, cfg.data, *rest, seed=5, steps=1)))


@pytest.fixture(scope="module")
def sheet(cfg, tiny_sheets, tiny_tokenizer, tiny_classes):
    """A batch of stage 0."""
    rest = cfg.model.policy, cfg.model.text, tiny_tokenizer, tiny_classes
    things = sheets.most(cfg.data.screens.sheet_side)
    return next(pipeline.batches(tiny_sheets, cfg.data, *rest, seed=5, steps=1, things=things))


@pytest.fixture(scope="module")
def step(whole, cfg, batch, sheet):
    """Job -> (state before, state after, metrics), from the last state of the undisturbed run."""
    start = jax.tree.map(np.asarray, whole[1])

    def step(job, cfg=cfg):
        state = jax.device_put(start, jax.devices()[0])
        after, metrics = train.compiled(cfg)(state, sheet if job.stage0 else batch, job)
        return start, jax.tree.map(np.asarray, after), {k: float(v) for k, v in metrics.items()}

    return step


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


def moved(before, after):
    """Groups whose weights changed, and groups whose optimiser state changed."""
    return tuple(
        {g for g in before.params if not equal(getattr(before, part)[g], getattr(after, part)[g])}
        for part in ("params", "opt")
    )


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- resuming --------------------------------------------------------------------------------------------------------


class PowerCut(Exception):
    pass


def test_two_steps_saved_and_two_resumed_are_four_bit_for_bit(whole, run, cfg, tmp_path, monkeypatch):
    """The run dies in its third step, after the checkpoint of the second."""
    compiled = train.compiled

    def dies(cfg, grid):
        step = compiled(cfg, grid)

        def takes(state, batch, job):
            if int(state.step) == 2:
                raise PowerCut
            return step(state, batch, job)

        return takes

    with monkeypatch.context() as patched:
        patched.setattr(train, "compiled", dies)
        with pytest.raises(PowerCut):
            run(tmp_path)
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").latest() == 2
    with (tmp_path / "log.jsonl").open("a") as f:  # of a step that is not in the checkpoint, and of one cut short
        f.write('{"step": 2, "loss_base": 1.0}\n{"step": 3, "lo')
    state = run(tmp_path)
    assert int(state.step) == 4
    assert equal(state, whole[1])
    for a, b in zip(log(whole[0]), log(tmp_path), strict=True):
        assert {k: v for k, v in a.items() if k != "time"} == {k: v for k, v in b.items() if k != "time"}


def test_a_finished_run_is_not_trained_again(whole, run):
    lines = (whole[0] / "log.jsonl").read_text()
    assert equal(run(whole[0]), whole[1])
    assert (whole[0] / "log.jsonl").read_text() == lines


def test_the_log_has_a_line_a_step_with_the_parts_of_its_job(whole):
    lines = log(whole[0])
    always = {"step", "time", "grad_norm", "lr", "tokens"}
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert set(lines[0]) == always | {f"{k}_{b}" for k in ("name", "word", "cell") for b in BRANCHES}
    assert set(lines[1]) == set(lines[3]) == always | {"name_large", "word_large", "cell_large", "loss_large"}
    assert set(lines[2]) == always | {"name_base", "word_base", "cell_base", "loss_base", "kl"}


def test_a_folder_of_other_settings_is_refused(whole, run, cfg):
    with pytest.raises(TrainError, match=r"other settings \(config\.train\.lr was 0\.001, is 0\.5\)"):
        run(whole[0], cfg=replace(cfg, train=replace(cfg.train, lr=0.5)))
    with pytest.raises(TrainError, match=r"other settings \(classes was \['.*\], is \['cat'\]\)"):
        run(whole[0], classes=("cat",))


def test_a_run_goes_on_when_only_settings_of_vrc_changed(whole, run, cfg):
    run(whole[0], cfg=replace(cfg, vrc=replace(cfg.vrc, steps=cfg.vrc.steps + 1)))


def test_a_run_older_than_a_setting_goes_on(whole, run):
    file = whole[0] / "train.json"
    settings = json.loads(file.read_text())
    del settings["config"]["model"]["llm"]["qk_norm"]
    file.write_text(json.dumps(settings))
    run(whole[0])


# --- what is not finite ----------------------------------------------------------------------------------------------


class Spoilt:
    """A feed whose batch of one step holds what is no number."""

    def __init__(self, feed, at):
        self.feed, self.at = feed, at

    def __getattr__(self, name):
        return getattr(self.feed, name)

    def batches(self, start, rows=None):
        for step, batch in enumerate(self.feed.batches(start, rows), start):
            yield batch._replace(weights=batch.weights * np.nan) if step == self.at else batch


def test_weights_that_are_not_finite_are_never_saved(run, cfg, tmp_path, monkeypatch):
    fresh = train.init_state

    def poisoned(*how):
        state = fresh(*how)
        state.params["large"]["vit"]["norm"]["bias"] *= jnp.nan
        return state

    monkeypatch.setattr(train, "init_state", poisoned)
    with pytest.raises(CheckpointError, match=r"2: not finite: params\.large\.vit\.norm\.bias; it is not written"):
        run(tmp_path, replace(cfg, train=replace(cfg.train, skips=9)))
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").latest() is None


@pytest.fixture(scope="module")
def lenient(cfg):
    return replace(cfg, train=replace(cfg.train, skips=1))


def test_a_step_that_is_not_finite_moves_nothing_but_its_count(lenient, whole, sheet):
    start = jax.tree.map(np.asarray, whole[1])
    spoilt = sheet._replace(weights=sheet.weights * np.nan)
    after, metrics = train.compiled(lenient)(jax.device_put(start, jax.devices()[0]), spoilt, NAMES)
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert equal(after.params, start.params)
    assert equal(after.opt, start.opt)
    assert int(after.step) == int(start.step) + 1


def test_a_guarded_step_is_the_step(lenient, step):
    """But for rounding, which is why steps are not guarded unless asked: runs that exist go on bit for bit."""
    _, want, parts = step(NAMES)
    _, after, metrics = step(NAMES, lenient)
    close(after.params, want.params)
    assert metrics == pytest.approx(parts, rel=1e-5)


def test_a_step_that_is_not_finite_is_passed_over_and_said(run, lenient, tmp_path, capsys):
    state = run(tmp_path, lenient, change=lambda feed: Spoilt(feed, 0))
    assert int(state.step) == 4
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    first, *rest = [json.loads(s, parse_constant=pytest.fail) for s in lines]
    assert first["skipped"] is True
    assert not any("skipped" in row for row in rest)
    assert "step 0: " in capsys.readouterr().err
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_too_many_steps_that_are_not_finite_stop_the_run_and_leave_the_batch(run, cfg, sheet, tmp_path):
    assert cfg.train.skips == 0
    with pytest.raises(TrainError, match=r"step 0: .* in 1 of the last 100 steps; .*not-finite-0\.npz"):
        run(tmp_path, change=lambda feed: Spoilt(feed, 0))
    at, batch, shown = watch.load_batch(tmp_path / "not-finite-0.npz")
    assert at == 0
    assert np.isnan(batch.weights).any()
    assert batch.tiles.shape == sheet.tiles.shape
    assert [s.split()[0] for s in shown] == ["sheet"] * len(batch.tiles)


# --- what a job moves ------------------------------------------------------------------------------------------------


def test_a_large_step_leaves_base_bit_equal(step):
    before, after, _ = step(LARGE)
    assert moved(before, after) == ({"large", "llm", "names_large"},) * 2


def test_a_base_step_leaves_large_bit_equal(step):
    before, after, metrics = step(BASE)
    assert moved(before, after) == ({"base", "llm", "names_base"},) * 2
    assert metrics["kl"] > 0


def test_stage_0_leaves_the_decoder_bit_equal(step):
    before, after, _ = step(NAMES)
    assert moved(before, after) == ({"base", "large", "names_base", "names_large"},) * 2


def test_teacher_only_leaves_the_decoder_bit_equal_on_base_steps(step, cfg):
    frozen = replace(cfg, dcl=replace(cfg.dcl, llm_train="teacher_only"))
    before, after, _ = step(BASE, frozen)
    assert moved(before, after) == ({"base", "names_base"},) * 2
    assert "llm" in train.groups(frozen, LARGE)


def test_without_its_terms_nothing_is_left_of_names_and_kl(cfg, whole, batch):
    bare = replace(cfg, train=replace(cfg.train, name_weight=0.0), dcl=replace(cfg.dcl, weight=0.0))
    assert train.groups(bare, BASE) == ("base", "llm")
    params = jax.tree.map(jnp.asarray, whole[1].params)
    _, parts = jax.eval_shape(lambda p: train.loss_fn(p, {}, bare, Job(BRANCHES), batch), params)
    assert set(parts) == {"loss_base", "loss_large"}


def test_every_weight_of_a_moving_group_moves(step):
    before, after, _ = step(LARGE)
    for group in ("large", "llm"):
        old = tensors.flatten(before.params[group])
        still = {k for k, v in tensors.flatten(after.params[group]).items() if (v == old[k]).all()}
        assert still <= {"vit.blocks.layers.k.bias"}  # softmax does not feel it


# --- where gradients go ----------------------------------------------------------------------------------------------


def test_consistency_pulls_on_the_student_alone(cfg, whole, batch):
    """Exactly nothing reaches the teacher's encoder and projector, through the shared decoder either."""
    params = jax.tree.map(jnp.asarray, whole[1].params)
    kl = jax.jit(jax.grad(lambda p: train.loss_fn(p, {}, cfg, Job(BRANCHES), batch)[1]["kl"]))
    size = {g: sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(t)) for g, t in kl(params).items()}
    assert size["large"] == size["names_base"] == size["names_large"] == 0
    assert size["base"] > 0
    assert size["llm"] > 0


# --- the same gradients by other ways --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params(cfg, tiny_params, tiny_classes):
    rng = np.random.default_rng(9)

    def tables(branch):
        rows = {"names": (len(tiny_classes), cfg.model.vit(branch).width), "cells": (4, cfg.model.llm.width)}
        return {k: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for k, shape in rows.items()}

    assert cfg.model.policy.tokens_per_tile == 4
    return {**tiny_params, **{f"names_{b}": tables(b) for b in BRANCHES}}


@pytest.fixture(scope="module")
def gradients(cfg, params):
    """(batch, settings of training) -> gradients and parts of the loss of a step that has all terms."""
    compute = jax.jit(train.gradients, static_argnums=(1, 2))
    return lambda batch, **how: compute(params, replace(cfg, train=replace(cfg.train, **how)), BASE, batch)


@pytest.fixture(scope="module")
def uneven(batch):
    """Rows of which one has no answer, one a single word of one, one nothing to name."""
    loss = batch.loss.at[0].set(False).at[1].set(batch.loss[1] & (jnp.cumsum(batch.loss[1]) == 1))
    return batch._replace(loss=loss, names=batch.names.at[2].set(-1), words=batch.words.at[2].set(-1))


@pytest.fixture(scope="module")
def plain(gradients, uneven):
    return gradients(uneven)


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()) + 1e-7)  # some are all 0


def test_micro_batches_add_up_to_the_batch(cfg, gradients, uneven, plain):
    """Also where the rows of one have more answers, tokens and things than those of another."""
    shares = [train.totals(cfg, jax.tree.map(lambda a, k=k: a[k::2], uneven)) for k in range(2)]
    whole = train.totals(cfg, uneven)
    assert all(float(a) + float(b) == pytest.approx(float(c)) for a, b, c in zip(*shares, whole, strict=True))
    assert float(shares[0].answers) != float(shares[1].answers)
    assert float(shares[0].names) != float(shares[1].names)
    close(gradients(uneven, accumulate=2), plain)


def test_the_loss_in_chunks_is_the_loss(gradients, uneven, plain):
    close(gradients(uneven, loss_chunk=100), plain)  # of 512: the last chunk overlaps


def test_attention_in_blocks_is_attention(gradients, uneven, plain):
    close(gradients(uneven, attention_block=10, remat=True), plain)


def test_half_precision_computes_and_full_precision_learns(cfg, params, batch):
    half = replace(cfg, train=replace(cfg.train, compute_dtype="bfloat16"))
    grads, _ = jax.eval_shape(lambda p: train.gradients(p, half, LARGE, batch), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    fine, coarse = (jax.jit(lambda p, c=c: train.loss_fn(p, {}, c, LARGE, batch)[1])(params) for c in (cfg, half))
    for name, value in fine.items():
        assert coarse[name] != value
        assert float(coarse[name]) == pytest.approx(float(value), rel=0.02)
    program = str(jax.make_jaxpr(lambda p: train.patches(train._narrow(p, half), half, "large", batch))(params))
    assert "bf16[" in program
    products = [line for line in program.splitlines() if " dot_general" in line]
    assert products
    assert all("bf16[" in line for line in products)


def test_a_frequent_word_learns_from_every_place_in_half_precision(cfg, params):
    """Thousands of gradients add up in its row of the table: in 16 bits they would stop adding up after hundreds."""
    ids, seen = jnp.zeros((1, 4096), jnp.int32), jnp.zeros((1, 1, cfg.model.llm.width))

    def pulled(dtype):
        how = replace(cfg, train=replace(cfg.train, compute_dtype=dtype))

        def total(params):
            rows = hypervl.embed(train._narrow(params, how), ids, ids - 1, seen)
            assert rows.dtype == dtype
            return (0.01 * rows.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(total))(params)["llm"]["embed"]

    close(pulled("bfloat16"), pulled("float32"), 0.01)


def test_a_step_by_rules_moves_what_they_say(cfg, params, batch, tiny_classes):
    """The projectors, as when encoders and decoder are first made to fit each other."""
    rules = (Rule(r"(base|large)\.projector\..*"), Rule(r"(base|large)\.vit\..*|llm\..*|names_.*", 0.0))
    ruled = replace(cfg, train=replace(cfg.train, rules=rules))
    state = jax.device_put(train.init_state(ruled, len(tiny_classes), params), jax.devices()[0])
    start = jax.tree.map(np.asarray, state)
    assert set(start.opt) == set(BRANCHES)
    after, _ = train.compiled(ruled)(state, batch, LARGE)
    before = tensors.flatten(start.params)
    changed = {k for k, v in tensors.flatten(after.params).items() if (np.asarray(v) != before[k]).any()}
    assert changed == {k for k in before if k.startswith("large.projector.")}
    assert equal(after.opt["base"], start.opt["base"])


def test_a_step_that_would_move_nothing_is_refused(cfg, params, batch):
    still = (Rule(r"base\..*", 0.0), Rule(r"llm\..*|names_.*", 0.0), Rule(r"large\..*"))
    ruled = replace(cfg, train=replace(cfg.train, rules=still))
    with pytest.raises(ConfigError, match=r"train\.rules: a step of base moves nothing"):
        train.gradients(params, ruled, BASE, batch)


def test_rules_that_do_not_fit_are_found_before_anything_is_written(cfg, run, tmp_path):
    wrong = replace(cfg, train=replace(cfg.train, rules=(Rule(r"vision\..*", 0.0),)))
    with pytest.raises(ConfigError, match=r"train\.rules: no rule for base\..*nothing is left for"):
        run(tmp_path, wrong)
    rules = (Rule(r"base\..*|llm\..*|names_base\..*", 0.0), Rule(r"large\..*|names_large\..*"))
    with pytest.raises(ConfigError, match=r"train\.rules: a step of base moves nothing"):  # its third
        run(tmp_path, replace(cfg, train=replace(cfg.train, rules=rules)))
    assert not list(tmp_path.iterdir())


def test_logits_of_the_prompt_have_no_say(batch):
    targets, mask = losses.shift(jnp.asarray(batch.ids), jnp.asarray(batch.loss))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, *batch.ids.shape, 32)), jnp.float32)
    other = jnp.where(mask[..., None], logits, 9.0 - logits)
    assert losses.dcl_kl(*logits, mask, 2.0) == losses.dcl_kl(*other, mask, 2.0)
    assert 0 < mask.mean() < 0.5
    supervised = losses.mean_where(losses.cross_entropy(logits[0], targets % 32), mask)
    assert supervised == losses.mean_where(losses.cross_entropy(other[0], targets % 32), mask)


# --- schedule --------------------------------------------------------------------------------------------------------


def test_the_schedule_alternates_after_stage_0(cfg):
    assert [train.job_at(cfg, s) for s in range(4)] == [NAMES, LARGE, BASE, LARGE]
    joint = replace(cfg, dcl=replace(cfg.dcl, schedule="joint"))
    assert [train.job_at(joint, s) for s in range(3)] == [NAMES, Job(BRANCHES), Job(BRANCHES)]
    coin = replace(cfg, dcl=replace(cfg.dcl, schedule="random"))
    tossed = [train.job_at(coin, s) for s in range(1, 101)]
    assert tossed == [train.job_at(coin, s) for s in range(1, 101)]
    assert 30 < tossed.count(BASE) < 70
    assert tossed.count(BASE) + tossed.count(LARGE) == 100


def test_stage_0_holds_the_peak_and_the_cosine_spans_the_rest(cfg):
    t = replace(cfg.train, steps=50, stage0_steps=10, warmup=4, stage0_lr=2.0, lr=1.0, final_lr=0.1)
    cfg = replace(cfg, train=t)
    rates = [float(train.rate_at(cfg, jnp.int32(s))) for s in range(50)]
    np.testing.assert_allclose(rates[:10], [0.5, 1.0, 1.5, *[2.0] * 7])
    np.testing.assert_allclose(rates[10:14], [0.25, 0.5, 0.75, 1.0])
    assert rates[-1] == pytest.approx(0.1)


def test_screens_and_rows_that_fit_no_bucket_are_found_before_the_first_step(cfg, run, tmp_path):
    few = replace(cfg, data=replace(cfg.data, tile_buckets=(1,), lengths=(96,)))
    short = replace(cfg, data=replace(cfg.data, lengths=(40,)))
    for bad, setting in ((few, "tile_buckets"), (short, r"data\.lengths")):
        with pytest.raises(ValueError, match=setting):
            run(tmp_path, bad)
    assert not list(tmp_path.iterdir())


def test_damaged_settings_of_a_run_are_named(cfg, run, tmp_path):
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(TrainError, match=r"train\.json: damaged"):
        run(tmp_path)
