"""Every file under `configs/` is a config, of a model or of a pair; the stages at the paper's size, and their twins,
one after another; the pairs at the paper's size."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from hypervl_jax import config, needs, optim, plan, quickstart, text, train
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES
from hypervl_jax.data import feeds
from hypervl_jax.rescale import train as pair_training
from hypervl_jax.tensors import flatten
from hypervl_jax.watch import QUIET

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
PAIRS = [f for f in FILES if f.stem.startswith(("hcd", "light"))]
STAGES = ("stage1_align", "stage2_pretrain", "stage3_dcl")


@pytest.fixture(scope="module")
def tiny():
    """A stage's twin, in one bucket and two steps: one of each branch."""

    def tiny(name):
        (path,) = (f for f in FILES if f.stem == name)
        scope: dict = {}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        cfg = scope["get_tiny"]()
        data = dataclasses.replace(cfg.data, tile_buckets=(5,), lengths=(128,))
        steps = min(cfg.train.steps, 2)
        return dataclasses.replace(cfg, data=data, train=dataclasses.replace(cfg.train, steps=steps, save_every=2))

    return tiny


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_config_is_a_value_that_json_holds(path):
    cfg = (needs.pair_config if path in PAIRS else needs.load_config)(str(path))
    assert cfg.name == path.stem
    assert config.from_dict(type(cfg), config.to_dict(cfg)) == cfg


@pytest.mark.parametrize(("scale", "parameters"), [(2, 1_667_952), (4, 4_355_136)])
def test_a_pair_at_the_papers_size(scale, parameters):
    """Network, rates and crops are the official ones, and its step can be traced."""
    cfg = needs.pair_config(str(FILES[0].parent / f"hcd_x{scale}.py"))
    state = jax.eval_shape(lambda: pair_training.init_state(cfg))
    assert sum(x.size for x in jax.tree.leaves(state.params)) == parameters
    t = cfg.train
    assert (t.batch, t.crop, t.lr, t.clip, t.weight_decay, t.seed) == (16, 144, 2e-4, 10, 1e-5, 10)
    hr, small = (jax.ShapeDtypeStruct((t.batch, s, s, 3), np.uint8) for s in (t.crop, t.crop // scale))
    after, told = jax.eval_shape(lambda *x: pair_training.train_step(*x, cfg), state, hr, small)
    assert after == state
    assert {x.shape for x in told.values()} == {()}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_at_the_papers_size(name):
    """Its rules cover every parameter, its largest picture and the text around it fit its longest row."""
    cfg = needs.load_config(str(FILES[0].parent / f"{name}.py"))
    shapes = jax.eval_shape(lambda: train.init_state(cfg, 14)).params
    speed = {
        path.split(".")[0] + "." + path.split(".")[1]: rate
        for path, rate in flatten(optim.rates(cfg.train, shapes)).items()
    }
    assert {speed["base.projector"], speed["large.projector"]} == {1.0}
    assert {speed["base.vit"], speed["large.vit"]} == ({0.0} if name == "stage1_align" else {0.25})
    assert {speed["llm.embed"], speed["llm.blocks"]} == ({0.0} if name == "stage1_align" else {1.0})
    assert (cfg.dcl.weight > 0) == (name == "stage3_dcl")
    assert (cfg.train.compute_dtype, cfg.train.remat, cfg.train.loss_chunk > 0) == ("bfloat16", True, True)
    large = [plan.make((3000, w), 1.0, cfg.model.policy) for w in range(1000, 9001, 500)]
    assert max(p.n_tiles for p in large) == cfg.data.tile_buckets[-1]
    assert max(text.visual_tokens(p, cfg.model.text) for p in large) < 0.7 * cfg.data.lengths[-1]


def test_the_twins_train_one_after_another(tiny, tiny_source, tiny_sheets, tiny_tokenizer, tiny_classes, tmp_path):
    words, params = (tiny_source, tiny_sheets, tiny_tokenizer, tiny_classes), None
    for name in STAGES:
        cfg = tiny(name)
        assert cfg.name == name
        before = train.init_state(cfg, len(tiny_classes), params).params
        state = train.run(cfg, feeds.Screens(cfg, *words), tmp_path / name, QUIET, params)
        params = jax.tree.map(np.asarray, state.params)
        old = {k: np.asarray(v) for k, v in flatten(before).items()}
        moved = {k for k, v in flatten(params).items() if (v != old[k]).any()}
        learns = set(flatten(optim.learning(cfg.train, params)))
        assert moved <= learns
        assert learns - moved <= {f"{b}.vit.blocks.layers.k.bias" for b in BRANCHES}  # softmax does not feel it
        assert any(k.startswith("llm.") for k in moved) == (name != "stage1_align")
        rows = quickstart.curves(tmp_path / name / "log.jsonl")
        assert [("loss_large" in r, "loss_base" in r) for r in rows] == [(True, False), (False, True)]
        assert ["kl" in r for r in rows] == [False, name == "stage3_dcl"]


def test_the_twin_of_vrc_learns_from_a_models_labels(tiny, tiny_model, tiny_source):
    cfg, some = tiny("vrc"), tiny_source.records[:4]
    assert cfg.train.steps == 0  # the model stands still
    cfg = dataclasses.replace(cfg, vrc=dataclasses.replace(cfg.vrc, ratios=(0.5, 1.0)))
    found = quickstart.label(tiny_model, cfg, some)
    assert found.kept.any()
    model, history = quickstart.fit_vrc(tiny_model, cfg, some, found)
    assert len(history) == cfg.vrc.steps
    assert np.isfinite(history).all()
    assert isinstance(model, Model)
    for group in (*BRANCHES, "llm"):
        assert model.params[group] is tiny_model.params[group]
    old = flatten(tiny_model.params["vrc"])
    assert any((np.asarray(v) != np.asarray(old[k])).any() for k, v in flatten(model.params["vrc"]).items())
