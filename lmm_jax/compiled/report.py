"""What compiling a program told: memory by kind, work, time, and what to change.

All sizes are of one device, in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import re
import time
from typing import Any

import jax

from lmm_jax.compiled import hlo
from lmm_jax.compiled.estimate import Estimate, estimate
from lmm_jax.compiled.programs import Lowered
from lmm_jax.compiled.tpu import Slice
from lmm_jax.compiled.work import COLLECTIVES, Work, work

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# How the TPU compiler says what did not fit, arguments aside.
_NEEDED = (
    re.compile(r"\bprogram ([\d.]+)([KMGT]?)"),
    re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"\bUsed ([\d.]+)([KMGT]?) of"),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        held: by kind, what is there before a step.
        temporary: activations, gradients and whatever else a step needs at its peak.
        output: new arrays that a step leaves; none where it overwrites what is held.
        code: the program.
    """

    held: Mapping[str, int]
    temporary: int
    output: int = 0
    code: int = 0

    @property
    def kinds(self) -> dict[str, int]:
        rest = {
            "activations and gradients": self.temporary,
            "output": self.output,
            "program": self.code,
        }
        return {**self.held, **{kind: size for kind, size in rest.items() if size}}

    @property
    def total(self) -> int:
        return sum(self.held.values()) + self.temporary + self.output + self.code


@dataclasses.dataclass(frozen=True)
class Report:
    """A program on a slice.

    Attributes:
        chips: the slice.
        memory: of one chip.
        seconds: that compiling took.
        examples, flops: see `Lowered`.
        work, estimate: None where memory overflowed, for then there is no program.
    """

    chips: Slice
    memory: Memory
    seconds: float
    examples: int
    flops: float
    work: Work | None = None
    estimate: Estimate | None = None

    @property
    def share(self) -> float:
        """Of the memory of a chip that the program needs."""
        return self.memory.total / (self.chips.chip.memory * GIB)

    @property
    def fits(self) -> bool:
        return self.work is not None and self.share <= 1

    @property
    def utilisation(self) -> float:
        """Model FLOPs of a step over what the slice could do in its estimated time."""
        peak = self.chips.chip.flops * self.chips.count
        return self.flops / (peak * self.estimate.step)

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        found = {
            "topology": str(self.chips),
            "chips": self.chips.count,
            "fits": self.fits,
            "memory": self.memory.kinds,
            "memory_share": self.share,
            "compile_seconds": self.seconds,
            "examples": self.examples,
            "model_flops": self.flops,
        }
        if self.work is None:
            return found
        return found | {
            "flops": self.work.flops,
            "bytes": self.work.bytes,
            "collectives": {
                kind: dict(zip(("count", "bytes"), self.work.volume(kind)))
                for kind in COLLECTIVES
            },
            "seconds": dataclasses.asdict(self.estimate) | {"step": self.estimate.step},
            "utilisation": self.utilisation,
        }


def compile_for(lowered: Lowered, chips: Slice, devices) -> Report:
    """Compiles, and reads what came out.

    Args:
        devices: of the slice, in the order of the mesh.

    Raises:
        ValueError: the TPU compiler writes what this jaxlib cannot read.
    """
    start = time.perf_counter()
    told = dict(chips=chips, examples=lowered.examples, flops=lowered.flops)
    try:
        program = lowered.program.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = Memory(lowered.held, needed(error))
        return Report(memory=memory, seconds=time.perf_counter() - start, **told)
    seconds = time.perf_counter() - start
    found = work(hlo.read(text_of(program)))
    return Report(
        memory=memory_of(lowered, program),
        seconds=seconds,
        work=found,
        estimate=estimate(found, chips, devices),
        **told,
    )


def text_of(program: jax.stages.Compiled) -> str:
    """A compiled program in words.

    Raises:
        ValueError: as `compile_for`.
    """
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"jaxlib {jax.lib.__version__} cannot read what the TPU compiler made "
            f"({str(error).splitlines()[0]}): pip install 'jax[tpu]' brings the libtpu "
            "that belongs to it."
        ) from error


def memory_of(lowered: Lowered, program: jax.stages.Compiled) -> Memory:
    """What a compiled program needs."""
    found = program.memory_analysis()
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    code = found.generated_code_size_in_bytes
    return Memory(lowered.held, found.temp_size_in_bytes, max(output, 0), code)


def needed(error: Exception) -> int:
    """Bytes beside the arguments for which memory was too small.

    Raises:
        Exception: the error itself, where it is about something else.
    """
    text = str(error)
    matches = (pattern.search(text) for pattern in _NEEDED)
    found = next((match for match in matches if match), None)
    if "RESOURCE_EXHAUSTED" not in text or found is None:
        raise error
    return int(float(found[1]) * _UNITS[found[2]])


# --- As text ------------------------------------------------------------------------


def table(report: Report) -> str:
    """Memory by kind, then work and time."""
    lines = [*_memory_lines(report)]
    if report.work is not None:
        lines += ["", *_work_lines(report), "", *_time_lines(report)]
    return "\n".join(lines)


def _memory_lines(report: Report):
    for kind, size in report.memory.kinds.items():
        yield f"{kind:27}{size / GIB:8.2f} GiB"
    said = "fits" if report.fits else "does not fit"
    yield (
        f"{'of one chip':27}{report.memory.total / GIB:8.2f} of "
        f"{report.chips.chip.memory} GiB, {report.share:.0%}: {said}"
    )


def _work_lines(report: Report):
    chip, done = report.chips.chip, report.work
    yield (
        f"{'products':27}{done.flops / 1e12:8.2f} TFLOP of one chip, "
        f"{1e3 * report.estimate.products:.0f} ms at {chip.flops / 1e12:.0f} TFLOP/s"
    )
    yield (
        f"{'memory traffic':27}{done.bytes / 1e9:8.2f} GB, "
        f"{1e3 * done.bytes / chip.bandwidth:.0f} ms at {chip.bandwidth / 1e9:.0f} GB/s"
    )
    for kind in COLLECTIVES:
        count, moved = done.volume(kind)
        if count:
            yield f"{kind:27}{moved / 1e9:8.2f} GB in {count:,}"
    if done.unknown:
        yield f"{done.unknown} loops of unknown length count once"


def _time_lines(report: Report):
    found, scale = report.estimate, 1e3
    yield f"{'computing':27}{scale * found.computing:8.1f} ms"
    yield f"{'waiting for exchanges':27}{scale * found.waiting:8.1f} ms"
    yield f"{'exchanges beside it':27}{scale * found.beside:8.1f} ms"
    yield (
        f"{'estimated step':27}{scale * found.step:8.1f} ms, "
        f"{report.examples / found.step:,.1f} examples/s, "
        f"model FLOP utilisation {report.utilisation:.0%}"
    )
