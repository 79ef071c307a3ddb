"""IRN: rescaling by an invertible network (Xiao et al., ECCV 2020; IJCV 2022), and its light sibling FIRN.

Every stage halves the picture by Haar and mixes it with coupling blocks; three channels of the result are the small
picture, the rest is detail. The inverse puts noise in the place of the detail, as the weights were taught to bear.
Axes: B batch, H W picture, h w small picture, C channels of a stage, D channels out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from hypervl_jax.rescale.layers import DenseBlock, Kernel, Learnt, conv, haar, leaky, unhaar
from hypervl_jax.rescale.pairs import Key, Params, noise, shrunk

Kind = Literal["dense", "light"]
Subnet = Callable[[Array], Array]


class LightBlock(nn.Module):
    """The kernels of FIRN's subnet: three distilling steps and pixel attention, of int(C * factor) channels (Zhao et
    al. 2020); `light` applies them."""

    features: int
    factor: float

    @nn.compact
    def __call__(self, channels: int) -> dict[str, Kernel]:
        width = int(channels * self.factor)
        carried = width if self.factor > 1 else channels
        made = {"expandconv": (width, 3, channels)} if self.factor > 1 else {}
        for i in (1, 2, 3):
            made |= {f"c{i}_d": (width, 1, carried), f"c{i}_r": (carried, 3, carried)}
        made |= {"c4": (width, 3, carried), "c5": (self.features, 1, 4 * width)}
        made["PA.conv"] = (self.features, 1, self.features)
        return {name: Learnt(d, k, name=name)(c) for name, (d, k, c) in made.items()}


def light(x: Float[Array, "B H W C"], learnt: dict[str, Kernel], wide: bool) -> Float[Array, "B H W D"]:
    """FIRN's subnet."""

    def step(x: Array, name: str) -> Array:
        return conv(x, learnt[name], wide)

    x = leaky(step(x, "expandconv")) if "expandconv" in learnt else x
    distilled = []
    for i in (1, 2, 3):
        distilled.append(leaky(step(x, f"c{i}_d")))
        x = leaky(step(x, f"c{i}_r") + x)
    y = step(jnp.concatenate([*distilled, leaky(step(x, "c4"))], -1), "c5")
    return y * nn.sigmoid(step(y, "PA.conv"))


def beside(*blocks: dict[str, Kernel]) -> dict[str, Kernel]:
    """The kernels of one subnet that says what one or several do that see the same, with what lies between the first
    and the last in fours. Zeros join them, and yet XLA's CPU backend takes less time, for it runs narrow convolutions
    badly (`widened`)."""
    joined = {}
    for name in blocks[0]:
        kernels, total = [block[name] for block in blocks], sum(block[name].bias.size for block in blocks)
        more = 0 if name in ("c5", "PA.conv") else -total % 4
        bias = jnp.pad(jnp.concatenate([kernel.bias for kernel in kernels]), (0, more))
        if name == "expandconv":  # sees what comes in, which all see
            weight = jnp.pad(jnp.concatenate([kernel.weight for kernel in kernels], -1), [(0, 0)] * 3 + [(0, more)])
            joined[name] = Kernel(weight, bias)
            continue
        rows, at = [], 0
        for kernel in kernels:
            parts = rearrange(kernel.weight, "k l (p c) d -> k l p c d", p=4 if name == "c5" else 1)  # of 4 results
            d = parts.shape[-1]
            rows.append(jnp.pad(parts, [(0, 0)] * 4 + [(at, total + more - at - d)]))
            at += d
        weight = jnp.concatenate(rows, 3)
        fill = 0 if name == "PA.conv" else -weight.shape[3] % 4
        weight = jnp.pad(weight, [(0, 0)] * 3 + [(0, fill), (0, 0)])
        joined[name] = Kernel(rearrange(weight, "k l p c d -> k l (p c) d"), bias)
    return joined


class Coupling(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 exp(s(y1)) + G(y1), and back (IRN, eq. 2 and 3); x1 is the first three channels."""

    kind: Kind = "dense"
    growth: int = 32
    wide: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], inverse: bool = False) -> Float[Array, "B H W C"]:
        low, detail = x[..., :3], x[..., 3:]
        shift, both = (self._light if self.kind == "light" else self._dense)(detail.shape[-1])
        low = low if inverse else low + shift(detail)
        scaled, g = both(low)
        s = jnp.tanh(scaled / 2)
        detail = (detail - g) / jnp.exp(s) if inverse else detail * jnp.exp(s) + g
        return jnp.concatenate([low - shift(detail) if inverse else low, detail], -1)

    def _dense(self, width: int) -> tuple[Subnet, Callable[[Array], tuple[Array, Array]]]:
        f, g, h = (
            DenseBlock(n, self.growth, wide=self.wide, name=k) for n, k in ((3, "F"), (width, "G"), (width, "H"))
        )
        return f, lambda low: (h(low), g(low))

    def _light(self, width: int) -> tuple[Subnet, Callable[[Array], tuple[Array, Array]]]:
        thin = Learnt(width // 2, 1, name="reduce_conv.0")(width)
        f, g, h = (
            LightBlock(n, w, name=k)(c)
            for n, w, k, c in ((3, 0.5, "F", width // 2), (width, 3.0, "G", 3), (width, 3.0, "H", 3))
        )

        def both(low: Array) -> tuple[Array, Array]:
            if self.wide:
                return tuple(jnp.split(light(low, beside(h, g), True), 2, -1))  # type: ignore
            return light(low, h, False), light(low, g, False)

        def shift(detail: Array) -> Array:
            x = leaky(conv(detail, thin))
            if not self.wide:
                return light(x, f, False)
            return light(jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % 4)]), beside(f), True)

        return shift, both


class Flow(nn.Module):
    """[B H W 3] -> [B h w 3 s^2] (small picture first) and back; `blocks` counts the couplings of each stage."""

    blocks: tuple[int, ...]
    kind: Kind
    growth: int
    wide: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B _ _ C"], inverse: bool = False) -> Float[Array, "B _ _ D"]:
        at, steps = 0, []
        for n in self.blocks:  # numbered as in published weights, where Haar has a number too
            steps += [
                None,
                *(Coupling(self.kind, self.growth, self.wide, name=f"operations.{at + 1 + i}") for i in range(n)),
            ]
            at += 1 + n
        for step in reversed(steps) if inverse else steps:
            if step is None:
                x = unhaar(x) if inverse else haar(x)
            else:
                x = step(x, inverse)
        return x


@dataclass(frozen=True)
class Irn:
    """The pair. `blocks` (8,), (8, 8), (8, 8, 8) are the published x2, x4, x8; `firn()` is FIRN x4."""

    blocks: tuple[int, ...] = (8, 8)
    kind: Kind = "dense"
    growth: int = 32  # of the dense blocks
    noise: float = 1.0  # spread of what stands for the detail on the way up, as the weights were taught; 0: none
    # "plain" as the papers write it, "wide" as CPUs like it, "auto" as the default backend does; one result, one name
    form: Literal["auto", "wide", "plain"] = field(default="auto", repr=False)

    @property
    def scale(self) -> int:
        return 2 ** len(self.blocks)

    @property
    def flow(self) -> Flow:
        wide = self.form == "wide" or (self.form == "auto" and jax.default_backend() == "cpu")
        return Flow(self.blocks, self.kind, self.growth, wide)

    def init(self, key: Array) -> Params:
        return self.flow.init(key, jnp.zeros((1, self.scale, self.scale, 3)))["params"]  # type: ignore

    def forward(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Small picture and detail, what training looks at."""
        shrunk(hr, self.scale)
        return self.flow.apply({"params": params}, hr)  # type: ignore

    def inverse(self, params: Params, x: Float[Array, "B h w D"]) -> Float[Array, "B H W 3"]:
        return self.flow.apply({"params": params}, x, inverse=True)  # type: ignore

    def down(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        return self.forward(params, hr)[..., :3]

    def up(self, params: Params, lr: Float[Array, "B h w 3"], key: Key = None) -> Float[Array, "B H W 3"]:
        z = self.noise * noise(key if self.noise else None, (*lr.shape[:3], 3 * (self.scale**2 - 1)))
        return self.inverse(params, jnp.concatenate([lr, z], -1))

    def flops(self, side: int) -> int:
        """Of one direction over a square picture, by formula: two a multiply-add of its kernels."""
        shapes = jax.tree.leaves_with_path(jax.eval_shape(self.init, jax.random.key(0)))
        total, at = 0, 0
        for stage, n in enumerate(self.blocks, 1):
            mine = {f"operations.{at + 1 + i}" for i in range(n)}
            kernels = sum(leaf.size for path, leaf in shapes if leaf.ndim == 4 and path[0].key in mine)
            total, at = total + 2 * kernels * (side // 2**stage) ** 2, at + 1 + n
        return total


def firn() -> Irn:
    """FIRN x4 (qwopqwop200/Fast-Invertible-Rescaling-Net): IRN's flow with a fourteenth of its weights."""
    return Irn((8, 8), "light")
