"""Attention kernels of libraries, which never write the T x T logits.

"splash" is Pallas' kernel for TPU. Its mask is fixed when it is compiled, so tokens are
put in the order of their positions for it and back after it: causal by storage is then
causal by position, wherever the tokens lie. "cudnn" is that of GPUs, whose mask is free.

Where a mesh divides the tokens of a row, each device computes some heads of all of them:
its tokens' other heads are exchanged for other tokens' heads before attention, and back
after it (Ulysses, arXiv:2309.14509, section 3.1). So the mask needs no parts, and a kernel
none of it.

Letters: B batch, T tokens, S the same, filled up to whole blocks, N query heads, K key
heads, G = N / K, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, Protocol

import einops
import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp

from lmm_jax.depth import Keys, Place
from lmm_jax.nn.attention import Fused, Sight, attention
from lmm_jax.nn.block import BlockSpec
from lmm_jax.parallel.axes import Axes

Array = jax.Array
Name = Literal["auto", "xla", "splash", "cudnn"]

BY_TOKENS = "batch tokens heads head_dim"
BY_HEADS = "batch row act_heads head_dim"
OTHER = -1  # segment of what nobody sees
BLOCKS = (512, 256, 128)  # tokens that the kernel holds at once
AUTO = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


class Kernel(Protocol):
    """A way to compute attention of tokens among themselves."""

    def fused(self, place: Place, seen: Sight) -> Fused | None:
        """What runs where these tokens see each other so; None: nothing of this kernel."""


def named(
    name: Name, platform: str, spec: BlockSpec, axes: Axes | None = None
) -> Kernel | None:
    """The kernel of a config; None is plain XLA.

    Args:
        platform: of the devices.
        axes: of the mesh; None on one device.

    Raises:
        ValueError: the kernel that was asked for cannot compute such a block.
    """
    chosen = AUTO.get(platform, "xla") if name == "auto" else name
    told = _REFUSALS[chosen](spec) if chosen in _REFUSALS else ""
    if chosen == "xla" or (told and name == "auto"):
        return _plain(axes)
    if told:
        raise ValueError(
            f"model.attention={name!r}: {told}; use model.attention='xla', or 'auto', "
            "which takes what can be."
        )
    if chosen == "cudnn":
        return Cudnn(axes)
    return Splash(axes, interpret=platform == "cpu")


def _splash_refuses(spec: BlockSpec) -> str:
    if spec.causal and spec.window is None and not spec.soft_mask:
        return ""
    return "splash attention has the causal mask only, no window and no soft mask"


def _cudnn_refuses(spec: BlockSpec) -> str:
    fits = spec.head_dim % 8 == 0 and spec.head_dim <= 128
    if fits and spec.dtype in ("bfloat16", "float16") and not spec.soft_mask:
        return ""
    return (
        f"heads of {spec.head_dim} {spec.dtype} values, but cuDNN's attention needs hard "
        "masks and a multiple of 8 up to 128, of 16 bits each"
    )


_REFUSALS = {"splash": _splash_refuses, "cudnn": _cudnn_refuses}


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """XLA's attention on a mesh that divides the tokens of a row."""

    axes: Axes

    def fused(self, place: Place, seen: Sight) -> Fused:
        return Fused(self._run, (seen,))

    def _run(self, q: Array, keys: Keys, seen: Sight) -> Array:
        q, keys = _by_heads(q, keys, self.axes)
        return _by_tokens(attention(q, ((keys, seen),)), self.axes)


@dataclasses.dataclass(frozen=True)
class Splash:
    """Pallas' splash attention.

    Attributes:
        axes: of the mesh; None on one device.
        interpret: in Python, for tests on CPU.
    """

    axes: Axes | None = None
    interpret: bool = False

    def fused(self, place: Place, seen: Sight) -> Fused | None:
        """XLA's where merged tokens have shares: the kernel adds nothing to logits."""
        if seen.gate is not None:
            plain = _plain(self.axes)
            return plain and plain.fused(place, seen)
        length = place.valid.shape[1]
        block = 128 if length <= 512 else 256
        widths = ((0, 0), (0, -length % block))
        valid = jnp.pad(place.valid, widths)
        positions = jnp.pad(place.positions, widths)
        last = jnp.iinfo(jnp.int32).max
        order = jnp.argsort(jnp.where(valid, positions, last), axis=1)
        back = jnp.argsort(order, axis=1)
        segment = jnp.where(valid, jnp.pad(place.segment, widths), OTHER)
        segment = jnp.take_along_axis(segment, order, axis=1)
        return Fused(self._run, (order, back, segment))

    def _run(self, q: Array, keys: Keys, order: Array, back: Array, segment: Array):
        run = functools.partial(_sorted_attention, interpret=self.interpret)
        if self.axes is None:
            return run(q, keys.k, keys.v, order, back, segment)
        q, keys = _by_heads(q, keys, self.axes)
        names = (BY_HEADS,) * 3 + ("batch row",) * 3
        run = self.axes.mapped(run, names, BY_HEADS)
        return _by_tokens(run(q, keys.k, keys.v, order, back, segment), self.axes)


@dataclasses.dataclass(frozen=True)
class Cudnn:
    """cuDNN's attention, as `jax.nn` offers it; `implementation` may be "xla" in tests."""

    axes: Axes | None = None
    implementation: str = "cudnn"

    def fused(self, place: Place, seen: Sight) -> Fused:
        return Fused(self._run, (seen.visible, seen.gate))

    def _run(self, q: Array, keys: Keys, visible: Array | None, gate: Array | None):
        mask = None if visible is None else visible[:, None]
        bias = None if gate is None else gate[:, None, None].astype(q.dtype)
        q, keys = _by_heads(q, keys, self.axes)
        out = jax.nn.dot_product_attention(
            q, keys.k, keys.v, bias, mask, implementation=self.implementation
        )
        return _by_tokens(out, self.axes)


def _plain(axes: Axes | None) -> Exchanged | None:
    return Exchanged(axes) if axes and axes.parts("tokens") > 1 else None


def _by_heads(q: Array, keys: Keys, axes: Axes | None) -> tuple[Array, Keys]:
    """All tokens of a device's heads, and the keys that these heads read."""
    if axes is None:
        return q, keys
    # Their gradients come back by tokens, or the compiler gathers all of them.
    q, k, v = (_by_tokens(x, axes) for x in (q, keys.k, keys.v))
    if k.shape[2] % axes.parts("act_heads"):  # too few: one for each query head
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    q, k, v = (axes.constrain(x, BY_HEADS) for x in (q, k, v))
    return q, Keys(k, v)


def _by_tokens(out: Array, axes: Axes | None) -> Array:
    return out if axes is None else axes.constrain(out, BY_TOKENS)


def _sorted_attention(q, k, v, order, back, segment, *, interpret: bool) -> Array:
    """Of the tokens in storage order, [B, T, N, H]; see `Splash.fused`."""
    heads, length, filled = k.shape[2], q.shape[1], order.shape[1]
    widths = ((0, 0), (0, filled - length), (0, 0), (0, 0))
    q, k, v = (_taken(jnp.pad(x, widths), order, back) for x in (q, k, v))
    q = einops.rearrange(q, "b s (k g) h -> b k g s h", k=heads)
    k, v = (einops.rearrange(x, "b s k h -> b k s h") for x in (k, v))
    kernel = _kernel(filled, q.shape[2], interpret)
    ids = splash.SegmentIds(segment, segment)
    by_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = jax.vmap(by_head)(q * q.shape[-1] ** -0.5, k, v, ids)
    out = einops.rearrange(out, "b k g s h -> b s (k g) h")
    return _taken(out, back, order)[:, :length]


def _kernel(length: int, heads: int, interpret: bool):
    """For the query heads of one key head."""
    block = next(size for size in BLOCKS if length % size == 0)
    names = (f.name for f in dataclasses.fields(splash.BlockSizes))
    sizes = {name: block for name in names if name.startswith("block_")}
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mqa_single_device(
        mask, block_sizes=splash.BlockSizes(**sizes), interpret=interpret
    )


@jax.custom_vjp
def _taken(x: Array, order: Array, back: Array) -> Array:
    """Rows [B, S, ...] in another order. Its gradient is a gather too, not a scatter."""
    return jnp.take_along_axis(x, order[..., None, None], axis=1)


def _taken_forward(x, order, back):
    return _taken(x, order, back), (order, back)


def _taken_backward(orders, gradient):
    order, back = orders
    return _taken(gradient, back, order), None, None


_taken.defvjp(_taken_forward, _taken_backward)
