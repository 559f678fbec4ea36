"""Random access to the objects of a JSON file; only byte offsets stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
from pathlib import Path
import re
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Note = Callable[[Any], tuple[int, ...] | None]
_BLANK = re.compile(r"[\ufeff \t\r\n]*")


class BadRecord(ValueError):
    """One record that cannot become a sample.

    Attributes:
        kind: the class of fault, for counting ("missing image", "too long", ...).
        reason: the value, the rule and the remedy.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)  # both in args: it must survive pickling
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


class JsonRows:
    """The elements of a JSON list, or one JSON object per line.

    Args:
        path: the file.
        key: of an object whose member with this name is the list.
        note: whole numbers to remember of a row that stands in a list; None leaves it out.

    Attributes:
        fields: the other members of the object that holds the list.
        notes: int64 [N, ...], what `note` said.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a list that is not JSON, with line and column, or is not there, or
            has a row that `note` cannot read. A bad line of JSON lines is a `BadRecord`
            when it is read.
    """

    def __init__(self, path: str | Path, key: str = "", note: Note = lambda row: ()):
        self.path, self.fields = Path(path), {}
        if not self.path.is_file():
            raise FileNotFoundError(f"no data file {self.path}; give a .json or .jsonl")
        with self.path.open("rb") as file:
            starts_list = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        spans, notes = [], []
        if key or starts_list:
            for span, value in self._elements(key):
                if (noted := self._noted(note, value, len(spans))) is not None:
                    spans.append(span)
                    notes.append(noted)
        else:
            spans = list(_line_spans(self.path))
        self._spans = np.array(spans, np.int64).reshape(-1, 2)
        self.notes = np.array(notes, np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def read(self, index: int, parse: Callable[[Any], T]) -> T:
        """A row, parsed.

        Raises:
            BadRecord: "malformed", if the row is not JSON or lacks what `parse` wants;
                or of another kind, if `parse` says so.
        """
        start, end = self._spans[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            return parse(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            kind = getattr(error, "kind", "malformed")
            reason = f"{self.name(index)}: {_reason(error)}"
            raise BadRecord(kind, reason) from error

    def _noted(self, note: Note, row: Any, index: int) -> tuple[int, ...] | None:
        try:
            return note(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"element {index} of {self.path}: {_reason(error)}; is this the file of "
                "another data set?"
            ) from error

    def _elements(self, key: str) -> Iterator[tuple[tuple[int, int], Any]]:
        """Byte spans and values of the list."""
        reader = _Reader(self.path)
        try:
            if not key:
                yield from reader.elements()
                return
            for name in reader.members():
                if name == key:
                    yield from reader.elements()
                    key = ""
                else:
                    self.fields[name] = reader.value()
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path} is not JSON: {error.msg} at line {error.lineno}, column "
                f"{error.colno}; repair the file (was the download cut?)"
            ) from error
        if key:
            raise ValueError(
                f"{self.path} has no list {key!r}, but {sorted(self.fields)}; is this the "
                "file of another data set?"
            )


class _Reader:
    """JSON text, read from left to right."""

    def __init__(self, path: Path):
        self._text = path.read_bytes().decode()  # read_text would translate line ends
        self._decode = json.JSONDecoder().raw_decode
        self._at = self._counted = self._bytes = 0  # text[:counted] is `bytes` long

    def elements(self) -> Iterator[tuple[tuple[int, int], Any]]:
        """Byte spans and values of the list that comes next."""
        for _ in self._parts("[", "]"):
            start = self._byte()
            value = self.value()
            yield (start, self._byte()), value

    def members(self) -> Iterator[str]:
        """Names in the object that comes next; what is named is read in between."""
        for _ in self._parts("{", "}"):
            name = self.value()
            self._pass(":")
            yield name

    def value(self) -> Any:
        """The value that comes next."""
        self._skip()
        found, self._at = self._decode(self._text, self._at)
        return found

    def _parts(self, begin: str, end: str) -> Iterator[None]:
        self._pass(begin)
        if self._skip() == end:
            self._pass(end)
            return
        yield
        while self._pass(f",{end}") == ",":
            self._skip()
            yield

    def _pass(self, expected: str) -> str:
        """Goes behind the character that comes next, one of those expected."""
        found = self._skip()
        if not found or found not in expected:
            wanted = " or ".join(map(repr, expected))
            raise json.JSONDecodeError(f"expected {wanted}", self._text, self._at)
        self._at += 1
        return found

    def _skip(self) -> str:
        """Goes to the character that comes next, "" at the end."""
        self._at = _BLANK.match(self._text, self._at).end()
        return self._text[self._at : self._at + 1]

    def _byte(self) -> int:
        self._bytes += len(self._text[self._counted : self._at].encode())
        self._counted = self._at
        return self._bytes


def _reason(error: Exception) -> str:
    if isinstance(error, BadRecord):
        return error.reason
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _line_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Byte spans of the lines that are not blank."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            start, end = end, end + len(line)
            if line.strip():
                yield start, end
