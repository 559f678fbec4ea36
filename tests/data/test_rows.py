"""Lists inside objects, and what is remembered of their rows."""

from __future__ import annotations

import json
import pickle

from hypothesis import given
from hypothesis import strategies as st
import pytest

from lmm_jax.data.rows import BadRecord, JsonRows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.json"

    def written(text: str):
        path.write_bytes(text.encode())
        return path

    return written


@given(
    rows=st.lists(VALUES, max_size=5),
    before=st.dictionaries(st.text(max_size=3), VALUES, max_size=3),
    after=st.dictionaries(st.text(min_size=4, max_size=4), VALUES, max_size=3),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
)
def test_a_list_in_an_object(write, rows, before, after, indent, ascii):
    whole = {**before, "questions": rows, **after}
    path = write(json.dumps(whole, indent=indent, ensure_ascii=ascii))
    found = pickle.loads(pickle.dumps(JsonRows(path, "questions")))
    assert [found.read(i, lambda row: row) for i in range(len(found))] == rows
    assert found.fields == {**before, **after}


def test_rows_are_chosen_and_noted(write):
    path = write(json.dumps([{"n": n} for n in range(6)]))
    rows = JsonRows(path, note=lambda row: (row["n"], 7) if row["n"] % 2 else None)
    assert rows.notes.tolist() == [[1, 7], [3, 7], [5, 7]]
    assert rows.read(2, lambda row: row["n"]) == 5


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            '{"info": 1, "answers": []}',
            r"no list 'questions', but \['answers', 'info'\]",
        ),
        ('{"info": 1 "questions": []}', "not JSON: expected ',' or '}' at line 1"),
        ('{"questions": {}}', r"not JSON: expected '\['"),
        ('{"questions": [{"n": 1}, {"m": 2}]}', r"element 1 of .*: no 'n'.*data set"),
        ("7", "not JSON: expected '{'"),
    ],
)
def test_a_broken_file(write, text, reason):
    with pytest.raises(ValueError, match=reason):
        JsonRows(write(text), "questions", lambda row: (row["n"],))


def test_a_row_that_lacks_what_is_wanted(write):
    rows = JsonRows(write('{"a": 1}\n[2]\n{'))
    assert rows.read(0, lambda row: row["a"]) == 1
    for index, reason in ((0, "no 'b'"), (1, "indices"), (2, "Expecting")):
        with pytest.raises(BadRecord, match=rf"malformed: .*\[{index}\]: .*{reason}"):
            rows.read(index, lambda row: row["b"])
