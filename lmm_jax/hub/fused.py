"""Tensors that a checkpoint stores as one and we keep apart, such as Phi-3's queries, keys
and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
from typing import Any

import numpy as np

from lmm_jax.checkpoint.params import Tensor

# Published name -> (name of a part, rows of it), in order along the first dimension.
Fused = Mapping[str, tuple[tuple[str, int], ...]]


def fused_of(family: Any, spec: Any) -> Fused:
    """What a family stores as one; most store nothing so."""
    return family.fused(spec) if hasattr(family, "fused") else {}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows start..stop of a tensor."""

    whole: Tensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.whole.shape[1:])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        first, *rest = index
        start, stop, _ = first.indices(self.stop - self.start)
        return self.whole[(slice(self.start + start, self.start + stop), *rest)]


class Split(Mapping[str, Tensor]):
    """Published tensors with the fused ones replaced by their parts."""

    def __init__(self, tensors: Mapping[str, Tensor], fused: Fused):
        self._tensors, self._parts = tensors, {}
        self._fused = set(fused) & set(tensors)
        for key in self._fused:
            start = 0
            for name, rows in fused[key]:
                self._parts[name] = Rows(tensors[key], start, start + rows)
                start += rows
            if start != tensors[key].shape[0]:
                raise ValueError(
                    f"{key!r} has {tensors[key].shape[0]} rows, its parts need {start}: "
                    "the checkpoint is of a model of another size."
                )

    def __getitem__(self, name: str) -> Tensor:
        if name in self._parts:
            return self._parts[name]
        if name in self._fused:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._parts
        yield from (name for name in self._tensors if name not in self._fused)

    def __len__(self) -> int:
        return len(self._tensors) - len(self._fused) + len(self._parts)


def joined(
    tensors: Iterable[tuple[str, np.ndarray]], fused: Fused
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `Split` for a stream: holds parts until their last one comes."""
    whole = {name: key for key, parts in fused.items() for name, _ in parts}
    waiting: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors:
        if name not in whole:
            yield name, value
            continue
        key = whole[name]
        held = waiting.setdefault(key, {})
        held[name] = value
        if len(held) == len(fused[key]):
            del waiting[key]
            yield key, np.concatenate([held[part] for part, _ in fused[key]])
