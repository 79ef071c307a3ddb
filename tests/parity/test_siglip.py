"""The vision encoder against transformers' SigLIP, fixed resolution and NaFlex: directories as save_pretrained
writes them, read by the real loader, random weights, odd sizes."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypervl_jax import convert, image, layouts
from hypervl_jax.config import VitConfig
from hypervl_jax.model.layers import LayerNorm
from hypervl_jax.model.vit import Block, Vit

torch = pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")

# Heads of 20 channels where SigLIP has 64, an MLP that is not four widths, an odd number of patches a side.
CFG = VitConfig(width=60, depth=3, heads=3, mlp=100, tile=40, patch=8)


def sizes(cfg=CFG):
    return {
        "hidden_size": cfg.width, "intermediate_size": cfg.mlp, "num_attention_heads": cfg.heads,
        "num_hidden_layers": cfg.depth, "patch_size": cfg.patch,
    }  # fmt: skip


@pytest.fixture(scope="module")
def reference(shaken):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return shaken(SiglipVisionModel(SiglipVisionConfig(**sizes(), image_size=CFG.tile)))


@pytest.fixture(scope="module")
def loaded(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    reference.save_pretrained(folder)
    return convert.load_vit(folder)


@pytest.fixture(scope="module")
def params(loaded):
    return loaded.params


def test_the_loader_reads_sizes_and_every_weight_but_the_pooling_head(loaded, reference):
    assert loaded.config == CFG
    args = jnp.zeros((1, CFG.tile, CFG.tile, 3)), jnp.ones((1, CFG.patches), bool)
    shapes = jax.eval_shape(Vit(CFG).init, jax.random.key(0), *args)["params"]
    assert jax.tree.map(np.shape, loaded.params) == jax.tree.map(lambda s: s.shape, shapes)
    used = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    theirs = sum(p.numel() for name, p in reference.named_parameters() if not name.startswith("head."))
    assert used == theirs
    assert [line.split(" (")[0] for line in loaded.unused] == ["pooling head"]


def test_norm(params, reference, close):
    x = np.random.default_rng(0).normal(size=(2, 5, CFG.width)).astype(np.float32)
    got = LayerNorm(CFG.eps).apply({"params": params["norm"]}, jnp.asarray(x))
    close(got, reference.post_layernorm(torch.tensor(x)))


def test_block(params, reference, close):
    x = np.random.default_rng(1).normal(size=(2, CFG.patches, CFG.width)).astype(np.float32)
    layer = jax.tree.map(lambda a: a[0], params["blocks"]["layers"])
    mask = jnp.ones((2, 1, CFG.patches), bool)
    got, _ = Block(CFG).apply({"params": layer}, jnp.asarray(x), None, mask)
    want = reference.encoder.layers[0](torch.tensor(x), attention_mask=None)
    close(got, want[0] if isinstance(want, tuple) else want)


@pytest.fixture(scope="module")
def tiles():
    return np.random.default_rng(2).integers(0, 256, (3, CFG.tile, CFG.tile, 3), np.uint8)


@pytest.fixture(scope="module")
def pixels(tiles):
    """What their image processor makes of the tiles: (x / 255 - 0.5) / 0.5, channels first."""
    return torch.tensor((tiles.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5, dtype=torch.float32)


@pytest.mark.parametrize("scan", [True, False])
def test_features_of_bytes(scan, params, reference, tiles, pixels, close):
    want = reference(pixel_values=pixels).last_hidden_state
    got = jax.jit(Vit(CFG, scan).apply)({"params": params}, tiles, np.ones((3, CFG.patches), bool))
    close(got, want)


def test_features_in_bf16(params, reference, tiles, pixels, bf16_is_as_good_as_torchs):
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    got = jax.jit(Vit(CFG).apply)({"params": half}, tiles, np.ones((3, CFG.patches), bool))
    with torch.no_grad():
        theirs = copy.deepcopy(reference).bfloat16()(pixel_values=pixels.bfloat16()).last_hidden_state
        bf16_is_as_good_as_torchs(got, theirs, reference(pixel_values=pixels).last_hidden_state)


def test_a_picture_becomes_what_their_image_processor_makes_of_it(tmp_path):
    """A tile as it is and, through the preprocessor we write, a picture of any size."""
    from transformers import AutoImageProcessor

    layouts.write_image_files(tmp_path, CFG.tile)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    rng = np.random.default_rng(3)
    exact, large = (rng.integers(0, 256, (*size, 3), np.uint8) for size in ((CFG.tile, CFG.tile), (70, 93)))
    for picture in (exact, large):
        want = theirs(Image.fromarray(picture), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        got = image.resize(picture, (CFG.tile, CFG.tile)).astype(np.float32) / 255 * 2 - 1
        np.testing.assert_allclose(got, want, atol=1e-5)


# --- NaFlex ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def naflex(shaken):
    """Made for 4 x 4 patches."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    return shaken(Siglip2VisionModel(Siglip2VisionConfig(**sizes(), num_patches=16)))


@pytest.fixture(scope="module")
def naflex_loaded(naflex, tmp_path_factory):
    folder = tmp_path_factory.mktemp("naflex")
    naflex.save_pretrained(folder)
    return convert.load_vit(folder)


@pytest.mark.parametrize("side", [4, 5, 3, 9])
def test_positions_are_resized_as_theirs(side, naflex, naflex_loaded, close):
    table = naflex.embeddings.position_embedding.weight
    want = naflex.embeddings.resize_positional_embeddings(
        table.reshape(4, 4, -1), torch.tensor([[side, side]]), side * side
    )[0]
    close(convert.resize_positions(naflex_loaded.params["pos"], side), want)


def test_positions_of_the_real_size_are_resized_as_theirs(naflex, close):
    table = np.random.default_rng(5).normal(size=(256, 6)).astype(np.float32)
    want = naflex.embeddings.resize_positional_embeddings(
        torch.tensor(table).reshape(16, 16, -1), torch.tensor([[32, 32]]), 1024
    )[0]
    close(convert.resize_positions(table, 32), want)


def test_naflex_features_of_a_tile_half_empty(naflex, naflex_loaded, close):
    """Patches as their processor cuts them, three of 25 padding; ours from the tile itself."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    assert naflex_loaded.config.tile == 32
    cfg = CFG  # the same sizes, tiles of 5 x 5 patches
    params = naflex_loaded.params | {"pos": convert.resize_positions(naflex_loaded.params["pos"], 5)}
    rng = np.random.default_rng(6)
    tile, real = rng.integers(0, 256, (cfg.tile, cfg.tile, 3), np.uint8), np.arange(25) < 22
    cut = convert_image_to_patches((tile.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32), cfg.patch)
    with torch.no_grad():
        want = naflex(
            pixel_values=torch.tensor(cut, dtype=torch.float32)[None], spatial_shapes=torch.tensor([[5, 5]]),
            pixel_attention_mask=torch.tensor(real, dtype=torch.int32)[None],
        ).last_hidden_state  # fmt: skip
    got = jax.jit(Vit(cfg).apply)({"params": params}, tile[None], real[None])
    close(got[:, :22], want[:, :22])
