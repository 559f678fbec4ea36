"""Format requests, means and prediction files."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lmm_jax.eval import tasks
from lmm_jax.eval.scores import anls, exact


@pytest.fixture(name="task")
def _task() -> tasks.Task:
    return tasks.Task(
        name="toy",
        questions="toy/q.jsonl",
        images="toy/images",
        suffix=tasks.SHORT_ANSWER,
        max_new_tokens=4,
        metrics={"accuracy": exact.score, "anls": anls.score},
        citation="none",
    )


@dataclasses.dataclass(frozen=True)
class Question:
    id: str
    text: str


def test_the_published_size_is_checked(task):
    task.check_size(3)
    published = dataclasses.replace(task, examples=2)
    published.check_size(2)
    with pytest.raises(ValueError, match="3 questions of toy, which has 2"):
        published.check_size(3)


def test_the_format_request_comes_once(task):
    full = Question("1", f"Colour?\n{tasks.SHORT_ANSWER}")
    assert task.asked(Question("1", "Colour?")) == full
    assert task.asked(full) == full
    bare = dataclasses.replace(task, suffix="")
    assert bare.asked(Question("1", "Colour?")).text == "Colour?"


def test_means_per_category_and_over_examples(task):
    answers = [("Red.", "red", "colour"), ("bed", "red", "colour"), ("2", "3", "")]
    rows = [
        {"category": category, "score": tasks.score(task, text, [reference])}
        for text, reference, category in answers
    ]
    result = tasks.aggregate(task, rows)
    assert result["accuracy"] == pytest.approx({"total": 100 / 3, "colour": 50.0})
    # "Red." against "red" is 3/4 by ANLS, which does not strip points.
    assert result["anls"]["colour"] == pytest.approx(100 * (3 / 4 + 2 / 3) / 2)
    assert result["n"] == {"total": 3, "colour": 2}


def scored(*pairs: tuple[str, float]) -> list[dict]:
    return [
        {"category": category, "score": {"accuracy": value, "anls": value}}
        for category, value in pairs
    ]


def test_groups_average_over_examples(task):
    rows = scored(("sum", 1.0), ("sum", 1.0), ("count", 0.0), ("colour", 0.0))
    result = tasks.aggregate(task, rows, {"numbers": ("sum", "count")})
    assert result["n"] == {"total": 4, "numbers": 3, "sum": 2, "count": 1, "colour": 1}
    assert result["accuracy"]["numbers"] == pytest.approx(200 / 3)


def test_the_first_questions_may_leave_categories_out(task):
    rows = scored(("sum", 1.0), ("sum", 0.0))
    groups = {"numbers": ("sum", "count"), "colours": ("colour",)}
    result = tasks.aggregate(task, rows, groups, part=True)
    assert result["n"] == {"total": 2, "numbers": 2, "sum": 2}
    assert result["accuracy"]["numbers"] == 50


@pytest.mark.parametrize(
    ("rows", "groups", "says"),
    [
        ([], None, "no predictions of task 'toy'"),
        (scored(("total", 1.0)), None, r"\['total'\] are also names"),
        (scored(("a", 1.0)), {"a": ("a",)}, r"\['a'\] are also names"),
        (scored(("a", 1.0)), {"g": ("b",)}, r"no category \['b'\].*has \['a'\]"),
    ],
)
def test_aggregate_refuses_nothing_and_clashes(task, rows, groups, says):
    with pytest.raises(ValueError, match=says):
        tasks.aggregate(task, rows, groups)


def row(**changes) -> dict:
    return {
        "question_id": 7,
        "prompt": "Où ?",
        "text": "là",
        "answers": ["là"],
        "score": {"accuracy": 1.0},
        "category": "",
        "model_id": "toy",
        "metadata": {},
    } | changes


def test_predictions_are_json_lines_in_order(tmp_path):
    path = tmp_path / "out/toy.jsonl"
    tasks.write_predictions(path, [row(), row(question_id=3)])
    text = path.read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == [
        row(),
        row(question_id=3),
    ]
    assert "là" in text


def test_a_bad_row_leaves_the_old_file(tmp_path):
    path = tmp_path / "toy.jsonl"
    tasks.write_predictions(path, [row()])
    with pytest.raises(ValueError, match=r"prediction 8.*\['extra'\]"):
        tasks.write_predictions(path, [row(), row(question_id=8, extra=1)])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_rows_of_the_table_are_consistent():
    names = [task.name for task in tasks.TASKS]
    assert len(set(names)) == len(names)
    for task in tasks.TASKS:
        assert tasks.named(task.name) is task
        for value in tasks.score(task, "Yes", ["Yes"] * 10).values():
            assert value == 1.0
        for value in tasks.score(task, "Yes", ["1234"] * 10).values():
            assert value == 0.0


def test_unknown_tasks_list_the_known():
    with pytest.raises(ValueError, match=r"'popee'.*gqa, vqav2"):
        tasks.named("popee")
