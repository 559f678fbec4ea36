"""Evaluates a run: batched generation, scores, and beside every score what it cost.

    python -m lmm_jax.evaluate --config.workdir=runs/quickstart
    python -m lmm_jax.evaluate --config=configs/fastv.py --config.init.run=runs/llava

Writes `predictions/<task>.jsonl` and `results.json` into the work directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from lmm_jax import classify, cli, experiment, runs, weights
from lmm_jax.answer import Answerer
from lmm_jax.choose import Chooser
from lmm_jax.data import pipeline
from lmm_jax.depth import Plan
from lmm_jax.depth.cost import cost
from lmm_jax.eval import choices, report, tasks
from lmm_jax.experiment import Conversing, Experiment


def evaluate(exp: Experiment) -> list[report.Record]:
    """Runs the tasks of a config on its parameters; returns and writes the records.

    Raises:
        ValueError: no task, or one that does not exist.
        CheckpointError: no parameters, or those of another model.
    """
    experiment.prepare_data(exp)
    headed = isinstance(exp, experiment.Encoding)
    records = _classified(exp) if headed else _answered(exp)
    if jax.process_index() == 0:
        report.write_results(Path(exp.config.workdir) / "results.json", records)
    return records


def _answered(exp: Conversing) -> list[report.Record]:
    """Of a model that gives answers."""
    settings = exp.config.eval
    if not settings.tasks:
        raise ValueError(
            "config.eval.tasks is empty: name tasks, for example "
            f"--config.eval.tasks=('{tasks.TASKS[0].name}',)."
        )
    chosen = [tasks.named(name) for name in settings.tasks]
    model = exp.model(train=False)
    text = all(task.shots is not None for task in chosen)
    params = weights.prepared(weights.to_run(exp, model, text=text))
    done = runs.trained(weights.source(exp, text=text))
    records = []
    for task in chosen:
        generates = task.shots is None
        plan = model.plan if generates else exp.text_model(task.slots).plan
        rows, prompt = (answer if generates else choose)(exp, params, task)
        if jax.process_index() == 0:
            path = Path(exp.config.workdir) / "predictions" / f"{task.name}.jsonl"
            tasks.write_predictions(path, rows)
        categories = {row["category"] for row in rows}
        # Of several tasks, a group belongs to those that have one of its categories.
        groups = {
            name: members
            for name, members in settings.groups.items()
            if len(chosen) == 1 or categories & set(members)
        }
        means = tasks.aggregate(task, rows, groups, part=bool(settings.limit))
        common = _common(exp, plan, round(prompt), done)
        records += [
            report.Record(
                **common,
                task=task.name,
                metric=metric,
                category=group,
                value=value,
                examples=means["n"][group],
            )
            for metric in task.metrics
            for group, value in means[metric].items()
        ]
    return records


def _classified(exp: experiment.Encoding) -> list[report.Record]:
    """Of a model with a head."""
    values, count = classify.evaluate(exp)
    plan = exp.plan(train=False)
    done = runs.trained(weights.source(exp))
    common = _common(exp, plan, plan.geometry.prefix, done)
    return [
        report.Record(
            **common, task=exp.task.name, metric=metric, value=value, examples=count
        )
        for metric, value in values.items()
    ]


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
        _row(exp, task, question, question.text, text, question.answers)
        for question, (text, _) in zip(asked, found)
    ]
    return rows, float(np.mean([length for _, length in found]))


def choose(
    exp: Conversing, params: Mapping[str, Any], task: tasks.Task
) -> tuple[list[dict[str, Any]], float]:
    """Has the letter of every question chosen; returns what `answer` does."""
    settings = exp.config.eval
    questions = choices.read(settings.choices or task.questions)
    questions = questions[: settings.limit or None]
    found = Chooser(exp, params, task.slots, task.shots).ask(
        questions, settings.batch_size
    )
    rows = []
    for question, (likelihoods, _) in zip(questions, found):
        letter, prompt = question.letters[likelihoods.argmax()], question.prompt(0)
        row = _row(exp, task, question, prompt, letter, (question.answer,))
        row["metadata"]["likelihoods"] = likelihoods.tolist()
        rows.append(row)
    return rows, float(np.mean([length for _, length in found]))


def _row(exp, task: tasks.Task, question, prompt: str, text: str, answers):
    """One line of predictions."""
    asked = dict(name=question.id, prompt=prompt, answers=answers)
    return tasks.prediction(
        task, exp.config.name, text, **asked, category=question.category
    )


def _common(
    exp: Experiment, plan: Plan, text: int, done: Mapping[str, float]
) -> dict[str, Any]:
    """What all records of a run say: how it was made, and its cost for so much text."""
    spent = cost(plan, text=text)
    images = plan.geometry.images * plan.geometry.rows
    return {
        "strategy": "+".join(exp.config.strategy) or exp.plain,
        "setting": _setting(exp.config.strategy),
        "steps": int(done.get("steps", 0)),
        "seconds": round(done.get("seconds", 0.0), 1),
        "seed": exp.config.train.seed,
        "visual_tokens": plan.tokens_per_image * images,
        "visual_tokens_per_layer": spent.visual_average,
        "llm_tflops_per_example": spent.language / 1e12,
        "vision_tflops_per_example": (spent.vision + spent.connector) / 1e12,
        "kv_bytes": spent.kv_bytes,
    }


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
