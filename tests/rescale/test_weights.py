"""Reading weights: three formats, one answer; damage and strangers are refused without running anything."""

import io
import os
import pickle
import re
import zipfile

import jax
import numpy as np
import pytest

from hypervl_jax.rescale import weights
from hypervl_jax.rescale.hcflow import HcFlow
from hypervl_jax.rescale.imdn import Imdn
from hypervl_jax.rescale.irn import Irn, firn
from hypervl_jax.rescale.pairs import Bicubic, Pair
from hypervl_jax.tensors import CheckpointError

NET = Irn((1,), growth=2)


def theirs(params):
    """Our parameters as PyTorch would name and lay them out."""
    named = {".".join(p.key for p in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}
    return {k: np.ascontiguousarray(x.transpose(3, 2, 0, 1)) if x.ndim == 4 else x for k, x in named.items()}


@pytest.fixture(scope="module")
def params(shaken):
    return shaken(NET)


@pytest.fixture
def published(params):
    """What a file of these weights holds; the Haar kernels beside them."""
    return theirs(params) | {"operations.0.haar_weights": np.ones((12, 1, 2, 2), np.float32)}


def check(file, params):
    jax.tree.map(np.testing.assert_array_equal, weights.load(NET, file).params, params)


def test_npz(published, params, tmp_path):
    np.savez(tmp_path / "w.npz", **{f"module.{k}": v for k, v in published.items()})
    check(tmp_path / "w.npz", params)


def test_safetensors(published, params, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="needs the dev extra")
    numpy.save_file(published, tmp_path / "w.safetensors")
    check(tmp_path / "w.safetensors", params)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [None, "state_dict", "params"])
def test_pth(published, params, tmp_path, zipped, wrapped):
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    tree = {k: torch.nn.Parameter(torch.from_numpy(np.array(v))) for k, v in published.items()}
    torch.save({wrapped: tree} if wrapped else tree, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    check(tmp_path / "w.pth", params)


@pytest.mark.parametrize("zipped", [True, False])
def test_pth_of_shared_and_turned_tensors(tmp_path, zipped):
    """Views of one storage, a transposed one, other dtypes."""
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tree = {"turned": base.T, "part": base[1:3, ::2], "half": base.half(), "long": torch.tensor(7), "none": base[:0]}
    torch.save(tree, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    got = weights.read(tmp_path / "w.pth")
    assert got.keys() == tree.keys()
    for name, value in tree.items():
        np.testing.assert_array_equal(got[name], value.numpy())
        assert got[name].dtype == value.numpy().dtype


def test_published_files_are_read_as_pytorch_reads_them(rescaling):
    """FIRN's file holds exactly what its network needs, and the perceptual sibling's too."""
    for name in ("firn_x4", "firn_plus_x4"):
        pair = weights.load(firn(), rescaling / "weights" / f"{name}.npz")
        assert sum(x.size for x in jax.tree.leaves(pair.params)) == 320_640


# --- what is refused -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def old_file(tree):
    f = io.BytesIO()
    for value in (*weights.LEGACY, {"little_endian": True}, tree):
        pickle.dump(value, f, protocol=2)
    return f.getvalue()


def new_file(tree):
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps(tree, protocol=2))
    return f.getvalue()


@pytest.mark.parametrize("make", [old_file, new_file])
def test_a_pickle_that_asks_for_more_is_not_run(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(make({"a": Evil()}))
    with pytest.raises(CheckpointError, match=r"w\.pth: damaged \(it asks for (posix|nt)\.system"):
        weights.read(tmp_path / "w.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.npz", b"", "0 bytes are no weights"),
        ("w.npz", b"PK\x03\x04 cut short", "damaged"),
        ("w.safetensors", b"\x08", "damaged"),
        ("w.pth", b"not a pickle", "damaged"),
        ("w.pth", new_file({"a": 1}), "no dictionary of tensors"),
        ("w.pth", old_file([1, 2])[:-1], "damaged"),
        ("w.bin", b"x", r"weights are \.npz, \.safetensors or \.pth"),
    ],
)
def test_damage_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: .*{message}"):
        weights.read(tmp_path / name)


def test_a_pickled_array_in_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([Evil()], object))
    with pytest.raises(CheckpointError, match="damaged"):
        weights.read(tmp_path / "w.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.npz: cannot be read"):
        weights.read(tmp_path / "none.npz")


def test_a_tensor_past_its_numbers_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    torch.save({"a": torch.zeros(4)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        for n, data in files.items():
            archive.writestr(n, data[:8] if n.endswith("/data/0") else data)
    with pytest.raises(CheckpointError, match="a reaches past its numbers"):
        weights.read(tmp_path / "w.pth")


def test_all_that_does_not_fit_is_said_at_once(published, tmp_path):
    del published["operations.1.F.conv1.bias"]
    published["extra"] = np.zeros(3, np.float32)
    published["operations.1.G.conv1.weight"] = np.zeros((2, 4, 3, 3), np.float32)
    published["operations.1.H.conv5.bias"] = np.full(9, np.nan, np.float32)
    np.savez(tmp_path / "w.npz", **published)
    with pytest.raises(CheckpointError) as e:
        weights.load(NET, tmp_path / "w.npz")
    for part in ("w.npz", "Irn(blocks=(1,)", "4 do not fit", "missing operations.1.F.conv1.bias", "unknown extra"):
        assert part in str(e.value)
    assert "operations.1.G.conv1.weight is (2, 4, 3, 3)" in str(e.value)
    assert "operations.1.H.conv5.bias is not finite" in str(e.value)


def test_weights_of_another_model_are_refused(rescaling):
    with pytest.raises(CheckpointError, match=r"imdn_x2\.npz: no weights of Irn.*do not fit"):
        weights.load(firn(), rescaling / "weights" / "imdn_x2.npz")
    with pytest.raises(CheckpointError, match="do not fit"):
        weights.load(Bicubic(2), rescaling / "weights" / "imdn_x2.npz")


# --- whose weights they are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net",
    [
        Irn((1,), growth=2),
        Irn((2, 1), growth=3),
        Irn((1, 1), "light"),
        Imdn(2, width=16, blocks=2),
        Imdn(4, width=16, blocks=1),
        HcFlow(2, 1),
    ],
)
def test_a_file_tells_its_network(net, shaken, as_published, tmp_path):
    pair = Pair(net, shaken(net))
    found = weights.recognise(as_published(pair, tmp_path / "w.npz"))
    assert found.net == net
    jax.tree.map(np.testing.assert_array_equal, found.params, pair.params)
    assert weights.fingerprint(found) == weights.fingerprint(pair)


@pytest.mark.parametrize("noise", [1.0, 0.0, 0.25])
def test_what_is_saved_is_recognised(noise, shaken, tmp_path):
    """With the noise it was taught to bear; in 16 bits it is what those hold."""
    net = Irn((2, 1), growth=3, noise=noise)
    pair = Pair(net, shaken(net))
    weights.save(pair, tmp_path / "w.npz")
    found = weights.recognise(tmp_path / "w.npz")
    assert found.net == net
    jax.tree.map(np.testing.assert_array_equal, found.params, pair.params)
    with np.load(tmp_path / "w.npz") as file:
        assert ("noise" in file) == (noise != 1)
        assert file["operations.1.F.conv1.weight"].shape == (3, 9, 3, 3)
    weights.save(pair, tmp_path / "half.npz", np.float16)
    half = weights.recognise(tmp_path / "half.npz")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), half.params, pair.params)
    assert (tmp_path / "half.npz").stat().st_size < (tmp_path / "w.npz").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.npz", "w.npz"]


def test_noise_that_is_not_the_networks_is_refused(shaken, tmp_path):
    net = Irn((1,), growth=2, noise=0.0)
    weights.save(Pair(net, shaken(net)), tmp_path / "w.npz")
    weights.load(net, tmp_path / "w.npz")
    with pytest.raises(CheckpointError, match="noise is 0, not 1"):
        weights.load(Irn((1,), growth=2), tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as file:
        np.savez(tmp_path / "bad.npz", **(dict(file) | {"noise": np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match="noise is nan"):
        weights.recognise(tmp_path / "bad.npz")


def test_published_weights_are_recognised(rescaling):
    files = rescaling / "weights"
    nets = {name: weights.recognise(files / f"{name}.npz").net for name in ("firn_x4", "imdn_x2", "imdn_x4")}
    assert nets == {"firn_x4": firn(), "imdn_x2": Imdn(2), "imdn_x4": Imdn(4)}


def test_weights_of_something_else_are_refused(shaken, as_published, tmp_path):
    np.savez(tmp_path / "other.npz", **{"conv1.weight": np.zeros((3, 3))})
    with pytest.raises(CheckpointError, match="weights of no pair known by its names"):
        weights.recognise(tmp_path / "other.npz")
    pair = Pair(net := Irn((1,), growth=2), shaken(net))
    part = {k: v for k, v in weights.read(as_published(pair, tmp_path / "w.npz")).items() if "G.conv5" not in k}
    np.savez(tmp_path / "part.npz", **part)
    with pytest.raises(CheckpointError, match=r"missing operations\.1\.G\.conv5"):
        weights.recognise(tmp_path / "part.npz")


def test_a_fingerprint_is_of_every_number_and_of_the_network(shaken):
    net = Irn((1,), growth=2)
    params = shaken(net)
    moved = jax.tree.map(lambda x: x, params)
    moved["operations.1"]["F"]["conv5"]["bias"] = moved["operations.1"]["F"]["conv5"]["bias"].at[0].add(1e-6)
    prints = {weights.fingerprint(p) for p in (Pair(net, params), Pair(net, moved), Pair(Bicubic(2)), Pair(Bicubic(4)))}
    assert len(prints) == 4
