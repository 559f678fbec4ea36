"""Token maps as images: mosaics of views, dilated sampling, pooling.

Letters: B batch, I images, C views, N fine views of a view, P patches of one view (p a
side), D width, S groups, M tokens per image after pooling. All grids are (columns, rows),
width first, and all maps are row-major.
"""

from __future__ import annotations

from typing import Literal

import einops
import jax
import jax.numpy as jnp

Array = jax.Array
Order = Literal["2d", "1d", "grid"]


def dilated_groups(
    crops: Array, grid: Array, side: int, *, order: Order = "2d"
) -> Array:
    """Splits the mosaic of hi-res views into groups the size of one view.

    DeepStack, section 3 (arXiv:2406.04334). With "2d", group k = i * columns + j takes
    rows i, i + rows, ... and columns j, j + columns, ... of the mosaic, so token s of
    every group lies inside the image area of token s of the whole view. "1d" strides
    over the flattened mosaic, "grid" makes each view a group (ablations, Table 5).

    Computed from the grid on device, so one compiled program serves all grids.

    Args:
        crops: [B, I, G, P, D], hi-res views in raster order, G the budget of views.
        grid: int32 [B, I, 2], columns and rows in use.
        side: p, with P = p * p.

    Returns:
        [G, B, I * P, D]; group k is zero where an image has k or fewer views.
    """
    budget, patches = crops.shape[2:4]
    group = jnp.arange(budget)[:, None]
    token = jnp.arange(patches)[None, :]
    columns, rows = (grid[..., axis, None, None] for axis in (0, 1))  # [B, I, 1, 1]
    columns, rows = jnp.maximum(columns, 1), jnp.maximum(rows, 1)
    if order == "2d":
        row = token // side * rows + group // columns
        column = token % side * columns + group % columns
    elif order == "1d":
        flat = group + token * columns * rows
        row, column = jnp.divmod(flat, side * columns)
    elif order == "grid":
        row = token // side + group // columns * side
        column = token % side + group % columns * side
    else:
        raise ValueError(f"order={order!r}; use '2d', '1d' or 'grid'.")
    view = row // side * columns + column // side
    index = view * patches + row % side * side + column % side  # [B, I, G, P]
    used = group < (grid[..., 0] * grid[..., 1])[..., None, None]
    index = jnp.where(used, index, 0)
    flat = einops.rearrange(crops, "b i g p d -> b i (g p) d")
    rows_ = einops.rearrange(index, "b i g p -> b i (g p) 1")
    taken = jnp.take_along_axis(flat, rows_, axis=2)
    groups = einops.rearrange(taken, "b i (g p) d -> b i g p d", g=budget)
    groups = jnp.where(used[..., None], groups, 0)
    return einops.rearrange(groups, "b i g p d -> g b (i p) d")


def fine_groups(fine: Array, grid: tuple[int, int], side: int) -> Array:
    """Splits the mosaic of every view's fine views by dilated sampling.

    Args:
        fine: [B, I, C, N, P, D], fine views in raster order.
        grid: rows and columns of patches in a view.
        side: n, with N = n * n.

    Returns:
        [N, B, I, C, P, D]; patch p of group i * n + j is the one of row i and column j of
        the n * n that lie where patch p of the view lies.
    """
    rows, columns = grid
    mosaic = einops.rearrange(
        fine,
        "b i c (r s) (y x) d -> b i c (r y) (s x) d",
        r=side,
        y=rows,
    )
    return einops.rearrange(
        mosaic, "b i c (y r) (x s) d -> (r s) b i c (y x) d", y=rows, x=columns
    )


def cell_order(tokens: Array, grid: tuple[int, int] | None, side: int = 2) -> Array:
    """Tokens of each side x side cell one after the other, row by row; cells likewise.

    Args:
        tokens: [..., P, D], row-major.
        grid: rows and columns of the map, both multiples of `side`; None where tokens
            are in this order already.

    Returns:
        [..., P, D].
    """
    if grid is None or side == 1:
        return tokens
    rows, columns = grid
    return einops.rearrange(
        tokens,
        "... (h y w x) d -> ... (h w y x) d",
        h=rows // side,
        w=columns // side,
        y=side,
        x=side,
    )


def windows(
    tokens: Array, grid: tuple[int, int], side: int, *, fill: float = 0.0
) -> Array:
    """Cuts a token map into windows; the last of a row or column may be filled up.

    Args:
        tokens: [..., rows * columns, D].
        grid: rows and columns of the map.
        side: tokens along a side of a window.
        fill: what stands beyond the map.

    Returns:
        [..., h, side, w, side, D] for h * w windows.
    """
    rows, columns = grid
    maps = einops.rearrange(tokens, "... (y x) d -> ... y x d", y=rows)
    edges = [(0, 0)] * (maps.ndim - 3)
    edges += [(0, -rows % side), (0, -columns % side), (0, 0)]
    maps = jnp.pad(maps, edges, constant_values=fill)
    return einops.rearrange(maps, "... (h y) (w x) d -> ... h y w x d", y=side, x=side)


def pool(tokens: Array, grid: tuple[int, int], factor: int) -> Array:
    """Means over factor x factor windows of a token map.

    Args:
        tokens: [..., rows * columns, D].
        grid: rows and columns of the map; both multiples of `factor`.

    Returns:
        [..., rows * columns / factor**2, D].
    """
    return einops.reduce(
        tokens,
        "... (h fh w fw) d -> ... (h w) d",
        "mean",
        h=grid[0] // factor,
        w=grid[1] // factor,
        fh=factor,
        fw=factor,
    )
