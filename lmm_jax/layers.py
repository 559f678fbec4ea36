"""Scores the layers of a language model: which of them matter.

    python -m lmm_jax.layers --config.workdir=RUN --method=angular_hidden --samples=256
    python -m lmm_jax.layers --config.workdir=RUN --method=parameter_change --base=BASE_RUN

Writes `layers/<method>.json` (scores, and layers from the most important one) and a plot
over depth into the work directory. Layers have the numbers of the model that was pruned, if
one was.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
from pathlib import Path

from absl import flags
import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from lmm_jax import cli, experiment, importance, weights
from lmm_jax.eval.report import COLOURS

_METHOD = flags.DEFINE_enum(
    "method", "angular_hidden", list(importance.METHODS), "What is measured."
)
_BASE = flags.DEFINE_string(
    "base", "", "What parameters are compared with, if not what `init` names."
)
_SAMPLES = flags.DEFINE_integer("samples", 256, "Prompts of the data.", lower_bound=1)
_BLOCK = flags.DEFINE_integer("block", 1, "Layers that are scored together.")


def ranking(scores: np.ndarray) -> list[int]:
    """Indices from the largest score on; ties to the lower index."""
    return np.argsort(-scores, kind="stable").tolist()


def plot(
    scores: np.ndarray, numbers: Sequence[int], path: Path, *, title: str, score: str
) -> None:
    """A PNG: the score of every layer."""
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(numbers, scores, color=COLOURS[0], zorder=3)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("layer")
    axes.set_ylabel(score)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.93", zorder=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, format="png")


def main(argv: list[str], config) -> None:
    exp = importance.scored(experiment.build(config))
    experiment.prepare_data(exp)
    name, block = _METHOD.value, _BLOCK.value
    model = exp.model(train=False)
    base, compares = None, importance.METHODS[name].program is None
    if compares and (path := importance.base_of(exp, _BASE.value)):
        base = weights.whole(exp, model, path)
    params = weights.to_run(exp, model)
    scores = importance.scores(
        *(exp, model, params, name), samples=_SAMPLES.value, base=base, block=block
    )
    if jax.process_index():
        return
    numbers = model.spec.language.numbers[: len(scores)]
    ranked = [numbers[i] for i in ranking(scores)]
    where = Path(exp.config.workdir) / "layers" / (name + f"-{block}" * (block > 1))
    score = f"{name} of {block} layers" if block > 1 else name
    plot(scores, numbers, where.with_suffix(".png"), title=exp.config.name, score=score)
    found = {
        "method": name,
        "block": block,
        "samples": 0 if compares else _SAMPLES.value,
        "layers": numbers,
        "scores": scores.tolist(),
        "ranking": ranked,
    }
    where.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{score}, from the most important layer on:\n{', '.join(map(str, ranked))}")
    print(f"{where}.json and .png written")


if __name__ == "__main__":
    cli.run(main)
