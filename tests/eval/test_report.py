"""Records refuse a missing cost; tables, fronts and plots show it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lmm_jax.eval import report
from lmm_jax.eval.report import Record


def record(**changes) -> Record:
    fields = {
        "strategy": "fastv",
        "task": "gqa",
        "metric": "accuracy",
        "value": 60.0,
        "examples": 100,
        "steps": 0,
        "seconds": 1.5,
        "visual_tokens": 144.0,
        "llm_tflops_per_example": 3.9,
    }
    return Record(**fields | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"visual_tokens": None},
        {"llm_tflops_per_example": None},
        {"llm_tflops_per_example": float("nan")},
        {"llm_tflops_per_example": 0.0},
        {"visual_tokens": -1},
    ],
)
def test_no_accuracy_without_its_cost(changes):
    with pytest.raises(ValueError, match=r"'fastv' on 'gqa'.*cost"):
        record(**changes)


def test_text_alone_has_zero_visual_tokens():
    assert record(visual_tokens=0).visual_tokens == 0


def test_results_survive_the_file(tmp_path):
    records = [record(), record(seed=1, kv_bytes=2.0**20, protocol="llava")]
    path = tmp_path / "run/results.json"
    report.write_results(path, records)
    assert report.read_results(path) == records
    assert [path.name for path in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("pop", "visual_tokens"), "visual_tokens"),
        (("pop", "value"), "value"),
        (("setdefault", "speed", 3), "speed"),
        (("update", {"llm_tflops_per_example": None}), "no accuracy without its cost"),
    ],
)
def test_bad_files_name_the_record(tmp_path, change, says):
    method, *arguments = change
    rows = [dataclasses.asdict(record()), dataclasses.asdict(record(seed=1))]
    getattr(rows[1], method)(*arguments)
    (tmp_path / "results.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f"record 1: .*{says}"):
        report.read_results(tmp_path / "results.json")


def test_table_has_mean_spread_and_cost():
    records = [record(value=value, seed=i) for i, value in enumerate((58, 60, 65))]
    records.append(
        record(
            strategy="none",
            visual_tokens=576.0,
            llm_tflops_per_example=9.25,
            kv_bytes=352 * 2**20,
            visual_tokens_per_layer=571.5,
            protocol="llava",
        )
    )
    records.append(record(category="binary"))
    assert report.markdown(records).splitlines() == [
        "| task | metric | strategy | setting | value | seeds | visual tokens "
        "| per layer | LLM TFLOP | KV MiB |",
        "| --- | --- | --- | --- | --: | --: | --: | --: | --: | --: |",
        "| gqa | accuracy | fastv |  | 61.0 ± 3.6 | 3 | 144 |  | 3.9 |  |",
        "| gqa (llava) | accuracy | none |  | 60.0 | 1 | 576 | 571.5 | 9.25 | 352.0 |",
        "| gqa/binary | accuracy | fastv |  | 60.0 | 1 | 144 |  | 3.9 |  |",
    ]


def test_comparison_has_a_line_a_model_and_a_column_a_category():
    records = [
        record(metric=metric, strategy=strategy, category=category, value=v, seed=seed)
        for seed in (0, 1)
        for strategy, v in (("b", 50 + seed), ("a", 70))
        for metric in ("accuracy", "anls")
        for category in ("total", "small")
    ][:-1]
    assert report.comparison(records).splitlines() == [
        "| task | strategy | setting | seeds | total | small | visual tokens | per layer "
        "| LLM TFLOP | KV MiB |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
        "| gqa | b |  | 2 | 50.5 ± 0.7 | 50.5 ± 0.7 | 144 |  | 3.9 |  |",
        "| gqa | a |  | 2 | 70.0 ± 0.0 | 70.0 ± 0.0 | 144 |  | 3.9 |  |",
    ]


def test_a_number_that_one_seed_lacks_has_no_mean():
    both = [record(kv_bytes=2.0), record(seed=1, kv_bytes=4.0)]
    (point,) = report.summarise(both)
    assert point.mean.kv_bytes == 3.0
    (point,) = report.summarise([*both, record(seed=2)])
    assert point.mean.kv_bytes is None and point.seeds == 3


def test_settings_keep_budgets_apart():
    with pytest.raises(ValueError, match="tell them apart by `setting`"):
        report.summarise([record(), record(visual_tokens=64.0)])
    cheap = record(setting="keep 64", llm_tflops_per_example=2.0)
    points = report.summarise([cheap, record(setting="keep 144")])
    assert [point.mean.setting for point in points] == ["keep 144", "keep 64"]


def test_the_front_drops_what_is_beaten():
    numbers = {
        "a": (1.0, 50),
        "b": (2.0, 49),
        "c": (2.0, 55),
        "d": (4, 55),
        "e": (5, 60),
    }
    records = [
        record(setting=name, llm_tflops_per_example=cost, value=value)
        for name, (cost, value) in numbers.items()
    ]
    front = report.pareto(report.summarise(records))
    assert [point.mean.setting for point in front] == ["a", "c", "e"]


def test_plot_writes_a_png(tmp_path):
    records = [
        record(setting=f"keep {keep}", value=60 + seed, seed=seed)
        for keep in (64, 128)
        for seed in (0, 1)
    ]
    path = tmp_path / "plots/gqa.png"
    report.plot(records, path, task="gqa", metric="accuracy")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_needs_records_of_one_protocol(tmp_path):
    with pytest.raises(ValueError, match="no record of 'f1' on 'gqa'"):
        report.plot([record()], tmp_path / "x.png", task="gqa", metric="f1")
    mixed = [record(), record(protocol="llava")]
    with pytest.raises(ValueError, match="mix protocols"):
        report.plot(mixed, tmp_path / "x.png", task="gqa", metric="accuracy")


@pytest.mark.parametrize(("ratio", "scale"), [(10, "linear"), (11, "log")])
def test_wide_costs_get_a_logarithmic_axis(tmp_path, monkeypatch, ratio, scale):
    scales = []
    monkeypatch.setattr(
        report.Figure,
        "savefig",
        lambda figure, *_, **__: scales.append(figure.axes[0].get_xscale()),
    )
    records = [
        record(setting="a", llm_tflops_per_example=1.0),
        record(setting="b", llm_tflops_per_example=float(ratio)),
    ]
    report.plot(records, tmp_path / "x.png", task="gqa", metric="accuracy")
    assert scales == [scale]
