"""Runs that are interrupted and gone on with, in processes of their own, beside one that nobody touched: the same bits,
the same samples, no checkpoint lost. `benchmarks/resume.py` is the same with more kills."""

import json
import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("grain", reason="needs the train extra")


@pytest.fixture(scope="module")
def resume(load):
    return load("resume")


@pytest.fixture(scope="module")
def lab(resume, tmp_path_factory):
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    return resume.Lab(tmp_path_factory.mktemp("lab"), steps=14, pace=0.05, cache=cache)


@pytest.fixture(scope="module")
def whole(lab):
    return lab.whole("untouched")


def taken(resume, out):
    """Steps that a run's processes took, one list each."""
    found = {}
    for row in resume.rows(out / "seen.jsonl"):
        found.setdefault(row["process"], []).append(row["step"])
    return list(found.values())


def same(resume, out, whole):
    """Whether a finished run ended as the one that nobody touched, and its log says the same."""
    logs = [
        [{k: v for k, v in r.items() if k != "time"} for r in resume.rows(o / "run" / "log.jsonl")]
        for o in (out, whole)
    ]
    return (out / "done").read_text() == (whole / "done").read_text() and logs[0] == logs[1]


def wait(process, true):
    while process.is_alive() and not true():
        time.sleep(0.002)
    assert process.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_says_so_and_goes_on_bit_for_bit(number, resume, lab, whole):
    """In the middle of an epoch and between two checkpoints."""
    name = signal.Signals(number).name
    out = lab.folder / name
    process = lab.begin(name)
    wait(process, lambda: len(resume.rows(out / "seen.jsonl")) >= 6)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 75
    (steps,) = taken(resume, out)
    assert len(steps) < lab.steps
    assert resume.finished(out)[-1] == len(steps)  # not one is lost
    assert f"{name} at step {len(steps)} of {lab.steps}" in (out / "said.txt").read_text()
    assert same(resume, lab.whole(name), whole)
    assert taken(resume, out)[1] == list(range(len(steps), lab.steps))


def test_killed_anywhere_it_goes_on_bit_for_bit(resume, lab, whole):
    """Four kills of one run: as it starts, in a step, as it saves, at random."""
    rng, out = np.random.default_rng(0), lab.folder / "killed"
    want = {r["step"]: (r["shown"], r["digest"]) for r in resume.rows(whole / "seen.jsonl")}
    for saving in (True, False, True, False):
        newest = max(resume.finished(out), default=0)
        before = len(resume.rows(out / "seen.jsonl"))
        if not lab.kill("killed", rng, saving):
            break
        began = resume.rows(out / "seen.jsonl")[before:]
        assert not began or began[0]["step"] >= newest
        assert not resume.finished(out) or resume.unreadable(out) == 0
    lab.whole("killed")
    assert same(resume, out, whole)
    seen = resume.rows(out / "seen.jsonl")
    assert all((r["shown"], r["digest"]) == want[r["step"]] for r in seen)
    assert {r["step"] for r in seen} == set(range(lab.steps))
    assert not list((out / "run" / "checkpoints").glob("damaged-*"))
    rows = [json.loads(s) for s in (out / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(lab.steps))


@pytest.mark.slow
def test_fifty_kills(resume, tmp_path):
    found = resume.trial(resume.Lab(tmp_path), 50, seed=1)
    assert found.while_saving > 0
    assert found._replace(kills=0, while_saving=0, runs=0) == resume.Trial(*[0] * 8)


@pytest.mark.slow
def test_every_step_is_one_to_go_on_from(resume, tmp_path):
    found = resume.step_by_step(resume.Lab(tmp_path, steps=16))
    assert found._replace(kills=0, runs=0) == resume.Trial(*[0] * 8)
    assert found.kills > 8  # a step that is saved as the run ends is not killed
