"""Weights in 8 and 4 bits: the integers against the definition, products against float64, what a model of them says."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import ask, checkpoint, generate, presets, quantize
from hypervl_jax.chat import Chat
from hypervl_jax.checkpoint import CheckpointError
from hypervl_jax.config import LlmConfig
from hypervl_jax.model import layers, llm
from hypervl_jax.quantize import KINDS, Kind, Quantized, RecipeError, Rule, dequantize, quantize_matrix

O, I = 300, 192


def matrix(seed=0, shape=(O, I)):
    """Rows of very different sizes, as trained matrices have them."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))).astype(np.float32)


def close(got, want, tolerance):
    """Fails unless max |a - b| <= tolerance x max |b|."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def values(w: Quantized) -> np.ndarray:
    """What it stands for in float64, number by number, from the definition."""
    q, scale = np.asarray(w.q), np.asarray(w.scale, np.float64)
    if w.bits == 8:
        return q * scale
    groups = q.reshape(*q.shape[:-1], scale.shape[-1], -1)
    whole = np.concatenate([(groups & 15).astype(int) - 8, (groups >> 4).astype(int) - 8], -1)
    return (whole * scale[..., None]).reshape(*q.shape[:-1], -1)


narrow = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "f32"])


@narrow
def test_every_weight_is_within_half_a_step(kind):
    w, kind = matrix(shape=(2, 300, 384)), KINDS[kind]
    kept = quantize_matrix(w, kind)
    assert (kept.bits, kept.group) == (kind.bits, kind.group or 384)
    step = np.repeat(np.asarray(kept.scale, np.float64), kept.group, -1)
    # The scale of a group is rounded: its largest weight may lie 7 x 2^-9 of a step beyond the range.
    assert (np.abs(values(kept) - w) <= step * (0.5 + 1e-5)).all()
    np.testing.assert_allclose(np.asarray(dequantize(kept)), values(kept), rtol=1e-6)
    assert kept.q.nbytes == w.size * kind.bits // 8


@narrow
def test_integers_and_floats_are_those_of_jax(kind):
    kept = quantize_matrix(matrix(shape=(2, 10, 256)), KINDS[kind])
    np.testing.assert_array_equal(quantize.floats(kept), np.asarray(dequantize(kept)))
    whole = np.asarray(values(kept) / np.repeat(np.asarray(kept.scale, np.float64), kept.group, -1))
    np.testing.assert_array_equal(quantize.integers(kept), np.rint(whole))


@narrow
def test_what_was_quantised_comes_back(kind):
    """The same integers again, as the exported files must have them."""
    once = quantize_matrix(matrix(shape=(300, 256)), KINDS[kind])
    again = quantize_matrix(np.asarray(dequantize(once)), KINDS[kind])
    np.testing.assert_array_equal(again.q, once.q)
    np.testing.assert_allclose(np.float32(again.scale), np.float32(once.scale), rtol=1e-6)


@narrow
def test_nothing_but_zeros(kind):
    assert not np.asarray(dequantize(quantize_matrix(np.zeros((3, 128), np.float32), KINDS[kind]))).any()


def test_scales_of_groups_are_what_phones_keep_of_them():
    scale = quantize_matrix(matrix(), Kind(4, 32)).scale
    np.testing.assert_array_equal(scale.astype(jnp.bfloat16).astype(np.float16), scale)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("kind", ["int8", "int4", "int4/32", "int4/64", "bf16", "f16"])
@pytest.mark.parametrize("block", [None, 128 * I])  # bytes: a block is the whole matrix, or 32 rows and the last 12
def test_products_against_float64(kind, rows, block, monkeypatch):
    if block:
        monkeypatch.setattr(layers, "_BLOCK", block)
        monkeypatch.setattr(layers, "_BLOCK_4", block)
    w, x = matrix(), matrix(1, (rows, I))
    if kind in ("bf16", "f16"):
        weight = jnp.asarray(w, jnp.bfloat16 if kind == "bf16" else jnp.float16)
        exact = np.asarray(weight, np.float64)
    else:
        weight = jax.tree.map(jnp.asarray, quantize_matrix(w, KINDS[kind]))
        exact = values(weight)
    got = jax.jit(lambda x, w: layers.matmul(x, w))(x, weight)  # a function of its own: blocks are not an argument
    assert got.dtype == jnp.float32
    close(got, x.astype(np.float64) @ exact.T, 2e-6)


def test_rows_that_are_no_numbers_stay_so():
    weight = quantize_matrix(matrix(), Kind(8))
    for bad in (np.nan, np.inf):
        x = np.ones((1, I), np.float32)
        x[0, 3] = bad
        assert not np.isfinite(np.asarray(layers.matmul(jnp.asarray(x), weight))).any()
    assert not np.asarray(layers.matmul(jnp.zeros((1, I)), weight)).any()


def test_bf16_products_are_as_good_as_their_result():
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (matrix(1, (1, I)), matrix()))
    got = layers.matmul(x, w)
    assert got.dtype == jnp.bfloat16
    close(got, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T, 2**-8)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_bf16_layer_can_be_trained(rows):
    w, x = jnp.asarray(matrix(), jnp.bfloat16), jnp.asarray(matrix(1, (rows, I)))
    to_x, to_w = jax.grad(lambda x, w: (layers.matmul(x, w) ** 2).sum(), (0, 1))(x, w)
    assert to_w.dtype == jnp.bfloat16
    exact, rest = np.asarray(w, np.float64), np.asarray(x, np.float64)
    y = 2 * rest @ exact.T
    close(to_x, y @ exact, 1e-5 if rows > 1 else 2**-7)  # of a single row by parts in bf16
    close(to_w, y.T @ rest, 2**-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_weights_that_no_scale_fits_are_named(bad, tiny_model):
    blocks = jax.tree.map(np.array, tiny_model.params["llm"]["blocks"])
    blocks["layers"]["o"]["weight"][1, 2, 3] = bad
    llm = tiny_model.params["llm"] | {"blocks": blocks}
    recipe = (Rule(r".*\.o\.weight", "int4/32"), Rule(".*", "int8"))
    with pytest.raises(
        RecipeError, match=r"llm\.blocks\.layers\.1\.o\.weight: weights that are not finite, or too large"
    ):
        quantize.quantize(tiny_model.params | {"llm": llm}, recipe)


def test_which_matrices_are_kept_how(tiny_model):
    params = quantize.quantize(tiny_model.params, quantize.RECIPES["int4"])
    layer = params["llm"]["blocks"]["layers"]
    assert layer["down"]["weight"].bits == 4  # 96 inputs
    assert layer["q"]["weight"].bits == 8  # 48: no groups of 32
    assert params["llm"]["embed"].bits == params["base"]["vit"]["patch"]["weight"].bits == 8
    kept = [params["base"]["vit"]["pos"], layer["norm1"]["weight"], params["base"]["vit"]["patch"]["bias"]]
    assert all(leaf.dtype == np.float32 for leaf in kept)
    assert not quantize.is_quantized(params["vrc"])


def test_the_first_rule_that_matches_holds(tiny_model):
    recipe = (
        Rule(r"llm\.blocks\.layers\.down\.weight", "f32"),
        Rule(r".*\.(gate|o)\.weight", "int4"),
        *quantize.decoder4(64),
    )
    params = quantize.quantize(tiny_model.params, recipe)
    layer = params["llm"]["blocks"]["layers"]
    assert layer["down"]["weight"].dtype == np.float32
    assert layer["o"]["weight"].group == 64  # its inputs: a row has one scale
    assert layer["o"]["weight"].scale.dtype == np.float32
    assert layer["up"]["weight"].bits == 8  # 48 inputs: no groups of 64
    assert set(quantize.matrices(params)) >= {"llm.embed", "llm.blocks.layers.q.weight", "base.vit.patch.weight"}
    assert quantize.bits_per_weight(layer["o"]["weight"]) == 4 + 32 / 64
    assert quantize.bits_per_weight(layer["down"]["weight"]) == 32
    assert quantize.bits_per_weight(layer["norm1"]) == 32


def test_rules_may_speak_of_single_layers(tiny_model):
    """That stack comes apart; a model of it says what the model of its floats says."""
    recipe = (Rule(r"llm\.blocks\.layers\.1\.(down|gate)\.weight", "int4"), Rule(".*", "int8"))
    params = quantize.quantize(tiny_model.params, recipe)
    first, second = params["llm"]["blocks"]["layers"]
    assert [layer[name]["weight"].bits for layer in (first, second) for name in ("down", "up")] == [8, 8, 4, 8]
    w = tiny_model.params["llm"]["blocks"]["layers"]["down"]["weight"][1]
    np.testing.assert_array_equal(second["down"]["weight"].q, quantize_matrix(np.asarray(w), Kind(4)).q)
    assert isinstance(params["base"]["vit"]["blocks"]["layers"], dict)  # nothing is said of its layers
    ids = jnp.array([[5, 9, 2]])
    ask = jax.jit(lambda p: generate.prefill(p, tiny_model.config, llm.embed(p["llm"], ids), jnp.zeros(1, jnp.int32),
                                             jax.random.key(0), 4).logits)  # fmt: skip
    close(ask(params), ask(quantize.restored(params)), 1e-5)


def test_layers_that_are_kept_alike_stay_a_stack(tiny_model):
    each = tuple(Rule(rf"llm\.blocks\.layers\.{i}\..*", "int4") for i in range(2))
    params = quantize.quantize(tiny_model.params, (*each, Rule(".*", "int8")))
    want = quantize.quantize(tiny_model.params, quantize.decoder4(None))
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_rules_are_read_from_files(tmp_path):
    path = tmp_path / "rules.txt"
    path.write_text("# what it cost\n\nllm.embed=int8  # the table\n a=b=int4/32\n")
    assert quantize.read([r"x\.y=f32", str(path), "z=int8"]) == (
        Rule(r"x\.y", "f32"), Rule("llm.embed", "int8"), Rule("a=b", "int4/32"), Rule("z", "int8"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a=int8\n\nb=int5\n", r"rules\.txt:3: 'b=int5': a rule is PATTERN=KIND, its kind one of f32, int8, int4"),
        (b"a\n", r"rules\.txt:1: 'a': a rule is"),
        (b"\xff\xfe\x00", "rules.txt: not a file of rules: not text"),
        (None, r"rules\.txt: neither a rule, PATTERN=KIND, nor a file of them \(No such file"),
    ],
)
def test_files_that_are_no_rules_are_named_with_the_line(content, says, tmp_path):
    path = tmp_path / "rules.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=says):
        quantize.read([str(path)])


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (("llm.blocks", "int8"), "matches the whole path of no matrix; there are base"),
        (("vrc.*", "int8"), "matches the whole path of no matrix"),
        (("(", "int8"), "not a pattern"),
        ((r"llm\.blocks\.layers\.2\.q\.weight", "int8"), "matches the whole path of no matrix"),
        ((".*", "int3"), "no such kind; choose one of f32, int8, int4, int4/32"),
    ],
)
def test_a_rule_that_speaks_of_nothing_is_refused(rule, says, tiny_model):
    with pytest.raises(RecipeError, match=says):
        quantize.quantize(tiny_model.params, (Rule(*rule), Rule(".*", "int8")))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_models_are_quantised_as_they_are_read(kind, tiny_folder, tiny_model):
    read = checkpoint.load_model(tiny_folder, kind).params
    want = quantize.quantize(tiny_model.params, quantize.RECIPES[kind])
    jax.tree.map(np.testing.assert_array_equal, read, want)
    assert quantize.nbytes(read["llm"]) < 0.5 * quantize.nbytes(tiny_model.params["llm"])


def test_quantised_weights_are_neither_saved_nor_read_onto_several_devices(tiny_folder, tmp_path):
    model = checkpoint.load_model(tiny_folder, "int8")
    with pytest.raises(CheckpointError, match="load the model as it is"):
        checkpoint.save_model(tmp_path / "m", model.config, model.params, model.tokenizer)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="leave out shardings"):
        checkpoint.load_model(tiny_folder, "int8", {})


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_a_model_of_narrow_weights_is_the_model_of_what_they_stand_for(kind, tiny_model):
    """Logits of a prompt and of a step behind it, against the same model with the weights written out as f32."""
    cfg, params = tiny_model.config, tiny_model.params
    if kind == "bfloat16":
        narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    else:
        narrow = quantize.quantize(params, quantize.RECIPES[kind])
        wide = quantize.restored(narrow)
    ids = jnp.array([[5, 9, 2, 7, 1]])

    @jax.jit
    def logits(params):
        x = llm.embed(params["llm"], ids)
        state = generate.prefill(params, cfg, x, jnp.zeros(1, jnp.int32), jax.random.key(0), 8)
        step = generate.sample_step(params, cfg, state, generate.GREEDY, jnp.zeros(cfg.llm.vocab, bool), -1)[0]
        return state.logits, step.logits

    apart = narrow | {"llm": layers.unstack(narrow["llm"])}
    for got, same, want in zip(logits(narrow), logits(apart), logits(wide), strict=True):
        close(got, same, 0.05 if kind == "bfloat16" else 1e-6)
        close(got, want, 0.05 if kind == "bfloat16" else 1e-5)


def test_the_encoder_takes_them_too(tiny_model, tiny_source):
    narrow = tiny_model._replace(params=quantize.quantize(tiny_model.params, quantize.RECIPES["int8"]))
    features = [ask.see(model, tiny_source[0].image, vrc=False).features for model in (narrow, tiny_model)]
    close(*features, 0.05)
    assert np.abs(features[0] - features[1]).max() > 0


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_are_rounded_within_half_a_step_of_their_own(bits):
    x = np.stack([matrix(2, (4, I))[0], np.abs(matrix(3, (4, I))[0]), np.zeros(I, np.float32)])
    got = np.asarray(quantize.round_rows(jnp.asarray(x), jnp.float32(2**bits - 1)))
    step = (np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)) / (2**bits - 1)
    assert (np.abs(got - x) <= step[:, None] * 0.501 + np.abs(x) * 1e-6).all()
    assert not got[2].any()
    for row, kept in zip(x[:2], got, strict=False):
        assert len(np.unique(kept)) <= 2**bits
        assert np.abs(kept - row).max() > 0


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 0.05), ("f16", 5e-3), ("int16", 5e-4), ("int8", 0.1)])
def test_activations_of_sixteen_and_eight_bits(kind, tolerance, tiny_model, tiny_source):
    """From pixels to features and from ids to logits: other numbers than in f32, and near to them. The tree keeps its
    kinds, stacked or apart."""
    cfg, narrow = tiny_model.config, quantize.quantize(tiny_model.params, quantize.decoder4())
    params = quantize.with_activations(narrow, kind)
    features = [
        ask.see(tiny_model._replace(params=p), tiny_source[0].image, vrc=False).features for p in (params, narrow)
    ]
    close(*(np.asarray(f, np.float32) for f in features), tolerance)
    ids = jnp.array([[5, 9, 2, 7, 1]])
    logits = jax.jit(lambda p: generate.prefill(p, cfg, llm.embed(p["llm"], ids), jnp.zeros(1, jnp.int32),
                                                jax.random.key(0), 8).logits)  # fmt: skip
    got, want = logits(params), logits(narrow)
    close(got, want, tolerance)
    assert np.abs(np.asarray(got) - np.asarray(want)).max() > 0
    apart = params | {"llm": layers.unstack(params["llm"])}
    close(logits(apart), got, 1e-5 if kind.startswith("int") else tolerance)
    layer = params["llm"]["blocks"]["layers"]
    kept = layer["down"]["weight"]
    assert isinstance(kept.weight if kind.startswith("int") else kept, Quantized)
    assert layer["norm1"]["weight"].dtype == {"bf16": "bfloat16", "f16": "float16"}.get(kind, "float32")
    jax.tree.map(np.testing.assert_array_equal, params["vrc"], narrow["vrc"])


def test_layers_that_came_apart_are_looped(tiny_model):
    cfg = tiny_model.config.llm
    args = jnp.ones((1, 3, cfg.width)), jnp.arange(3)[None], jnp.ones((1, 3, 3), bool)
    params = tiny_model.params["llm"]
    got, want = (llm.Llm(cfg).apply({"params": p}, *args)[0] for p in (layers.unstack(params), params))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_a_step_makes_floats_of_no_whole_matrix(kind):
    """By the compiler's account: what a decoding step needs beside its arguments is less than any projection in f32."""
    c = LlmConfig(vocab=2048, width=1024, depth=2, heads=8, kv_heads=1, head_dim=32, mlp=4096)
    cfg = dataclasses.replace(presets.preset("tiny").model, llm=c)
    one = jnp.zeros((1, 1), jnp.int32)
    args = jnp.zeros((1, 1, c.width)), one, jnp.ones((1, 1, 1), bool)
    shapes = jax.eval_shape(lambda key: llm.Llm(c).init(key, *args), jax.random.key(0))["params"]

    def kept(path, leaf):
        name = "llm." + jax.tree_util.keystr(path, simple=True, separator=".")
        of = jax.ShapeDtypeStruct
        if kind == "bfloat16":
            return of(leaf.shape, jnp.bfloat16)
        how = quantize.kind_of(name, leaf.shape[-1], quantize.RECIPES[kind])
        if how is None:
            return leaf
        *lead, inputs = leaf.shape
        return (Quantized(of((*lead, inputs), jnp.int8), of((*lead, 1), jnp.float32)) if how.bits == 8 else
                Quantized(of((*lead, inputs // 2), jnp.uint8), of((*lead, inputs // 32), jnp.float16)))  # fmt: skip

    params = jax.tree_util.tree_map_with_path(kept, shapes)
    params = jax.eval_shape(layers.unstack, params)
    state = jax.eval_shape(lambda: generate.start(cfg, 1, 128, llm.dtype(params)))

    def step(params, state):
        return generate.sample_step({"llm": params}, cfg, state, generate.GREEDY, jnp.zeros(c.vocab, bool), -1)

    memory = jax.jit(step, donate_argnums=1).lower(params, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < c.width * c.mlp * 4 / 4


def test_the_weights_that_ship_answer_the_same_in_8_bits():
    picture = Path(__file__).parents[1] / "examples" / "screen.png"
    questions = ("what is the number?", "what is at the top left?", "how many things are there?")
    said = {}
    for kind in ("float32", "int8"):
        model = checkpoint.load_model("nano", kind)
        said[kind] = ["".join(Chat(model, max_tokens=16).ask(picture, q)) for q in questions]
    assert said["int8"] == said["float32"]
    assert all(said["float32"])


def test_on_a_cpu_read_weights_are_the_devices_without_a_copy(tiny_folder):
    model = checkpoint.load_model(tiny_folder)
    table = model.params["llm"]["embed"]
    assert Chat(model).model.params["llm"]["embed"].unsafe_buffer_pointer() == table.ctypes.data
