"""What a run is watched by: signals, the clock, what is not finite, logs, rates, answers, traces, the last words."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from hypervl_jax import cost, plan, watch
from hypervl_jax.config import BRANCHES
from hypervl_jax.data import feeds
from hypervl_jax.watch import Guard, Log, Meter, Stop, Trace

# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_asked_about_and_handlers_come_back(number, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def told():
        with Stop() as stop:
            assert stop.asked() == ""
            signal.raise_signal(number)
            raise watch.Stopped(stop.asked())

    with pytest.raises(watch.Stopped, match=signal.Signals(number).name) as stopped:
        told()
    assert stopped.value.exit_code == 75
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "finished and saved" in capsys.readouterr().err


def test_a_second_ctrl_c_does_not_wait():
    def twice():
        with Stop():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it waited")

    with pytest.raises(KeyboardInterrupt):
        twice()


def test_a_signal_that_comes_too_late_to_be_asked_about_is_not_lost():
    with pytest.raises(KeyboardInterrupt), Stop():
        signal.raise_signal(signal.SIGINT)


def test_a_step_that_would_end_too_late_is_not_begun():
    with Stop(time.monotonic() + 60) as stop:
        assert stop.asked() == ""
    with Stop(time.monotonic() + 0.05) as stop:
        time.sleep(0.03)
        assert stop.asked() == "--max-hours"  # 0.02 s are left, a step took 0.03


def test_signals_are_left_alone_outside_the_main_thread():
    said = []

    def inside():
        with Stop() as stop:
            said.append(stop.asked())

    before = signal.getsignal(signal.SIGTERM)
    (thread := threading.Thread(target=inside)).start()
    thread.join()
    assert said == [""]
    assert signal.getsignal(signal.SIGTERM) is before


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_steps_are_passed_over_up_to_a_limit_in_a_window():
    guard = Guard(2)
    assert [guard.too_many(s) for s in (0, 50, 101, 102, 149, 151)] == [False, False, False, True, True, True]
    assert not any(Guard(1).too_many(s) for s in [7])
    assert Guard(1, before=[5]).too_many(7)  # as it was before the run was interrupted
    assert Guard(0).too_many(0)


def test_a_batch_comes_back_as_it_was(tiny_batches, tmp_path):
    path = watch.save_batch(tmp_path / "deep" / "b.npz", 7, tiny_batches[0], ["screen 3 at 0.5", "screen 1 at 1"])
    step, batch, shown = watch.load_batch(path)
    assert (step, shown) == (7, ["screen 3 at 0.5", "screen 1 at 1"])
    jax.tree.map(np.testing.assert_array_equal, batch, tiny_batches[0])
    assert [p.name for p in path.parent.iterdir()] == ["b.npz"]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_a_log_forgets_what_comes_after_its_checkpoint(tmp_path):
    log = Log(tmp_path, 0)
    for step in range(5):
        log.write(step, {"loss": step / 3} | ({"skipped": True} if step == 1 else {}))
    log.flush(disk=True)
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    before = (tmp_path / "log.jsonl").read_text().splitlines()
    again = Log(tmp_path, 3)
    assert again.skipped == [1]
    again.close()
    assert (tmp_path / "log.jsonl").read_text().splitlines() == before[:3]


def test_tensorboard_gets_the_same(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    log = Log(tmp_path, 0)
    log.write(0, {"loss_base": 2.5})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss_base" in file.read_bytes()


# --- speed -----------------------------------------------------------------------------------------------------------


def test_flops_of_a_step_are_those_of_its_parts(tiny_config, tiny_batches):
    """By hand: forward and backward of what learns, forward alone of the teacher."""
    m, batch = tiny_config.model, tiny_batches[0]
    b, n, length = len(batch.ids), batch.tiles.shape[1], batch.ids.shape[1]
    one = plan.make((m.policy.tile, m.policy.tile), 1.0, m.policy)
    vit = {branch: one.vit_flops(m.vit(branch)) for branch in BRANCHES}
    wide = {branch: 4 * m.vit(branch).width for branch in BRANCHES}
    project = {k: m.policy.tokens_per_tile * 2 * (w * m.llm.width + m.llm.width**2) for k, w in wide.items()}
    decoder = b * (cost.llm_flops(m.llm, length) + 2 * length * m.llm.width * m.llm.vocab)
    seen = {branch: b * n * (vit[branch] + project[branch]) for branch in BRANCHES}
    every = ["base.vit.pos", "base.projector.x", "large.vit.pos", "llm.embed", "names_base.cells"]

    def flops(branches, stage0=False, learns=every, cfg=tiny_config):
        return watch.step_flops(cfg, branches, stage0, batch, learns)

    assert flops(("large",)) == 3 * seen["large"] + 3 * decoder
    assert flops(("base",)) == 3 * seen["base"] + 3 * decoder + seen["large"] + decoder
    assert flops(BRANCHES, stage0=True) == 3 * seen["base"] + 3 * seen["large"]
    alone = replace(tiny_config, dcl=replace(tiny_config.dcl, weight=0.0))
    assert flops(("base",), cfg=alone) == 3 * seen["base"] + 3 * decoder
    frozen = b * n * (vit["large"] + 3 * project["large"]) + 2 * decoder
    assert flops(("large",), learns=["large.projector.x"]) == frozen


def test_rates_are_of_the_time_since_they_were_asked_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(jax.devices())
    meter.add(3_000, 4 * 10**9)
    now[0] = 2.0
    assert meter.read() == {"tok/s": "1,500", "GFLOP/s": "2"}
    monkeypatch.setattr(watch.chips, "peak", lambda kind: 1e9 if kind == jax.devices()[0].device_kind else 0.0)
    meter = Meter(jax.devices())
    meter.add(10, int(4e9) * jax.device_count())
    now[0] = 10.0
    assert meter.read()["MFU"] == "50.0%"


# --- answers and traces ----------------------------------------------------------------------------------------------


def test_answers_are_those_of_ask(tiny_config, tiny_model, tiny_source, tiny_sheets, tiny_classes, tmp_path, capsys):
    from hypervl_jax import ask

    feed = feeds.Screens(tiny_config, tiny_source, tiny_sheets, tiny_model.tokenizer, tiny_classes)
    watch.Samples(tiny_config, feed, tmp_path, 1)(40, tiny_model.params)
    (row,) = [json.loads(s) for s in (tmp_path / "samples.jsonl").read_text().splitlines()]
    asked = tiny_source[0].questions[0]
    seen = ask.see(tiny_model, tiny_source[0].image, "base", vrc=False)
    want = "".join(ask.answer(tiny_model, [seen], asked.text, watch.NEW))
    assert row == {"step": 40, "question": asked.text, "truth": asked.answer, "answer": want}
    assert f'step 40: "{asked.text}" -> ' in capsys.readouterr().err

    spread = {g: jax.tree.map(np.asarray, tiny_model.params[g]) for g in ("base", "llm")}  # as a mesh gives them
    (tmp_path / "mesh").mkdir()
    watch.Samples(tiny_config, feed, tmp_path / "mesh", 1)(40, spread)
    assert json.loads((tmp_path / "mesh" / "samples.jsonl").read_text()) == row


def test_a_trace_covers_its_steps_and_no_more(tmp_path, monkeypatch):
    calls, now = [], [0]
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", now[0])))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", now[0])))

    def steps(traced, start, end, dies=None):
        calls.clear()
        trace = Trace(tmp_path, traced, start, end)
        for step in range(start, end):
            now[0] = step
            trace.before(step)
            if step == dies:
                break
            trace.after(step)
        trace.close()
        return list(calls)

    assert steps(3, 0, 100) == [("start", 5), ("stop", 7)]
    assert steps(3, 40, 42) == [("start", 40), ("stop", 41)]
    assert steps(3, 0, 4) == [("start", 1), ("stop", 3)]
    assert steps(0, 0, 100) == []
    assert steps(3, 10, 10) == []
    assert steps(3, 0, 100, dies=6) == [("start", 5), ("stop", 6)]


def test_a_trace_is_written(tmp_path):
    trace = Trace(tmp_path / "profile", 1, 0, 1)
    trace.before(0)
    jax.numpy.ones(3).block_until_ready()
    trace.after(0)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


# --- what next -------------------------------------------------------------------------------------------------------


def test_the_last_words_are_commands_that_run_as_they_stand(tmp_path):
    import shlex

    bare = watch.commands(tmp_path)
    assert "hypervl ask PICTURE 'what is this?' --model" in bare[0]
    pixels = np.zeros((20, 30, 3), np.uint8)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many 'cats'?"}]}]
    out = tmp_path / "a folder"
    out.mkdir()
    watch.keep_example(out, feeds.Example([pixels], messages, "2"))
    watch.keep_example(out, feeds.Example([pixels + 9], messages, "3"))  # the first one stays
    assert sorted(p.name for p in out.iterdir()) == ["example.png", "example.txt"]
    ask, judge, export = (shlex.split(line)[2:] for line in watch.commands(out, vrc=False))
    model = str(out / "model")
    assert ask == ["hypervl", "ask", str(out / "example.png"), "how many 'cats'?", "--model", model, "--no-vrc"]
    assert judge == ["hypervl", "eval", "--model", model]
    assert export == ["hypervl", "export", model, "--out", str(out / "export")]
    assert os.stat(out / "example.png").st_size > 0
