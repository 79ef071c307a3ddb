"""The decoder against transformers' Qwen3 and Llama: directories as save_pretrained writes them, read by the real
loader, random weights, odd sizes; part by part, then logits and greedy answers."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import convert, generate
from hypervl_jax.config import LlmConfig
from hypervl_jax.model import llm
from hypervl_jax.model.layers import RMSNorm, attention
from hypervl_jax.presets import tiny

torch = pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")

SIZES = {
    # Eight query heads on one key head, heads that do not make up the width, a head of its own, another base, epsilon.
    "odd": LlmConfig(101, 40, 3, heads=8, kv_heads=1, head_dim=14, mlp=72, rope_theta=1e4, eps=1e-5, tied=False),
    "tied": LlmConfig(101, 36, 2, heads=3, kv_heads=3, head_dim=12, mlp=50, rope_theta=1e6, tied=True),
    "llama": LlmConfig(101, 48, 2, heads=4, kv_heads=2, head_dim=12, mlp=50, rope_theta=1e4, eps=1e-5, qk_norm=False),
}
B, L = 2, 9


def reference(cfg: LlmConfig):
    """A model of transformers of these sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    make, model = (Qwen3Config, Qwen3ForCausalLM) if cfg.qk_norm else (LlamaConfig, LlamaForCausalLM)
    sizes = make(
        vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=cfg.mlp, num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim,
        rms_norm_eps=cfg.eps, tie_word_embeddings=cfg.tied, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return model(sizes)


class Pair:
    """One geometry: their model with random weights (norms too), and what our loader makes of its directory."""

    def __init__(self, cfg, theirs, folder):
        theirs.save_pretrained(folder, max_shard_size="20KB")
        self.files = sorted(p.name for p in folder.glob("*.safetensors"))
        self.theirs, self.loaded = theirs, convert.load_llm(folder)
        self.cfg, self.params = cfg, jax.tree.map(jnp.asarray, self.loaded.params)

    def layer(self, i):
        return jax.tree.map(lambda a: a[i], self.params["blocks"]["layers"])


@pytest.fixture(scope="module", params=SIZES)
def pair(request, shaken, tmp_path_factory):
    cfg = SIZES[request.param]
    return Pair(cfg, shaken(reference(cfg), 0.25), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def ids(pair):
    return np.random.default_rng(0).integers(0, pair.cfg.vocab, (B, L))


def test_the_loader_reads_sizes_and_every_weight_out_of_several_files(pair):
    assert pair.loaded.config == pair.cfg
    assert len(pair.files) > 2
    assert pair.loaded.unused == []
    args = jnp.zeros((1, 1, pair.cfg.width)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
    shapes = jax.eval_shape(llm.Llm(pair.cfg).init, jax.random.key(0), *args)["params"]
    assert jax.tree.map(np.shape, pair.params) == jax.tree.map(lambda s: s.shape, shapes)
    theirs = sum(p.numel() for p in pair.theirs.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(pair.params)) == theirs


def test_norm(pair, close):
    x = np.random.default_rng(1).normal(size=(2, 5, pair.cfg.width)).astype(np.float32)
    got = RMSNorm(pair.cfg.eps).apply({"params": pair.params["norm"]}, jnp.asarray(x))
    close(got, pair.theirs.model.norm(torch.tensor(x)))


def test_rotary(pair, close):
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


def test_attention(pair, close):
    """Key heads shared as theirs are, behind a causal mask."""
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    rng, c = np.random.default_rng(4), pair.cfg
    q, k, v = (rng.normal(size=(B, h, L, c.head_dim)).astype(np.float32) for h in (c.heads, c.kv_heads, c.kv_heads))
    mask = np.tril(np.ones((L, L), bool))
    bias = torch.tensor(np.where(mask, 0, np.finfo(np.float32).min), dtype=torch.float32)[None, None]
    module = pair.theirs.model.layers[0].self_attn
    want, _ = eager_attention_forward(module, *map(torch.tensor, (q, k, v)), bias, scaling=c.head_dim**-0.5)
    got = attention(*map(jnp.asarray, (q, k, v)), jnp.broadcast_to(mask, (B, L, L)))
    close(np.asarray(got).transpose(0, 2, 1, 3), want)


def test_block(pair, close):
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


def answers(cfg, params, ids, scan=True):
    """Hidden states and logits of whole rows."""
    x = llm.embed(params, jnp.asarray(ids))
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    mask = llm.segment_mask(jnp.zeros(ids.shape, jnp.int32))
    hidden, _ = jax.jit(llm.Llm(cfg, scan).apply)({"params": params}, x, positions, mask)
    return hidden, llm.logits(params, hidden)


@pytest.mark.parametrize("scan", [True, False])
def test_stack_and_logits(scan, pair, ids, close):
    hidden, logits = answers(pair.cfg, pair.params, ids, scan)
    with torch.no_grad():
        close(hidden, pair.theirs.model(torch.tensor(ids)).last_hidden_state)
        close(logits, pair.theirs(torch.tensor(ids)).logits)


def test_logits_in_bf16(pair, ids, bf16_is_as_good_as_torchs):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), pair.params)
    with torch.no_grad():
        reference = pair.theirs(torch.tensor(ids)).logits
        theirs = copy.deepcopy(pair.theirs).bfloat16()(torch.tensor(ids)).logits
    bf16_is_as_good_as_torchs(answers(pair.cfg, params, ids)[1], theirs, reference)


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
