"""Accuracy beside its cost: result records, a table, and a Pareto plot.

No accuracy without its cost: a record that does not say how many visual tokens and how
many FLOPs an answer took is refused where it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import json
import math
import os
from pathlib import Path
import statistics
from typing import NamedTuple

from matplotlib import cycler, patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclasses.dataclass(frozen=True)
class Record:
    """One metric of one task for one trained or adapted model.

    Attributes:
      strategy: name of the method; records of one method share a colour.
      task, metric: what was measured.
      value: of the metric, percent as a rule; higher is better.
      examples: number of examples behind `value`.
      steps: training steps, 0 for a method without training.
      seconds: wall time of that training.
      visual_tokens: per example, as they enter the language model.
      llm_tflops_per_example: 1e12 operations of the language model's prefill.
      category: part of the task that `value` is about.
      setting: what differs within a strategy, such as "keep 144".
      seed: of training or selection; records that differ only here are averaged.
      visual_tokens_per_layer: mean over the layers of the language model.
      vision_tflops_per_example: of the vision encoder and the connector.
      kv_bytes: of the cache after the prefill of one example.
      tokens_per_second: generated.
      protocol: prompts and answer handling, such as "llava".
    """

    strategy: str
    task: str
    metric: str
    value: float
    examples: int
    steps: int
    seconds: float
    visual_tokens: float
    llm_tflops_per_example: float
    category: str = "total"
    setting: str = ""
    seed: int = 0
    visual_tokens_per_layer: float | None = None
    vision_tflops_per_example: float | None = None
    kv_bytes: float | None = None
    tokens_per_second: float | None = None
    protocol: str = ""

    def __post_init__(self) -> None:
        for name in ("visual_tokens", "llm_tflops_per_example"):
            cost = getattr(self, name)
            valid = isinstance(cost, int | float) and math.isfinite(cost) and cost >= 0
            if not valid:
                raise ValueError(
                    f"{name}={cost!r} of {self.strategy!r} on {self.task!r}: no "
                    "accuracy without its cost; take the number from the plan's table"
                )
        if not self.llm_tflops_per_example:
            raise ValueError(f"{self.strategy!r} on {self.task!r} cannot cost 0 TFLOP")

    @property
    def title(self) -> str:
        """Task, category and protocol in words."""
        category = "" if self.category == "total" else f"/{self.category}"
        return self.task + category + (f" ({self.protocol})" if self.protocol else "")


class Point(NamedTuple):
    """Records that differ only in their seed, summarised.

    Attributes:
      mean: a record with the means over the seeds; None where one of them has None.
      spread: sample standard deviation of the value, None for a single seed.
      seeds: number of records.
    """

    mean: Record
    spread: float | None
    seeds: int

    @property
    def cost(self) -> float:
        """TFLOP of the language model per example."""
        return self.mean.llm_tflops_per_example

    @property
    def value(self) -> float:
        """The mean value."""
        return self.mean.value

    @property
    def text(self) -> str:
        """Mean and spread."""
        spread = "" if self.spread is None else f" ± {self.spread:.1f}"
        return f"{self.value:.1f}{spread}"


_AVERAGED = (
    "value",
    "seconds",
    "visual_tokens",
    "llm_tflops_per_example",
    "visual_tokens_per_layer",
    "vision_tflops_per_example",
    "kv_bytes",
    "tokens_per_second",
)


def write_results(path: str | Path, records: Iterable[Record]) -> None:
    """A JSON list, one object per record, replacing the file in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(record) for record in records]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_results(path: str | Path) -> list[Record]:
    """The records of a file.

    Raises:
      ValueError: one has missing or unknown fields, or no cost; says which.
    """
    records = []
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        try:
            records.append(Record(**row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, record {number}: {error}") from error
    return records


def summarise(records: Iterable[Record]) -> list[Point]:
    """Means over seeds, by task and metric, then by falling cost.

    Raises:
      ValueError: two records of a group have the same seed.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = (record.title, record.metric, record.strategy, record.setting)
        groups.setdefault(key, []).append(record)
    points = [_point(group) for group in groups.values()]
    return sorted(points, key=lambda p: (p.mean.title, p.mean.metric, -p.cost))


def markdown(records: Iterable[Record]) -> str:
    """A line per task, strategy and setting: value ± spread over seeds, then its cost.

    Raises:
      ValueError: as in `summarise`.
    """
    header = ("task", "metric", "strategy", "setting", "value", "seeds", *_COSTS)
    rows = [header, ("---",) * 4 + ("--:",) * 6]
    for point in summarise(records):
        mean = point.mean
        names = (mean.title, mean.metric, mean.strategy, mean.setting)
        rows.append((*names, point.text, str(point.seeds), *_costs(mean)))
    return table(rows)


def comparison(records: Sequence[Record]) -> str:
    """A line per task, strategy and setting, in the order of the records: the first metric
    of the task in every category, then the cost.

    Raises:
      ValueError: as in `summarise`.
    """
    metric = {record.task: record.metric for record in reversed(records)}
    chosen = [record for record in records if record.metric == metric[record.task]]
    lines: dict[tuple[str, ...], dict[str, Point]] = {}
    for point in summarise(chosen):
        of = lines.setdefault(_model(point.mean), {})
        of[point.mean.category] = point
    categories = list(dict.fromkeys(record.category for record in chosen))
    header = ("task", "strategy", "setting", "seeds", *categories, *_COSTS)
    rows = [header, ("---",) * 3 + ("--:",) * (len(header) - 3)]
    for model in dict.fromkeys(map(_model, chosen)):
        points = lines[model]
        point = next(iter(points.values()))
        values = (points[c].text if c in points else "" for c in categories)
        rows.append((*model, str(point.seeds), *values, *_costs(point.mean)))
    return table(rows)


def _model(record: Record) -> tuple[str, str, str]:
    return record.task, record.strategy, record.setting


_COSTS = ("visual tokens", "per layer", "LLM TFLOP", "KV MiB")


def _costs(mean: Record) -> tuple[str, ...]:
    kv = None if mean.kv_bytes is None else mean.kv_bytes / 2**20
    return (
        f"{mean.visual_tokens:.4g}",
        _cell(mean.visual_tokens_per_layer, "{:.4g}"),
        f"{mean.llm_tflops_per_example:.3g}",
        _cell(kv, "{:.1f}"),
    )


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def pareto(points: Iterable[Point]) -> list[Point]:
    """Points that no other beats in value at the same or lower cost, by rising cost."""
    best, front = -math.inf, []
    for point in sorted(points, key=lambda p: (p.cost, -p.value)):
        if point.value > best:
            best = point.value
            front.append(point)
    return front


def plot(
    records: Iterable[Record],
    path: str | Path,
    *,
    task: str,
    metric: str,
    category: str = "total",
) -> None:
    """A PNG: the metric over TFLOP, one colour per strategy, bars of one spread.

    The cost axis is logarithmic if it spans more than a factor of ten. A grey step line
    is the Pareto front.

    Raises:
      ValueError: no record of this task, metric and category, or they mix protocols.
    """
    wanted = (task, metric, category)
    chosen = [r for r in records if (r.task, r.metric, r.category) == wanted]
    if not chosen:
        raise ValueError(f"no record of {metric!r} on {task!r}, {category!r} to plot")
    if len(protocols := sorted({record.protocol for record in chosen})) > 1:
        raise ValueError(f"records of {task!r} mix protocols {protocols}; plot one")
    points = summarise(chosen)
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _decorate(axes, points)
    front = pareto(points)
    axes.step(
        [point.cost for point in front],
        [point.value for point in front],
        where="post",
        color="0.85",
        linewidth=4,
        zorder=1,
        label="Pareto front",
    )
    for strategy in sorted({record.strategy for record in chosen}):
        _curve(axes, strategy, [p for p in points if p.mean.strategy == strategy])
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, format="png")


def _point(records: Sequence[Record]) -> Point:
    first = records[0]
    if len({record.seed for record in records}) < len(records):
        raise ValueError(
            f"{first.strategy!r} on {first.title!r} has {len(records)} records with "
            f"setting {first.setting!r} and the same seed; tell them apart by `setting`"
        )
    columns = {name: [getattr(r, name) for r in records] for name in _AVERAGED}
    means = {
        name: None if None in values else statistics.fmean(values)
        for name, values in columns.items()
    }
    spread = statistics.stdev(columns["value"]) if len(records) > 1 else None
    return Point(dataclasses.replace(first, **means), spread, len(records))


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _decorate(axes: Axes, points: Sequence[Point]) -> None:
    record = points[0].mean
    axes.set_prop_cycle(cycler(color=COLOURS))
    axes.set_title(record.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("TFLOP of the language model per example")
    axes.set_ylabel(record.metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93", zorder=0)
    axes.margins(x=0.12, y=0.15)
    costs = [point.cost for point in points]
    if max(costs) > 10 * min(costs):
        axes.set_xscale("log", subs=(2, 5))
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(ticker.FormatStrFormatter("%g"))
        axes.tick_params(which="both", length=3.5, pad=3.5)


def _curve(axes: Axes, strategy: str, points: Sequence[Point]) -> None:
    bars = axes.errorbar(
        [point.cost for point in points],
        [point.value for point in points],
        yerr=[point.spread or 0.0 for point in points],
        marker="o",
        markersize=6,
        linewidth=1.2,
        capsize=3,
        zorder=3,
        label=strategy,
    )
    for point in points:
        axes.annotate(
            point.mean.setting or f"{point.mean.visual_tokens:.4g} tokens",
            (point.cost, point.value),
            xytext=(5, -11),
            textcoords="offset points",
            fontsize=7.5,
            color=bars.lines[0].get_color(),
            path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
            zorder=4,
        )
