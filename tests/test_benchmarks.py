"""The arithmetic of `benchmarks/`: intervals, and what dcl.py, vrc.py and nano.py make of answers. Of models a tiny
decoder runs, beside llama.cpp where that is installed."""

import dataclasses
import itertools
import json
import sys
from argparse import ArgumentParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import checkpoint, presets, tensors, train
from hypervl_jax.compress import LabelSet
from hypervl_jax.config import BRANCHES, VrcTrainConfig
from hypervl_jax.data.screens import Question, Screen, Thing
from hypervl_jax.evaluate import Answer, wilson
from hypervl_jax.model import llm

# --- common ----------------------------------------------------------------------------------------------------------


def test_paired_interval(load):
    """Differences 1, 0, 0, 1: mean 0.5, standard error sqrt(1/3) / 2."""
    got = load("common").paired(np.array([1, 1, 0, 1.0]), np.array([0, 1, 0, 0.0]))
    assert got.mean == 0.5
    assert got.high - got.mean == pytest.approx(1.959964 * (1 / 3) ** 0.5 / 2)
    assert got.mean - got.low == pytest.approx(got.high - got.mean)


def test_one_pair_bounds_nothing(load):
    got = load("common").paired(np.ones(1), np.zeros(1))
    assert (got.mean, got.low, got.high) == (1, -np.inf, np.inf)


def test_bootstrap_agrees_with_the_normal_interval(load):
    common, x = load("common"), np.random.default_rng(0).normal(3, 2, 400)
    got = common.bootstrap(lambda i: x[i].mean(), 400)
    normal = common.paired(x, np.zeros(400))
    assert got == pytest.approx(normal, abs=0.05)
    assert got.low < got.mean < got.high
    assert got == common.bootstrap(lambda i: x[i].mean(), 400)


def test_figures_that_json_cannot_hold_are_null(load, tmp_path, monkeypatch):
    common = load("common")
    monkeypatch.setattr(sys, "argv", ["benchmarks/thing.py"])
    args = common.arguments("doc", ["--out", str(tmp_path)])
    assert common.finish("thing", {"a": {"b": [float("nan"), 1.0]}}, [common.Bar("x", float("inf"), 0)], args) == 0
    result = json.loads((tmp_path / "thing-cpu.json").read_text())
    assert result["metrics"] == {"a": {"b": [None, 1.0]}}
    assert result["bars"][0]["figure"] is None


def test_a_script_adds_its_own_arguments(load):
    def more(parser: ArgumentParser):
        parser.add_argument("--steps", type=int)

    args = load("common").arguments("doc", ["--quick", "--steps", "3"], more)
    assert (args.steps, args.quick, args.out.name) == (3, True, "benchmarks")


# --- dcl -------------------------------------------------------------------------------------------------------------


def judged(dcl, base, large, same, kl):
    teacher = np.stack([np.full(len(base), kl), np.ones(len(base)), np.full(len(base), 2.0)], 1)
    correct = {"base": np.array(base, float), "large": np.array(large, float)}
    tasks = {b: {"name": float(correct[b].mean())} for b in BRANCHES}
    return dcl.Judged(correct, tasks, np.array(same, float), teacher)


def test_row_of_a_run(load):
    row = judged(load("dcl"), [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1], 0.6).row()
    assert row == pytest.approx(
        {"divergence": 0.3, "token_agreement": 0.5, "agreement": 0.75, "base": 0.25, "large": 0.5, "switch_cost": 0.25}
    )


def test_arms_are_compared_by_screen_over_seeds(load):
    dcl = load("dcl")
    off = [judged(dcl, [1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1], kl) for kl in (0.8, 1.2)]
    on = [judged(dcl, [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], kl) for kl in (0.2, 0.4)]
    figures, bars = dcl.compare(on, off)
    assert figures["divergence_ratio"] == pytest.approx(0.3)
    assert figures["base_gain"]["mean"] == pytest.approx(0.25)
    assert figures["large_gain"] == {"mean": 0, "low": 0, "high": 0}
    assert figures["switch_cost"]["kl"]["mean"] == 0
    assert figures["switch_cost"]["plain"]["mean"] == pytest.approx(0.25)
    assert all(bar.ok for bar in bars)


def test_the_other_way_round_every_bar_falls_short(load):
    dcl = load("dcl")
    off = [judged(dcl, [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], 1.0)]
    on = [judged(dcl, [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], 0.3)]
    _, bars = dcl.compare(off, on)
    assert [bar.name for bar in bars if not bar.ok] == [bar.name for bar in bars]


def test_branches_that_guess_alike_do_not_look(load):
    dcl = load("dcl")
    screens = [Screen(np.zeros((9, 9, 3), np.uint8), (), (Question("name", "?", a, None),), "", 0.0) for a in "aaab"]
    blind, seeing = judged(dcl, [1, 1, 1, 0], [1, 1, 1, 0], [1] * 4, 0.0), judged(dcl, [1] * 4, [1] * 4, [1] * 4, 0.0)
    assert dcl.looks([blind], screens, 10) == 0
    assert dcl.looks([seeing], screens, 10) == 0.25
    assert dcl.looks([seeing, blind], screens, 10) == 0


def test_arms_differ_in_one_value(load, tiny_config):
    dcl = load("dcl")
    on, off, nameless = (dcl.arm(tiny_config, name, 3) for name in (dcl.ON, dcl.OFF, dcl.NAMELESS))
    assert on.train.seed == off.train.seed == 3
    assert (on.dcl.weight, off.dcl.weight) == (1, 0)
    assert (on.train, on.data, on.model) == (off.train, off.data, off.model)
    assert (nameless.train.stage0_steps, nameless.train.name_weight) == (0, 0)
    assert nameless.train.steps == on.train.steps
    assert nameless.dcl == on.dcl


def test_stage_0_is_one_program_for_both_arms(load, tiny_config, tiny_batches):
    """So that one checkpoint may start both."""
    dcl, job = load("dcl"), train.Job(BRANCHES, stage0=True)
    state = jax.eval_shape(lambda: train.init_state(tiny_config, 14))
    programs = [
        str(jax.make_jaxpr(lambda s, b, cfg=cfg: train.train_step(s, b, cfg, job))(state, tiny_batches[0]))
        for cfg in (dcl.arm(tiny_config, dcl.ON, 0), dcl.arm(tiny_config, dcl.OFF, 0))
    ]
    assert programs[0] == programs[1]


def test_steps_scale_stage_0_too(load):
    dcl = load("dcl")
    whole, half = dcl.settings(1_000), dcl.settings(500)
    assert half.train.stage0_steps == whole.train.stage0_steps // 2 > 0
    assert half.data == whole.data


# --- vrc -------------------------------------------------------------------------------------------------------------


def test_retained_is_the_mean_over_tasks(load):
    """Two tasks; the rare one loses half of its right answers."""
    vrc = load("vrc")
    full = [Answer(i, task, "", "", True) for i in range(4) for task in ("find", "read")[: 1 + (i == 0)]]
    with_vrc = [a._replace(correct=a.task == "find") for a in full]
    (kept, asked), (right, _) = vrc.hits(with_vrc, 4, 2), vrc.hits(full, 4, 2)
    assert asked.sum(0).tolist() == [2, 2, 1, 0]  # find and read, each on known and on unseen art
    assert vrc.retained(right, right, asked) == 1
    assert vrc.retained(kept, right, asked) == pytest.approx(2 / 3)


def screen(*things):
    """A screen of (kind, box), each asked about once."""
    tasks = {"digit": "read", "picture": "name"}
    questions = tuple(Question(tasks[kind], "?", "", box) for kind, box in things)
    return Screen(np.zeros((9, 9, 3), np.uint8), tuple(Thing("", *t, "") for t in things), questions, "", 0.0)


DIGIT, LARGE, SMALL = ("digit", (0, 0, 30, 10)), ("picture", (0, 0, 20, 40)), ("picture", (0, 0, 10, 10))


def test_the_legible_scale_is_of_the_thing_that_needs_most(load):
    need = load("vrc").legible([screen(DIGIT, LARGE), screen(DIGIT, SMALL)], {"digit": 5.0, "picture": 8.0})
    np.testing.assert_allclose(need["all"], [0.25, 0.64])
    np.testing.assert_allclose(need["number"], [0.25, np.nan])
    np.testing.assert_allclose(need["picture"], [np.nan, 0.64])


def test_kinds_of_unknown_need_say_nothing(load):
    need = load("vrc").legible([screen(DIGIT, LARGE), screen(DIGIT)], {"digit": float("nan"), "picture": 8.0})
    np.testing.assert_allclose(need["all"], [0.04, np.nan])


def test_what_a_thing_needs_is_measured_on_the_models_losses(load):
    """A digit of 10 px that is read at a quarter of the area needs 5; a picture that is never known says nothing."""
    ratios = np.array([0.25, 0.5, 1.0])
    losses = np.array([[[0.01, 0.01, 0.01], [2.0, 2.0, 2.0]]])
    found = LabelSet(ratios, losses, np.array([1.0]))
    least = load("vrc").legible_sizes([screen(DIGIT, LARGE)], found, VrcTrainConfig())
    assert least["digit"] == pytest.approx(5.0)
    assert np.isnan(least["picture"])


def test_following_the_legible_scale(load):
    vrc = load("vrc")
    need = np.array([1, 2, np.nan, 3, 4]) ** 2.0
    ratios = np.array([0.1, 0.2, 0.9, 0.3, 0.4])
    assert vrc.follows(ratios, need) == pytest.approx(1)
    assert vrc.follows(-ratios, need) == pytest.approx(-1)
    assert np.isnan(vrc.follows(ratios, np.full(5, np.nan)))
    assert [row["mean_ratio"] for row in vrc.quarters(ratios, need)] == [0.1, 0.2, 0.3, 0.4]
    assert vrc.quarters(ratios, need)[3] == {"from": 16, "to": 16, "mean_ratio": 0.4}


def test_vrc_is_measured_against_the_best_constant(load):
    """Half the screens need full size: following them keeps all at the cost at which a constant keeps half less."""
    vrc = load("vrc")
    tokens, need = np.tile([10.0, 100.0], (40, 1)), np.arange(40) % 2 == 0
    correct = np.stack([~need, np.ones(40)], 1).astype(float)
    good = vrc.Tables(np.where(need, 1.0, 0.1), (0.1, 1.0), tokens, correct)
    blind = vrc.Tables(np.where(np.arange(40) < 20, 1.0, 0.1), (0.1, 1.0), tokens, correct)
    assert good.at(good.predicted) == pytest.approx((0.45, 1.0, 0.75))
    assert good.edge().low > 0.1
    assert blind.edge().low < 0 < blind.edge().high + 0.05


# --- nano ------------------------------------------------------------------------------------------------------------


def row(mean, n=100):
    return {"mean": mean, "n": n, "low": 0.0, "high": 1.0}


def test_a_task_on_both_splits(load):
    known = [Answer(i // 2, "read", "7", "7", True) for i in range(4)]
    unseen = [Answer(0, "read", "7", "1", False), Answer(1, "find", "1 1", "1 1", True)]
    got = load("nano").together({"test_known": known, "test_unseen": unseen, "none": []})
    assert (got["read"].mean, got["read"].n, got["find"].n) == (0.8, 5, 1)


def test_the_margin_is_of_the_worst_task_above_its_better_control(load):
    table = {"read_known": row(0.9), "yesno_known": row(0.7)}
    controls = {"majority": {"read_known": 0.1, "yesno_known": 0.52}, "shuffled": {"read_known": 0.2}}
    assert load("nano").margin(table, controls) == (pytest.approx(0.18), "yesno_known")


def test_bars_of_the_shipped_weights(load):
    nano = load("nano")
    good = {f"{task}_{s}": row(0.95) for task in ("name", "find", "read") for s in ("known", "unseen")}
    tasks = {task: wilson(90, 100) for task in ("find", "read")}
    assert all(bar.ok for bar in nano.bars_of("base", good, tasks, {"majority": {}}))
    worse = nano.bars_of("base", good | {"name_unseen": row(0.4)}, tasks, {"m": {}})
    short = {bar.name for bar in worse if not bar.ok}
    assert short == {"nano.base.name_unseen"}
    none = {k: v for k, v in good.items() if not k.startswith("name")}
    short = {bar.name for bar in nano.bars_of("base", none, {"read": wilson(79, 100)}, {"m": {}}) if not bar.ok}
    assert short == {"nano.base.name_known", "nano.base.name_unseen", "nano.base.read", "nano.base.find"}


# --- inference -------------------------------------------------------------------------------------------------------


def test_rounds_are_compared_with_the_first_call_of_the_same_round(load, monkeypatch):
    """The second call takes 3 s where the first takes 1, in the last round 6 and 2; the first round does not count."""
    inference, now = load("inference"), [0.0]
    monkeypatch.setattr(inference.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(inference.time, "process_time", lambda: 2 * now[0])
    durations = iter([9, 1, 1, 3, 1, 3, 2, 6])

    def call():
        now[0] += next(durations)

    found = inference.rounds({"a": call, "b": call}, 3)
    assert found["a"]["seconds"] == found["a"]["over_first"] == 1
    assert (found["b"]["seconds"], found["b"]["cpu_seconds"], found["b"]["over_first"]) == (3, 6, 3)


def test_bars_of_inference(load):
    inference = load("inference")

    def rows(**over):
        return {k.replace("_", " "): {"over_first": v} for k, v in over.items()}

    kinds = {"float32": {"bytes": 400}, "int8": {"bytes": 101}}
    prefill = rows(torch_float32=1.0, jax_float32=1.05)
    decode = rows(torch_float32=1.0, jax_float32=0.5, jax_int8=0.4)
    size = inference.Sizes(None, "float32", (512,), 8, (), 5)
    metrics = {
        "torch": "2",
        "encode": {"base": {"jax": {"over_first": 1.0}}},
        "decoder": {"kinds": kinds, "prefill_512": prefill, "decode": decode},
    }
    found = {bar.name: bar for bar in inference.bars(size, metrics)}
    assert all(bar.ok for bar in found.values())
    assert found["int8_decode_over_full"].figure == pytest.approx(0.8)
    decode["jax int8"]["over_first"] = 0.6
    decode["torch float32"]["over_first"] = 0.9
    kinds["int8"]["bytes"] = 120
    short = {bar.name for bar in inference.bars(size, metrics) if not bar.ok}
    assert short == {"decode", "int8_decode_over_full", "int8_bytes"}
    assert {bar.name for bar in inference.bars(size, metrics | {"torch": None})} == {
        "int8_decode_over_full",
        "int8_bytes",
    }


def test_what_is_not_installed_is_left_out(load, capsys):
    assert load("inference").beside("llamacpp", "json", "no_such_package") is None
    assert capsys.readouterr().out.startswith("not installed, so left out: no_such_package (benchmarks/llamacpp.py")


def test_without_a_gpu_the_measurement_for_one_says_so(load, monkeypatch):
    inference = load("inference")
    monkeypatch.setattr(sys, "argv", ["inference.py", "--gpu"])
    with pytest.raises(SystemExit, match="no GPU here"):
        inference.main()


def test_the_limits_are_measured(load):
    assert all(v > 0 for v in load("inference").limits(small=True).values())


# --- training --------------------------------------------------------------------------------------------------------


def test_the_paper_sizes_step_is_measured(load):
    found = load("training").paper(quick=True, n=1)
    assert found["seconds"] > 0
    assert found["flops"] > 0


def test_both_turns_are_measured_where_torch_is_not(load):
    training = load("training")
    (cfg,) = training.settings(quick=True)
    found = training.beside_torch(cfg, None, 1)
    assert found["error"] == {}
    assert all(found[b]["flops_per_second"] > 0 for b in BRANCHES)
    assert training.bars({"steps": {"tiny": found}}) == []


def test_a_step_is_that_of_torch(load):
    """Checked inside: losses, divergence and gradient norms of three steps a turn, or the run ends."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    training = load("training")
    (cfg,) = training.settings(quick=True)
    found = training.beside_torch(cfg, load("peers"), 1)
    assert len(found["error"]) == 3 * 5
    assert [bar.name for bar in training.bars({"steps": {"tiny": found}})] == ["tiny.base", "tiny.large"]


def test_wide_is_as_large_as_it_is_said(load):
    training = load("training")
    sizes = jax.eval_shape(lambda: train.init_state(training.wide(), 2)).params
    assert sum(int(np.prod(a.shape)) for a in jax.tree.leaves(sizes)) // 10**6 == 62


# --- llamacpp --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamacpp(load):
    for package in ("llama_cpp", "gguf"):
        pytest.importorskip(package, reason="needs llama-cpp-python and gguf")
    return load("llamacpp")


def decoder(model, width):
    """(sizes, random weights: norms too)."""
    model = dataclasses.replace(model, llm=dataclasses.replace(model.llm, width=width))
    rng, shapes = np.random.default_rng(0), checkpoint.expected(model)
    draw = {
        path.removeprefix("llm."): rng.uniform(0.5, 1.5, s) if "norm" in path else rng.normal(size=s) / s[-1] ** 0.5
        for path, s in sorted(shapes.items())
        if path.startswith("llm.")
    }
    return model.llm, tensors.unflatten({k: v.astype(np.float32) for k, v in draw.items()})


def next_logits(cfg, params, ids):
    def run(params, ids):
        at, causal = jnp.arange(ids.shape[1])[None], jnp.tri(ids.shape[1], dtype=bool)[None]
        hidden, _ = llm.Llm(cfg).apply({"params": params}, llm.embed(params, ids), at, causal)
        return llm.logits(params, hidden[:, -1])

    return np.asarray(jax.jit(run)(params, ids))


def error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(ours).max()


def test_llama_cpp_computes_the_same(llamacpp, tiny_config):
    """Prompt and three tokens behind it, twice: the second prompt finds an empty cache."""
    cfg, params = decoder(tiny_config.model, 64)
    theirs = llamacpp.Decoder(cfg, params, "float32", room=64, threads=1)
    for seed in (0, 1):
        ids = np.random.default_rng(seed).integers(0, cfg.vocab, (1, 24)).astype(np.int32)
        assert error(next_logits(cfg, params, ids), theirs.prefill(ids)) < 1e-5
        ids = np.concatenate([ids, [theirs.decode(3)]], 1).astype(np.int32)
        assert error(next_logits(cfg, params, ids), theirs.logits) < 1e-5


@pytest.mark.parametrize(("kind", "width", "bits"), [
    ("bfloat16", 64, 16), ("q8_0", 64, 8.5), ("q4_0", 64, 4.5), ("q4_0", 48, None),
])  # fmt: skip
def test_llama_cpp_has_our_weights_in_fewer_bits(llamacpp, tiny_config, kind, width, bits):
    """Close to f32 on the numbers that it keeps; the rows that it multiplies by them are rounded too."""
    gguf = pytest.importorskip("gguf")
    cfg, params = decoder(tiny_config.model, width)
    flat = tensors.flatten(params)

    def kept(path, values):
        stacked = path.startswith("blocks.")
        how = llamacpp.kept_as("blk." if stacked else path, values.shape[stacked:], kind)
        return gguf.dequantize(gguf.quantize(values, how), how)

    stored = tensors.unflatten({k: kept(k, v) for k, v in flat.items()})
    ids = np.random.default_rng(2).integers(0, cfg.vocab, (1, 24)).astype(np.int32)
    theirs = llamacpp.Decoder(cfg, params, kind, room=64, threads=1)
    assert error(next_logits(cfg, stored, ids), theirs.prefill(ids)) < 0.04
    if bits:
        table, size = flat["embed"].size, sum(v.size for v in flat.values())
        wanted = (bits * (size - table) + max(bits, 8.5) * table) / 8
        assert theirs.bytes == pytest.approx(wanted, rel=0.02)  # norms are f32


def test_a_llama_is_not_written_as_a_qwen(llamacpp, tiny_config):
    cfg = dataclasses.replace(tiny_config.model.llm, qk_norm=False)
    with pytest.raises(ValueError, match="qk_norm"):
        llamacpp.Decoder(cfg, {}, "float32", room=64, threads=1)


# --- quantize --------------------------------------------------------------------------------------------------------


def test_points_lost_are_paired_and_a_task_each(load):
    of = load("quantize")
    before = [Answer(i, task, "x", "x", True) for i in range(8) for task in ("read", "count")]
    after = [a._replace(correct=a.task == "count" or a.screen > 1, answer="y" if a.screen < 2 else "x") for a in before]
    found = of.lost(before, after)
    assert {t: (x["mean"], x["n"], x["before"]) for t, x in found.items()} == {
        "count": (0, 8, 100), "read": (25, 8, 100),
    }  # fmt: skip
    assert found["read"]["low"] < 25 < found["read"]["high"]
    assert of.same(before, after) == 0.75


def test_every_way_is_another(load, tiny_model):
    """8 bits, then 4 by each method: the same matrices in the same kinds, other integers."""
    from hypervl_jax import calibrate, quantize

    of = load("quantize")
    some = of.ways((None,))
    assert list(some) == ["int8", "row nearest", "row awq", "row gptq", "row awq+gptq"]
    assert of.HEADLINE in of.ways((32,))
    grams = list(calibrate.grams(tiny_model, calibrate.from_screens(tiny_model, 2), ("base",), progress=False))
    kept = [quantize.matrices(way.params(tiny_model, grams)) for way in some.values()]
    down = "llm.blocks.layers.down.weight"
    assert [m[down].bits for m in kept] == [8, 4, 4, 4, 4]
    for a, b in itertools.combinations(kept[1:], 2):
        assert not np.array_equal(a[down].q, b[down].q)
        assert np.array_equal(a["llm.embed"].q, b["llm.embed"].q)


# --- paper_size, picture_size ----------------------------------------------------------------------------------------


def test_memory_of_a_command_is_that_of_its_children_too(load):
    """Two processes at once, 60 and 80 MB of zeros written."""
    hold = "import time; x = bytearray({} * 2**20); time.sleep(1.5)"
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold.format(80)!r}]);"
    seconds, peak = load("paper_size").watched([sys.executable, "-c", f"{child} {hold.format(60)}; p.wait()"])
    assert 140 * 2**20 < peak < 240 * 2**20
    assert 1.5 < seconds < 30


def test_a_command_that_fails_ends_the_benchmark(load):
    with pytest.raises(SystemExit, match="3"):
        load("paper_size").watched([sys.executable, "-c", "raise SystemExit(3)"])


def test_random_weights_of_no_layer_are_those_of_another(load, tiny_config, tmp_path):
    load("paper_size").make(tmp_path / "model", tiny_config.model)
    model = checkpoint.load_model(tmp_path / "model")
    assert checkpoint.expected(model.config) == checkpoint.expected(tiny_config.model)
    for leaf in jax.tree.leaves(model.params["llm"]["blocks"]["layers"]):
        assert not np.array_equal(leaf[0], leaf[1])


def test_a_fit_has_no_negative_terms(load):
    fitted, x = load("picture_size").fitted, [1.0, 2, 3, 4]
    assert fitted(x, [3 * a + 2 * a**2 for a in x], (1, 2))(10) == pytest.approx(230)
    bent = fitted(x, [7 * a - 0.5 * a**2 for a in x], (1, 2))  # a line is the nearest without the square
    assert 0 < bent(10) == pytest.approx(10 * bent(1))


def test_sizes_that_did_not_run_are_computed(load):
    """Costs that follow the model of the computation are continued exactly."""
    size = load("picture_size")
    cfg = presets.hypervl_1p7b().model
    cache = 2 * 4 * cfg.llm.depth * cfg.llm.kv_heads * cfg.llm.head_dim
    factors, sides = {"base": 1.0, "large": 3.0}, (256, 512, 768, 1024)

    def costs(side):
        p = side * side
        whole = {b: {"seconds": f * (p + p * p / 1e6), "bytes": f * (1e9 + 10 * p + p * p)} for b, f in factors.items()}
        out = {f"whole {b} f32": cost for b, cost in whole.items()}
        n, fewer = (size._tiles(cfg.policy, side, share) for share in (1.0, size.SHARE))
        tiles = [f"tiles {b} {kind}" for b in BRANCHES for kind in ("f32", "int8")]
        out |= {way: {"seconds": float(n), "bytes": 5e8} for way in tiles}
        out["VRC, tiles base int8"] = {"seconds": float(fewer), "bytes": 6e8}
        for i, way in enumerate(("whole large f32", "VRC, tiles base int8")):
            text = 0.1 * prompts[side][i]
            first = {"seconds": out[way]["seconds"] + text, "decoder": text}
            out[f"first token, {way}"] = first | {"bytes": out[way]["bytes"] + cache * prompts[side][i]}
        return out

    prompts = {side: (side * side // 1024 + 30, side * side // 1024 + 290) for side in (*sides, 2048)}
    got, want = size.computed(cfg, {s: costs(s) for s in sides}, prompts, 2048), costs(2048)
    for way in want:
        assert got[way] == pytest.approx(want[way], rel=1e-6), way
    assert size.ratios(got).keys() == size.RATIOS.keys()
