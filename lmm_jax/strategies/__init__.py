"""Strategies: one file each, found by its name. A strategy is a list of edits."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from lmm_jax.depth import Edit, Geometry


def names() -> tuple[str, ...]:
    """All strategies, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def module(name: str) -> ModuleType:
    """The file of one strategy.

    Raises:
        ValueError: no such strategy; lists those that exist.
    """
    if name not in names():
        raise ValueError(
            f"strategy {name!r} does not exist; there are {', '.join(names())}. A new one "
            f"is a file lmm_jax/strategies/{name}.py with a function edits(geometry)."
        )
    return importlib.import_module(f"{__name__}.{name}")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A strategy with all its arguments: hashable edits that a model may own."""

    name: str
    arguments: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, name: str, arguments: Mapping[str, Any]) -> Chosen:
        """Of a strategy and what differs from its defaults."""
        defaults = module(name).edits.__kwdefaults__ or {}
        return cls(name, tuple({**defaults, **arguments}.items()))

    def __call__(self, geometry: Geometry) -> tuple[Edit, ...]:
        return build({self.name: dict(self.arguments)}, geometry)


def build(
    chosen: Mapping[str, Mapping[str, Any]], geometry: Geometry
) -> tuple[Edit, ...]:
    """Edits of all chosen strategies together; their order comes from their sites.

    Args:
        chosen: name -> keyword arguments of the strategy's `edits`.

    Raises:
        ValueError: unknown strategy or argument.
    """
    edits: list[Edit] = []
    for name, arguments in chosen.items():
        function = module(name).edits
        known = function.__kwdefaults__ or {}
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise ValueError(
                f"strategy.{name} has no argument {', '.join(unknown)}; it takes "
                f"{', '.join(known) or 'none'}."
            )
        edits += function(geometry, **arguments)
    return tuple(edits)
