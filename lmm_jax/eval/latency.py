"""What was timed, and what it cost by the plan: records, tables, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import platform
import statistics
from typing import Any

from lmm_jax.eval import report


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed.

    Attributes:
        batch: prompts at once.
        text: text tokens of a prompt; 0 fills the slots of the config.
        new_tokens: decoded in one loop, after the first.
        rounds: timed, after the one that warms up.
        train: whether to time training steps of `data.batch_size` conversations.
    """

    batch: int = 1
    text: int = 0
    new_tokens: int = 32
    rounds: int = 7
    train: bool = False


@dataclasses.dataclass(frozen=True)
class Timing:
    """One compiled program.

    Attributes:
        rounds: seconds of each call.
        compiling: seconds.
        memory: bytes on one device of arguments, results and temporaries together.
    """

    rounds: tuple[float, ...]
    compiling: float
    memory: int

    def over(self, base: Timing) -> list[float]:
        """Ratios to another, round by round."""
        return [mine / other for mine, other in zip(self.rounds, base.rounds)]


@dataclasses.dataclass(frozen=True)
class Result:
    """One config: its cost by the plan and its times.

    The plan counts the pairs of query and key that are seen; `computed` and
    `train_computed` count all, since a masked product computes all.

    Attributes:
        name: of the config or variant.
        called: the model in words.
        dtype: of computation and cache.
        parameters: number.
        text, visual: tokens of one prompt as it enters the language model.
        language, vision, projector: FLOPs of one prompt.
        token: FLOPs of its first decoded token.
        kv_bytes: of one prompt.
        computed: FLOPs up to the first token of one prompt.
        train_batch, train_tokens: conversations of a training step, tokens of each.
        train_computed: FLOPs of a training step.
        first: vision, projector, prefill and sampling for all prompts.
        loop: decoding of all new tokens but the first, for all prompts.
        update: training step; as all about training, None if it was not timed.
    """

    name: str
    called: str
    dtype: str
    parameters: int
    text: int
    visual: int
    language: float
    vision: float
    projector: float
    token: float
    kv_bytes: int
    computed: float
    first: Timing
    loop: Timing
    train_batch: int | None = None
    train_tokens: int | None = None
    train_computed: float | None = None
    update: Timing | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Results in the order of the configs, the baseline first.

    Attributes:
        versions: libraries, device and command.
        device_peak: bytes that were in use at once on one device, all configs together;
            None where the backend does not count.
    """

    settings: Settings
    results: tuple[Result, ...]
    versions: Mapping[str, Any]
    device_peak: int | None

    def write(self, path: str | Path) -> None:
        """As JSON, every round included."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


# --- Tables --------------------------------------------------------------------------


def tables(found: Report) -> str:
    """Cost by the plan, times and memory, and ratios to the first config."""
    parts = [_conditions(found), _costs(found), _times(found)]
    if len(found.results) > 1:
        parts.append(_ratios(found))
    return "\n".join(parts)


def _conditions(found: Report) -> str:
    """What the times depend on, in words."""
    told, by = found.settings, found.versions
    chip = platform.processor() or platform.machine() if by["device"] == "cpu" else ""
    count = f"{by['devices']} device{'s' if by['devices'] > 1 else ''}"
    lines = [
        f"{' '.join(filter(None, (by['device'], chip)))}, {count}, jax {by['jax']}",
        f"batch {told.batch}, {told.new_tokens} tokens decoded; {told.rounds} rounds in "
        "turn: medians (ranges)",
    ]
    if found.device_peak is not None:
        lines.append(
            f"{_mib(found.device_peak)} MiB in use at once, all configs together"
        )
    return "\n".join(lines) + "\n"


def _costs(found: Report) -> str:
    """One prompt, by the plan."""
    head = ("config", "parameters", "text", "visual", "language GFLOP", "vision")
    rows = [(*head, "projector", "a token", "KV MiB", "dtype"), _rule(10)]
    for one in found.results:
        counts = (one.parameters, one.text, one.visual)
        flops = (one.language, one.vision, one.projector, one.token)
        rows.append(
            (
                one.name,
                *(f"{count:,}" for count in counts),
                *(_figures(x / 1e9) for x in flops),
                _mib(one.kv_bytes),
                one.dtype,
            )
        )
    return report.table(rows)


def _times(found: Report) -> str:
    """Times of a batch, and of each program its memory and seconds of compilation."""
    trained = found.settings.train
    head = ["config", "first token ms", "tokens/s"]
    head += ["training step ms", "batch x tokens"] if trained else []
    head += ["first token MiB", "decoding MiB"]
    head += ["training MiB"] if trained else []
    rows = [(*head, "compiled in s"), _rule(len(head) + 1)]
    tokens = found.settings.batch * found.settings.new_tokens
    for one in found.results:
        rates = [tokens / seconds for seconds in one.loop.rounds]
        cells = [one.name, spread(one.first.rounds, 1e3), spread(rates)]
        if trained:
            cells.append(spread(one.update.rounds, 1e3))
            cells.append(f"{one.train_batch} x {one.train_tokens:,}")
        programs = [part for part in (one.first, one.loop, one.update) if part]
        cells += [_mib(program.memory) for program in programs]
        cells.append(" + ".join(_figures(program.compiling) for program in programs))
        rows.append(cells)
    return report.table(rows)


def _ratios(found: Report) -> str:
    """To the first config; "promised" are ratios of the FLOPs that are computed."""
    base = found.results[0]
    head = [f"ratio to {base.name}", "promised", "first token"]
    head += ["of the speed-up", "KV", "a token"]
    head += ["promised", "training step"] if found.settings.train else []
    rows = [head, _rule(len(head))]
    for one in found.results[1:]:
        promised, first = one.computed / base.computed, one.first.over(base.first)
        reached = statistics.median(promised / ratio for ratio in first)
        cells = [one.name, _figures(promised), spread(first), f"{reached:.0%}"]
        cells.append(_figures(one.kv_bytes / base.kv_bytes))
        cells.append(spread(one.loop.over(base.loop)))
        if found.settings.train:
            cells.append(_figures(one.train_computed / base.train_computed))
            cells.append(spread(one.update.over(base.update)))
        rows.append(cells)
    return report.table(rows)


def spread(values: Sequence[float], unit: float = 1.0) -> str:
    """Median and range, times `unit`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    shown = [_figures(unit * value) for value in (middle, low, high)]
    return "{} ({}-{})".format(*shown)


def _rule(columns: int) -> tuple[str, ...]:
    return ("---", *["--:"] * (columns - 1))


def _figures(value: float) -> str:
    """Three of them, and all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mib(size: int) -> str:
    return _figures(size / 2**20)
