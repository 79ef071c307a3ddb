"""What the networks that rescale pictures are made of: a convolution, a dense block, Haar, folding pixels.

Axes: B batch, H W rows and columns, C D channels in and out, K kernel side.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from hypervl_jax.model.vrc import convolve

XAVIER = nn.initializers.variance_scaling(0.01, "fan_avg", "normal")  # Xavier's normal times 0.1, as the flows begin
ZEROS = nn.initializers.zeros


class Kernel(NamedTuple):
    """What a convolution learns."""

    weight: Float[Array, "K K C D"]
    bias: Float[Array, " D"]


class Learnt(nn.Module):
    """The kernel of a convolution of C channels, for whoever applies it himself."""

    features: int
    kernel: int = 3
    init: nn.initializers.Initializer = XAVIER

    @nn.compact
    def __call__(self, channels: int) -> Kernel:
        weight = self.param("weight", self.init, (self.kernel, self.kernel, channels, self.features))
        return Kernel(weight, self.param("bias", ZEROS, (self.features,)))


class Conv(Learnt):
    """Convolution with a bias, zero padded to the same size; a kernel of side 1 is a matrix product."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return conv(x, super().__call__(x.shape[-1]))


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of all that came before (IRN, fig. 3; Wang et al. 2018). Starts as the constant 0.

    `wide` computes it the other way about: what each result adds to all that come after it, in one `widened`
    convolution. CPUs take less time for fewer and wider ones that read nothing twice.
    """

    features: int
    growth: int = 32
    last: nn.initializers.Initializer = ZEROS
    wide: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        widths, inits = (*[self.growth] * 4, self.features), (*[XAVIER] * 4, self.last)
        kernels, biases = zip(
            *(
                Learnt(width, init=init, name=f"conv{i + 1}")(x.shape[-1] + i * self.growth)
                for i, (width, init) in enumerate(zip(widths, inits, strict=True))
            ),
            strict=True,
        )
        if not self.wide:
            for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
                x = jnp.concatenate([x, leaky(convolve(x, kernel) + bias)], -1)
            return convolve(x, kernels[-1]) + biases[-1]
        total, at, result = jnp.concatenate(biases), 0, x  # of all convolutions that are not done
        for i, width in enumerate(widths):
            part = leaky(result) if i else x
            n = part.shape[-1]
            weight = jnp.concatenate([kernel[:, :, at : at + n] for kernel in kernels[i:]], -1)
            total = total + widened(part, weight)
            result, total, at = total[..., :width], total[..., width:], at + n
        return result


# --- without weights -------------------------------------------------------------------------------------------------


def conv(x: Float[Array, "B H W C"], kernel: Kernel, wide: bool = False) -> Float[Array, "B H W D"]:
    """A convolution with its bias; `wide`: see `widened`."""
    pixels = x.shape[1] * x.shape[2]  # of one the exporter lowers no product
    if len(kernel.weight) == 1 and pixels > 1:
        return x @ kernel.weight[0, 0] + kernel.bias
    return (widened if wide else convolve)(x, kernel.weight) + kernel.bias


def widened(x: Float[Array, "B H W C"], weight: Float[Array, "K K C D"]) -> Float[Array, "B H W D"]:
    """`convolve` with channels of zeros added, such that XLA's CPU backend takes its fast way, both here and in the
    gradient: it wants fours, and more than 16 where they are few (`benchmarks/hcd_speed.py` has what it gives)."""
    channels, features = weight.shape[2:]
    c, d = (-(-n // 4) * 4 for n in (channels, features))
    d = 20 if max(c, d) <= 16 else d
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, c - channels)])
    return convolve(x, jnp.pad(weight, [(0, 0)] * 2 + [(0, c - channels), (0, d - features)]))[..., :features]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def leaky(x: Float[Array, "..."], slope: float = 0.2) -> Float[Array, "..."]:
    """LeakyReLU of a constant slope in 0..1. Its derivative is read off the result: what came in is not kept."""
    return jnp.maximum(x, slope * x)


@leaky.defjvp
def _leaky_jvp(slope: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = leaky(*primals, slope)
    return y, jnp.where(y > 0, tangents[0], slope * tangents[0])


def haar(x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ D"]:
    """[B 2h 2w C] -> [B h w 4C]: of every 2 x 2 cell the mean, then the horizontal, vertical and diagonal difference,
    all channels of one before the next. Undone by `unhaar`."""
    a, b, c, d = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    return jnp.concatenate([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], -1) / 4


def unhaar(x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ D"]:
    """[B h w 4C] -> [B 2h 2w C]"""
    a, b, c, d = jnp.split(x, 4, -1)
    cell = jnp.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d])
    return rearrange(cell, "(p q) b h w c -> b (h p) (w q) c", p=2)


def pixel_shuffle(x: Float[Array, "B H W C"], scale: int) -> Float[Array, "B _ _ D"]:
    """[B h w C s s] -> [B hs ws C], channels counted as PyTorch does."""
    return rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=scale, q=scale)
