"""Teaches a model to answer in German, by adapters of its decoder, and asks about screens that it has not seen.

The toy set is composed of drawings that ship. It takes half a minute on two cores:

    python examples/lora.py            the weights that ship
    python examples/lora.py MODEL      a model directory
"""

import sys
from dataclasses import replace

import numpy as np

from hypervl_jax import checkpoint, evaluate, lora, presets
from hypervl_jax.config import LoraConfig
from hypervl_jax.data import screens
from hypervl_jax.data.assets import Assets

model, how, words = checkpoint.load_model((*sys.argv[1:], "nano")[0]), LoraConfig(rank=8), {"yes": "ja", "no": "nein"}
toy = replace(presets.nano().data.screens, tasks=("yesno",), max_side=64, max_area=64 * 64)
drawn = [screens.record(Assets.load(), toy, "train", i) for i in range(160)]
said = [s._replace(questions=tuple(q._replace(answer=words[q.answer]) for q in s.questions)) for s in drawn]
samples = [lora.Sample(s.image, q.text, q.answer) for s in said[:128] for q in s.questions]
fitted = lora.fit(model, samples, how, steps=120, lr=5e-3)
taught = model._replace(params=lora.merge(model.params, fitted.adapters, how).params)
right = [np.mean([a.correct for a in evaluate.run(m, "base", said[128:])]) for m in (model, taught)]
print(f"loss {fitted.losses[0]:.2f} -> {fitted.losses[-5:].mean():.2f}, right {right[0]:.0%} -> {right[1]:.0%}")
assert right[0] < 0.1 < 0.65 < right[1]
