"""The decoder against transformers' Qwen3, random weights, odd sizes: part by part, then logits and greedy answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import generate
from hypervl_jax.config import LlmConfig
from hypervl_jax.model import llm
from hypervl_jax.model.layers import RMSNorm
from hypervl_jax.presets import tiny

torch = pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")

BLOCK = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
SIZES = {
    # Four query heads a key head, heads that do not make up the width, a head of its own, another base and epsilon.
    "odd": LlmConfig(101, 40, 3, heads=8, kv_heads=2, head_dim=14, mlp=72, rope_theta=1e4, eps=1e-5, tied=False),
    "tied": LlmConfig(101, 36, 2, heads=3, kv_heads=3, head_dim=12, mlp=50, rope_theta=1e6, tied=True),
}
B, L = 2, 9


class Pair:
    """One geometry: their model with random weights (norms too), and the same weights in our tree."""

    def __init__(self, cfg: LlmConfig):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        self.cfg = cfg
        sizes = Qwen3Config(
            vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=cfg.mlp, num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim,
            rms_norm_eps=cfg.eps, tie_word_embeddings=cfg.tied, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        self.theirs = Qwen3ForCausalLM(sizes).eval()
        with torch.no_grad():
            for name, p in self.theirs.named_parameters():
                p.copy_(1 + 0.3 * torch.randn(p.shape) if "norm" in name else 0.25 * torch.randn(p.shape))
        w = {k: np.asarray(v.detach()) for k, v in self.theirs.named_parameters()}
        layers = [
            {ours: {"weight": w[f"model.layers.{i}.{theirs}.weight"]} for ours, theirs in BLOCK.items()}
            for i in range(cfg.depth)
        ]
        self.params = {
            "embed": w["model.embed_tokens.weight"],
            "blocks": {"layers": jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *layers)},
            "norm": {"weight": w["model.norm.weight"]},
        }
        if not cfg.tied:
            self.params["head"] = w["lm_head.weight"]
        self.params = jax.tree.map(jnp.asarray, self.params)

    def layer(self, i):
        return jax.tree.map(lambda a: a[i], self.params["blocks"]["layers"])


@pytest.fixture(scope="module", params=SIZES)
def pair(request):
    return Pair(SIZES[request.param])


@pytest.fixture(scope="module")
def ids(pair):
    return np.random.default_rng(0).integers(0, pair.cfg.vocab, (B, L))


def close(got, want, tolerance=1e-5):
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_the_tree_is_ours_and_nothing_of_theirs_is_left_over(pair):
    args = jnp.zeros((1, 1, pair.cfg.width)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
    shapes = jax.eval_shape(llm.Llm(pair.cfg).init, jax.random.key(0), *args)["params"]
    assert jax.tree.map(np.shape, pair.params) == jax.tree.map(lambda s: s.shape, shapes)
    theirs = sum(p.numel() for p in pair.theirs.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(pair.params)) == theirs


def test_norm(pair):
    x = np.random.default_rng(1).normal(size=(2, 5, pair.cfg.width)).astype(np.float32)
    got = RMSNorm(pair.cfg.eps).apply({"params": pair.params["norm"]}, jnp.asarray(x))
    close(got, pair.theirs.model.norm(torch.tensor(x)))


def test_rotary(pair):
    """Tables, and the rotation itself, at near and far positions."""
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    d = pair.cfg.head_dim
    positions = np.array([[0, 1, 2, 7, 300], [5, 5, 4, 3, 2]])
    x = np.random.default_rng(2).normal(size=(2, 3, 5, d)).astype(np.float32)
    cos, sin = llm.rotary(jnp.asarray(positions), d, pair.cfg.rope_theta)
    theirs = pair.theirs.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    for ours, table in zip((cos, sin), theirs, strict=True):
        close(np.concatenate([ours, ours], -1)[:, 0], table, 2e-5)  # an angle of 300 in f32
    want, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), *theirs)
    close(llm.rotate(jnp.asarray(x), cos, sin), want, 2e-5)


def test_block(pair):
    x = np.random.default_rng(3).normal(size=(B, L, pair.cfg.width)).astype(np.float32)
    positions = np.broadcast_to(np.arange(L), (B, L))
    mask = np.tril(np.ones((L, L), bool))
    cos, sin = llm.rotary(jnp.asarray(positions), pair.cfg.head_dim, pair.cfg.rope_theta)
    seen = jnp.broadcast_to(mask, (B, L, L))
    got, _ = llm.Block(pair.cfg).apply({"params": pair.layer(1)}, jnp.asarray(x), None, cos, sin, seen, 0)
    bias = torch.tensor(np.where(mask, 0, np.finfo(np.float32).min), dtype=torch.float32)[None, None]
    tables = pair.theirs.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    want = pair.theirs.model.layers[1](torch.tensor(x), attention_mask=bias, position_embeddings=tables)
    close(got, want[0] if isinstance(want, tuple) else want)


@pytest.mark.parametrize("scan", [True, False])
def test_stack_and_logits(scan, pair, ids):
    x = llm.embed(pair.params, jnp.asarray(ids))
    positions = jnp.broadcast_to(jnp.arange(L), (B, L))
    mask = llm.segment_mask(jnp.zeros((B, L), jnp.int32))
    hidden, _ = jax.jit(llm.Llm(pair.cfg, scan).apply)({"params": pair.params}, x, positions, mask)
    with torch.no_grad():
        close(hidden, pair.theirs.model(torch.tensor(ids)).last_hidden_state)
        close(llm.logits(pair.params, hidden), pair.theirs(torch.tensor(ids)).logits)


def test_greedy_answers_through_both_caches(pair, ids):
    """Rows of different length, padded on the left; twenty tokens each."""
    new = 20
    cfg = dataclasses.replace(tiny().model, llm=pair.cfg)
    rows = [(ids[0], np.full(L, -1)), (ids[1, 4:], np.full(L - 4, -1))]
    padded, _, pads = generate.pad_left(rows, L, 0)
    x = llm.embed(pair.params, jnp.asarray(padded))
    allowed, key = jnp.zeros(pair.cfg.vocab, bool), jax.random.key(0)
    got = generate.generate(
        {"llm": pair.params}, cfg, x, jnp.asarray(pads), allowed, key, generate.Sampler(), pair.cfg.vocab, new
    )
    for (prompt, _), answer in zip(rows, np.asarray(got), strict=True):
        asked = torch.tensor(prompt)[None]
        with torch.no_grad():
            said = pair.theirs.generate(
                asked, attention_mask=torch.ones_like(asked), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        assert answer.tolist() == said[0, len(prompt) :].tolist()
    assert len(set(got.ravel().tolist())) > 5
