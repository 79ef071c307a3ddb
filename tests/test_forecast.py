"""Forecasts: the step a config would take, on devices that are simulated and on a slice that is not there."""

import importlib.util
import json
from dataclasses import replace
from importlib import metadata

import jax
import numpy as np
import pytest

from hypervl_jax import account, cli, forecast, mesh, needs, presets, train
from hypervl_jax.chips import CHIPS, TPUS, peak
from hypervl_jax.config import BRANCHES, ConfigError, DclConfig
from hypervl_jax.forecast import Unfit
from hypervl_jax.mesh import MeshConfig
from hypervl_jax.train import Job


@pytest.fixture(scope="module")
def cfg(tiny_config):
    how = replace(tiny_config.train, stage0_steps=0, name_weight=0.0, optimizer="adamw", remat=True, loss_chunk=128)
    data = replace(tiny_config.data, batch=8, tile_buckets=(1,), lengths=(32,))
    return replace(tiny_config, train=how, data=data, dcl=replace(tiny_config.dcl, weight=0.0))


@pytest.fixture(scope="module")
def found(cfg):
    return forecast.forecast(cfg, forecast.topology("h100:8"), MeshConfig(2, 4))


def test_shapes_are_those_of_a_batch(tiny_config, tiny_batches):
    """What is compiled for is what training is fed."""
    for batch in tiny_batches:
        bucket = tiny_config.data.tile_buckets.index(batch.tiles.shape[1])
        want = forecast.batch_shapes(tiny_config, bucket)
        assert [(a.shape, a.dtype) for a in batch] == [(a.shape, a.dtype) for a in want]


def test_what_a_step_takes(cfg, found):
    state = jax.eval_shape(lambda: train.init_state(cfg, 14))
    whole = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(state))
    assert whole / 4 < found.state < whole / 3  # matrices in four parts, vectors whole
    assert found.memory > found.state
    assert {c.kind for c in found.collectives} >= {"all-gather", "all-reduce"}
    assert {c.group for c in found.collectives} <= {2, 4, 8}
    assert found.tokens == 8 * 32
    weights = sum(int(np.prod(a.shape)) * 4 for a in jax.tree.leaves(state.params))
    assert found.crossing < 6 * weights  # rows stay where they are: weights are gathered, activations are not added up
    low, high = found.step
    assert low == max(found.seconds.values()) < high == sum(found.seconds.values())
    chip = CHIPS["h100"]
    assert found.seconds["products"] == found.flops / 8 / chip.flops
    assert found.seconds["links"] == pytest.approx(sum(c.received for c in found.collectives) / chip.link)
    said = "\n".join(forecast.lines(found))
    for part in ("h100:8: 8 devices, mesh data 2, fsdp 4, tensor 1", "8 rows of 32 tokens and 1 tiles", chip.source):
        assert part in said
    values = json.loads(forecast.to_json(found))
    assert values["step_seconds"] == [low, high]
    assert values["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}


def test_products_against_the_formula_and_the_unrolled_program(cfg, found):
    """Forward once and backward twice of what a decoder and an encoder multiply; with remat once more, but for the last
    product of a block, which no gradient asks for."""
    m, n, l = cfg.model, cfg.data.batch, cfg.data.lengths[0]
    c, v, p = m.llm, m.large, m.policy
    llm = l * c.depth * (2 * c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_dim + 6 * c.width * c.mlp)
    llm += c.depth * 4 * l * l * c.heads * c.head_dim
    vit = v.patches * v.depth * (8 * v.width**2 + 4 * v.width * v.mlp) + v.depth * 4 * v.patches**2 * v.width
    wide = v.width * p.merge**2
    rest = p.tokens_per_tile * 2 * (wide * c.width + c.width**2) + l * 2 * c.vocab * c.width
    patch = v.patches * 2 * 3 * p.patch**2 * v.width
    want = n * (3 * (llm + vit + rest) + 2 * patch)  # no gradient into pixels
    assert found.useful == pytest.approx(want, rel=0.01)
    last = l * c.depth * 2 * c.width * c.mlp + v.patches * v.depth * 2 * v.width * v.mlp
    anew = n * (llm + vit - last + l * 2 * c.vocab * c.width)
    assert found.flops - found.useful == pytest.approx(anew, rel=0.001)

    plain = replace(cfg, train=replace(cfg.train, remat=False, loss_chunk=0, scan=False))
    shapes = jax.eval_shape(lambda: train.init_state(plain, 14)), forecast.batch_shapes(plain, 0)
    step = jax.jit(lambda s, b: train.gradients(s.params, plain, Job(("large",)), b))
    by_trace = account.flops(lambda s, b: train.gradients(s.params, plain, Job(("large",)), b), *shapes)
    counted = step.lower(*shapes).compile().cost_analysis()["flops"]  # what is not a product counts there as well
    assert by_trace <= counted < 1.25 * by_trace


def test_the_dearest_step_of_a_schedule(tiny_config):
    def dearest(**how):
        return forecast.dearest(replace(tiny_config, dcl=DclConfig(**how)))

    assert dearest() == Job(("base",))  # which also reads Large's answers
    assert dearest(weight=0.0) == Job(("large",))
    assert dearest(schedule="joint") == Job(BRANCHES)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_what_to_change(cfg, found, monkeypatch):
    where = forecast.topology("h100:8")

    def refused(memory):
        small = where._replace(chip=where.chip._replace(memory=memory))
        with pytest.raises(Unfit) as e:
            forecast.forecast(cfg, small, MeshConfig(2, 4))
        return str(e.value)

    assert "spread them over more devices: a mesh with a larger fsdp than 4" in refused(found.state * 0.9)
    room = max(2.1 * found.state, 0)
    if found.memory > room:
        assert "--mesh data=2,fsdp=2,tensor=2" in refused(room)  # one row a device: it is cut itself
    assert forecast._cure(replace(cfg, data=replace(cfg.data, batch=32)), MeshConfig(2, 4), 1, 9.0).startswith(
        "fewer rows at a time: --accumulate 2 halves the 4"
    )
    assert "shorter rows" in forecast._cure(cfg, MeshConfig(8), 1, 9.0)


@pytest.mark.parametrize(
    "wrong", ["v5e", "v5e:", "v9:4x4", "v5e:4by4", "h100:16", "cpu:0x", "cpu:64", "../v5e:2x2", "tpu"]
)
def test_topologies_that_are_none(wrong):
    assert jax.device_count() == 8  # so they are there, and none can be added
    with pytest.raises(ConfigError, match=f"topology '?{wrong.replace('.', chr(92) + '.')}"):
        forecast.topology(wrong)


def test_meshes_and_batches_that_do_not_go_together(cfg):
    where = forecast.topology("cpu:8")
    with pytest.raises(ConfigError, match="mesh: 4 devices, cpu:8 has 8"):
        forecast.forecast(cfg, where, MeshConfig(fsdp=4))
    with pytest.raises(ConfigError, match=r"data.batch 4 must be a multiple of 8"):
        forecast.forecast(forecast.resized(cfg, 4), where)
    with pytest.raises(ConfigError, match=r"data.batch 5 must be a multiple of train.accumulate 2"):
        forecast.resized(cfg, 5, 2)
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        forecast.resized(cfg, 0)


def test_every_figure_has_a_source():
    for name, chip in CHIPS.items():
        assert chip.source.startswith("https://")
        assert 1e14 < chip.flops < 1e16
        assert chip.link < chip.bandwidth < chip.flops
        assert (chip.node > 8) == (name in TPUS)
    assert peak("TPU v5 lite") == peak("TPU v5e") == 197e12
    assert peak("NVIDIA A100-SXM4-40GB") == peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("cpu") == 0
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


# --- the verb --------------------------------------------------------------------------------------------------------


def test_plan_says_how_to_come_by_a_compiler(monkeypatch, capsys):
    find = needs.importlib.util.find_spec
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(SystemExit):
        cli.main(["plan", "--topology", "v5e:4x4", "--config", "tiny"])
    assert capsys.readouterr().err == (
        "hypervl: libtpu is not installed: pip install 'hypervl-jax[plan]', or `make setup` in a clone\n"
    )


def test_plan_takes_the_compiler_that_goes_with_jax(monkeypatch, capsys):
    """Another one's programs may be unreadable, or not compiled at all."""
    version, pin = metadata.version, next(r for r in metadata.requires("jax") if r.startswith("libtpu=="))
    exact = pin.split(";")[0].strip().removeprefix("libtpu==").replace("*", "7")
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(metadata, "version", lambda name: exact if name == "libtpu" else version(name))
    needs.compiler()
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == "libtpu" else version(name))
    with pytest.raises(SystemExit):
        cli.main(["plan", "--topology", "v5e:4x4", "--config", "tiny"])
    said = capsys.readouterr().err
    assert said.startswith(f"hypervl: libtpu 0.0.1: JAX {version('jax')} goes with 0.0.")
    assert said.endswith("pip install 'jax[tpu]'\n")


def test_plan_refuses_a_bucket_that_is_none(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--topology", "cpu:8", "--config", "tiny", "--bucket", "3"])
    assert "--bucket 3: tiny has 3, counted from 0" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the plan extra")
def test_a_slice_that_is_not_there():
    """Compiled by the TPU's own compiler: the state is cut as the rule says, and collectives are found in its text."""
    cfg = presets.tiny()
    how = replace(cfg.train, stage0_steps=0, name_weight=0.0, optimizer="adamw", compute_dtype="bfloat16")
    cfg = replace(cfg, train=how, data=replace(cfg.data, batch=16, tile_buckets=(1,), lengths=(64,)))
    found = forecast.forecast(cfg, forecast.topology("v5e:4x4"), MeshConfig(fsdp=8, tensor=2))
    assert {c.group for c in found.collectives} <= {2, 8, 16}
    assert found.crossing > 0
    assert found.traffic > found.state
    with pytest.raises(ConfigError, match="topology v5e:3x5"):
        forecast.topology("v5e:3x5")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the plan extra")
@pytest.mark.parametrize(
    ("name", "sizes"), [("v6e:8x8", (2, 32, 1)), ("v5p:4x4x4", (1, 32, 2)), ("v5e:16x16", (1, 64, 4))]
)
def test_an_axis_may_be_a_part_of_a_slices_side(name, sizes):
    """Sizes need not be products of a slice's sides: every chip has one place, whichever way the axes cut it."""
    chips = forecast.topology(name).devices
    found = mesh.make(MeshConfig(*sizes), chips)
    assert tuple(found.shape.values()) == sizes
    assert sorted(d.id for d in found.devices.flat) == sorted(d.id for d in chips)
