"""What was timed, and what it cost by the plan: records, tables, JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        batch: examples at once: prompts, or what an encoder reads.
        text: text tokens of an example; 0 fills the slots of the config.
        new_tokens: decoded in one loop, after the first.
        rounds: timed, after the one that warms up.
        train: whether to time training steps of `data.batch_size` examples.
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
        temporary: bytes of temporaries at their peak: activations and, in training,
            gradients.
    """

    rounds: tuple[float, ...]
    compiling: float
    memory: int
    temporary: int

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
        text, visual: tokens of one example as it enters the language model.
        language, vision, words, projector: FLOPs of one example, `words` those of the
            text's own tower; 0 without such a part.
        token: FLOPs of its first decoded token; 0 in an encoder, as `kv_bytes`.
        kv_bytes: of one example.
        computed: FLOPs of `forward` for one example.
        train_batch, train_tokens: examples of a training step, tokens of each.
        train_computed: FLOPs of a training step, without what `remat` repeats.
        train_compiled: FLOPs of its products as compiled; see `compiled.work.flops`.
        learning: parameters that learn.
        moments: bytes of the optimizer's state.
        forward: of all examples up to the first token, sampling included; in an encoder,
            up to what the head says.
        loop: decoding of all new tokens but the first, for all examples; None in an
            encoder.
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
    words: float
    projector: float
    token: float
    kv_bytes: int
    computed: float
    forward: Timing
    loop: Timing | None = None
    train_batch: int | None = None
    train_tokens: int | None = None
    train_computed: float | None = None
    train_compiled: float | None = None
    learning: int | None = None
    moments: int | None = None
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
    decoded = f", {told.new_tokens} tokens decoded" if _decode(found) else ""
    lines = [
        f"{' '.join(filter(None, (by['device'], chip)))}, {count}, jax {by['jax']}",
        f"batch {told.batch}{decoded}; {told.rounds} rounds in turn: medians (ranges)",
    ]
    if found.device_peak is not None:
        lines.append(
            f"{_mib(found.device_peak)} MiB in use at once, all configs together"
        )
    return "\n".join(lines) + "\n"


def _costs(found: Report) -> str:
    """One example, by the plan."""

    def giga(flops: float | None) -> str:
        return _figures(flops / 1e9) if flops else ""

    return _table(
        found.results,
        ("config", lambda one: one.name),
        ("parameters", lambda one: f"{one.parameters:,}"),
        ("text", lambda one: f"{one.text:,}"),
        ("visual", lambda one: f"{one.visual:,}"),
        ("language GFLOP", lambda one: giga(one.language)),
        ("vision", lambda one: giga(one.vision)),
        ("text tower", lambda one: giga(one.words)),
        ("projector", lambda one: giga(one.projector)),
        ("a token", lambda one: giga(one.token)),
        ("KV MiB", lambda one: _mib(one.kv_bytes) if one.kv_bytes else ""),
        ("learning", lambda one: f"{one.learning:,}" if one.learning else ""),
        ("a training step", lambda one: giga(one.train_computed)),
        ("as compiled", lambda one: giga(one.train_compiled)),
        ("optimizer MiB", lambda one: one.moments and _mib(one.moments)),
        ("dtype", lambda one: one.dtype),
    )


def _times(found: Report) -> str:
    """Times of a batch, and of each program its memory and seconds of compilation."""
    told, forward = found.settings, _forward(found)

    def ran(timing: Timing | None) -> str:
        return spread(timing.rounds, 1e3) if timing else ""

    def rate(count: int, timing: Timing | None) -> str:
        return spread([count / x for x in timing.rounds]) if timing else ""

    def held(timing: Timing | None) -> str:
        return _mib(timing.memory) if timing else ""

    def compiling(one: Result) -> str:
        programs = filter(None, (one.forward, one.loop, one.update))
        return " + ".join(_figures(program.compiling) for program in programs)

    return _table(
        found.results,
        ("config", lambda one: one.name),
        (f"{forward} ms", lambda one: ran(one.forward)),
        ("examples/s", lambda one: "" if one.loop else rate(told.batch, one.forward)),
        ("tokens/s", lambda one: rate(told.batch * told.new_tokens, one.loop)),
        ("training step ms", lambda one: ran(one.update)),
        (
            "batch x tokens",
            lambda one: one.update and f"{one.train_batch} x {one.train_tokens:,}",
        ),
        (f"{forward} MiB", lambda one: held(one.forward)),
        ("activations", lambda one: _mib(one.forward.temporary)),
        ("decoding MiB", lambda one: held(one.loop)),
        ("training MiB", lambda one: held(one.update)),
        (
            "activations and gradients",
            lambda one: one.update and _mib(one.update.temporary),
        ),
        ("compiled in s", compiling),
    )


def _ratios(found: Report) -> str:
    """To the first config; "promised" are ratios of the FLOPs that are computed."""
    base, forward = found.results[0], _forward(found)

    def promised(one: Result) -> float:
        return one.computed / base.computed

    def reached(one: Result) -> str:
        shares = [promised(one) / x for x in one.forward.over(base.forward)]
        return f"{statistics.median(shares):.0%}"

    def over(mine: Timing | None, other: Timing | None) -> str:
        return spread(mine.over(other)) if mine and other else ""

    def ratio(mine: float | None, other: float | None) -> str:
        return _figures(mine / other) if mine and other else ""

    def held(timing: Timing | None) -> int:
        return timing.temporary if timing else 0

    return _table(
        found.results[1:],
        (f"ratio to {base.name}", lambda one: one.name),
        ("promised", lambda one: _figures(promised(one))),
        (forward, lambda one: over(one.forward, base.forward)),
        ("of the speed-up", reached),
        ("activations", lambda one: ratio(held(one.forward), held(base.forward))),
        ("KV", lambda one: ratio(one.kv_bytes, base.kv_bytes)),
        ("a token", lambda one: over(one.loop, base.loop)),
        ("promised", lambda one: ratio(one.train_computed, base.train_computed)),
        ("as compiled", lambda one: ratio(one.train_compiled, base.train_compiled)),
        ("training step", lambda one: over(one.update, base.update)),
        (
            "activations and gradients",
            lambda one: ratio(held(one.update), held(base.update)),
        ),
    )


def _table(
    results: Sequence[Result], *columns: tuple[str, Callable[[Result], str | None]]
) -> str:
    """A row for each config. A column in which no config has anything is left out."""
    cells = [(head, [say(one) or "" for one in results]) for head, say in columns]
    heads, told = zip(*((head, column) for head, column in cells if any(column)))
    rule = ("---", *["--:"] * (len(heads) - 1))
    return report.table([heads, rule, *zip(*told)])


def _decode(found: Report) -> bool:
    """Whether a config does."""
    return any(one.loop for one in found.results)


def _forward(found: Report) -> str:
    """How tables call the program `forward`."""
    return "first token" if _decode(found) else "forward"


def spread(values: Sequence[float], unit: float = 1.0) -> str:
    """Median and range, times `unit`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    shown = [_figures(unit * value) for value in (middle, low, high)]
    return "{} ({}-{})".format(*shown)


def _figures(value: float) -> str:
    """Three of them, and all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mib(size: int) -> str:
    return _figures(size / 2**20)
