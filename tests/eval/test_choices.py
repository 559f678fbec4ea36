"""Files of multiple choice, and the prompts made of them."""

from __future__ import annotations

import json

import pytest

from lmm_jax.eval import choices


@pytest.fixture
def mmlu(tmp_path):
    """Two subjects in the published form; one question has a line break."""
    for split, subject, text in (
        ("dev", "high_school_biology", "What lives?,a stone,a cat,B\nMore?,x,y,A\n"),
        ("test", "high_school_biology", '"Two\nlines, one field",yes,no,A\n'),
        ("test", "anatomy", "Where?,here,there,up,down,D\n"),
    ):
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / split / f"{subject}_{split}.csv").write_text(text)
    return tmp_path


def test_the_published_folder(mmlu):
    where, lines = choices.read(mmlu)
    assert (where.category, where.answer, where.examples) == ("anatomy", "D", ())
    assert where.letters == ("A", "B", "C", "D")
    assert lines.question == "Two\nlines, one field" and len(lines.examples) == 2
    assert choices.most((where, lines)) == 4


def test_prompts_are_those_of_the_original_code(mmlu):
    _, question = choices.read(mmlu)
    assert question.prompt(1) == (
        "The following are multiple choice questions (with answers) about  high school "
        "biology.\n\nWhat lives?\nA. a stone\nB. a cat\nAnswer: B\n\n"
        "Two\nlines, one field\nA. yes\nB. no\nAnswer:"
    )
    assert question.prompt(5) == question.prompt(2) != question.prompt(1)
    assert "What lives?" not in question.prompt(0)


def test_lines_of_json(tmp_path):
    file = tmp_path / "choices.jsonl"
    rows = [
        dict(question="1?", choices=["a", 2], answer=1, category="x", split="dev"),
        dict(question="2?", choices=["a", "b", "c"], answer="C", category="x"),
        dict(question="3?", choices=["a", "b"], answer="A", question_id="three"),
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    two, three = choices.read(file)
    assert (two.id, two.examples[0].answer, two.examples[0].choices) == (
        "2",
        "B",
        ("a", "2"),
    )
    assert (three.id, three.examples) == ("three", ())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "?", "choices": ["a", "b"]}, "line 1: KeyError.'answer'"),
        ({"question": "?", "choices": ["a", "b"], "answer": "C"}, "answer 'C': give 2"),
        ({"question": "?", "choices": ["a"], "answer": "A"}, "has 1 choices"),
        ([], "line 1: "),
    ],
)
def test_lines_that_are_no_questions(tmp_path, row, says):
    file = tmp_path / "choices.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=says):
        choices.read(file)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder of MMLU"):
        choices.read(tmp_path)
