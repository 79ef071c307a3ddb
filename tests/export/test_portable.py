"""Parts as portable StableHLO: what is read back computes what the part computes."""

import jax
import numpy as np
import pytest

from hypervl_jax import cli, needs
from hypervl_jax.export import parts, portable
from hypervl_jax.export.lower import ExportError

SMALL = {"prefill": (64,), "cache": 96, "branches": ("base",)}


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("portable") / "server"
    portable.write(tiny_model, out, **SMALL)
    return out


def test_every_entry_point_goes_round(folder, tiny_model):
    rng = np.random.default_rng(0)
    made = parts.make(tiny_model.config, tiny_model.params, ("base",), (64,), 96)
    entries = [f"{name}.{s.name}" for name, part in made.items() for s in part.signatures]
    assert sorted(p.stem for p in folder.glob("*.stablehlo")) == sorted(entries)
    assert sorted(p.stem for p in folder.glob("*.safetensors")) == sorted(made)

    def draw(x):
        return rng.integers(0, 8, x.shape, x.dtype) if x.dtype == np.int32 else rng.random(x.shape, x.dtype)

    for name, part in made.items():
        for s in part.signatures:
            call, weights = portable.load(folder, name, s.name)
            args = jax.tree.map(draw, s.args)
            got = call(weights, dict(zip(s.inputs, jax.tree.leaves(args), strict=True)))
            want = dict(zip(s.outputs, jax.tree.leaves(jax.jit(s.fn)(part.params, *args)), strict=True))
            assert got.keys() == want.keys()
            for output, w in want.items():
                assert np.abs(got[output] - w).max() <= 1e-5 * np.abs(w).max()


def test_what_cannot_be_is_refused(folder, tiny_model, tmp_path, capsys, monkeypatch):
    with pytest.raises(ExportError, match="is there already; remove it"):
        portable.write(tiny_model, folder, **SMALL)
    for name in ("vrc.vrc.stablehlo", "vrc.safetensors"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ExportError, match=name):
            portable.load(folder, "vrc", "vrc")
        (folder / name).write_bytes(data)
    data = (folder / "vrc.safetensors").read_bytes()
    (folder / "vrc.safetensors").write_bytes((folder / "embedder.safetensors").read_bytes())
    with pytest.raises(ExportError, match="has other weights than it takes"):
        portable.load(folder, "vrc", "vrc")
    (folder / "vrc.safetensors").write_bytes(data)
    with pytest.raises(ExportError, match="none"):
        portable.load(folder, "none", "vrc")
    monkeypatch.setattr(needs, "load", lambda name: tiny_model)
    for more in (["--recipe", "int8"], ["--bundle", "base"], ["--calibrate", "1"]):
        with pytest.raises(SystemExit):
            cli.main(["export", "m", "--out", str(tmp_path / "x"), "--portable", *more])
        assert "weights as they are, in f32; leave recipe, rules and bundle out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
