"""Evaluates a run: batched generation, scores, and beside every score what it cost.

    python -m lmm_jax.evaluate --config.workdir=runs/quickstart
    python -m lmm_jax.evaluate --config=configs/fastv.py --config.init.run=runs/llava

Writes `predictions/<task>.jsonl` and `results.json` into the work directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from lmm_jax import cli, experiment, runs, weights
from lmm_jax.answer import Answerer
from lmm_jax.data import pipeline
from lmm_jax.decode import prepared
from lmm_jax.depth.cost import cost
from lmm_jax.eval import report, tasks
from lmm_jax.experiment import Experiment
from lmm_jax.models import lmm


def evaluate(exp: Experiment) -> list[report.Record]:
    """Runs the tasks of a config on its parameters; returns and writes the records.

    Raises:
        ValueError: no task, or one that does not exist.
        CheckpointError: no parameters, or those of another model.
    """
    settings = exp.config.eval
    if not settings.tasks:
        raise ValueError(
            "config.eval.tasks is empty: name tasks, for example "
            f"--config.eval.tasks=('{tasks.TASKS[0].name}',)."
        )
    chosen = [tasks.named(name) for name in settings.tasks]
    experiment.prepare_data(exp)
    model = exp.model(train=False)
    params = prepared(weights.to_run(exp, model))
    done = runs.trained(weights.source(exp))
    records = []
    for task in chosen:
        rows, prompt = answer(exp, params, task)
        records += _records(exp, model, task, rows, prompt, done)
    if jax.process_index() == 0:
        report.write_results(Path(exp.config.workdir) / "results.json", records)
    return records


def answer(
    exp: Experiment, params: Mapping[str, Any], task: tasks.Task
) -> tuple[list[dict[str, Any]], float]:
    """Asks every question of a task.

    Returns:
        Prediction rows in the order of the questions, and the mean number of text tokens
        in a prompt.
    """
    settings = exp.config.eval
    questions = pipeline.read_questions(
        settings.questions or task.questions, settings.images or task.images
    )
    questions = questions[: settings.limit or None]
    asked = [task.asked(question) for question in questions]
    slots = settings.max_new_tokens or task.max_new_tokens
    found = Answerer(exp, params, slots).ask(asked, settings.batch_size, task.name)
    rows = [
        {
            "question_id": question.id,
            "prompt": question.text,
            "text": text,
            "answers": list(question.answers),
            "score": tasks.score(task, text, question.answers),
            "category": question.category,
            "model_id": exp.config.name,
            "metadata": {"protocol": task.protocol, "version": task.version},
        }
        for question, (text, _) in zip(asked, found)
    ]
    if jax.process_index() == 0:
        path = Path(exp.config.workdir) / "predictions" / f"{task.name}.jsonl"
        tasks.write_predictions(path, rows)
    return rows, float(np.mean([length for _, length in found]))


def _records(
    exp: Experiment,
    model: lmm.LMM,
    task: tasks.Task,
    rows: Sequence[Mapping[str, Any]],
    prompt: float,
    done: Mapping[str, float],
) -> list[report.Record]:
    """One record per metric and group of categories, each with its cost."""
    spent = cost(model.plan, text=round(prompt))
    means = tasks.aggregate(task, rows, exp.config.eval.groups)
    common = {
        "strategy": "+".join(exp.config.strategy) or "llava",
        "setting": _setting(exp.config.strategy),
        "task": task.name,
        "steps": int(done.get("steps", 0)),
        "seconds": round(done.get("seconds", 0.0), 1),
        "seed": exp.config.train.seed,
        "visual_tokens": model.plan.tokens_per_image * exp.config.text.images,
        "visual_tokens_per_layer": spent.visual_average,
        "llm_tflops_per_example": spent.language / 1e12,
        "vision_tflops_per_example": (spent.vision + spent.connector) / 1e12,
        "kv_bytes": spent.kv_bytes,
    }
    return [
        report.Record(
            **common,
            metric=metric,
            category=group,
            value=value,
            examples=means["n"][group],
        )
        for metric in task.metrics
        for group, value in means[metric].items()
    ]


def _setting(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """The arguments of strategies as text, with their names where there are several."""
    return ", ".join(
        f"{name}.{key}={value}" if len(chosen) > 1 else f"{key}={value}"
        for name, arguments in chosen.items()
        for key, value in arguments.items()
    )


def main(argv: list[str], config) -> None:
    start = time.perf_counter()
    exp = experiment.build(config)
    records = evaluate(exp)
    if jax.process_index() == 0:
        print(report.markdown(records))
        where = Path(exp.config.workdir) / "results.json"
        print(f"{where} written after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    cli.run(main)
