"""Any mesh: one rule says where a leaf is, nothing is ever whole on a device, and a run is the same run on all of them:
one device, eight of one process, several processes over the loopback, and from one to another through a checkpoint."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hypervl_jax import checkpoint, mesh, optim, train, watch
from hypervl_jax.config import ConfigError, Rule
from hypervl_jax.mesh import MeshConfig
from hypervl_jax.tensors import flatten

pytest.importorskip("grain", reason="needs the train extra")

CUBE = MeshConfig(2, 2, 2)
WORKER, SHARE = (Path(__file__).with_name(name) for name in ("one_process.py", "one_share.py"))


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture(scope="module")
def worker():
    """What the processes do, here."""
    return imported(WORKER)


@pytest.fixture(scope="module")
def cfg(worker):
    return worker.settings()


@pytest.fixture(scope="module")
def feed(worker, cfg):
    return worker.feed(cfg)


@pytest.fixture(scope="module")
def run(cfg, feed):
    return lambda out, on=mesh.ONE: train.run(cfg, feed, out, watch.QUIET, on=on)


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """(folder, last state) on one device."""
    out = tmp_path_factory.mktemp("alone")
    return out, run(out)


@pytest.fixture(scope="module")
def processes():
    """Runs so many processes together; returns what each has said, on stdout as JSON and on stderr."""

    def processes(count, *argv, codes=(0,), script=WORKER, devices=1):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        cache = os.environ["JAX_COMPILATION_CACHE_DIR"] + "-processes"  # some are killed while they write to it
        env = os.environ | {
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
        }
        command, pipes = [sys.executable, str(script), *map(str, argv)], {"stdout": subprocess.PIPE, "text": True}
        each = [
            subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, **pipes)
            for i in range(count)
        ]
        try:
            said = [p.communicate(timeout=600) for p in each]
        finally:
            for p in each:
                p.kill()
        assert all(p.returncode in codes for p in each), said
        whole = [[json.loads(s) for s in out.splitlines() if s.startswith("{")] for out, _ in said]  # gloo talks too
        return [lines[-1] if lines else None for lines in whole], [err for _, err in said]

    return processes


def log(out):
    rows = [json.loads(s) for s in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "time"} for r in rows]


def same(got, want):
    """The steps of one run and another: losses, gradient norm, rate, tokens."""
    assert [sorted(r) for r in got] == [sorted(r) for r in want]
    for a, b in zip(got, want, strict=True):
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=1e-5), (name, b["step"])


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape", "want"),
    [
        ("llm.blocks.layers.gate.weight", (28, 6144, 2048), P(None, "tensor", "fsdp")),
        ("llm.blocks.layers.down.weight", (28, 2048, 6144), P(None, "fsdp", "tensor")),
        ("opt.llm.0.mu.blocks.layers.o.weight", (28, 2048, 2048), P(None, "fsdp", "tensor")),
        ("base.vit.patch.weight", (768, 768), P("fsdp", None)),
        ("large.projector.fc1.weight", (2048, 4096), P("tensor", "fsdp")),
        ("llm.embed", (151_936, 2048), P(None, ("fsdp", "tensor"))),
        ("llm.blocks.layers.norm1.weight", (28, 2048), P()),
        ("base.vit.blocks.layers.fc1.bias", (12, 3072), P()),
        ("llm.blocks.layers.q.weight", (28, 2048, 7), P(None, "tensor", None)),  # 7 does not divide
        ("llm.embed", (512, 6), P(None, ("fsdp",))),
        ("step", (), P()),
    ],
)
def test_where_a_leaf_is_cut(path, shape, want):
    on = MeshConfig(4, 2, 2)
    assert mesh.spec(path.split("."), shape, on) == want
    for axis in ("data", "fsdp", "tensor"):
        assert str(want).count(f"'{axis}'") <= 1


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("muon", 1)])
def test_moments_are_where_their_parameters_are(optimizer, moments, worker):
    """By the same rule: no structure of theirs is known."""
    cfg = worker.settings(())
    cfg = replace(cfg, train=replace(cfg.train, optimizer=optimizer))
    grid, shapes = mesh.make(CUBE), jax.eval_shape(lambda: train.init_state(cfg, 1))
    where = mesh.places(grid, shapes)
    cut = 0
    for group, state in where.opt.items():
        params = {tuple(k.split(".")): v.spec for k, v in flatten(where.params[group]).items()}
        for path, place in jax.tree_util.tree_flatten_with_path(state)[0]:
            names = tuple(k.key for k in path if hasattr(k, "key"))
            assert place.spec == next((spec for end, spec in params.items() if names[-len(end) :] == end), P())
            cut += place.spec != P()
    matrices = [s for s in jax.tree.leaves(where.params) if s.spec != P()]
    assert 2 * len(matrices) >= cut > moments * len(matrices) - 1 > 20


def test_a_mesh_is_written_as_sizes():
    assert mesh.parse("fsdp=8") == MeshConfig(fsdp=8)
    assert mesh.parse("data=2, tensor=4") == MeshConfig(2, 1, 4)
    for wrong in ("", "8", "fsdp", "fsdp=x", "fsdp=2,fsdp=2", "model=2", "fsdp=2,"):
        with pytest.raises(ConfigError, match="such as fsdp=8"):
            mesh.parse(wrong)
    with pytest.raises(ConfigError, match="data 0 must be at least 1"):
        mesh.parse("data=0")


def test_a_mesh_that_does_not_fit_is_refused(cfg, run, tmp_path):
    with pytest.raises(ConfigError, match=r"data 4, fsdp 4, tensor 1.*16 of devices, there are 8"):
        mesh.make(MeshConfig(4, 4))
    with pytest.raises(ConfigError, match=r"data.batch 8 must be a multiple of 3: data 1 x fsdp 3"):
        run(tmp_path / "out", MeshConfig(fsdp=3))
    assert not (tmp_path / "out").exists()


# --- born in parts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(cfg):
    """As one device draws it."""
    return train.init_state(cfg, 1)


def test_born_in_parts(cfg, fresh, monkeypatch):
    """The same numbers as on one device, and the program that draws them has no room for the whole."""
    grid, jit, programs = mesh.make(MeshConfig(fsdp=8)), jax.jit, []

    def kept(f, **how):
        if "out_shardings" not in how:
            return jit(f, **how)
        programs.append(jit(f, **how).lower().compile())
        return programs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(mesh.jax, "jit", kept)
        state = train.born(cfg, 1, None, grid)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    q = state.params["llm"]["blocks"]["layers"]["q"]["weight"]
    assert {s.data.nbytes for s in q.addressable_shards} == {q.nbytes // 8}
    memory, whole = programs[0].memory_analysis(), sum(a.nbytes for a in jax.tree.leaves(fresh))
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 2


def test_begun_with_given_weights(cfg, fresh):
    """Those of a stage before, cut as they are laid down; what has no weights yet is drawn."""
    grid = mesh.make(CUBE)
    given = {g: jax.tree.map(lambda a: np.asarray(a) + 1, fresh.params[g]) for g in ("base", "large", "llm")}
    state = train.born(cfg, 1, given, grid)
    names = {g: p for g, p in fresh.params.items() if g.startswith("names")}
    want = fresh._replace(params={**given, **names})
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    found = jax.tree.map(lambda a: a.sharding, state)
    assert jax.tree.all(jax.tree.map(lambda a, p: p.is_equivalent_to(a, 3), found, mesh.places(grid, state)))


# --- one run, many meshes --------------------------------------------------------------------------------------------


def test_the_default_is_what_one_device_does_bit_for_bit(cfg, feed, alone, fresh):
    """`run` against the plain step, with no mesh anywhere."""
    state = jax.tree.map(jnp.copy, fresh)  # the step donates it
    for step, batch in enumerate(feed.batches(0)):
        state, metrics = train.compiled(cfg)(state, batch, train.job_at(cfg, step))
        row = log(alone[0])[step]
        assert {k: float(v) for k, v in metrics.items()} == {k: row[k] for k in metrics}
        assert row["tokens"] == (batch.segments >= 0).sum()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def eight(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("eight")
    return out, run(out, CUBE)


def test_eight_devices(alone, eight):
    same(log(eight[0]), log(alone[0]))
    grid = mesh.make(CUBE)
    for a, place in zip(jax.tree.leaves(eight[1]), jax.tree.leaves(mesh.places(grid, eight[1])), strict=True):
        assert a.sharding.is_equivalent_to(place, a.ndim)  # the step left everything where the rule has it
    for a, b in zip(jax.tree.leaves(mesh.whole(eight[1])), jax.tree.leaves(eight[1]), strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, b)
    assert mesh.whole(alone[1]).step is alone[1].step


@pytest.mark.slow
def test_everything_learns_on_eight_devices(worker, feed, tmp_path):
    """Encoders too, and layers that are scanned, with micro-batches, losses in chunks and the guard."""
    cfg = worker.settings(())
    how = replace(cfg.train, scan=True, accumulate=2, attention_block=16, loss_chunk=100, remat=True, skips=1)
    many = replace(cfg, train=how)
    train.run(cfg, feed, tmp_path / "one", watch.QUIET)
    for name, on in (("cube", CUBE), ("fsdp", MeshConfig(fsdp=4)), ("tensor", MeshConfig(data=2, tensor=4))):
        train.run(many, feed, tmp_path / name, watch.QUIET, on=on)
        same(log(tmp_path / name), log(tmp_path / "one"))


def test_two_processes_of_two_devices(processes, tmp_path):
    """Without a model: a layer cut over both, its gradient, who is first, what is agreed on, a checkpoint of parts."""
    out, share = tmp_path / "out", imported(SHARE)
    said, _ = processes(2, out, script=SHARE, devices=2)
    x, w, b = (np.asarray(a, np.float64) for a in (share.X, *(share.weights()["fc1"][k] for k in ("weight", "bias"))))
    y = x @ w.T + b
    want = {"weight": w - 0.1 * 2 / y.size * y.T @ x, "bias": b - 0.1 * 2 / y.size * y.sum(0)}
    for i, one in enumerate(said):
        assert one["rows"] == list(range(4 * i, 4 * i + 4))
        assert one["part"] == [[8, 3], [8, 3]]  # inputs are cut in four
        assert one["found"] == (i > 0)
        assert one["largest"] == 11
        assert one["same"]
        for name, leaf in want.items():
            np.testing.assert_allclose(one["after"]["fc1"][name], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max())
    like = mesh.shapes(mesh.make(CUBE), jax.eval_shape(share.weights))  # and eight devices of one process read it
    with contextlib.closing(checkpoint.Checkpoints(out / "c")) as ckpts:
        again = ckpts.restore(like)
    assert jax.tree.map(lambda a: np.asarray(a).tolist(), again) == said[0]["after"]


def damage(folder, process):
    """Cuts what a process has written in two, where it is longest."""
    files = (p for p in (folder / "default" / f"ocdbt.process_{process}").rglob("*") if p.is_file())
    os.truncate(path := max(files, key=lambda p: p.stat().st_size), path.stat().st_size // 2)


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.slow
def test_two_processes(alone, run, processes, tmp_path):
    """One of them is told to stop: both finish the step, save together and leave with 75. Eight devices of one process
    go on from there. So do two processes, of whom one finds its part of what was saved last damaged: both go back to
    what was saved before."""
    two, want = tmp_path / "two", log(alone[0])
    _, told = processes(2, two, "fsdp=2", int(signal.SIGTERM), codes=(watch.RESUME,))
    assert all("SIGTERM at step 2 of 4; it is saved" in err for err in told)
    same(log(two), want[:2])
    assert sorted(p.name for p in (two / "checkpoints").iterdir()) == ["1", "2"]

    shutil.copytree(two, tmp_path / "eight")
    state = run(tmp_path / "eight", CUBE)
    same(log(tmp_path / "eight"), want)
    close(state.params, alone[1].params)

    damage(two / "checkpoints" / "2", 1)
    said, told = processes(2, two, "fsdp=2")
    same(log(two), want)
    assert "2: damaged (the part of another process is damaged), now damaged-2; going on from step 1" in told[0]
    assert "damaged" not in told[1]  # it is said once
    assert [one["rows"] for one in said] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for one in said:
        assert 0.5 < one["held"] < 0.6  # half of the matrices and all of the vectors
        assert one["steps"] == [1, 2, 3, 4]
        assert one["again"] == one["state"] == said[0]["state"]  # as it was saved, sums and all


@pytest.mark.slow
def test_four_processes_killed_go_on_bit_for_bit(alone, processes, tmp_path):
    """kill -9 of all of them, in a step after one that was saved. And two go on where four were."""
    whole, _ = processes(4, tmp_path / "whole", "data=2,fsdp=2")
    same(log(tmp_path / "whole"), log(alone[0]))
    assert [one["rows"] for one in whole] == [[2 * i, 2 * i + 1] for i in range(4)]
    assert all(0.5 < one["held"] < 0.6 for one in whole)  # half of the matrices and all of the vectors
    processes(4, tmp_path / "killed", "data=2,fsdp=2", int(signal.SIGKILL), codes=(-signal.SIGKILL,))
    assert not (tmp_path / "killed" / "checkpoints" / "4").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "others")
    again, _ = processes(4, tmp_path / "killed", "data=2,fsdp=2")
    assert {one["state"] for one in again} == {one["state"] for one in whole}
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    said, _ = processes(2, tmp_path / "others", "tensor=2")
    same(log(tmp_path / "others"), log(alone[0]))
    assert [one["rows"] for one in said] == [list(range(8))] * 2


def test_rules_and_meshes_go_together(cfg, fresh):
    """What is frozen has no moments, on any mesh."""
    how = replace(cfg.train, rules=(Rule(r"llm\.embed"), Rule(r".*", 0.0)))
    where = mesh.places(mesh.make(CUBE), jax.eval_shape(lambda: optim.init(how, fresh.params)))
    assert len([s for s in jax.tree.leaves(where) if s.spec != P()]) == 2
