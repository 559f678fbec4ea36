"""Which layers learn: selections over depth of "Visual Region" (arXiv:2412.12785).

    select("uniform", depth=32, count=8)    (0, 4, 8, 12, 18, 22, 26, 30)
    select("0+4+8", depth=32)               (0, 4, 8)

They need no trained model. A config hands them to `pattern`, for `train.learn`, or to
`lora.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math

Layers = tuple[int, ...]

PRESETS: dict[str, Layers] = {
    "paper_32x8": (0, 4, 8, 12, 18, 22, 26, 30),
    "released_32x8": (1, 5, 9, 13, 19, 23, 27, 31),  # its code; the paper's plus one
    "ours_40x9": (0, 5, 10, 14, 19, 24, 29, 33, 38),  # not published for 13B
}


def sparse_uniform(depth: int, count: int) -> Layers:
    """Spread over the depth, by the rule of the paper's list for 8 of 32: equal strides
    from the bottom, mirrored from the last layer but one."""
    _check_count(depth, count)
    if count == depth:
        return tuple(range(depth))
    if count == 1:
        return (depth // 2,)
    if count % 2:
        step = (depth - 2) / (count - 1)
        return tuple(math.floor(i * step + 0.5) for i in range(count))
    stride, half = depth // count, range(count // 2)
    low = (i * stride for i in half)
    high = (depth - 2 - i * stride for i in half)
    return tuple(sorted((*low, *high)))


def shifted_uniform(depth: int, count: int) -> Layers:
    """The same, one layer further up, as the authors' code has it.

    Raises:
        ValueError: the last of them would be past the top.
    """
    layers = tuple(layer + 1 for layer in sparse_uniform(depth, count))
    return checked(layers, depth)


def bottom(depth: int, count: int) -> Layers:
    """The first layers."""
    return _block(depth, count, 0)


def midbottom(depth: int, count: int) -> Layers:
    """Neighbours from a quarter of the depth on."""
    return _block(depth, count, depth // 4)


def midtop(depth: int, count: int) -> Layers:
    """Neighbours from half the depth on."""
    return _block(depth, count, depth // 2)


def top(depth: int, count: int) -> Layers:
    """The last layers."""
    return _block(depth, count, depth)


def hybrid(depth: int, count: int) -> Layers:
    """Half of them the first layers, half the last."""
    first = count - count // 2
    return (*bottom(depth, first), *top(depth, count)[first:])


METHODS: dict[str, Callable[[int, int], Layers]] = {
    "uniform": sparse_uniform,
    "shifted": shifted_uniform,
    "bottom": bottom,
    "midbottom": midbottom,
    "midtop": midtop,
    "top": top,
    "hybrid": hybrid,
}


def select(name: str, depth: int, count: int = 0) -> Layers:
    """Layers by name.

    Args:
        name: of `METHODS` or `PRESETS`, "all", "none", or a list such as "0+4+8".
        depth: layers of the stack.
        count: how many, for a method; 0 is a quarter.

    Raises:
        ValueError: no such name, or layers that the stack does not have.
    """
    if name in METHODS:
        return METHODS[name](depth, count or max(depth // 4, 1))
    if name in ("all", "none"):
        return tuple(range(depth)) if name == "all" else ()
    if name in PRESETS:
        return checked(PRESETS[name], depth)
    try:
        layers = [int(word) for word in name.split("+")]
    except ValueError:
        known = ", ".join((*METHODS, *PRESETS, "all", "none"))
        raise ValueError(
            f"layers={name!r}: use one of {known}, or a list such as 0+4+8."
        ) from None
    return checked(layers, depth)


def checked(layers: Sequence[int], depth: int) -> Layers:
    """The same layers, which a stack of `depth` has, each once, in order.

    Raises:
        ValueError: it has not.
    """
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers {list(layers)} must ascend: sort them, each once.")
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise ValueError(
            f"layers {outside} of {list(layers)} are not among the {depth} of the stack: "
            f"use 0..{depth - 1}."
        )
    return tuple(layers)


def pattern(layers: Sequence[int], stack: str = "language") -> str:
    """What `train.learn` calls these layers."""
    return f"{stack}/stack/layers[{','.join(map(str, layers))}]"


def _block(depth: int, count: int, start: int) -> Layers:
    """Neighbours from `start` on, or as far up as they fit."""
    _check_count(depth, count)
    start = min(start, depth - count)
    return tuple(range(start, start + count))


def _check_count(depth: int, count: int) -> None:
    if not 1 <= count <= depth:
        raise ValueError(f"count={count} of {depth} layers: use 1 to {depth}.")
