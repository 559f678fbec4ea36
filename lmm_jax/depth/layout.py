"""The static storage order of a sequence: named spans of fixed capacity."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Span:
    """A named, contiguous stretch of storage.

    Attributes:
        name: "cls", "prefix", "visual" or "suffix".
        length: capacity in tokens; unused slots have `valid=False`.
    """

    name: str
    length: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Spans in storage order. Order is free: `TokenState.positions` carry the meaning."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, lengths: Mapping[str, int]) -> Layout:
        """Builds a layout from `{name: length}` in storage order."""
        return cls(tuple(Span(name, length) for name, length in lengths.items()))

    @property
    def length(self) -> int:
        return sum(span.length for span in self.spans)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(span.name for span in self.spans)

    def has(self, name: str) -> bool:
        return name in self.names

    def count(self, name: str) -> int:
        """Capacity of one span; 0 if there is no such span."""
        return next((s.length for s in self.spans if s.name == name), 0)

    def slice(self, name: str) -> slice:
        """Where a span lies on the token axis.

        Raises:
            KeyError: no span has this name.
        """
        start = 0
        for span in self.spans:
            if span.name == name:
                return slice(start, start + span.length)
            start += span.length
        raise KeyError(f"no span {name!r}; this layout has {', '.join(self.names)}")

    def resized(self, name: str, length: int) -> Layout:
        """The same spans, one of them with another capacity."""
        self.slice(name)  # an unknown name is an error
        return Layout(
            tuple(
                dataclasses.replace(s, length=length) if s.name == name else s
                for s in self.spans
            )
        )
