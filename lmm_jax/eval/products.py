"""FLOPs of the matrix products of a compiled program, from its text.

XLA's own analysis counts the body of a loop once, however often it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$"
)
_CALLED = re.compile(r"(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|conv)')


def flops(text: str) -> float | None:
    """FLOPs of all products, two for each multiply-add, loops as often as they run.

    Args:
        text: of `jax.stages.Compiled.as_text()`, optimised HLO.

    Returns:
        None where the compiler hands products to a library, or does not know how often a
        loop runs.
    """
    if _LIBRARY.search(text):
        return None
    programs, entry = _computations(text)

    @functools.cache
    def of(name: str) -> float:
        shapes, total = {}, 0.0
        for found in map(_INSTRUCTION.match, programs[name]):
            own, kind, op, rest = found.groups()
            shapes[own] = _shape(kind)
            if op in ("dot", "convolution"):
                total += _product(op, shapes[own], rest, shapes)
            times = 1.0
            if op == "while":
                trips = _TRIPS.search(rest)
                times = float(trips[1]) if trips else math.nan
            inner = sum(of(called) for called in _CALLED.findall(rest))
            total += times * inner if inner else 0.0
        return total

    total = of(entry)
    return None if math.isnan(total) else total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Instructions of each computation, and the name of the first that runs."""
    programs: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            programs[name] = []
            entry = name if header[1] else entry
        elif name and _INSTRUCTION.match(line):
            programs[name].append(line)
    return programs, entry


def _shape(kind: str) -> tuple[int, ...]:
    """Sizes in a type such as "f32[8,16]{1,0}"; of tuples nothing is asked."""
    sizes = re.match(r"\w+\[([\d,]*)\]", kind)
    return tuple(map(int, filter(None, sizes[1].split(",")))) if sizes else ()


def _product(op: str, out: Sequence[int], rest: str, shapes: dict) -> float:
    """FLOPs of one instruction; `rest` is all behind its opening parenthesis."""
    names = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
    left, right = (shapes[name] for name in names[:2])
    if op == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
        summed = math.prod(left[int(dim)] for dim in filter(None, dims.split(",")))
    else:
        labels = re.search(r"dim_labels=\w+_(\w+)->", rest)[1]
        summed = math.prod(right) // right[labels.index("o")]
    return 2.0 * math.prod(out) * summed
