"""A plan as a table that a person reads before the first FLOP is spent."""

from __future__ import annotations

from lmm_jax.depth.cost import Cost, StepCost, cost
from lmm_jax.depth.edits import Connect
from lmm_jax.depth.planner import Cut, Fold, Layer, Plan, Scan, make_plan

HEADER = ("step", "layers", "visual", "text", "GFLOP", "KV MiB", "")


def table(plan: Plan, *, text: int | None = None, bytes_per_value: int = 2) -> str:
    """Steps, tokens alive, FLOPs and cache of one prompt, against the baseline.

    The baseline is the same model and prompt without any edit.

    Args:
        text: text tokens of the prompt; None counts all text slots.
        bytes_per_value: of the key-value cache.
    """
    args = dict(text=text, bytes_per_value=bytes_per_value)
    this = cost(plan, **args)
    base = cost(make_plan(plan.geometry, ()), **args)
    rows = [HEADER, *(_row(step, plan) for step in this.steps)]
    rows.append(_total("language", this.language, this.kv_bytes, base.language, base))
    if any(edit.projects for edit in plan.injects):
        rows.append(_in_context(plan, args))
    rows.append(("vision", "", "", "", _giga(this.vision), "", _views(plan)))
    if this.words:
        rows.append(("text", "", "", "", _giga(this.words), "", "a tower of its own"))
    if this.connector:
        rows.append(("projector", "", "", "", _giga(this.connector), "", ""))
    decodes = plan.geometry.language.causal
    if not decodes:
        rows.append(("head", "", "", "", _giga(this.head), "", _whole(this, base)))
        rows = [(*row[:5], row[6]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [_line(row, widths) for row in rows]
    average = f"{this.visual_average:.1f}".removesuffix(".0")
    lines.append(f"visual tokens per layer, on average: {average}")
    if decodes:
        lines[-1] += f"; {_giga(this.decode)} GFLOP per decoded token"
    if plan.mode == "mask":
        lines.append("mode=mask hides tokens without removing them: nothing is saved")
    return "\n".join(lines)


def _row(step: StepCost, plan: Plan) -> tuple[str, ...]:
    kind, layers, note = "scan", "", ""
    at = step.step
    if isinstance(at, Cut):
        names = ", ".join(edit.name for edit in at.edits)
        kept = [f"keep {edit.to} {edit.span}" for edit in at.edits]
        kept += [f"{query.count} tokens of {query.name} read" for query in at.queries]
        kind = f"cut {names}" if names else "query"
        spent = _giga(step.flops) if step.flops else ""
        counts = (str(step.visual), str(step.text))
        return (kind, "", *counts, spent, "", ", ".join(kept))
    last = at.stop - 1
    layers = f"{at.start}..{last}" if last > at.start else str(at.start)
    notes = [f"+ {feed.source}[{feed.start}:{feed.stop}]" for feed in at.feeds]
    if isinstance(at, Scan) and at.period > 1:
        notes.append(f"every {at.period} layers")
    if not at.learns:
        notes.append("frozen")
    if isinstance(at, Layer):
        kind = "layer"
        notes += [f"shows {name}" for name in at.observe]
        notes += [f"{edit.name}: keep {edit.to} {edit.span}" for edit in at.between]
    note = ", ".join(notes)
    mib = _mib(step.kv_bytes)
    counts = (str(step.visual), str(step.text))
    return (kind, layers, *counts, _giga(step.flops), mib, note)


def _views(plan: Plan) -> str:
    """How many views the encoder reads, and where they are stacked into fewer."""
    g = plan.geometry
    views = g.rows * g.images * g.views * g.passes
    if not plan.vision:
        return "patches alone"
    for fold in (step for step in plan.vision if isinstance(step, Fold)):
        name, layers = fold.edit.name, fold.edit.layers
        rest = f"{views // fold.views} + {name}[0:{len(layers)}]"
        return f"{views} views before layer {layers[0]}, from there on {rest}"
    return f"{views} view{'s' if views > 1 else ''} through the encoder"


def _total(
    name: str, flops: float, kv: int, base_flops: float, base: Cost
) -> tuple[str, ...]:
    ratios = [flops / base_flops]
    if base.kv_bytes:
        ratios.append(kv / base.kv_bytes)
    ratio = " / ".join(f"{x:.3f} x" for x in ratios) + " of the baseline"
    return (name, "", "", "", _giga(flops), _mib(kv), ratio)


def _whole(this: Cost, base: Cost) -> str:
    """An encoder's whole cost."""
    total = this.prefill / base.prefill
    return f"{_giga(this.prefill)} GFLOP in all, {total:.3f} x of the baseline"


def _in_context(plan: Plan, args: dict) -> tuple[str, ...]:
    """The language stack if what is injected stood in the sequence instead."""
    g = plan.geometry
    tokens = plan.connect.to if plan.connect else g.visual_tokens
    tokens += sum(edit.projects for edit in plan.injects)
    strung = cost(make_plan(g, (Connect("in context", tokens, None),)), **args)
    text = str(strung.steps[0].text)
    visual = str(strung.steps[0].visual)
    mib = _mib(strung.kv_bytes)
    note = "if the injected tokens were in the sequence"
    return ("in context", "", visual, text, _giga(strung.language), mib, note)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first = row[0].ljust(widths[0])
    cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1])]
    return "  ".join([first, *cells, row[-1]]).rstrip()


def _giga(flops: float) -> str:
    value = flops / 1e9
    return f"{value:,.1f}" if value >= 10 else f"{value:.4f}"


def _mib(size: int) -> str:
    value = size / 2**20
    return f"{value:,.1f}" if value >= 1 else f"{value:.3f}"
