"""Model directories and training checkpoints: there and back, and every kind of damage named by its file."""

import json
import os
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypervl_jax import checkpoint, config, tensors
from hypervl_jax.checkpoint import CheckpointError, Checkpoints
from hypervl_jax.config import ConfigError
from hypervl_jax.tokens import TextError

WEIGHTS, CONFIG = tensors.FILE, checkpoint.CONFIG
EMBED, NORM, POS = (
    "llm.model.embed_tokens.weight",
    "llm.model.norm.weight",
    "base.vision_model.embeddings.position_embedding.weight",
)


@pytest.fixture(scope="module")
def params(tiny_params, tiny_config):
    expected = checkpoint.expected(tiny_config.model)
    vrc = {k: np.full(s, 0.1, np.float32) for k, s in expected.items() if k.startswith("vrc.")}
    return {**tiny_params, **tensors.unflatten(vrc)}


@pytest.fixture
def saved(tmp_path, params, tiny_config, tiny_tokenizer):
    """A model directory of this test's own."""
    return checkpoint.save_model(tmp_path / "m", tiny_config.model, params, tiny_tokenizer, {"steps": 3})


def tamper(path, change):
    """Applies `change` to the weights of a model directory as a plain dictionary."""
    flat = load_file(path / WEIGHTS)
    change(flat)
    save_file(flat, path / WEIGHTS)


# --- model directories -----------------------------------------------------------------------------------------------


def test_a_model_comes_back_bit_equal(saved, params, tiny_config, tiny_tokenizer):
    model = checkpoint.load_model(saved)
    assert model.config == tiny_config.model
    assert model.info == {"steps": 3}
    assert model.tokenizer.encode("what is this?") == tiny_tokenizer.encode("what is this?")
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["m"]  # nothing half-written beside it


def test_half_precision_is_half_the_bytes(saved, params, tiny_config, tiny_tokenizer):
    half = checkpoint.save_model(saved.with_name("half"), tiny_config.model, params, tiny_tokenizer, dtype=np.float16)
    assert (half / WEIGHTS).stat().st_size < 0.6 * (saved / WEIGHTS).stat().st_size
    got = checkpoint.load_model(half).params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float16(b)), got, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}


def test_other_float_types_are_read_as_f32(saved, params):
    tamper(saved, lambda f: f.update({POS: f[POS].astype(jnp.bfloat16)}))
    got = checkpoint.load_model(saved).params["base"]["vit"]["pos"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, params["base"]["vit"]["pos"], rtol=1e-2)


def test_saving_again_replaces_the_model_whole(saved, params, tiny_config, tiny_tokenizer):
    (saved / "stale").write_text("")
    other = jax.tree.map(lambda a: a + 1, params)
    checkpoint.save_model(saved, tiny_config.model, other, tiny_tokenizer)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_model(saved).params, other)
    assert not (saved / "stale").exists()


def test_what_lies_beside_a_model_is_left_alone(saved, params, tiny_config, tiny_tokenizer):
    for name in ("m.part", "m.old"):
        (saved.parent / name).mkdir()
        (saved.parent / name / "thesis.txt").write_text("words")
    checkpoint.save_model(saved, tiny_config.model, params, tiny_tokenizer)
    assert sorted(str(p.relative_to(saved.parent)) for p in saved.parent.glob("m.*/*")) == [
        os.path.join("m.old", "thesis.txt"), os.path.join("m.part", "thesis.txt")
    ]  # fmt: skip


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace
    out.mkdir()
    (out / "old").write_text("")

    def fails(source, target):
        if target == out and source.name == "new":
            raise PermissionError("held open")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(PermissionError), checkpoint.replacing(out) as new:
        (new / "new").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_an_empty_folder_is_filled_where_it_is(tmp_path, monkeypatch):
    """Someone may stand in it."""
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    with checkpoint.replacing(".") as new:
        (new / "file").write_text("")
    assert tmp_path.stat().st_ino == inode
    assert os.listdir() == ["file"]


def test_weights_that_are_not_finite_are_not_saved_and_the_old_ones_stay(saved, params, tiny_config, tiny_tokenizer):
    bad = {**params, "llm": {**params["llm"], "embed": params["llm"]["embed"] * np.nan}}
    with pytest.raises(CheckpointError, match=r"not finite.*: llm\.model\.embed_tokens\.weight"):
        checkpoint.save_model(saved, tiny_config.model, bad, tiny_tokenizer)
    huge = {**params, "llm": {**params["llm"], "embed": params["llm"]["embed"] * np.float32(1e6)}}
    with pytest.raises(CheckpointError, match="not finite"):  # as f16 they would not be
        checkpoint.save_model(saved, tiny_config.model, huge, tiny_tokenizer, dtype=np.float16)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_model(saved).params, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop(EMBED), f"missing {EMBED}"),
        (lambda f: f.update(extra=f[EMBED]), "unknown extra"),
        (lambda f: f.update({EMBED: f[EMBED][:-1]}), f"{EMBED} is (511, 48), not (512, 48)"),
        (lambda f: f.update({POS: f[POS] * np.nan}), f"{POS} is not finite"),
        (lambda f: f.update({POS: f[POS].astype(np.int8)}), f"{POS} is int8"),
        (lambda f: f.update({POS: f[POS] * np.float64(1e200)}), f"{POS} is not finite"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named_with_their_file(saved, change, message):
    tamper(saved, change)
    with pytest.raises(CheckpointError) as e:
        checkpoint.load_model(saved)
    assert str(saved / WEIGHTS) in str(e.value)
    assert message in str(e.value)


def test_all_that_is_wrong_is_reported_together(saved):
    tamper(saved, lambda f: (f.pop(EMBED), f.pop(NORM), f.update(x=f[POS])))
    with pytest.raises(CheckpointError, match=f"3 weights.*missing {EMBED}; missing {NORM}; unknown x"):
        checkpoint.load_model(saved)


def _bfloat16(data: bytes) -> bytes:
    return data.replace(b'"F32"', b'"BF16"')


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"\xff" * 64,
        lambda data: b"PK\x03\x04" + data[4:],
        lambda data: data + b"0",
        _bfloat16,
    ],
    ids=["half", "one-byte-short", "no-header", "empty", "noise", "zip", "one-byte-more", "other-dtype"],
)
def test_damaged_weights_are_an_error_that_names_the_file(saved, damage):
    path = saved / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as e:
        checkpoint.load_model(saved)
    assert str(path) in str(e.value)


def test_missing_weights_are_an_error_that_names_the_file(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        checkpoint.load_model(saved)


@pytest.mark.parametrize(
    "written",
    [b"", b"{", b"[]", b"3", b'{"format": 1}', b'{"model": 3}', b'{"model": {"base": {}}}', b"\xff\xfe", b"[" * 10**5],
    ids=lambda b: b[:24].decode("latin1"),
)
def test_a_damaged_config_is_an_error_that_names_the_file(saved, written):
    (saved / CONFIG).write_bytes(written)
    with pytest.raises((CheckpointError, ConfigError)) as e:
        checkpoint.load_model(saved)
    assert str(saved / CONFIG) in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "not a model of format 2"),
        ({"model_type": "qwen3"}, "'qwen3' is a part of a model"),
        ({"info": ["x"]}, "info: expected a table"),
        ({"info": {"vrc_scale": "x"}}, "vrc_scale above 0"),
        ({"info": {"vrc_scale": float("nan")}}, "vrc_scale above 0"),
        ({"info": {"vrc_scale": -1}}, "vrc_scale above 0"),
        ({"info": {"vrc_scale": True}}, "vrc_scale above 0"),
    ],
)
def test_what_stands_beside_the_sizes_in_a_config_is_checked(saved, change, message):
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        checkpoint.load_model(saved)


def test_sizes_in_the_config_that_cannot_be_are_an_error_that_names_the_setting(saved):
    values = json.loads((saved / CONFIG).read_text())
    values["model"]["llm"]["kv_heads"] = 3
    (saved / CONFIG).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: model\.llm: heads 4 must be a multiple of kv_heads 3"):
        checkpoint.load_model(saved)


def test_a_damaged_tokenizer_is_an_error_that_names_the_file(saved):
    (saved / checkpoint.TOKENIZER).write_text("{}")
    with pytest.raises(TextError, match=checkpoint.TOKENIZER):
        checkpoint.load_model(saved)


def test_a_model_is_found_by_its_folder_or_that_of_its_run(saved):
    assert checkpoint.find_model(saved) == saved
    (saved.parent / "run").mkdir()
    saved.rename(saved.parent / "run" / "model")
    assert checkpoint.find_model(saved.parent / "run") == saved.parent / "run" / "model"


def test_a_run_without_its_model_is_none(saved, tmp_path, tiny_config, monkeypatch):
    """It does not stand before weights that ship under its name; without those, the error says what it is."""
    run = tmp_path / "nano"
    run.mkdir()
    (run / CONFIG).write_text(json.dumps(config.to_dict(tiny_config)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "weights")
    with pytest.raises(CheckpointError, match="nano: a run that has not made its model yet"):
        checkpoint.find_model("nano")
    shutil.copytree(saved, tmp_path / "weights" / "nano")
    assert checkpoint.find_model("nano") == tmp_path / "weights" / "nano"


@pytest.mark.parametrize(("make", "message"), [(True, "has no config.json"), (False, "does not exist")])
def test_what_is_no_model_is_an_error_with_the_cure(tmp_path, make, message):
    path = tmp_path / "nothing"
    if make:
        path.mkdir()
    with pytest.raises(CheckpointError, match=f"nothing: {message}; give a model directory or the name"):
        checkpoint.load_model(path)


# --- training checkpoints --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    step: jax.Array
    params: dict


def pair(step, width=3):
    return Pair(jnp.int32(step), {"a": {"w": jnp.arange(width, dtype=jnp.float32) + step}})


def test_the_latest_state_comes_back_and_old_ones_go(tmp_path):
    ckpts = Checkpoints(tmp_path, keep=2)
    assert ckpts.latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        ckpts.restore(pair(0))
    for step in (2, 4, 6):
        ckpts.save(step, pair(step))
    ckpts.close()
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest() == 6
    got = again.restore(pair(0))
    assert type(got) is Pair
    jax.tree.map(np.testing.assert_array_equal, got, pair(6))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "6"]
    again.close()


def test_a_state_comes_back_on_this_machines_device_wherever_it_was_written(tmp_path):
    ckpts = Checkpoints(tmp_path)
    ckpts.save(2, jax.device_put(pair(2), jax.devices()[3]))
    got = ckpts.restore(jax.eval_shape(lambda: pair(0)))
    ckpts.close()
    assert {d for leaf in jax.tree.leaves(got) for d in leaf.devices()} == {jax.local_devices()[0]}
    jax.tree.map(np.testing.assert_array_equal, got, pair(2))


def test_what_is_told_of_a_checkpoint_comes_back_and_the_best_stays(tmp_path):
    ckpts = Checkpoints(tmp_path, keep=1)
    for step, loss in ((1, 3.0), (2, 1.0 / 3), (3, 2.0), (4, 0.5)):
        ckpts.save(step, pair(step), {"loss": loss, "seed": 7})
    ckpts.save(5, pair(5))  # one without a loss is not the best
    assert (ckpts.best(), ckpts.latest()) == (2, 5)
    ckpts.close()
    again = Checkpoints(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "5"]
    assert again.best() == 2
    assert {k: v for k, v in again.about(2).items() if k not in ("sums", "seal")} == {"loss": 1.0 / 3, "seed": 7}
    again.save(6, pair(6), {"loss": 0.25})
    again.close()
    assert Checkpoints(tmp_path).best() == 6


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path):
    """It is written while the next steps are given its buffers."""
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 2 + 1, s), donate_argnums=0)
    ckpts, state, want = Checkpoints(tmp_path, keep=5), pair(1, 100_000), {}
    for n in range(1, 5):
        want[n] = jax.tree.map(np.array, state)
        ckpts.save(n, state)
        for _ in range(3):
            state = step(state)
    ckpts.close()
    again = Checkpoints(tmp_path, keep=5)
    for n in range(1, 5):
        jax.tree.map(np.testing.assert_array_equal, again._read(n, pair(0, 100_000)), want[n])
    again.close()


def test_what_is_not_finite_is_not_saved(tmp_path):
    ckpts = Checkpoints(tmp_path)
    ckpts.save(1, pair(1))
    bad = pair(2)._replace(params={"a": {"w": jnp.array([1.0, jnp.inf, 0.0])}})
    with pytest.raises(CheckpointError, match=r"2: not finite: params\.a\.w; it is not written"):
        ckpts.save(2, bad)
    ckpts.close()
    assert [p.name for p in tmp_path.iterdir() if p.name.isdigit()] == ["1"]


def test_sums_tell_any_bit_from_any_other_and_know_no_devices():
    rng = np.random.default_rng(0)
    a = {"a": rng.normal(size=(8, 6)).astype(np.float32), "b": rng.integers(0, 9, 24).astype(np.int32)}
    a |= {"c": jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16), "d": np.array([True, False]), "e": np.int32(3)}
    sums = {k: np.asarray(v) for k, (v, _) in checkpoint._survey(a).items()}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    spread = jax.device_put(a["a"], jax.NamedSharding(mesh, jax.P("x", "y")))
    np.testing.assert_array_equal(checkpoint._survey({"a": spread})["a"][0], sums["a"])
    flipped = a["a"].copy()
    for _ in range(40):
        flipped.view(np.uint32)[rng.integers(8), rng.integers(6)] ^= np.uint32(1) << rng.integers(32, dtype=np.uint32)
        now = np.asarray(checkpoint._survey({"a": flipped})["a"][0])
        assert (now != sums["a"]).all() or (flipped == a["a"]).all()
    swapped = a["a"][::-1].copy()
    assert (np.asarray(checkpoint._survey({"a": swapped})["a"][0]) != sums["a"]).any()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves readers behind
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(damage, tmp_path, capsys):
    """File by file: it is told of and the one before it is used, or what was damaged did not matter."""
    ckpts = Checkpoints(tmp_path / "c", keep=2)
    ckpts.save(2, pair(2, 4_000), {"loss": 2.0})
    ckpts.save(4, pair(4, 4_000), {"loss": 1.0})
    ckpts.close()
    files = sorted(p.relative_to(tmp_path / "c") for p in (tmp_path / "c" / "4").rglob("*") if p.is_file())
    told = 0
    for n, file in enumerate(files):
        shutil.copytree(tmp_path / "c", here := tmp_path / f"{n}")
        data = bytearray((here / file).read_bytes())
        if damage == "gone":
            (here / file).unlink()
        else:
            data[len(data) // 2 : len(data) // 2 + 1] = b"" if not data else bytes([data[len(data) // 2] ^ 4])
            (here / file).write_bytes(data if damage == "flip" else data[: len(data) // 2])
        again = Checkpoints(here, keep=2)
        got = again.restore(pair(0, 4_000))
        said = capsys.readouterr().err
        step = int(got.step)
        jax.tree.map(np.testing.assert_array_equal, got, pair(step, 4_000))
        if step == 2:
            told += 1
            assert f"{here / '4'}: damaged (" in said
            assert "now damaged-4; going on from step 2" in said
            assert (again.latest(), (here / "damaged-4").is_dir()) == (2, True)
            again.save(4, pair(4, 4_000))  # what is gone on with comes there again
        else:
            assert said == ""
        again.close()
    assert told >= 2


def test_where_no_checkpoint_is_whole_nothing_is_moved(tmp_path):
    ckpts = Checkpoints(tmp_path, keep=2)
    ckpts.save(2, pair(2))
    ckpts.save(4, pair(4))
    ckpts.close()
    for file in tmp_path.rglob("_CHECKPOINT_METADATA"):
        file.write_text(file.read_text().replace("sums", "sumo"))
    again = Checkpoints(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match=r"4: cannot be resumed .*seal.*so are 1 more, and none is whole"):
        again.restore(pair(0))
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "4"]


def test_a_checkpoint_of_an_older_version_is_read(tmp_path):
    """They were written without a word about them."""
    ckpts = Checkpoints(tmp_path)
    ckpts._manager.save(2, args=ckpts._ocp.args.StandardSave(pair(2)))
    ckpts.close()
    again = Checkpoints(tmp_path)
    assert again.about(2) == {}
    jax.tree.map(np.testing.assert_array_equal, again.restore(pair(0)), pair(2))
    again.close()


@pytest.mark.skipif(checkpoint.fcntl is None, reason="no locks here")
def test_two_runs_cannot_write_to_one_folder(tmp_path):
    first = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="another run is writing there"):
        Checkpoints(tmp_path)
    first.close()
    Checkpoints(tmp_path).close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves readers behind
def test_a_state_of_another_shape_or_a_damaged_one_is_an_error_that_names_its_folder(tmp_path, monkeypatch):
    """Only of a damaged one it is said that it may be deleted."""
    ckpts = Checkpoints(tmp_path)
    ckpts.save(2, pair(2))
    for other in (Pair(jnp.int32(0), {"b": {"w": jnp.zeros(3)}}), pair(0, width=4)):
        with pytest.raises(CheckpointError, match=r"2: cannot be resumed.*other settings or another version"):
            ckpts.restore(other)
    with monkeypatch.context() as patched:
        patched.setattr(ckpts._handler, "restore", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(CheckpointError, match=r"2: cannot be resumed \(MemoryError.*may be whole"):
            ckpts.restore(pair(0))
    for worst, said in ((1, "the part of another process is damaged.*delete that"), (2, "another process.*be whole")):
        with monkeypatch.context() as patched:  # what another process has found counts here
            patched.setattr(checkpoint.mesh, "agree", lambda mine, worst=worst: max(mine, worst))
            with pytest.raises(CheckpointError, match=rf"2: cannot be resumed.*{said}"):
                ckpts.restore(pair(0))
    ckpts.close()
    for file in (tmp_path / "2").rglob("_METADATA"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"2: cannot be resumed.*delete that folder"):
        again.restore(pair(0))
    again.close()
