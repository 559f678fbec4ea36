"""The text of a compiled program, as far as it says what a device does.

`jax.stages.Compiled.as_text()` prints XLA's modules: computations of instructions, one a
line, `%name = type opcode(%operand, ...), attribute=value, ...`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import re

_ARRAY = re.compile(r"\b(pred|[a-z]\w*\d\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array. `main` says that it lies in the device's main memory, not in
    one of the small ones on the chip."""

    dtype: str
    shape: tuple[int, ...]
    main: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.size * (int(bits[0]) if bits else 8) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
        arrays: what it returns; several for a tuple.
        operands: names in the same computation.
        words: all between the parentheses, as it stands there.
        attributes: all after them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    words: str
    attributes: str

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that run, or are applied, where this one stands."""
        found = _CALLED.findall(self.attributes)
        return tuple(name for part in found for name in _NAME.findall(part))

    def attribute(self, name: str) -> str:
        """Value up to the next comma or space, "" where there is none."""
        found = re.search(rf"\b{name}=([^,\s]+)", self.attributes)
        return found[1] if found else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        """Value of an attribute such as `dimensions={0,1}`."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, filter(None, found[1].split(",")))) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last but for its use is `root`."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def users(self, name: str) -> tuple[Instruction, ...]:
        return self._users.get(name, ())

    @functools.cached_property
    def _users(self) -> dict[str, tuple[Instruction, ...]]:
        found: dict[str, tuple[Instruction, ...]] = {}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found[operand] = (*found.get(operand, ()), one)
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the one that runs."""

    computations: Mapping[str, Computation]
    entry: str

    def trips(self, loop: Instruction, within: Computation) -> int | None:
        """How often a `while` runs its body; None if the text does not say.

        Loops of `lax.scan` count from a constant to a constant in steps of one, whether
        or not the compiler has noted so.
        """
        known = re.search(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.attribute("condition").lstrip("%")]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, end = (condition.instructions[name] for name in test.operands)
        if counter.opcode != "get-tuple-element" or end.opcode != "constant":
            return None
        first = _constant(within, loop.operands[0], int(counter.attribute("index")))
        return None if first is None else int(end.words) - first


def read(text: str) -> Program:
    """Reads a module.

    Raises:
        ValueError: there is no entry computation in the text.
    """
    computations, entry, lines, name = {}, None, [], ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line == "}":
            computations[name] = _computation(name, lines)
        elif " = " in line and line.startswith(" "):
            lines.append(line)
    if entry is None:
        raise ValueError(
            "no ENTRY computation: give the text of one compiled program, as "
            "Compiled.as_text() returns it."
        )
    return Program(computations, entry)


def _constant(within: Computation, start: str, index: int) -> int | None:
    """Element `index` of a tuple, if it is a constant or a copy of one."""
    name = within.instructions[start].operands[index]
    one = within.instructions[name]
    while one.opcode in ("copy", "convert", "bitcast"):
        one = within.instructions[one.operands[0]]
    return int(one.words) if one.opcode == "constant" else None


def _computation(name: str, lines: list[str]) -> Computation:
    found, root = {}, ""
    for line in lines:
        one = _instruction(line.strip().removeprefix("ROOT "))
        found[one.name] = one
        root = one.name if line.lstrip().startswith("ROOT ") else root
    return Computation(name, found, root or next(reversed(found), ""))


def _instruction(line: str) -> Instruction:
    name, _, rest = _COMMENT.sub("", line).partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    words = rest[len(opcode) + 1 : close]
    return Instruction(
        name.lstrip("%"),
        opcode,
        tuple(_arrays(kind)),
        tuple(_NAME.findall(words)),
        words,
        rest[close + 1 :],
    )


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, sizes, layout in _ARRAY.findall(kind):
        shape = tuple(map(int, filter(None, sizes.split(","))))
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(dtype, shape, main=space is None or space[1] == "0")


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for mark in re.finditer(r"[()]", text[start:]):
        depth += 1 if mark[0] == "(" else -1
        if depth == 0:
            return start + mark.start()
    raise ValueError(f"a parenthesis stays open in {text[:80]!r}: the text was cut.")
