"""The vision encoder against transformers' SigLIP, fixed resolution, random weights, odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.config import VitConfig
from hypervl_jax.model.layers import LayerNorm
from hypervl_jax.model.vit import Block, Vit

torch = pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")

# Heads of 20 channels where SigLIP has 64, an MLP that is not four widths, an odd number of patches a side.
CFG = VitConfig(width=60, depth=3, heads=3, mlp=100, tile=40, patch=8)
BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip


def shaken(model):
    """Random biases, norms and positions too, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return model.eval()


@pytest.fixture(scope="module")
def reference():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": CFG.width, "intermediate_size": CFG.mlp, "num_attention_heads": CFG.heads}
    cfg = SiglipVisionConfig(**sizes, num_hidden_layers=CFG.depth, image_size=CFG.tile, patch_size=CFG.patch)
    return shaken(SiglipVisionModel(cfg))


@pytest.fixture(scope="module")
def params(reference):
    """Their weights in our tree: the convolution as a matrix over a patch's (row, column, channel), layers stacked."""
    w = {k: np.asarray(v.detach()) for k, v in reference.named_parameters()}

    def leaves(name):
        return {leaf: w[f"{name}.{leaf}"] for leaf in ("weight", "bias")}

    layers = [
        {ours: leaves(f"encoder.layers.{i}.{theirs}") for ours, theirs in BLOCK.items()} for i in range(CFG.depth)
    ]
    patch = leaves("embeddings.patch_embedding")
    return {
        "patch": {**patch, "weight": patch["weight"].transpose(0, 2, 3, 1).reshape(CFG.width, -1)},
        "pos": w["embeddings.position_embedding.weight"],
        "blocks": {"layers": jax.tree.map(lambda *a: np.stack(a), *layers)},
        "norm": leaves("post_layernorm"),
    }


def close(got, want):
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_tree_is_ours_and_nothing_of_theirs_is_left_over(params, reference):
    args = jnp.zeros((1, CFG.tile, CFG.tile, 3)), jnp.ones((1, CFG.patches), bool)
    shapes = jax.eval_shape(Vit(CFG).init, jax.random.key(0), *args)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    used = sum(leaf.size for leaf in jax.tree.leaves(params))
    theirs = sum(p.numel() for name, p in reference.named_parameters() if not name.startswith("head."))
    assert used == theirs


def test_norm(params, reference):
    x = np.random.default_rng(0).normal(size=(2, 5, CFG.width)).astype(np.float32)
    got = LayerNorm(CFG.eps).apply({"params": params["norm"]}, jnp.asarray(x))
    close(got, reference.post_layernorm(torch.tensor(x)))


def test_block(params, reference):
    x = np.random.default_rng(1).normal(size=(2, CFG.patches, CFG.width)).astype(np.float32)
    layer = jax.tree.map(lambda a: a[0], params["blocks"]["layers"])
    mask = jnp.ones((2, 1, CFG.patches), bool)
    got, _ = Block(CFG).apply({"params": layer}, jnp.asarray(x), None, mask)
    want = reference.encoder.layers[0](torch.tensor(x), attention_mask=None)
    close(got, want[0] if isinstance(want, tuple) else want)


@pytest.mark.parametrize("scan", [True, False])
def test_features_of_bytes(scan, params, reference):
    """From u8 tiles; theirs see what their image processor makes of them: (x / 255 - 0.5) / 0.5, channels first."""
    tiles = np.random.default_rng(2).integers(0, 256, (3, CFG.tile, CFG.tile, 3), np.uint8)
    pixels = torch.tensor((tiles.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5, dtype=torch.float32)
    want = reference(pixel_values=pixels).last_hidden_state
    got = jax.jit(Vit(CFG, scan).apply)({"params": params}, tiles, np.ones((3, CFG.patches), bool))
    close(got, want)
