"""Memory of the losses: through whole logits against a block of the vocabulary at a time.

Next token and DCL divergence of one row of 4096 tokens through the head of a Qwen3-1.7B, 151,936 rows of 2048; hidden
states of f32 or bf16, the head's weights f32 as they are trained. Working memory is what the compiler reserves beside
arguments and results, with every intermediate array a buffer (`hypervl_jax.bench`); nothing runs, so the sizes need no
memory. The gradient of the head, as large as the head, is a result and in neither figure.

  next token   value, gradients of hidden states and head
  KL, encoder  value, gradient of the student's hidden states: the decoder stands still on Base's turns
  KL, decoder  value, gradients of the student's hidden states and of the head
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from common import Bar, arguments, finish

from hypervl_jax import bench, losses, presets
from hypervl_jax.model.layers import matmul

TOKENS = 4096
CHUNKS = (1024, 2048, 4096)
TAU = 2.0


def next_token(chunk: int) -> Callable:
    def loss(hidden, head, targets):
        if chunk:
            return jnp.mean(losses.chunked_cross_entropy(hidden, head, targets, chunk))
        return losses.cross_entropy(matmul(hidden, head.astype(hidden.dtype)).astype(jnp.float32), targets).mean()

    return jax.value_and_grad(loss, argnums=(0, 1))


def divergence(chunk: int, decoder: bool) -> Callable:
    def loss(student, head, teacher, weights):
        if chunk:
            return losses.chunked_dcl_kl(teacher, student, head, weights, TAU, chunk)
        t, s = (matmul(hidden, head.astype(hidden.dtype)).astype(jnp.float32) for hidden in (teacher, student))
        return losses.dcl_kl(t, s, weights, TAU)

    return jax.value_and_grad(loss, argnums=(0, 1) if decoder else 0)


def analyse(tokens: int, dtype: str, chunks: tuple[int, ...]) -> list[dict]:
    """MB of 10^6 bytes a loss: `plain`, and one column a chunk."""
    cfg = presets.hypervl_1p7b().model.llm
    hidden = jax.ShapeDtypeStruct((1, tokens, cfg.width), dtype)
    head = jax.ShapeDtypeStruct((cfg.vocab, cfg.width), jnp.float32)
    targets, weights = (jax.ShapeDtypeStruct((1, tokens), kind) for kind in (jnp.int32, jnp.float32))
    losses_of = {
        "next token": (next_token, (hidden, head, targets)),
        "KL, encoder": (lambda chunk: divergence(chunk, decoder=False), (hidden, head, hidden, weights)),
        "KL, decoder": (lambda chunk: divergence(chunk, decoder=True), (hidden, head, hidden, weights)),
    }
    return [
        {"loss": name, "dtype": dtype, "plain": bench.temporary_bytes(of(0), *shapes) / 1e6}
        | {str(chunk): bench.temporary_bytes(of(chunk), *shapes) / 1e6 for chunk in chunks}
        for name, (of, shapes) in losses_of.items()
    ]


def main() -> int:
    args = arguments(__doc__)
    chosen = presets.hypervl_1p7b().train.loss_chunk
    chunks = (chosen,) if args.quick else CHUNKS
    rows = [row for dtype in ("float32", "bfloat16") for row in analyse(TOKENS, dtype, chunks)]
    print(f"\nworking memory by compiler analysis, MB; {TOKENS} tokens; columns: rows of the vocabulary at a time")
    print(f"{'':12}{'':10}{'plain':>10}" + "".join(f"{chunk:>10,}" for chunk in chunks))
    for row in rows:
        figures = "".join(f"{row[str(chunk)]:>10,.0f}" for chunk in chunks)
        print(f"{row['loss']:12}{row['dtype']:>10}{row['plain']:>10,.0f}{figures}")
    bars = []
    for row in rows:
        name = row["loss"].replace(", ", "_").replace(" ", "_").lower()
        less = row["plain"] / row[str(chosen)]
        bars.append(Bar(f"{row['dtype']}.{name}_less", less, 7 if row["loss"] == "next token" else 30))
    return finish("losses", {"tokens": TOKENS, "chunk": chosen, "memory_mb": rows}, bars, args)


if __name__ == "__main__":
    sys.exit(main())
