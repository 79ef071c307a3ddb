"""The model by hand: plan, tile, encode, project, embed and decode, each a plain function of arrays.

Every function takes its parameters as an argument and returns arrays, so JAX's transformations apply to it as they are:
`jit`, `vmap`, `pmap`, `shard_map`, `grad`. This walk uses each once, checks that all give the same numbers, and ends
with an answer and with the pixels that it hangs on. It takes under a minute on two cores:

    python examples/compose.py            random weights of the tiny preset
    python examples/compose.py MODEL      a model directory, or the name of weights that ship

Axes: B pictures, N tiles a picture, T tile side, P patches a tile, M tokens a tile, D decoder width.
"""

import functools
import os
import sys

# Four devices to spread over, simulated where there is one CPU. Must be set before JAX is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from hypervl_jax import checkpoint, generate, image, plan, presets, text, tokens
from hypervl_jax.checkpoint import Model
from hypervl_jax.data import screens
from hypervl_jax.data.assets import Assets
from hypervl_jax.model import hypervl, llm

BRANCH = "base"
QUESTION = "what is this?"
NEW = 6  # tokens to generate


def main(name: str | None = None) -> None:
    model = checkpoint.load_model(name) if name else untrained()
    cfg, params = model.config, jax.tree.map(jnp.asarray, model.params)
    devices = jax.devices()

    # --- pictures to tiles, on the host ------------------------------------------------------------------------------
    # One picture a device, all of one size, so that one plan serves all of them: two tiles and a thumbnail.
    size = (cfg.policy.tile, 3 * cfg.policy.tile // 2)
    seen = plan.make(size, ratio=1.0, policy=cfg.policy)
    drawn = [screens.record(Assets.load(), presets.tiny().data.screens, "test_known", i) for i in range(len(devices))]
    pictures = [image.resize(screen.image, size) for screen in drawn]
    tiles = jnp.asarray(np.stack([image.prepare(p, seen) for p in pictures]))  # u8[B N T T 3]
    mask = jnp.asarray(seen.patch_mask())  # bool[N P]
    say(f"{size[0]} x {size[1]} px: {seen.n_tiles} tiles, {seen.tokens} visual tokens; tiles {tiles.shape}")

    # --- tiles to features, five ways --------------------------------------------------------------------------------
    def encode(params, tiles):
        """One picture: u8[N T T 3] -> f32[N M D]."""
        patches = hypervl.look(params, cfg, BRANCH, tiles, mask)
        return hypervl.project(params, cfg, BRANCH, patches)

    plain = jnp.stack([encode(params, t) for t in tiles])
    say(f"plain: features {plain.shape}")

    every = jax.vmap(encode, in_axes=(None, 0))
    same("jit of vmap, all pictures in one program", jax.jit(every)(params, tiles), plain)

    serial = jax.jit(lambda params, tiles: hypervl.encode_tiles(params, cfg, BRANCH, tiles, mask, batch_size=1))
    same("lax.map, one tile at a time in constant memory", serial(params, tiles[0]), plain[0])

    same("pmap, a picture a device", jax.pmap(encode, in_axes=(None, 0))(params, tiles), plain)

    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(every, mesh=mesh, in_specs=(Spec(), Spec("data")), out_specs=Spec("data"))
    same("shard_map over a mesh", jax.jit(spread)(params, tiles), plain)

    sharded = jax.device_put(tiles, NamedSharding(mesh, Spec("data")))
    same("jit over a sharded array", jax.jit(every)(params, sharded), plain)

    # --- features and text to embeddings -----------------------------------------------------------------------------
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = text.render([message], [seen], model.tokenizer, cfg.text)
    ids, slots = (jnp.asarray(a)[None] for a in (prompt.ids, prompt.slots))
    features = plain[0].reshape(1, -1, plain.shape[-1])  # [1 N*M D]
    x = hypervl.embed(params, ids, slots, features)
    say(f"{ids.shape[1]} tokens in the prompt, {int((slots >= 0).sum())} of them visual")

    # --- decoding by hand, beside the library's loop -----------------------------------------------------------------
    end, forbidden = model.tokenizer.special(tokens.IM_END), jnp.asarray(model.tokenizer.forbidden(cfg.llm.vocab))
    greedy, key, unpadded = generate.Sampler(), jax.random.key(0), jnp.zeros(1, jnp.int32)
    state = jax.jit(generate.prefill, static_argnums=(1, 5))(params, cfg, x, unpadded, key, x.shape[1] + NEW)
    step = jax.jit(lambda state: generate.sample_step(params, cfg, state, greedy, forbidden, end))
    said = []
    while len(said) < NEW and not state.done.all():
        state, token = step(state)
        said.append(int(token[0]))
    looped = generate.generate(params, cfg, x, unpadded, forbidden, key, greedy, end, NEW)[0].tolist()
    assert said == looped[: len(said)], "the loop in one program must say the same"
    say(f"{QUESTION} -> {text.strip_answer(model.tokenizer, said)!r}, step by step and in one program")

    # --- and back: which pixels does the first token hang on? --------------------------------------------------------
    @jax.jit
    @functools.partial(jax.grad, argnums=0)
    def pull(tiles):
        """Gradient of log p(first token) by the pixels, f32[N T T 3] in 0..1."""
        features = encode(params, tiles).reshape(1, -1, x.shape[-1])
        at = jnp.arange(ids.shape[1])[None]
        hidden = hypervl.hidden(params, cfg, features, ids, slots, at, jnp.zeros_like(ids))
        return jax.nn.log_softmax(llm.logits(params["llm"], hidden[0, -1]))[said[0]]

    strength = jnp.abs(pull(tiles[0] / 255.0)).sum((1, 2, 3))
    assert bool(jnp.isfinite(strength).all())
    assert float(strength.sum()) > 0
    shares = ", ".join(f"{100 * float(s):.0f} %" for s in strength / strength.sum())
    say(f"share of the gradient in each tile, the thumbnail last: {shares}")


def untrained() -> Model:
    """The tiny preset with random weights, and a tokenizer of its few words."""
    words = [QUESTION, *Assets.load().words]
    cfg = presets.tiny().model
    return Model(cfg, hypervl.init(jax.random.key(0), cfg), tokens.train_tokenizer(words * 2), {})


def same(how: str, got: jax.Array, want: jax.Array) -> None:
    """Equal to 1e-5 of the largest feature."""
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    assert error <= 1e-5, f"{how}: off by {error:.1e}"
    say(f"{how}: equal to {error:.0e}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
