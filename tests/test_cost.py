"""What a picture costs, against the paper's table and the compiler's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import bench, cost, plan, presets
from hypervl_jax.model import hypervl, llm

# papers: HyperVL notes, 1.7: size (width, height), ratio, tokens with thumbnail, TFLOP of Base and Large, encoder alone
TABLE = [
    ((448, 448), 1.0, 196, 0.21, 0.72),
    ((640, 480), 1.0, 556, 0.64, 2.17),
    ((640, 480), 0.5, 165, 0.21, 0.72),
    ((1024, 768), 0.5, 647, 1.07, 3.62),
    ((1080, 2400), 1.0, 2806, 3.42, 11.57),
    ((1080, 2400), 0.1, 520, 0.64, 2.17),
    ((2480, 3508), 1.0, 8836, 7.70, 26.03),
]


@pytest.mark.parametrize(("size", "ratio", "visual", "base", "large"), TABLE)
def test_at_the_papers_sizes(size, ratio, visual, base, large):
    cfg = presets.hypervl_1p7b().model
    p = plan.make(size[::-1], ratio, cfg.policy)
    for branch, tera in (("base", base), ("large", large)):
        found = cost.of(p, cfg, branch)
        assert found.tokens == visual + p.n_tiles
        encoder = found.encode - cost.projector_flops(p, cfg, branch)
        assert encoder / 1e12 == pytest.approx(tera, abs=0.006)
        assert found.cache == found.tokens * 2 * 114_688  # bf16 there, float32 here
    assert cost.decoder_bytes(cfg) == 4 * 1_720_574_976


def flops(f, *shapes):
    return jax.jit(f).lower(*shapes).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("branch", ["base", "large"])
def test_encoder_flops_are_those_the_compiler_counts(branch):
    """Within 5 %: the compiler counts norms and activations too. One layer a loop body, so the loop is unrolled."""
    cfg = presets.nano().model
    p = plan.make((cfg.policy.tile, cfg.policy.tile), 1.0, cfg.policy)
    shapes = bench.encoder_shapes(cfg, branch, 1)
    counted = flops(lambda *a: hypervl.encode_batch(a[0], cfg, branch, *a[1:], scan=False), *shapes)
    assert cost.of(p, cfg, branch).encode == pytest.approx(counted, rel=0.05)


def test_decoder_flops_are_those_the_compiler_counts():
    cfg, n = presets.nano().model.llm, 96
    net, see = llm.Llm(cfg, scan=False), jnp.ones((1, n, n), bool)
    params = jax.eval_shape(
        lambda k: llm.Llm(cfg).init(k, jnp.zeros((1, 1, cfg.width)), jnp.zeros((1, 1), jnp.int32), see[:, :1, :1]),
        jax.random.key(0),
    )
    x, at = jax.ShapeDtypeStruct((1, n, cfg.width), np.float32), jax.ShapeDtypeStruct((1, n), np.int32)
    assert cost.llm_flops(cfg, n) == pytest.approx(
        flops(lambda p, x, at: net.apply(p, x, at, see)[0], params, x, at), rel=0.05
    )


def test_memory_is_that_of_one_tile_and_of_the_weights(tiny_config, tiny_params):
    for branch in ("base", "large"):
        found = cost.encoding(tiny_config.model, branch)
        assert found.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_params[branch]))
        assert found.working == bench.temporary_bytes(
            lambda p, t, m, branch=branch: hypervl.encode_tile(p, tiny_config.model, branch, t[0], m[0]),
            *bench.encoder_shapes(tiny_config.model, branch, 1),
        )
    assert cost.decoder_bytes(tiny_config.model) == sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_params["llm"]))
