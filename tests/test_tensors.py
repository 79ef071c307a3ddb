"""Folders of safetensors: what a table says is what is read and written, and every kind of damage has its name."""

import json
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from hypervl_jax import tensors
from hypervl_jax.tensors import FILE, INDEX, PATCH, CheckpointError, Row, Table

names = st.text("abc_1", min_size=1, max_size=4)
trees = st.recursive(st.integers(), lambda t: st.dictionaries(names, t, min_size=1, max_size=3), max_leaves=12)


@given(st.dictionaries(names, trees, min_size=1, max_size=4))
def test_unflatten_is_the_inverse_of_flatten(tree):
    flat = tensors.flatten(tree)
    assert not any(isinstance(v, dict) for v in flat.values())
    assert tensors.unflatten(flat) == tree


TABLE = Table(
    (
        Row("embed", "embed_tokens.weight"),
        Row("blocks.q", "layers.{i}.q_proj.weight"),
        Row("patch", "conv.weight", PATCH),
        Row("norm", "norm.weight"),
    ),
    unused=((r"head\..*", "pooling head"), (r"lm_head\.weight", "the head again")),
    repeats=(("lm_head.weight", "embed_tokens.weight"),),
)
SHAPES = {"embed": (16, 8), "blocks.q": (3, 4, 8), "patch": (8, 12), "norm": (8,)}


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    return tensors.unflatten({k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()})


@pytest.fixture
def folder(tree, tmp_path):
    """A folder of this test's own, in one file."""
    tensors.write(tmp_path, tree, TABLE)
    return tmp_path


def tamper(folder, change):
    """Applies `change` to the tensors of one file as a plain dictionary."""
    flat = load_file(folder / FILE)
    change(flat)
    save_file(flat, folder / FILE)


def read(folder, **how):
    return tensors.read(folder, TABLE, SHAPES, **how)


# --- there and back --------------------------------------------------------------------------------------------------


def test_the_library_of_the_format_reads_what_is_written(folder, tree):
    """Layers apart, the kernel as a convolution has it: channels, rows, columns."""
    flat = load_file(folder / FILE)
    assert sorted(flat) == ["conv.weight", "embed_tokens.weight", *(f"layers.{i}.q_proj.weight" for i in range(3)),
                            "norm.weight"]  # fmt: skip
    np.testing.assert_array_equal(flat["layers.1.q_proj.weight"], tree["blocks"]["q"][1])
    assert flat["conv.weight"].shape == (8, 3, 2, 2)
    for k, p, q in np.ndindex(3, 2, 2):
        np.testing.assert_array_equal(flat["conv.weight"][:, k, p, q], tree["patch"][:, (p * 2 + q) * 3 + k])


def test_what_is_written_comes_back_bit_equal(folder, tree):
    got, unused = read(folder)
    jax.tree.map(np.testing.assert_array_equal, got, tree)
    assert unused == []


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_dtypes_are_kept_or_changed_at_the_door(dtype, tree, tmp_path):
    tensors.write(tmp_path, tree, TABLE, dtype)
    assert {v.dtype for v in load_file(tmp_path / FILE).values()} == {np.dtype(dtype)}
    want = jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), tree)
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path, dtype=np.float32)[0], want)
    kept = jax.tree.leaves(read(tmp_path)[0])
    assert {leaf.dtype for leaf in kept} == {np.dtype(dtype)}


def test_leaves_of_several_dtypes_lie_side_by_side(tree, tmp_path):
    """An odd number of 16 bit ones before one of 32."""
    mixed = tree | {"norm": tree["norm"].astype(np.float16), "embed": tree["embed"].astype(jnp.bfloat16)}
    tensors.write(tmp_path, mixed, TABLE)
    assert {k: v.dtype.name for k, v in load_file(tmp_path / FILE).items() if "q_proj" not in k} == {
        "embed_tokens.weight": "bfloat16", "conv.weight": "float32", "norm.weight": "float16"
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path)[0], mixed)


def test_layers_of_several_dtypes_are_read_in_f32(folder, tree):
    tamper(folder, lambda f: f.update({"layers.0.q_proj.weight": f["layers.0.q_proj.weight"].astype(jnp.bfloat16)}))
    got = read(folder)[0]["blocks"]["q"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[1:], tree["blocks"]["q"][1:])


def test_what_is_large_is_written_in_several_files(tree, tmp_path):
    tensors.write(tmp_path, tree, TABLE, shard=400)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(tree))
    assert {k for f in files for k in load_file(tmp_path / f) if index["weight_map"][k] == f} == set(
        index["weight_map"]
    )
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path)[0], tree)


def test_each_device_gets_its_piece(folder, tree):
    """Stacked layers, rows and columns apart, and one leaf whole on all."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    specs = {"embed": P("b"), "blocks.q": P(None, "a", "b"), "patch": P("a"), "norm": P()}
    places = tensors.unflatten({k: NamedSharding(mesh, spec) for k, spec in specs.items()})
    got, _ = read(folder, dtype=jnp.bfloat16, shardings=places)
    assert jax.tree.map(lambda a: a.sharding, got) == places
    assert got["blocks"]["q"].addressable_shards[0].data.shape == (3, 2, 4)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b.astype(jnp.bfloat16)), got, tree)
    tensors.write(folder, got, TABLE)  # and from there back
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), read(folder)[0], tree)


def test_what_the_model_does_not_use_is_named(folder):
    more = {"head.probe": np.zeros(3, np.int64), "head.mlp": np.zeros(0, np.float32)}
    tamper(folder, lambda f: f.update(more | {"lm_head.weight": f["embed_tokens.weight"]}))
    assert read(folder)[1] == [
        "pooling head (2 tensors, such as head.mlp)", "the head again (1 tensors, such as lm_head.weight)"
    ]  # fmt: skip


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_everything_wrong_is_named_at_once(folder):
    def change(f):
        f.pop("norm.weight")
        f["extra"] = np.zeros(2, np.float32)
        f["layers.1.q_proj.weight"] = f["layers.1.q_proj.weight"][:2]
        f["embed_tokens.weight"] = f["embed_tokens.weight"].astype(np.int8)

    tamper(folder, change)
    with pytest.raises(CheckpointError) as e:
        read(folder)
    for message in (
        f"{folder / FILE}: 4 weights", "missing norm.weight", "unknown extra",
        "layers.1.q_proj.weight is (2, 8), not (4, 8)", "embed_tokens.weight is int8",
    ):  # fmt: skip
        assert message in str(e.value)


def test_a_depth_that_no_file_can_have_is_an_error_and_no_wait(folder):
    with pytest.raises(CheckpointError, match=r"missing layers\.3\.q_proj"):
        tensors.read(folder, TABLE, SHAPES | {"blocks.q": (10**12, 4, 8)})


def test_a_head_that_should_repeat_the_embedding_and_does_not_is_an_error(folder):
    tamper(folder, lambda f: f.update({"lm_head.weight": f["embed_tokens.weight"] + np.float32(1e-3)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        read(folder)


def test_all_that_is_not_finite_is_named_at_once(folder):
    def change(f):
        f["layers.2.q_proj.weight"][0, 0] = np.nan
        f["norm.weight"][3] = np.inf

    tamper(folder, change)
    with pytest.raises(CheckpointError, match=r"2 weights.*layers\.2\.q_proj\.weight is not.*norm\.weight is not"):
        read(folder)
    tamper(folder, lambda f: f.update({k: np.nan_to_num(v, posinf=1e6) for k, v in f.items()}))
    with pytest.raises(CheckpointError, match=r"1 weights.*norm\.weight is not finite"):
        read(folder, dtype=np.float16)


def test_what_is_not_finite_is_not_written(tree, tmp_path):
    with pytest.raises(CheckpointError, match=r"not finite.*norm\.weight"):
        tensors.write(tmp_path, tree | {"norm": tree["norm"] * np.nan}, TABLE)


def header(folder, change):
    """Rewrites the header of one file by `change`, the data behind it as it was."""
    data = (folder / FILE).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    head = change(data[8 : 8 + size])
    (folder / FILE).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + size :])


def field(key, value):
    """Sets one field of the entry of norm.weight."""

    def change(head):
        values = json.loads(head)
        values["norm.weight"][key] = value
        return json.dumps(values).encode()

    return change


@pytest.mark.parametrize(
    "change",
    [
        field("dtype", "F31"), field("dtype", 3), field("dtype", "F16"), field("shape", [9]), field("shape", [-8]),
        field("shape", [2.0, 4]), field("shape", [True] * 3), field("shape", "8"), field("shape", [1 << 62, 1 << 62]),
        field("data_offsets", [0, 32]), field("data_offsets", [-32, 0]), field("data_offsets", [1, 2, 3]),
        field("data_offsets", [1 << 60, 32 + (1 << 60)]), lambda head: b"[" * 100_000, lambda head: b"[]",
        lambda head: b'{"a": 3}', lambda head: head.rstrip()[:-1],
        lambda head: head.replace(b'"norm.weight"', b'"conv.weight"'),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_an_error_that_names_the_file(folder, change):
    header(folder, change)
    with pytest.raises(CheckpointError) as e:
        read(folder)
    assert f"{folder / FILE}: damaged" in str(e.value)


def test_a_name_that_stands_twice_is_named(folder):
    header(folder, lambda head: head.replace(b'"norm.weight"', b'"conv.weight"'))
    with pytest.raises(CheckpointError, match=r"duplicate conv\.weight"):
        read(folder)


def test_a_header_longer_than_the_file_is_not_read(folder):
    data = (folder / FILE).read_bytes()
    for length in (1 << 63, len(data), 0):
        (folder / FILE).write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointError, match="no safetensors header"):
            read(folder)


# --- several files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def several(tree, tmp_path):
    tensors.write(tmp_path, tree, TABLE, shard=400)
    return tmp_path


def relist(folder, change):
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(x=m["norm.weight"]), "missing x in model-"),
        (lambda m: m.pop("layers.0.q_proj.weight"), "holds layers.0.q_proj.weight, which is not listed as its"),
        (lambda m: m.update({"norm.weight": m["embed_tokens.weight"]}), "missing norm.weight in model-"),
        (lambda m: m.update({"norm.weight": "../model.safetensors"}), "is no name of a file beside it"),
        (lambda m: m.update({"norm.weight": "/etc/x.safetensors"}), "is no name of a file beside it"),
        (lambda m: m.update({"norm.weight": 3}), "is no name of a file beside it"),
        (lambda m: m.update({"norm.weight": "model-x.safetensors"}), "model-x.safetensors: cannot be read"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_named(several, change, message):
    relist(several, change)
    with pytest.raises(CheckpointError) as e:
        read(several)
    assert message in str(e.value)
    assert str(several) in str(e.value)


def test_a_tensor_in_two_files_is_named(several):
    a, *_, z = sorted(several.glob("*.safetensors"))
    flat = load_file(z)
    save_file(flat | dict(list(load_file(a).items())[:1]), z)
    with pytest.raises(CheckpointError, match=rf"duplicate \S+ in {a.name} and {z.name}"):
        read(several)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b""])
def test_a_damaged_file_of_several_is_named(several, damage):
    file = sorted(several.glob("*.safetensors"))[1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{file.name}: damaged"):
        read(several)


def test_one_file_and_an_index_are_one_too_many(several, tree):
    tensors.write(several, tree, TABLE)
    with pytest.raises(CheckpointError, match="delete the one"):
        read(several)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin may run code.*save it as safetensors"):
        read(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux what is mapped")
def test_no_file_stays_mapped(folder):
    kept = read(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert kept
