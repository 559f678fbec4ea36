"""Timings: what is compiled and run, the numbers beside them, tables, bad arguments.

Nothing here asserts how fast anything is.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from lmm_jax import bench, cli, decode, experiment, presets, train, weights
from lmm_jax.depth.cost import Learns, cost, train_flops
from lmm_jax.eval import latency
from lmm_jax.eval.latency import Report, Result, Settings, Timing
from lmm_jax.models import lmm
from lmm_jax.tasks import TASKS
from tests.small import small_config, write_config
from tests.test_train import command

ONE = (jax.devices()[0],)
SETTINGS = Settings(batch=2, text=9, new_tokens=3, rounds=2, train=True)


def build(strategy: str = "llava", **model) -> experiment.Experiment:
    config = small_config(Path("unwritten"), strategy)
    config.text.update(prefix=2, suffix=14)
    config.data.batch_size = 2
    config.model.update(model)
    return experiment.build(config, ONE)


def headed(task: str = "vqav2", **strategy) -> experiment.Experiment:
    """An encoder."""
    config = presets.encoder("quickstart-vilt", task)
    config.workdir, config.model.unroll = "unwritten", 0
    config.text.prefix, config.data.batch_size, config.task.negatives = 10, 2, 1
    config.strategy.update(strategy)
    return experiment.build(config, ONE)


@pytest.fixture(scope="module")
def encoders() -> Report:
    """One without cuts and with cuts."""
    cuts = dict(layers=(1, 3), prune=0.1, merge=0.3, text=0.2)
    pair = ("whole", headed()), ("pumer", headed(pumer=cuts))
    return bench.bench(pair, SETTINGS)


@pytest.fixture(scope="module")
def found() -> Report:
    """Two strategies that have their parameters in common."""
    return bench.bench([(name, build(name)) for name in ("llava", "fastv")], SETTINGS)


# --- What is timed ----------------------------------------------------------------------


def test_all_rounds_but_the_first_are_kept(found):
    for result in found.results:
        for timing in (result.forward, result.loop, result.update):
            assert len(timing.rounds) == SETTINGS.rounds
            assert min(timing.rounds) > 0 and timing.compiling > 0


def test_rounds_compile_nothing(caplog):
    settings = dataclasses.replace(SETTINGS, train=False)
    case = bench.Case("llava", build(), settings, bench.Shared())
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        case.run(timed=True)
        case.run(timed=True)
    assert "Compiling" not in caplog.text
    assert len(case.result().loop.rounds) == 2


def test_plans_over_the_same_parameters_share_them():
    shared, exps = bench.Shared(), [build("llava"), build("fastv")]
    one, other = (shared.params(exp, exp.model(train=False)) for exp in exps)
    assert one is other
    rounded = dataclasses.replace(exps[0].config.eval, weights="int8")
    config = dataclasses.replace(exps[0].config, eval=rounded)
    exp = dataclasses.replace(exps[0], config=config)
    assert shared.params(exp, exp.model(train=False)) is not one


def test_a_training_step_takes_the_state_of_another_plan_over():
    shared, exps = bench.Shared(), [build("llava"), build("fastv")]
    steps = [bench.Training(exp, shared) for exp in exps]
    for step in steps:
        step.run(timed=False)
    state, _ = shared.state(train.make_parts(exps[0]))
    assert int(state.step) == len(steps)


@pytest.mark.parametrize(
    "strategy", ["llava", "deepstack", "deepstack_v", "average_pool"]
)
@pytest.mark.parametrize("learns", [False, True])
def test_noise_is_what_the_model_reads(strategy, learns):
    exp = build(strategy)
    model = exp.model(train=learns)
    batch = bench.random_batch(exp, model, 2, learns=learns)
    expected = lmm.abstract_batch(model, 2)
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (x.shape, x.dtype) for n, x in expected.items()
    }


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_noise_is_what_an_encoder_learns_from(task):
    exp = headed(task)
    model = exp.model(train=True)
    batch = bench.random_batch(exp, model, 2, learns=True)
    expected = exp.abstract_batch(model)
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (x.shape, x.dtype) for n, x in expected.items()
    }
    params = jax.jit(lambda key: exp.fresh(model, key))(jax.random.key(0))
    objective = exp.objective(model)
    loss, _ = jax.jit(lambda *read: objective(*read))(params, batch, None)
    assert np.isfinite(loss)


# --- The numbers ------------------------------------------------------------------------


def test_costs_are_those_of_the_plan(found):
    for result, name in zip(found.results, ("llava", "fastv")):
        exp = build(name)
        plan = exp.plan(train=False, suffix=SETTINGS.text - exp.config.text.prefix)
        spent = cost(plan, bytes_per_value=4)
        assert (result.language, result.vision) == (spent.language, spent.vision)
        assert (result.projector, result.token) == (spent.connector, spent.decode)
        assert (result.text, result.visual) == (9, 16)
        assert result.computed == cost(plan, pairs="all").prefill > spent.prefill
        learned = exp.plan(train=True)
        each = train_flops(learned, Learns(), pairs="all")
        assert result.train_computed == 2 * each
        assert result.train_tokens == learned.entrance.length == 32


def test_costs_of_an_encoder_are_those_of_its_plan(encoders):
    for result in encoders.results:
        assert result.loop is None and len(result.forward.rounds) == SETTINGS.rounds
        assert (result.text, result.visual, result.kv_bytes) == (9, 65, 0)
        assert result.train_tokens == 10 + 65
    whole, pumer = encoders.results
    assert whole.computed == cost(headed().plan(train=False, suffix=9)).prefill
    assert pumer.computed < whole.computed and pumer.parameters == whole.parameters


def test_every_candidate_of_a_ranking_costs_a_sequence():
    exp = headed("flickr30k")
    result = bench.Training(exp, bench.Shared()).result()
    each = train_flops(exp.plan(train=True), Learns(vision=False), pairs="all")
    assert result["train_computed"] == 2 * (1 + 1) * each


def test_bytes_are_those_of_the_arrays(found):
    exp = build("fastv")
    model = exp.model(train=False, suffix=SETTINGS.text - exp.config.text.prefix)
    params = exp.abstract_params(model)
    prefill = decode.Generator(model, 4, end=-1).prefill
    batch = lmm.abstract_batch(model, SETTINGS.batch)
    _, cache = jax.eval_shape(prefill, params, batch, jax.random.key(0))
    keys = jax.tree.leaves([run.keys for run in cache.runs])
    _, result = found.results
    assert SETTINGS.batch * result.kv_bytes == sum(4 * x.size for x in keys)
    assert result.parameters == sum(x.size for x in jax.tree.leaves(params))
    assert result.forward.memory > 4 * result.parameters
    assert result.update.memory > 3 * 4 * result.parameters  # with two moments each
    for timing in (result.forward, result.loop, result.update):
        assert 0 < timing.temporary < timing.memory


def test_only_timings_make_weights_up():
    exp = build()
    model = exp.model(train=False)
    with pytest.raises(ValueError, match="has no checkpoint"):
        weights.to_run(exp, model)
    table = weights.to_run(exp, model, fresh=True)["language"]["embed"]["table"]
    assert np.asarray(table).std() > 0


# --- Tables and JSON --------------------------------------------------------------------

CALLS = Timing((0.004, 0.001, 0.002), 5.0, 3 * 2**20, 2**20)
PLAIN = Result(
    "llava", "sizes", "float32", 1000, 64, 576, 1e10, 2e9, 0.0, 5e8, 3e7, 2**21,
    1.25e10, CALLS, CALLS,
)  # fmt: skip
HALF = dataclasses.replace(
    PLAIN,
    name="fastv:keep=288",
    computed=0.5e10,
    kv_bytes=2**20,
    forward=dataclasses.replace(CALLS, rounds=(0.002, 0.0005, 0.001), temporary=2**18),
)
ENCODER = dict(
    projector=0.0, token=0.0, kv_bytes=0, loop=None, forward=CALLS, words=3e9
)
VERSIONS = dict(device="TPU v5e", devices=4, jax="1.2")


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_medians_ranges_and_ratios_round_by_round():
    settings = Settings(batch=4, new_tokens=10, rounds=3)
    text = latency.tables(Report(settings, (PLAIN, HALF), VERSIONS, 2**30))
    assert text.startswith(
        "TPU v5e, 4 devices, jax 1.2\nbatch 4, 10 tokens decoded; 3 "
    )
    assert "1,024 MiB in use at once" in text
    costs, times, ratios = (cells(part) for part in text.split("\n\n")[1:])
    counts = ["1,000", "64", "576"]
    assert costs[2] == ["llava", *counts, "10", "2", "0.5", "0.03", "2", "float32"]
    ran = ["2 (1-4)", "20,000 (10,000-40,000)", "3", "1", "3", "5 + 5"]
    assert times[2] == ["llava", *ran]
    half = ["0.4", "0.5 (0.5-0.5)", "80%", "0.25", "0.5", "1 (1-1)"]
    assert ratios[0][0] == "ratio to llava" and ratios[2:] == [
        ["fastv:keep=288", *half]
    ]


def test_columns_in_which_no_config_has_anything_are_left_out():
    both = tuple(dataclasses.replace(one, **ENCODER) for one in (PLAIN, HALF))
    text = latency.tables(Report(Settings(4, rounds=3), both, VERSIONS, None))
    assert "batch 4; 3 rounds" in text
    costs, times, ratios = (cells(part) for part in text.split("\n\n")[1:])
    assert costs[0][4:] == ["language GFLOP", "vision", "text tower", "dtype"]
    assert costs[2][4:] == ["10", "2", "3", "float32"]
    heads = ["forward ms", "examples/s", "forward MiB", "activations", "compiled in s"]
    assert times[0][1:] == heads
    assert times[2][1:] == ["2 (1-4)", "2,000 (1,000-4,000)", "3", "1", "5"]
    assert ratios[0][1:] == ["promised", "forward", "of the speed-up", "activations"]


def test_tables_of_encoders(encoders):
    costs, times, ratios = (
        cells(part) for part in latency.tables(encoders).split("\n\n")[1:]
    )
    assert "KV MiB" not in costs[0] and "projector" not in costs[0]
    assert "tokens/s" not in times[0] and "examples/s" in times[0]
    assert [row[0] for row in ratios] == ["ratio to whole", "---", "pumer"]


def test_every_row_has_the_columns_of_its_table(found):
    text = latency.tables(found)
    parts = [cells(part) for part in text.split("\n\n")[1:]]
    assert [len(rows) for rows in parts] == [4, 4, 3]
    for rows in parts:
        assert len({len(row) for row in rows}) == 1
    assert "training step ms" in parts[1][0] and "2 x 32" in parts[1][2]
    alone = dataclasses.replace(found, results=found.results[:1])
    assert "ratio" not in latency.tables(alone)


def test_json_holds_every_round(found, tmp_path):
    path = tmp_path / "new" / "bench.json"
    found.write(path)
    read = json.loads(path.read_text())
    assert read["settings"] == dataclasses.asdict(SETTINGS)
    for row, result in zip(read["results"], found.results):
        times = {
            name: Timing(**{**row[name], "rounds": tuple(row[name]["rounds"])})
            for name in ("forward", "loop", "update")
        }
        assert Result(**{**row, **times}) == result


# --- The command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "variant", "name", "words"),
    [
        ("a/b.py", ":keep=4", "keep=4", ["--config=a/b.py:keep=4"]),
        ("b.py:lm=x", ":keep=4", "keep=4", ["--config=b.py:lm=x,keep=4"]),
        ("b.py:lm=x", "c/d.py:k=1", "d:k=1", ["--config=c/d.py:k=1"]),
        (
            "b.py",
            "--config.eval.weights=int8",
            "eval.weights=int8",
            ["--config=b.py", "--config.eval.weights=int8"],
        ),
        (
            "b.py",
            "d.py --config.model.unroll=0",
            "d model.unroll=0",
            ["--config=d.py", "--config.model.unroll=0"],
        ),
    ],
)
def test_variants_are_command_lines(source, variant, name, words):
    everywhere = ["--config.train.seed=1"]
    first, second = bench.commands(source, [variant], everywhere)
    assert first[1] == [f"--config={source}", *everywhere]
    assert second == (name, [words[0], *everywhere, *words[1:]])


@pytest.mark.parametrize(
    "variant", ["", "a.py b.py", "--train", "-x a.py", "'a.py", "a.py --rounds=2"]
)
def test_other_variants_are_refused(variant):
    with pytest.raises(ValueError, match=r"variant .* give FILE"):
        list(bench.commands("a.py", [variant], []))


def test_configs_that_say_nothing_are_refused():
    mask = [("hidden", build(mode="mask"))]
    with pytest.raises(ValueError, match=r"hidden: model.mode='mask'.*use .*'drop'"):
        bench.bench(mask, SETTINGS)
    short = dataclasses.replace(SETTINGS, text=2)
    with pytest.raises(ValueError, match="--text=2: llava has 2 text slots before"):
        bench.bench([("llava", build())], short)


def test_configs_are_read_as_from_a_command_line(tmp_path):
    file = write_config(small_config(tmp_path), tmp_path / "config.py")
    words = [f"--config={file}", "--config.train.learn=('connector',)"]
    config = cli.read_config([*words, "--config.model.unroll=3"])
    assert (config.model.unroll, config.train.learn) == (3, ("connector",))
    with pytest.raises(ValueError, match="unrol"):
        cli.read_config([f"--config={file}", "--config.model.unrol=3"])
    with pytest.raises(ValueError, match="unroll"):
        cli.read_config([f"--config={file}", "--config.model.unroll=many"])


def test_the_command(tmp_path):
    config = small_config(tmp_path, "llava")
    config.text.update(suffix=8)
    config.eval.suffix = 0
    config.bench.variants = ("--config.text.suffix=4",)
    file = write_config(config, tmp_path / "config.py")
    common = ("lmm_jax.bench", f"--config={file}", "--rounds=1", "--new_tokens=2")
    out = tmp_path / "bench.json"
    done = command(*common, f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "| ratio to config |" in done.stdout and str(out) in done.stdout
    texts = [row["text"] for row in json.loads(out.read_text())["results"]]
    assert texts == [8, 4]
    failed = command(*common, "--variant=--train")
    assert failed.returncode == 1 and not failed.stdout
    (said,) = failed.stderr.splitlines()
    assert said.startswith("error: variant '--train': give FILE"), failed.stderr
