"""One tiny model with random weights, exported once."""

import pytest


@pytest.fixture(scope="session")
def tiny_model(tiny_config, tiny_params, tiny_tokenizer):
    """VRC's batch norms are random too, or folding them would prove nothing."""
    import jax
    import numpy as np

    from hypervl_jax.checkpoint import Model
    from hypervl_jax.model import vrc

    rng = np.random.default_rng(0)
    spread = {"mean": (-0.2, 0.2), "var": (0.5, 1.5), "scale": (0.7, 1.3), "bias": (-0.2, 0.2)}

    def draw(path, leaf):
        low_high = spread.get(path[-1].key)
        return np.asarray(leaf) if low_high is None else rng.uniform(*low_high, leaf.shape).astype(np.float32)

    net = jax.tree_util.tree_map_with_path(draw, vrc.init(jax.random.key(0), tiny_config.model.vrc))
    return Model(tiny_config.model, tiny_params | {"vrc": net}, tiny_tokenizer, {"vrc_scale": 0.9})


@pytest.fixture(scope="session")
def tiny_screens(tiny_config):
    from hypervl_jax.data import screens
    from hypervl_jax.data.assets import Assets

    return [screens.record(Assets.load(), tiny_config.data.screens, "test_known", i) for i in range(10)]


@pytest.fixture(scope="session")
def samples(tiny_screens):
    from hypervl_jax.calibrate import Sample

    said = {"role": "assistant", "content": "this"}
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    return [Sample([screen.image], [asked, said]) for screen in tiny_screens[:2]]


@pytest.fixture(scope="session")
def exported(tiny_model, tiny_screens, tmp_path_factory):
    """The exported folder. Nothing may write to it."""
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    pytest.importorskip("ai_edge_litert", reason="the LiteRT runtime has no wheel here")
    from hypervl_jax.export import parts

    out = tmp_path_factory.mktemp("export") / "tiny"
    pictures = [s.image for s in tiny_screens[:3]]
    parts.export(tiny_model, out, verify_images=pictures, progress=False)
    return out
