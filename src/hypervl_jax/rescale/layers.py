"""What the networks that rescale pictures are made of: a convolution, a dense block, Haar, folding pixels.

Axes: B batch, H W rows and columns, C D channels in and out, K kernel side.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from hypervl_jax.model.vrc import convolve

XAVIER = nn.initializers.variance_scaling(0.01, "fan_avg", "normal")  # Xavier's normal times 0.1, as the flows begin
ZEROS = nn.initializers.zeros


class Conv(nn.Module):
    """Convolution with a bias, zero padded to the same size; a kernel of side 1 is a matrix product."""

    features: int
    kernel: int = 3
    init: nn.initializers.Initializer = XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        weight = self.param("weight", self.init, (self.kernel, self.kernel, x.shape[-1], self.features))
        pixels = x.shape[1] * x.shape[2]  # of one the exporter lowers no product
        y = x @ weight[0, 0] if self.kernel == 1 and pixels > 1 else convolve(x, weight)
        return y + self.param("bias", ZEROS, (self.features,))


def leaky(x: Float[Array, "..."], slope: float = 0.2) -> Float[Array, "..."]:
    """LeakyReLU; as a maximum, for its slope lies in 0..1."""
    return jnp.maximum(x, slope * x)


class Kernel(nn.Module):
    """What a 3x3 `Conv` learns, for whoever applies it himself."""

    features: int
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, "3 3 C D"], Float[Array, " D"]]:
        weight = self.param("weight", self.init, (3, 3, channels, self.features))
        return weight, self.param("bias", ZEROS, (self.features,))


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of all that came before (IRN, fig. 3; Wang et al. 2018). Starts as the constant 0.

    Computed the other way about: what each result adds to all that come after it, in one convolution. Those are wider,
    read nothing twice, and take three quarters of the time on CPUs.
    """

    features: int
    growth: int = 32
    last: nn.initializers.Initializer = ZEROS

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        widths, inits = (*[self.growth] * 4, self.features), (*[XAVIER] * 4, self.last)
        learnt = [
            Kernel(width, init, name=f"conv{i + 1}")(x.shape[-1] + i * self.growth)
            for i, (width, init) in enumerate(zip(widths, inits, strict=True))
        ]
        kernels, biases = zip(*learnt, strict=True)
        total, at, result = jnp.concatenate(biases), 0, x  # of all convolutions that are not done
        for i, width in enumerate(widths):
            part = leaky(result) if i else x
            n = part.shape[-1]
            total = total + convolve(part, jnp.concatenate([kernel[:, :, at : at + n] for kernel in kernels[i:]], -1))
            result, total, at = total[..., :width], total[..., width:], at + n
        return result


# --- without weights -------------------------------------------------------------------------------------------------


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
