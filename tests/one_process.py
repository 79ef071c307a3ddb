"""One process of several that train together: `python one_process.py OUT MESH [TOLD]`, with JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID set. Prints one line of JSON: which rows it has and what it holds. With TOLD (a
signal) the last process is told so while it feeds the second step, and with 9 all are."""

import hashlib
import io
import json
import os
import signal
import sys
from dataclasses import replace

import jax
import numpy as np
from PIL import Image

from hypervl_jax import checkpoint, mesh, presets, tokens, train, watch
from hypervl_jax.config import Rule
from hypervl_jax.data import feeds
from hypervl_jax.data.conversations import Conversation, Picture


class Records:
    """A dozen conversations in memory, each about a picture."""

    repeat = 1.0

    def __getitem__(self, i):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)).save(
            file := io.BytesIO(), "PNG"
        )
        asked = [{"type": "image"}, {"type": "text", "text": f"what is {i}?"}]
        said = [{"type": "text", "text": "a thing" if i % 2 else "nothing"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        return Conversation(str(i), messages, [Picture(f"{i}.png", file.getvalue(), (20 + i, 30))], "set", i + 1)

    def __len__(self):
        return 12


RULES = Rule(r".*\.vit\..*|names_.*", 0.0), Rule(r".*")


def settings(rules=RULES):
    """Four steps of both branches, one program and a small one: encoders stand still. Eight rows, of which each device
    may have its own."""
    cfg = presets.tiny()
    parts = {part: replace(getattr(cfg.model, part), depth=1) for part in ("base", "large", "llm")}
    how = replace(
        cfg.train, steps=4, stage0_steps=0, name_weight=0.0, save_every=1, keep=9, optimizer="adamw", scan=False,
        rules=rules,
    )  # fmt: skip
    data = replace(cfg.data, batch=8, tile_buckets=(2,), lengths=(48,), shrink_prob=0.0)
    dcl = replace(cfg.dcl, schedule="joint", weight=0.0)
    return replace(cfg, model=replace(cfg.model, **parts), data=data, train=how, dcl=dcl)


def feed(cfg):
    tokenizer = tokens.train_tokenizer(list(feeds.texts([Records()])) * 2)
    return feeds.Conversations(cfg, [Records()], tokenizer, progress=False)


class Told:
    """A feed that tells its own process something while it feeds the second step."""

    def __init__(self, feed, number):
        self.feed, self.number = feed, number

    def __getattr__(self, name):
        return getattr(self.feed, name)

    def batches(self, start, rows=None):
        for step, batch in enumerate(self.feed.batches(start, rows), start):
            if step == 1 and (self.number == signal.SIGKILL or jax.process_index() == jax.process_count() - 1):
                os.kill(os.getpid(), self.number)
            yield batch


def digest(tree):
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(mesh.whole(tree)))).hexdigest()


def main() -> None:
    mesh.start()
    out, on, *told = sys.argv[1:]
    cfg, on = settings(), mesh.parse(on)
    given = Told(feed(cfg), int(told[0])) if told else feed(cfg)
    try:
        state = train.run(cfg, given, out, watch.QUIET, on=on)
    except watch.Stopped as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
    held = [sum(s.data.nbytes for s in a.addressable_shards) for a in jax.tree.leaves(state)]
    again = train.restore(cfg, out, 1, on)
    with mesh.first("asking"):
        steps = sorted(int(p.name) for p in (checkpoint.Path(out) / "checkpoints").iterdir() if p.name.isdigit())
    whole = sum(a.nbytes for a in jax.tree.leaves(state))
    said = {"process": jax.process_index(), "rows": mesh.rows(mesh.make(on), cfg.data.batch), "steps": steps}
    print(json.dumps(said | {"held": sum(held) / whole, "state": digest(state), "again": digest(again)}))


if __name__ == "__main__":
    main()
