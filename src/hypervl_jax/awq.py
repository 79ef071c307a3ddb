"""A decoder of the same function that loses less by 4 bits: inputs that are large are multiplied by smaller steps (AWQ,
Lin et al. 2306.00978, section 3.2).

Input j of a matrix is multiplied by s_j and what it is multiplied by is divided by it: W x = (W s) (x / s).
Rounded are the columns of W s, so the larger s_j, the finer is column j. s = r^share, r the root mean square of
the input, with the share that loses least of the outputs that share their input (`gptq.error`, where the paper runs
samples). The division goes into what comes before: a norm's weights, or the rows of `up` for `down`. The inputs of `o`
are those of several heads of one `v`, and stay.

What comes out is a model like any other, which is saved, exported and verified as such; GPTQ may follow.
Axes: I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from hypervl_jax import calibrate, gptq, quantize
from hypervl_jax.calibrate import INPUT, Grams
from hypervl_jax.quantize import Kind, Recipe

SHARES = np.linspace(0, 0.95, 20)  # tried, as the paper's code does
SETS = (("up", ("down",)), ("norm2", ("gate", "up")), ("norm1", ("q", "k", "v")))  # (what comes before, matrices)


def scaled(params: dict, recipe: Recipe, found: Iterable[Grams]) -> tuple[dict, list[Grams]]:
    """(parameters in f32 of the same function, what its matrices are multiplied by), for the 4 bits of a recipe and
    what was `found` of the model (`calibrate.grams`). Raises `RecipeError`."""
    kept = calibrate.layers_of(quantize.quantize(params, recipe))
    each, grams = [], []
    for i, (layer, h) in enumerate(zip(kept, found, strict=True)):
        kinds = {name: leaf.kind for name, leaf in calibrate.narrow(layer).items()}
        one, seen = _layer(calibrate.at(params, i), kinds, h)
        each.append(one)
        grams.append(seen)
    return calibrate.with_layers(params, each), grams


def _layer(layer: dict, kinds: dict[str, Kind], found: Grams) -> tuple[dict, Grams]:
    weights = {name: np.asarray(leaf["weight"], np.float64) for name, leaf in layer.items()}
    found = dict(found)
    for before, names in SETS:
        narrow, h = [(weights[n], kinds[n]) for n in names if n in kinds], found[INPUT[names[0]]]
        s = scales(narrow, h)
        for n in names:
            weights[n] = weights[n] * s
        weights[before] = weights[before] / (s if weights[before].ndim == 1 else s[:, None])
        found[INPUT[names[0]]] = h / np.outer(s, s)
    return {name: {"weight": w.astype(np.float32)} for name, w in weights.items()}, found


def scales(
    matrices: Sequence[tuple[Float[np.ndarray, "_ I"], Kind]], gram: Float[np.ndarray, "I I"]
) -> Float[np.ndarray, " I"]:
    """s of matrices with the same input: the largest times the smallest is 1, as in the paper's code."""
    h = np.asarray(gram, np.float64)
    size = np.sqrt(h.diagonal())
    best, least = np.ones(len(h)), np.inf
    size = np.where(size > 0, size, 1.0)
    for share in SHARES if matrices else ():
        s = size**share
        s = s / np.sqrt(s.max() * s.min())
        lost = sum(
            gptq.error(w, quantize.floats(quantize.quantize_matrix(w * s, kind)) / s, h).sum() for w, kind in matrices
        )
        if lost < least:
            best, least = s, lost
    return best
