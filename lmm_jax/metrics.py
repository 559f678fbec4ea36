"""Numbers on their way out: fetched one step late, rated, written, shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import json
import math
from pathlib import Path
import sys
import time
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from lmm_jax.compiled.tpu import CHIPS

Scalars = Mapping[str, float]

# Dense bf16 FLOP/s of one JAX device, by part of `device_kind`; the first match counts.
# Those of GPUs are in NVIDIA's data sheets.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("TPU v6", CHIPS["v6e"].flops),
    ("TPU v5 lite", CHIPS["v5e"].flops),
    ("TPU v5e", CHIPS["v5e"].flops),
    ("TPU v5", CHIPS["v5p"].flops),
    ("TPU v4", CHIPS["v4"].flops),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
)


class NonFiniteLoss(FloatingPointError):
    """The loss of a step is NaN or infinite; `step` says which."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(
            f"loss is {value} at step {step}; resume from the last checkpoint with a "
            "lower learning rate, a gradient clip or without that batch"
        )
        self.step = step


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device, None where the table has no number."""
    for name, flops in PEAK_FLOPS:
        if name in device_kind:
            return flops
    return None


def tagged(section: str, scalars: Scalars) -> dict[str, float]:
    """TensorBoard tags: {"loss": 1.0} in section "train" is {"train/loss": 1.0}."""
    return {f"{section}/{name}": value for name, value in scalars.items()}


class Late:
    """Device scalars come to the host one step late, so fetching never stalls a step.

    Push step n right after dispatching it; the wait for step n-1 then overlaps with n.
    """

    def __init__(self, watch: str = "loss") -> None:
        """`watch` names the scalar that must stay finite."""
        self._watch = watch
        self._waiting: tuple[int, Mapping[str, jax.Array], Any] | None = None

    def push(
        self, step: int, scalars: Mapping[str, jax.Array], beside: Any = None
    ) -> tuple[int, dict[str, float], Any] | None:
        """Takes step n and a tree of arrays beside its scalars; returns n-1, its values as
        floats and its tree, None the first time.

        Raises:
          NonFiniteLoss: the watched scalar of the finished step.
        """
        for value in jax.tree.leaves((scalars, beside)):
            value.copy_to_host_async()
        finished, self._waiting = self._waiting, (step, scalars, beside)
        return self._fetch(finished)

    def flush(self) -> tuple[int, dict[str, float], Any] | None:
        """The last pushed step, if any; call it after the loop and before evaluation.

        Raises:
          NonFiniteLoss: as in `push`.
        """
        finished, self._waiting = self._waiting, None
        return self._fetch(finished)

    def _fetch(self, finished):
        if finished is None:
            return None
        step, scalars, beside = finished
        scalars, beside = jax.device_get((dict(scalars), beside))
        host = {name: float(x) for name, x in scalars.items()}
        value = host.get(self._watch, 0.0)
        if not math.isfinite(value):
            raise NonFiniteLoss(step, value)
        return step, host, beside


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does on all devices together.

    Attributes:
      tokens: tokens the model reads, visual ones included.
      flops: floating point operations, forward and backward; None if not counted.
      peak: FLOP/s of all devices together; None if unknown, as on a CPU.
    """

    tokens: int
    flops: float | None = None
    peak: float | None = None

    @classmethod
    def on_devices(cls, tokens: int, flops: float | None = None) -> Work:
        """Work on all devices of this run."""
        devices = jax.devices()
        peak = peak_flops(devices[0].device_kind)
        return cls(tokens, flops, None if peak is None else peak * len(devices))


class Rates:
    """Step time, tokens per second and FLOP utilisation between finished steps; what the
    rest of the time goes into."""

    def __init__(
        self,
        work: Work,
        start: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`start` is what the clock said before anything was loaded."""
        self._work, self._start, self._clock = work, start, clock
        self._stepped = self._waited = 0.0
        self._last: tuple[int, float] | None = None

    def tick(self, step: int) -> dict[str, float]:
        """Rates since the last tick, empty at the first, whose step was compiled.

        Keys: `perf/step_time` and, of it, `perf/data_wait`, in seconds,
        `perf/tokens_per_second`; in [0, 1] `perf/goodput`, the share of steps in the time
        since the start (the rest is loading, compiling, saving), and `perf/mfu` if FLOPs
        and peak are known.
        """
        now, last = self._clock(), self._last
        waited, self._waited = self._waited, 0.0
        self._last = step, now
        if last is None or step <= last[0] or now <= last[1]:
            return {}
        self._stepped += now - last[1]
        seconds = (now - last[1]) / (step - last[0])
        rates = {
            "perf/step_time": seconds,
            "perf/data_wait": waited / (step - last[0]),
            "perf/tokens_per_second": self._work.tokens / seconds,
            "perf/goodput": self._stepped / (now - self._start),
        }
        if self._work.flops is not None and self._work.peak is not None:
            rates["perf/mfu"] = self._work.flops / seconds / self._work.peak
        return rates

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Where a step waits for its data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def pause(self) -> None:
        """Leaves the time until the next tick out: an evaluation, a checkpoint."""
        self._last = None


class Progress:
    """A bar on a terminal, otherwise a plain line every `every` steps."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every: int = 20,
        stream: TextIO = sys.stderr,
    ) -> None:
        """`total` steps in the run, of which `start` were done before."""
        self._total, self._every, self._stream = total, every, stream
        self._seconds: float | None = None
        self._bar = None
        if stream.isatty():
            self._bar = tqdm(total=total, initial=start, file=stream, unit="step")

    def show(self, step: int, scalars: Scalars) -> None:
        """Shows finished step `step` (from 1) by `train/loss` and the rates."""
        if seconds := scalars.get("perf/step_time"):
            before = self._seconds or seconds
            self._seconds = 0.9 * before + 0.1 * seconds
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(self._text(scalars))
        elif step % self._every == 0 or step == self._total:
            eta = ""
            if self._seconds is not None:
                left = (self._total - step) * self._seconds
                eta = f"  eta {tqdm.format_interval(left)}"
            line = f"step {step}/{self._total}  {self._text(scalars)}{eta}"
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the terminal clean."""
        if self._bar is not None:
            self._bar.close()

    def _text(self, scalars: Scalars) -> str:
        parts = [f"loss {scalars['train/loss']:.4f}"]
        if (tokens := scalars.get("perf/tokens_per_second")) is not None:
            parts.append(f"{tqdm.format_sizeof(tokens)} tokens/s")
        if (mfu := scalars.get("perf/mfu")) is not None:
            parts.append(f"mfu {mfu:.1%}")
        return "  ".join(parts)


class JsonlWriter:
    """`metrics.jsonl`, one object per call, appended.

    After a resume a step may appear twice: the last one counts. NaN becomes null.
    """

    def __init__(self, workdir: str | Path) -> None:
        self._file = _append(workdir, "metrics.jsonl")

    def write(self, step: int, scalars: Scalars) -> None:
        """One line {"step": step, tag: value, ...}."""
        values = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class CsvWriter:
    """`metrics.csv` with columns step, tag, value: tags may come and go."""

    def __init__(self, workdir: str | Path) -> None:
        self._file = _append(workdir, "metrics.csv")
        self._rows = csv.writer(self._file, lineterminator="\n")
        if self._file.tell() == 0:
            self._rows.writerow(("step", "tag", "value"))

    def write(self, step: int, scalars: Scalars) -> None:
        """One row per scalar."""
        self._rows.writerows((step, tag, value) for tag, value in scalars.items())
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard event files in the work directory."""

    def __init__(self, workdir: str | Path) -> None:
        self._writer = SummaryWriter(str(workdir))

    def write(self, step: int, scalars: Scalars) -> None:
        """One scalar event per tag."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


WRITERS = {
    "jsonl": JsonlWriter,
    "csv": CsvWriter,
    "tensorboard": TensorBoardWriter,
}


class Writers:
    """Several writers as one. Only process 0 writes; elsewhere nothing happens."""

    def __init__(self, workdir: str | Path, kinds: Sequence[str]) -> None:
        """Opens writers of these kinds: names in `WRITERS`.

        Raises:
          ValueError: unknown kind.
        """
        if unknown := sorted(set(kinds) - WRITERS.keys()):
            raise ValueError(f"writers {unknown} do not exist; use {sorted(WRITERS)}")
        first = jax.process_index() == 0
        self._writers = [WRITERS[kind](workdir) for kind in kinds] if first else []

    def write(self, step: int, scalars: Scalars) -> None:
        """Writes to all."""
        for writer in self._writers:
            writer.write(step, scalars)

    def close(self) -> None:
        """Closes all."""
        for writer in self._writers:
            writer.close()


def _append(workdir: str | Path, name: str) -> TextIO:
    if "://" in str(workdir):
        raise ValueError(f"{name} cannot be appended to in {workdir}; use tensorboard")
    path = Path(workdir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8", newline="")


class Trace:
    """A profile of some steps, below `plugins/profile`, where TensorBoard looks."""

    def __init__(self, workdir: Path, steps: Sequence[int]) -> None:
        """`steps`: before which it begins and after which it ends; () for none."""
        self._workdir, self._steps = workdir, tuple(steps)

    def before(self, step: int) -> None:
        """Step `step` (from 1) is about to be dispatched."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._workdir))

    def after(self, step: int, state: Any) -> None:
        """It has been, and will make `state`."""
        if self._steps and step == self._steps[1]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
