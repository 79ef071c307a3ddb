"""The paper's sizes: traced and counted with weights that take no memory; the Base encoder converted and run."""

import jax
import numpy as np
import pytest

from hypervl_jax import checkpoint, presets, quantize, tensors
from hypervl_jax.export import bench, lower, pack, parts


def weights(cfg, draw=None):
    """The tree of a model of `cfg`, of one number repeated (no memory) or drawn."""
    shapes = checkpoint.expected(cfg)
    draw = draw or (lambda name, shape: np.broadcast_to(np.float32(0), shape))
    return tensors.unflatten({name: draw(name, shape) for name, shape in shapes.items()})


def size(tree, bits=lambda path: (32, None)):
    """Bytes of a part whose matrices have `bits(path)` = (bits, inputs that share a scale of two bytes)."""
    total = 0
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        b, group = bits(jax.tree_util.keystr(path)) if x.ndim == 2 else (32, None)
        total += x.size * b // 8
        total += {4: 2 * x.size // (group or 1), 8: 4 * x.shape[0], 32: 0}[b]
    return total


def test_the_decoder_of_1_7b_traces_and_counts():
    cfg = presets.hypervl_1p7b().model
    part = parts.decoder(cfg, weights(cfg), (64,), 128)
    leaves, tree = jax.tree.flatten(part.params)
    traced = [lower._trace("decoder", s, tree, leaves) for s in part.signatures]
    assert [len(t.in_avals) for t in traced] == [len(leaves) + 3 + 2 * cfg.llm.depth] * 2
    assert all(len(t.mlir_module_serialized) < 2e6 for t in traced)  # no weights in it
    whole, narrow = size(part.params), size(part.params, lambda p: (8, None) if "embed" in p else (4, 128))
    print(f"decoder: {whole / 1e9:.2f} GB in f32, {narrow / 1e9:.2f} GB in int4 of groups of 128 with a head of int8")
    assert whole > 2**31
    assert narrow <= 1.1e9


def test_a_bundle_of_1_7b_counts():
    """Decoder in int4 of groups of 128, everything else of it in int8: bytes of weights, without a file's tables."""
    cfg = presets.hypervl_1p7b().model
    tree = weights(cfg)
    seen = parts.encoder(cfg, tree, "base", masked=False).params["base"]

    def kept(path):
        return (32, None) if "pos" in path else (8, None) if "blocks" not in path else (4, 128)

    decoder = size(parts.decoder(cfg, tree, (64,), 128).params, kept)
    embedder = size(parts.embedder(cfg, tree).params, kept)
    encoder, projector = (size({"": seen[k]}, lambda p: (32 if "pos" in p else 8, None)) for k in ("vit", "projector"))
    print(f"MB: decoder {decoder / 1e6:.0f}, embedder {embedder / 1e6:.0f}, Base {encoder / 1e6:.0f}, "
          f"its projector {projector / 1e6:.0f}")  # fmt: skip
    assert encoder <= 95e6
    assert decoder + embedder + encoder + projector <= 1.6e9


@pytest.mark.slow
def test_the_base_encoder_at_512_converts_and_runs(tmp_path):
    cfg, rng = presets.hypervl_1p7b().model, np.random.default_rng(0)

    def draw(name, shape):
        if not name.startswith("base."):
            return np.broadcast_to(np.float32(0), shape)
        return np.full(shape, 1, np.float32) if len(shape) < 2 else (rng.standard_normal(shape, np.float32) * 0.02)

    params = quantize.quantize({"base": weights(cfg, draw)["base"]}, quantize.RECIPES["int8"])
    part = parts.encoder(cfg, params, "base")
    path = tmp_path / "encoder_base.tflite"
    lower.to_tflite(path, quantize.restored(part.params), part.signatures)
    pack.pack(path, quantize.matrices(part.params))
    pack.compare(path, quantize.matrices(part.params))
    projector = sum(leaf.nbytes for leaf in jax.tree.leaves(params["base"]["projector"]))
    size_of, flops = path.stat().st_size, bench.work(path)["vision"].flops
    print(f"{size_of / 1e6:.1f} MB, {projector / 1e6:.1f} of them the projector's; {flops / 1e9:.1f} GFLOP, "
          f"peak {bench.peak() / 1e9:.2f} GB")  # fmt: skip
    assert size_of - projector <= 95e6
    inputs = {"images": rng.random((1, 512, 512, 3), np.float32), "mask": np.ones((1, 1024), np.float32)}
    assert np.isfinite(lower.run(path, "vision", inputs)["features"]).all()
