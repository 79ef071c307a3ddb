"""Visual Resolution Compressor: a small network that looks at a proxy of the image and says how far it may shrink.

MobileNetV4-conv-small trunk, weighted pooling, MLP, softplus (papers: HyperVL 3.2; MobileNetV4, arXiv 2404.10518). It
sees no text, so one prediction serves every question about the picture. What the number means is `compress.py`'s
business.

Batch norm without mutable state: `mean` and `var` are ordinary leaves of the parameters. Training normalises by the
batch and returns the batch's statistics beside the prediction, mirrored on the parameters' paths; `update_stats` blends
them in. `fold` multiplies stored statistics into the convolutions, which is what export runs.

Axes: B batch, S proxy side, H W feature rows and columns, C D channels in and out, K kernel side.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from hypervl_jax.config import VrcConfig
from hypervl_jax.model.layers import Linear

Params = dict[str, Any]
Depthwise = Literal["shift", "conv"]
Norm = Literal["stored", "batch", "folded"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
EPS = 1e-5  # of the batch norm, as in PyTorch
CELL = 32  # pixels of the proxy a side that one position of the trunk's output stands for
GAIN = 1.4  # initial fan-in variance: layers with ReLU (2) and without (1) take turns, so untrained outputs stay near 1


class Conv(NamedTuple):
    """One convolution of the trunk: kernel side, channels out, stride; normalised, then ReLU if `act`."""

    kernel: int
    features: int
    stride: int = 1
    depthwise: bool = False
    act: bool = True


class Uir(NamedTuple):
    """Universal inverted residual: [depthwise start] -> expand -> [depthwise mid] -> project; kernel 0 is absent."""

    start: int
    mid: int
    expand: int
    features: int
    stride: int = 1


TRUNK: tuple[Conv | Uir, ...] = (  # MobileNetV4-conv-small; halves the picture five times
    Conv(3, 32, 2),
    Conv(3, 32, 2), Conv(1, 32),
    Conv(3, 96, 2), Conv(1, 64),
    Uir(5, 5, 3, 96, 2), *[Uir(0, 3, 2, 96)] * 4, Uir(3, 0, 4, 96),
    Uir(3, 3, 6, 128, 2), Uir(5, 5, 4, 128), Uir(0, 5, 4, 128), Uir(0, 5, 3, 128), *[Uir(0, 3, 4, 128)] * 2,
    Conv(1, 960),
)  # fmt: skip


def make_divisible(channels: float | int, by: int = 8) -> int:
    """The multiple of `by` nearest to `channels`, never more than a tenth below it (MobileNet's rounding)."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


def scaled(multiplier: float) -> tuple[Conv | Uir, ...]:
    """The trunk at a width multiplier."""
    return tuple(block._replace(features=make_divisible(multiplier * block.features)) for block in TRUNK)


def unfold(block: Uir, channels: int) -> dict[str, Conv]:
    """The convolutions of an inverted residual by name, in order. The stride falls on `mid`, else on `start`."""
    wide = make_divisible(channels * block.expand)
    convs = {
        "start": Conv(block.start, channels, 1 if block.mid else block.stride, depthwise=True, act=False),
        "expand": Conv(1, wide),
        "mid": Conv(block.mid, wide, block.stride, depthwise=True),
        "project": Conv(1, block.features, act=False),
    }
    return {name: conv for name, conv in convs.items() if conv.kernel}


# --- convolutions ----------------------------------------------------------------------------------------------------


def convolve(x: Float[Array, "B H W C"], weight: Float[Array, "K K _ D"], stride: int = 1) -> Float[Array, "B _ _ D"]:
    """The library's convolution, zero padded by K // 2 on all sides (with stride 2, PyTorch's alignment).

    Channels a group are read off the weight: `K K 1 C` is depthwise.
    """
    pad = weight.shape[0] // 2
    return lax.conv_general_dilated(
        x, weight, (stride, stride), [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1] // weight.shape[2],
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def shift_multiply(
    x: Float[Array, "B H W C"], weight: Float[Array, "K K 1 C"], stride: int = 1
) -> Float[Array, "B _ _ C"]:
    """Depthwise `convolve` as a sum of K x K shifted multiples of the picture: XLA's own is many times slower on CPUs.

    The gradient of the weights is written out: one reduction with K x K results is half the time of K x K reductions.
    """
    k = weight.shape[0]
    return sum(tap * weight[i // k, i % k, 0] for i, tap in enumerate(_taps(x, k, stride)))  # pyright: ignore


def _taps(x: Array, k: int, stride: int) -> list[Array]:
    """What each of the k x k kernel positions sees, row by row; [B H W C] -> [B H' W' C] each."""
    rows, cols = ((n - 1) // stride * stride + 1 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    return [x[:, i : i + rows : stride, j : j + cols : stride] for i in range(k) for j in range(k)]


def _shift_forward(x: Array, weight: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return shift_multiply(x, weight, stride), (x, weight)


def _shift_backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = saved
    products = tuple(tap * g for tap in _taps(x, len(weight), stride))
    zeros = tuple(jnp.zeros((), g.dtype) for _ in products)
    sums = lax.reduce(products, zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), (0, 1, 2))
    holes = [(0, n - 1 - (m - 1) * stride, stride - 1) for n, m in zip(x.shape[1:3], g.shape[1:3], strict=True)]
    g = lax.pad(g, zeros[0], [(0, 0, 0), *holes, (0, 0, 0)])  # g back on the grid of x, zeros where no output was
    return shift_multiply(g, weight[::-1, ::-1]), jnp.stack(sums).reshape(weight.shape)


shift_multiply.defvjp(_shift_forward, _shift_backward)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU: [B H W C] -> [B H' W' D], and the batch's statistics (empty unless "batch")."""

    conv: Conv
    norm: Norm
    depthwise: Depthwise

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B _ _ D"], Params]:
        k, features, stride, depthwise, act = self.conv
        shape = (k, k, 1 if depthwise else x.shape[-1], features)
        weight = self.param("weight", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (features,))
        if k == 1:
            x = x @ weight[0, 0]
        else:
            x = (shift_multiply if depthwise and self.depthwise == "shift" else convolve)(x, weight, stride)
        stats = {}
        if self.norm == "folded":
            x = x + bias
        else:
            mean = self.param("mean", nn.initializers.zeros, (features,))
            var = self.param("var", nn.initializers.ones, (features,))
            scale = self.param("scale", nn.initializers.ones, (features,))
            if self.norm == "batch":
                mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
                stats = {"mean": mean, "var": var}
            x = (x - mean) * (scale * lax.rsqrt(var + EPS)) + bias
        return nn.relu(x) if act else x, stats


class Residual(nn.Module):
    """A universal inverted residual; the input is added back where shapes allow."""

    block: Uir
    norm: Norm
    depthwise: Depthwise

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B _ _ D"], Params]:
        y, stats = x, {}
        for name, conv in unfold(self.block, x.shape[-1]).items():
            y, stats[name] = ConvNorm(conv, self.norm, self.depthwise, name=name)(y)
        return x + y if x.shape == y.shape else y, stats


class Vrc(nn.Module):
    """Proxy f32[B S S 3] in 0..1 -> predicted rescaled ratio alpha' f32[B], positive and unbounded above.

    With `train` the result is (prediction, statistics of the batch). `folded` runs parameters that went through `fold`.
    `cells` stops after the trunk: f32[B N C], a row a cell of `CELL` pixels a side, instead of the prediction.
    """

    cfg: VrcConfig
    train: bool = False
    folded: bool = False
    depthwise: Depthwise = "shift"
    cells: bool = False

    @nn.compact
    def __call__(self, proxy: Float[Array, "B S S 3"]) -> Array | tuple[Array, Params]:
        if self.train and self.folded:
            raise ValueError("folded parameters hold no batch norm to train: fold after training")
        norm: Norm = "batch" if self.train else "folded" if self.folded else "stored"
        x, stats = (proxy - jnp.array(MEAN)) / jnp.array(STD), {}
        for i, block in enumerate(scaled(self.cfg.multiplier)):
            name = f"block_{i}"
            if isinstance(block, Uir):
                x, stats[name] = Residual(block, norm, self.depthwise, name=name)(x)
            else:
                x, stats[name] = ConvNorm(block, norm, self.depthwise, name=name)(x)
        x = rearrange(x, "b h w c -> b (h w) c")
        if self.cells:
            return (x, stats) if self.train else x
        where = nn.softmax(Linear(1, bias=False, name="pool")(x)[..., 0], axis=-1)  # one weight a position
        x = jnp.einsum("bn,bnc->bc", where, x)
        x = nn.relu(Linear(self.cfg.hidden, name="hidden")(x))
        ratio = nn.softplus(Linear(1, name="out")(x)[..., 0])
        return (ratio, stats) if self.train else ratio


# --- parameters ------------------------------------------------------------------------------------------------------


def init(key: Array, cfg: VrcConfig) -> Params:
    """Random weights and unit batch norms, the same tree as `Vrc(cfg).init`.

    Linen's sixty separate draws take a minute to compile; here all numbers come out of one small loop.
    """
    proxy = jax.ShapeDtypeStruct((1, cfg.side, cfg.side, 3), jnp.float32)
    leaves, tree = jax.tree.flatten_with_path(jax.eval_shape(Vrc(cfg).init, key, proxy)["params"])
    sizes = [leaf.size if path[-1].key == "weight" else 0 for path, leaf in leaves]
    keys = jax.random.split(key, -(-sum(sizes) // 4096))
    normal = lax.map(lambda k: jax.random.normal(k, (4096,)), keys).reshape(-1)
    out, at = [], 0
    for (path, leaf), size in zip(leaves, sizes, strict=True):
        if size:
            fan_in = (
                size // leaf.shape[-1 if leaf.ndim == 4 else 0]
            )  # convolutions are K K in out, linear layers out in
            out.append(normal[at : at + size].reshape(leaf.shape) * (GAIN / fan_in) ** 0.5)
            at += size
        else:
            out.append(jnp.full(leaf.shape, float(path[-1].key in ("scale", "var"))))
    return jax.tree.unflatten(tree, out)


def update_stats(params: Params, stats: Params, momentum: float = 0.9) -> Params:
    """`params` with every stored statistic moved to `momentum` x stored + (1 - momentum) x the batch's."""
    return params | {
        k: update_stats(params[k], v, momentum) if isinstance(v, dict) else momentum * params[k] + (1 - momentum) * v
        for k, v in stats.items()
    }


def fold(params: Params) -> Params:
    """Parameters for `Vrc(cfg, folded=True)`: every batch norm multiplied into its convolution."""
    if "mean" in params:
        gain = params["scale"] * lax.rsqrt(params["var"] + EPS)
        return {"weight": params["weight"] * gain, "bias": params["bias"] - params["mean"] * gain}
    return {k: fold(v) if isinstance(v, dict) else v for k, v in params.items()}


def macs(cfg: VrcConfig) -> int:
    """Multiply-accumulates of the trunk on one proxy; for the share of compute that choosing the ratio costs."""
    total, side, channels = 0, cfg.side, 3
    for block in scaled(cfg.multiplier):
        for conv in unfold(block, channels).values() if isinstance(block, Uir) else (block,):
            side = -(-side // conv.stride)
            total += side**2 * conv.kernel**2 * (1 if conv.depthwise else channels) * conv.features
            channels = conv.features
    return total
