"""What a compiled program does on one device: products, traffic, exchange.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it
runs. FLOPs are those of matrix products and convolutions, and what a kernel says of
itself; everything else is bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import math
import re

import numpy as np

from lmm_jax.compiled.hlo import Array, Computation, Instruction, Program, read

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Instructions that name or rearrange what is there.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
)
# Kernels that only mark memory or wait.
_MARKS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective", "AssumeGather")
# How groups of devices are written: [groups,each]<=[sizes]T(order), or the axes of a mesh
# whose devices may be in another order.
_ORDERED = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA = rf"\[([\d,]+)\]<={_ORDERED}"
_MESH = rf"([^\]]*)\](?:, device_ids=\({_ORDERED}\))?"
# Products that splash attention makes of a query and a key, which it does not tell.
_PRODUCTS = {"splash_mqa_fwd": 2, "splash_mqa_dq": 3, "splash_mqa_dkv": 4}
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|conv)')
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction that runs on its own, or one exchange.

    Attributes:
        kind: its opcode; of exchanges one of `COLLECTIVES`.
        times: how often it runs.
        flops, bytes: of one time; bytes are those of main memory.
        moved: bytes of the whole array that a group puts together or sums up.
        group: numbers of the devices that exchange, of the first group.
        waits: the device does nothing else meanwhile.
        channel: number of an exchange, "" of anything else.
        scope: where the program comes from, in names of modules and functions.
        loops: loops that it runs in.
    """

    kind: str
    times: int = 1
    flops: float = 0.0
    bytes: float = 0.0
    moved: int = 0
    group: tuple[int, ...] = ()
    waits: bool = True
    channel: str = ""
    scope: str = ""
    loops: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """All that a device does, and how many loops ran for a number of times that the text
    does not say; these count once."""

    ops: tuple[Op, ...]
    unknown: int

    @property
    def flops(self) -> float:
        return sum(op.times * op.flops for op in self.ops)

    @property
    def bytes(self) -> float:
        return sum(op.times * op.bytes for op in self.ops)

    @property
    def collectives(self) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.kind in COLLECTIVES)

    def volume(self, kind: str) -> tuple[int, int]:
        """Exchanges of a kind and their bytes (`Op.moved`)."""
        found = [op for op in self.collectives if op.kind == kind]
        return sum(op.times for op in found), sum(op.times * op.moved for op in found)


def work(program: Program) -> Work:
    """Counts a program from its entry on; of a conditional all branches."""
    reader = _Reader(program)
    kept: dict[object, Op] = {}
    for number, op in enumerate(reader.ops(program.computations[program.entry], 1, 0)):
        # An exchange beside other work is cut into pieces of one channel, of which those
        # in a loop count, not those that start it or wait for its end.
        key = op.channel or number
        if key not in kept or op.times > kept[key].times:
            kept[key] = op
    return Work(tuple(kept.values()), reader.unknown)


def flops(text: str) -> float | None:
    """FLOPs of all products of a compiled text; None where it hands some to a library, or
    does not say how often a loop runs."""
    done = work(read(text))
    return None if done.unknown or _LIBRARY.search(text) else done.flops


class _Reader:
    def __init__(self, program: Program):
        self._program = program
        self.unknown = 0

    def ops(self, computation: Computation, times: int, loops: int) -> Iterator[Op]:
        for one in computation.instructions.values():
            if one.opcode == "while":
                count = self._program.trips(one, computation)
                self.unknown += count is None
                often = times * (1 if count is None else count)
                body = self._named(one.attribute("body").lstrip("%"))
                yield from self.ops(body, often, loops + 1)
            elif one.opcode in ("call", "conditional", "async-start"):
                for name in one.called:
                    yield from self.ops(self._named(name), times, loops)
            else:
                where = dict(times=times, loops=loops, scope=_scope(one))
                for op in self._ops_of(one, computation):
                    yield dataclasses.replace(op, **where)

    def _ops_of(self, one: Instruction, within: Computation) -> Iterator[Op]:
        """What an instruction does once."""
        if one.opcode in _FREE or one.opcode.endswith("-update"):
            return
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            yield _exchange(one, within, waits=kind == one.opcode)
        elif one.opcode.endswith(("-start", "-done")):
            yield Op("copy", bytes=_copied(one, within))
        elif one.opcode == "custom-call":
            flops, traffic = _kernel(one, within)
            yield Op("custom-call", flops=flops, bytes=traffic)
        elif one.opcode == "fusion":
            yield from self._fusion(one, within)
        else:
            flops, traffic = _flops(one, within), _bytes(one, within)
            yield Op(one.opcode, flops=flops, bytes=traffic)

    def _fusion(self, one: Instruction, within: Computation) -> Iterator[Op]:
        """A TPU fuses a sum over devices with the slice that is kept of it; in any other
        fusion the rest runs beside an exchange."""
        body = self._named(one.called[0])
        inner = [x for x in body.instructions.values() if x.opcode in COLLECTIVES]
        if body.name.startswith("all-reduce-scatter"):
            op = _exchange(inner[0], body, waits=True)
            yield dataclasses.replace(op, kind="reduce-scatter")
            return
        for exchange in inner:
            yield _exchange(exchange, body, waits=False)
        flops, traffic = self._fused_flops(body), self._fused_bytes(one, within, body)
        yield Op("fusion", flops=flops, bytes=traffic)

    def _fused_flops(self, body: Computation) -> float:
        """Of a fusion, and of those in it."""
        total = 0.0
        for one in body.instructions.values():
            if one.opcode == "fusion":
                total += self._fused_flops(self._named(one.called[0]))
            else:
                total += _flops(one, body)
        return total

    def _fused_bytes(
        self, one: Instruction, within: Computation, body: Computation
    ) -> float:
        """Of operands, what the fusion reads of them; of results, what it writes."""
        read = sum(
            self._read(parameter, body, array.bytes)
            for parameter, array in zip(_parameters(body), _operands(one, within))
            if array.main
        )
        root = body.instructions[body.root]
        many = root.operands if root.opcode == "tuple" else (root.name,)
        written = sum(
            _written(body.instructions[name], body, array.bytes)
            for name, array in zip(many, one.arrays)
            if array.main
        )
        return read + written

    def _read(self, one: Instruction, body: Computation, whole: int) -> float:
        """Bytes of `one` that its users read: slices only, if all of them slice; nothing,
        if they write into it or hand it on."""
        total = 0.0
        for user in body.users(one.name):
            first = user.operands[0] == one.name
            if user.opcode in _SLICES and first:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "fusion":
                inner = self._named(user.called[0])
                for parameter, name in zip(_parameters(inner), user.operands):
                    if name == one.name:
                        total += self._read(parameter, inner, whole)
            elif user.opcode in ("bitcast", "copy", "convert"):
                total += self._read(user, body, whole)
            elif user.opcode == "dynamic-update-slice" and first:
                continue
            elif user.opcode not in ("tuple", "custom-call"):
                return whole
        return min(total, whole)

    def _named(self, name: str) -> Computation:
        return self._program.computations[name]


def _scope(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else ""


def _operands(one: Instruction, within: Computation) -> tuple[Array, ...]:
    """Arrays of all operands."""
    return tuple(
        array for name in one.operands for array in within.instructions[name].arrays
    )


def _parameters(body: Computation) -> list[Instruction]:
    found = (x for x in body.instructions.values() if x.opcode == "parameter")
    return sorted(found, key=lambda x: int(x.words))


def _main(arrays: Sequence[Array]) -> int:
    return sum(array.bytes for array in arrays if array.main)


# --- Exchange -----------------------------------------------------------------------


def _exchange(one: Instruction, within: Computation, *, waits: bool) -> Op:
    """Of whole arrays: the larger side of a gather or a scatter."""
    inputs = sum(array.bytes for array in _operands(one, within))
    outputs = sum(array.bytes for array in one.arrays)
    if one.opcode.endswith("-start"):  # returns its operands too
        outputs = max(outputs - inputs, inputs)
    kind = one.opcode.removesuffix("-start")
    moved, channel = max(inputs, outputs), one.attribute("channel_id")
    return Op(kind, moved=moved, group=_group(one), waits=waits, channel=channel)


def _group(one: Instruction) -> tuple[int, ...]:
    """The first group of devices; () for all."""
    text = one.attributes
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return tuple(map(int, pairs.groups()))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.search(rf"replica_groups={_IOTA}", text):
        sizes, *source = iota.groups()
        return tuple(_iota(*source).reshape(_sizes(sizes))[0].tolist())
    if named := re.search(rf"replica_groups=mesh\[{_MESH}\s*\{{([^}}]*)\}}", text):
        axes, *source, chosen = named.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        numbers = _iota(*source) if source[0] else np.arange(math.prod(sizes.values()))
        index = tuple(slice(None) if f"'{x}'" in chosen else 0 for x in sizes)
        return tuple(numbers.reshape(list(sizes.values()))[index].reshape(-1).tolist())
    return ()


def _iota(source: str, order: str | None) -> np.ndarray:
    """0, 1, 2 ... as an array of these sizes, its axes in another order."""
    sizes = _sizes(source)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_sizes(order)) if order else numbers


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


# --- Products -----------------------------------------------------------------------


def _flops(one: Instruction, within: Computation) -> float:
    if one.opcode == "dot":
        left = within.instructions[one.operands[0]].arrays[0].shape
        summed = [left[axis] for axis in one.numbers("lhs_contracting_dims")]
        return 2.0 * one.arrays[0].size * math.prod(summed)
    if one.opcode == "convolution":
        return _convolution(one, within)
    return 0.0


def _convolution(one: Instruction, within: Computation) -> float:
    """A TPU's products are convolutions, in which heads or examples may be places of a
    window that mostly lies in padding; only products with what is there count."""
    left, right = (within.instructions[name].arrays[0].shape for name in one.operands)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    into, kernel, out = (dict(zip(word, range(len(word)))) for word in labels)
    places = 1
    for number, axis in enumerate(sorted(x for x in kernel if x.isdigit())):
        sizes = (x[axes[axis]] for x, axes in ((left, into), (right, kernel)))
        window = _window(one, number)
        places *= _places(*sizes, one.arrays[0].shape[out[axis]], **window)
    groups = int(one.attribute("batch_group_count") or 1)
    outputs = one.arrays[0].shape[out["b"]] * one.arrays[0].shape[out["f"]]
    return 2.0 * places * outputs * right[kernel["i"]] / groups


def _window(one: Instruction, axis: int) -> dict[str, int]:
    found = re.search(r"window=\{([^}]*)\}", one.attributes)
    told = dict(word.split("=") for word in found[1].split()) if found else {}

    def of(name: str, default: str) -> str:
        return told[name].split("x")[axis] if name in told else default

    return dict(
        stride=int(of("stride", "1")),
        low=int(of("pad", "0_0").split("_")[0]),
        spread=int(of("lhs_dilate", "1")),
        apart=int(of("rhs_dilate", "1")),
    )


def _places(
    size: int, window: int, out: int, *, stride: int, low: int, spread: int, apart: int
) -> int:
    """Pairs of an output and a place of the window that fall on an element of the input.

    Args:
        size, window, out: along one axis of the input, the kernel and the output.
        stride, low, spread, apart: step and padding in front, and how far the elements of
            input and kernel are drawn apart.
    """
    at = np.arange(out)[:, None] * stride + np.arange(window)[None] * apart - low
    return int(((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum())


def _kernel(one: Instruction, within: Computation) -> tuple[float, float]:
    """FLOPs of a custom call, as it or `_PRODUCTS` tells them, and bytes, its operands and
    results."""
    if any(mark in one.attributes for mark in _MARKS):
        return 0.0, 0.0
    inputs = _operands(one, within)
    traffic = _main(inputs) + _main(one.arrays)
    told = re.search(r'\\?"flops\\?":\s*\\?"?(\d+)', one.attributes)
    products = next((n for name, n in _PRODUCTS.items() if name in one.name), 0)
    if told or not products:
        return float(told[1]) if told else 0.0, traffic
    blocks = next(x.shape[-1] for x in inputs if x.dtype == "s8")  # which are masked
    *queries, width = next(x.shape for x in inputs if len(x.shape) == 4)
    pairs = math.prod(queries) * queries[-1] * (blocks + 1) / (2 * blocks)
    return 2.0 * products * pairs * width, traffic


# --- Traffic ------------------------------------------------------------------------


def _bytes(one: Instruction, within: Computation) -> float:
    """What an instruction alone reads and writes."""
    if one.opcode in _SLICES:
        return 2.0 * _main(one.arrays)
    if one.opcode == "dynamic-update-slice":
        return 2.0 * _main(within.instructions[one.operands[1]].arrays)
    return _main(_operands(one, within)) + _main(one.arrays)


def _copied(one: Instruction, within: Computation) -> float:
    """Half of what a copy beside other work moves: read where it starts, written where it
    is done."""
    if one.opcode.endswith("-done"):
        return _main(one.arrays)
    users = within.users(one.name)
    ready = sum(a.bytes for user in users for a in user.arrays)
    source = within.instructions[one.operands[0]].arrays
    return ready if any(array.main for array in source) else 0


def _written(one: Instruction, body: Computation, whole: int) -> float:
    while one.opcode in ("bitcast", "copy"):
        one = body.instructions[one.operands[0]]
    if one.opcode != "dynamic-update-slice":
        return whole
    return sum(array.bytes for array in body.instructions[one.operands[1]].arrays)
