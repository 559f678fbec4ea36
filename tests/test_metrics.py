"""Late values, NaN, rates, progress lines, and what the writers leave on disk."""

from __future__ import annotations

import csv
import io
import itertools
import json
import struct

import jax
import jax.numpy as jnp
import pytest

from lmm_jax import metrics


def test_values_come_one_step_late():
    late = metrics.Late()
    got = [late.push(step, {"loss": jnp.float32(step * 10)}) for step in (1, 2, 3)]
    assert got == [None, (1, {"loss": 10.0}, None), (2, {"loss": 20.0}, None)]
    assert late.flush() == (3, {"loss": 30.0}, None)
    assert late.flush() is None


def test_late_values_pass_the_transfer_guard():
    late = metrics.Late()
    scalars = {"loss": jnp.ones(())}
    with jax.transfer_guard("disallow"):
        late.push(1, scalars, beside={"rows": jnp.arange(2)})
        step, values, beside = late.flush()
    assert (step, values, beside["rows"].tolist()) == (1, {"loss": 1.0}, [0, 1])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_loss_names_its_own_step(bad):
    late = metrics.Late()
    late.push(6, {"loss": jnp.float32(1.0), "grad_norm": jnp.float32(jnp.inf)})
    late.push(7, {"loss": jnp.float32(bad)})
    with pytest.raises(metrics.NonFiniteLoss, match="at step 7") as caught:
        late.push(8, {"loss": jnp.float32(1.0)})
    assert caught.value.step == 7


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
    ],
)
def test_peaks_by_device_kind(kind, tera):
    assert metrics.peak_flops(kind) == tera * 1e12


def test_unknown_devices_have_no_peak():
    assert metrics.peak_flops("cpu") is None
    assert metrics.Work.on_devices(10, 1e9).peak is None


def test_rates():
    times = iter([0.0, 0.5, 1.0, 2.0, 4.0, 100.0, 101.0])
    work = metrics.Work(tokens=1000, flops=3e12, peak=4e12)
    rates = metrics.Rates(work, -2.0, clock=lambda: next(times))
    assert rates.tick(1) == {}
    with rates.waiting():
        pass
    expected = {
        "perf/step_time": 2.0,
        "perf/data_wait": 0.5,
        "perf/goodput": 0.5,
        "perf/tokens_per_second": 500.0,
        "perf/mfu": 0.375,
    }
    assert rates.tick(2) == expected
    assert rates.tick(4)["perf/step_time"] == 1.0
    rates.pause()
    assert rates.tick(5) == {}
    assert rates.tick(6)["perf/step_time"] == 1.0


def test_utilisation_is_omitted_where_unknown():
    times = itertools.count()
    rates = metrics.Rates(metrics.Work(10, flops=1.0), 0.0, clock=lambda: next(times))
    rates.tick(1)
    assert "perf/mfu" not in rates.tick(2)


SHOWN = {
    "train/loss": 1.25,
    "perf/step_time": 2.0,
    "perf/tokens_per_second": 12345.0,
    "perf/mfu": 0.412,
}


def test_plain_lines_every_few_steps_and_at_the_end():
    stream = io.StringIO()
    progress = metrics.Progress(45, every=20, stream=stream)
    for step in range(1, 46):
        progress.show(step, SHOWN)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["20/45", "40/45", "45/45"]
    assert lines[0] == ("step 20/45  loss 1.2500  12.3k tokens/s  mfu 41.2%  eta 00:50")


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = metrics.Progress(10, start=4, stream=stream)
    progress.show(5, {"train/loss": 2.0})
    progress.close()
    assert "5/10" in stream.getvalue() and "loss 2.0000" in stream.getvalue()


def test_files_of_all_writers(tmp_path):
    writers = metrics.Writers(tmp_path / "run", ("jsonl", "csv", "tensorboard"))
    writers.write(1, metrics.tagged("train", {"loss": 0.5, "grad_norm": float("inf")}))
    writers.write(2, {"eval/pope/f1": 80.0})
    writers.close()
    again = metrics.Writers(tmp_path / "run", ("jsonl", "csv"))
    again.write(3, {"train/loss": 0.25})
    again.close()

    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train/loss": 0.5, "train/grad_norm": None},
        {"step": 2, "eval/pope/f1": 80.0},
        {"step": 3, "train/loss": 0.25},
    ]
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "tag", "value"]
    assert rows[-1] == ["3", "train/loss", "0.25"] and len(rows) == 5
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    data = events.read_bytes()
    assert b"train/loss" in data and b"eval/pope/f1" in data
    assert struct.pack("<f", 80.0) in data


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writers = metrics.Writers(tmp_path / "run", ("jsonl", "csv", "tensorboard"))
    writers.write(1, {"train/loss": 0.5})
    writers.close()
    assert not (tmp_path / "run").exists()


def test_unknown_writers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['wandb'\].*tensorboard"):
        metrics.Writers(tmp_path, ("wandb", "csv"))


def test_object_stores_take_no_appends():
    with pytest.raises(ValueError, match=r"metrics\.csv .* gs://bucket/run; use tens"):
        metrics.Writers("gs://bucket/run", ("csv",))
