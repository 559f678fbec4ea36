"""The whole path: train, stop, resume, evaluate, generate; and every bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmm_jax import evaluate, experiment, partition, runs, train, weights
from lmm_jax.checkpoint.state import CheckpointError
from lmm_jax.data import pipeline
from lmm_jax.data.pipeline import TooManyBadRecords
from lmm_jax.experiment import Experiment
from lmm_jax.models import lmm
from tests import flags
from tests.small import small_config, write_config

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {  # of commands: one device, and compiled as quickly as the tests
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "",  # they run for longer than they compile
    "PYTHONPATH": str(REPOSITORY),
}


def losses(workdir) -> dict[int, float]:
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["train/loss"] for row in map(json.loads, lines)}


def final(config) -> dict:
    exp = experiment.build(config)
    return jax.device_get(
        runs.load_params(exp, exp.model(train=False), exp.config.workdir)
    )


def same(one, two) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    config = small_config(tmp_path_factory.mktemp("whole"), profile=(2, 3))
    train.train(config)
    return config


def test_a_run_directory_explains_itself(whole):
    workdir = Path(whole.workdir)
    for name in ("config.json", "plan.txt", "versions.json", "training.json"):
        assert (workdir / name).is_file(), name
    assert (workdir / "tokenizer" / "tokenizer.json").is_file()
    assert list((workdir / "plugins" / "profile").rglob("*.xplane.pb"))
    assert "+ deepstack[0:4]" in (workdir / "plan.txt").read_text()
    assert runs.load_run(workdir).to_dict() == whole.to_dict()


def test_it_overfits_a_few_examples(tmp_path):
    config = small_config(tmp_path, steps=24)
    config.documents.train, config.data.batch_size = 8, 8
    config.checkpoint.every = 100
    train.train(config)
    curve = losses(config.workdir)
    assert curve[24] < 0.5 * curve[1]


def test_resuming_equals_no_interruption_bit_for_bit(whole, tmp_path, monkeypatch):
    config = small_config(tmp_path)
    interrupt(monkeypatch, at=5)  # the last checkpoint is that of step 3
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    monkeypatch.undo()
    train.train(config)
    same(final(config), final(whole))
    assert losses(config.workdir) == losses(whole.workdir)


def interrupt(monkeypatch, at: int) -> None:
    """Dies in the middle of a run, without any chance to clean up the state."""
    real, count = Experiment.place, iter(range(1, 1000))

    def dying(*args):
        if next(count) == at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Experiment, "place", dying)


def interrupted(tmp_path, monkeypatch, mesh):
    """The config of a run on a mesh that ended before its fifth step."""
    config = small_config(tmp_path)
    config.mesh = mesh
    interrupt(monkeypatch, at=5)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    monkeypatch.undo()
    return config


def test_resuming_on_another_mesh_continues_the_curve(whole, tmp_path, monkeypatch):
    config = interrupted(tmp_path, monkeypatch, dict(data=1, fsdp=4, tensor=2))
    config.mesh = dict(data=8, fsdp=1, tensor=1)
    train.train(config)
    curve, expected = losses(config.workdir), losses(whole.workdir)
    np.testing.assert_allclose(list(curve.values()), list(expected.values()), rtol=1e-4)


def test_resuming_on_fewer_devices_continues_the_curve(whole, tmp_path, monkeypatch):
    config = interrupted(tmp_path, monkeypatch, dict(data=1, fsdp=8, tensor=1))
    config.mesh = dict(data=1, fsdp=2, tensor=1)
    file = write_config(config, tmp_path / "config.py")
    two = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {flags.quick()}"}
    done = command("lmm_jax.train", f"--config={file}", **two)
    assert done.returncode == 0, done.stderr
    curve, expected = losses(config.workdir), losses(whole.workdir)
    np.testing.assert_allclose(list(curve.values()), list(expected.values()), rtol=1e-4)


def test_sigterm_saves_and_leaves(whole, tmp_path, monkeypatch):
    config = small_config(tmp_path)
    config.checkpoint.every = 100
    real, count = Experiment.place, iter(range(1, 1000))

    def terminating(*args):
        if next(count) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(Experiment, "place", terminating)
    with pytest.raises(SystemExit) as stop:
        train.train(config)
    assert stop.value.code == 143
    monkeypatch.undo()
    assert [p.name for p in Path(config.workdir, "checkpoints").iterdir()] == ["4"]
    train.train(config)
    same(final(config), final(whole))


def packed_config(folder):
    """Rows of up to three pages."""
    config = small_config(folder)
    config.text.update(images=3, suffix=256)
    config.data.update(pack=3, batch_size=4)
    return config


def updated(exp, batch):
    """Parameters after a step of plain gradient descent from seed 0, and its scalars."""
    model = lmm.LMM(exp.spec, exp.plan(train=True))
    params = jax.jit(lambda key: lmm.init(model, key))(jax.random.key(0))
    selection = partition.select(params, exp.learned)
    learning, frozen = partition.split(params, selection)
    descent = optax.sgd(1.0)
    update = train.make_update(
        exp.objective(model), selection, descent, exp.config.train
    )
    state = train.TrainState(jnp.zeros((), int), learning, descent.init(learning))
    rows = {k: x for k, x in batch.items() if k not in experiment.HOST_ONLY}
    state, scalars = jax.jit(update)(state, frozen, rows)
    return state.learning, scalars


def test_packed_rows_have_the_loss_and_gradients_of_their_samples(tmp_path):
    config = packed_config(tmp_path)
    packed = experiment.build(config)
    experiment.prepare_data(packed)
    source = pipeline.open_sources(packed.config.data)
    samples = packed.samples(packed.plan(train=True))
    batch = next(pipeline.train_batches(source, samples, packed.config.data))
    ids = batch["id"][batch["id"] >= 0]
    assert len(ids) > 2 * config.data.batch_size

    config.text.images, config.data.pack = 1, 1
    plain = experiment.build(config)
    samples = plain.samples(plain.plan(train=True))
    rows = [samples.sample(source[index], index=index) for index in ids]
    alone = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    (ours, scalars), (theirs, expected) = updated(packed, batch), updated(plain, alone)
    for name in ("loss", "tokens", "accuracy", "grad_norm"):
        np.testing.assert_allclose(scalars[name], expected[name], rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    jax.tree.map(close, ours, theirs)


def test_a_cut_among_all_tokens_of_a_row_is_refused_with_packing(tmp_path):
    config = small_config(tmp_path, "fastv")
    config.data.pack = 2
    exp = experiment.build(config)
    with pytest.raises(ValueError, match=r"data.pack=2: fastv .* use data.pack=1"):
        exp.plan(train=True)
    exp.plan(train=False)  # prompts are not packed
    config.strategy = dict(uniform=dict(keep=4))
    experiment.build(config).plan(train=True)


def test_frozen_parts_have_no_optimizer_state_and_do_not_move(tmp_path):
    config = small_config(tmp_path, learn=("connector", "language/stack/layers[4:]"))
    exp = experiment.build(config)
    parts = train.make_parts(exp)
    learning = parts.abstract_state.learning
    assert set(learning) == {"connector", "language"}
    assert learning["language"]["stack"]["layers"]["q"]["kernel"].shape[0] == 2
    moments = sum(x.size for x in jax.tree.leaves(parts.abstract_state.opt_state))
    learned = sum(x.size for x in jax.tree.leaves(learning))
    assert moments < 2 * learned + 10
    before, frozen = train.initial_state(exp, parts)
    before = jax.device_get(
        train.partition.join(before.learning, frozen, parts.selection)
    )
    train.train(config)
    after = final(config)
    same(after["vision"], before["vision"])
    q = [p["language"]["stack"]["layers"]["q"]["kernel"] for p in (before, after)]
    np.testing.assert_array_equal(q[0][:4], q[1][:4])
    assert np.abs(q[0][4:] - q[1][4:]).max() > 0


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    real, count = Experiment.place, iter(range(1, 1000))

    def poisoned(*args):
        batch = dict(real(*args))
        if next(count) == 5:
            batch["loss_mask"] = batch["loss_mask"] * np.nan
        return batch

    monkeypatch.setattr(Experiment, "place", poisoned)
    with pytest.raises(FloatingPointError, match="at step 5"):
        train.train(config)
    assert [p.name for p in Path(config.workdir, "checkpoints").iterdir()] == ["3"]


def test_evaluation_puts_cost_beside_accuracy(whole):
    records = evaluate.evaluate(experiment.build(whole))
    written = json.loads((Path(whole.workdir) / "results.json").read_text())
    wanted = {
        "strategy",
        "task",
        "metric",
        "value",
        "examples",
        "steps",
        "seconds",
        "visual_tokens",
        "llm_tflops_per_example",
    }
    assert all(wanted <= set(record) for record in written)
    total = next(r for r in records if r.category == "total")
    assert (total.examples, total.steps, total.visual_tokens) == (12, 6, 16)
    lines = (Path(whole.workdir) / "predictions" / "documents.jsonl").read_text()
    assert len(lines.splitlines()) == 12


def test_evaluation_takes_another_strategy_on_the_same_parameters(whole, tmp_path):
    config = small_config(tmp_path, "fastv")
    config.strategy = dict(fastv=dict(layer=2, keep=5), deepstack=dict())
    config.image = whole.image
    config.init.run = whole.workdir
    config.documents, config.eval = whole.documents, whole.eval
    records = evaluate.evaluate(experiment.build(config))
    assert records[0].strategy == "deepstack+fastv"
    assert records[0].visual_tokens_per_layer < 16


def test_a_strategy_that_learns_starts_from_a_run_without_it(whole, tmp_path):
    config = small_config(tmp_path, "flashsloth")
    config.init.run = whole.workdir
    config.documents = whole.documents
    exp = experiment.build(config)
    ours = weights.initial(exp, exp.model(train=True))
    theirs = experiment.build(whole)
    theirs = runs.load_params(theirs, theirs.model(train=True), whole.workdir)
    fresh = {name for name in ours if name.startswith("strategy_")}
    assert set(ours) - fresh == set(theirs) and len(fresh) == 2
    for name, branch in theirs.items():
        jax.tree.map(np.testing.assert_array_equal, ours[name], branch)


def test_what_shall_start_fresh(whole):
    config = whole.copy_and_resolve_references()
    config.init.update(run=whole.workdir, fresh=("connector", "language/norm"))
    exp = experiment.build(config)
    model = exp.model(train=True)
    before = partition.flatten(runs.load_params(exp, model, whole.workdir))
    for path, ours in partition.flatten(weights.initial(exp, model)).items():
        anew = path.startswith(("connector/", "language/norm/"))
        assert np.array_equal(ours, before[path]) != anew, path
    with pytest.raises(ValueError, match="'conector' matches no parameter"):
        weights.initial(_changed(exp, "conector"), model)


def _changed(exp, *fresh: str):
    init = dataclasses.replace(exp.config.init, fresh=fresh)
    return dataclasses.replace(exp, config=dataclasses.replace(exp.config, init=init))


def command(*arguments, typed="", **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env={**ENVIRONMENT, **environment},
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_generate_answers_in_every_way_the_same(whole, tmp_path):
    page = next(Path(whole.eval.images, "images").glob("validation*"))
    asked = "What is the title?"
    common = ("lmm_jax.generate", f"--config.workdir={whole.workdir}")
    common += ("--max_new_tokens=4", "--stop=zz")
    once = command(*common, f"--image={page}", f"--prompt={asked}")
    assert once.returncode == 0, once.stderr
    assert once.stdout.endswith("\n")
    chat = command(*common, f"--image={page}", "--chat", typed=f"{asked}\n/quit\n")
    assert chat.stdout == once.stdout, chat.stderr
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    row = {"question_id": "a", "image": page.name, "text": asked}
    questions.write_text(json.dumps(row) + "\n")
    files = (f"--questions={questions}", f"--answers={answers}")
    done = command(*common, *files, f"--images={page.parent}")
    assert done.returncode == 0, done.stderr
    assert "1 answers in" in done.stdout and "2 programs compiled" in done.stdout
    assert json.loads(answers.read_text())["text"] == once.stdout[:-1]
    both = command(*common, "--chat", f"--prompt={asked}")
    assert both.returncode == 1 and "give one of --prompt" in both.stderr


def test_kill_9_and_the_same_command_again(tmp_path):
    """The real thing, in processes of their own."""
    killed = small_config(tmp_path / "killed", steps=12)
    whole = small_config(tmp_path / "whole", steps=12)
    for name, config in (("killed", killed), ("whole", whole)):
        (tmp_path / name).mkdir()
        write_config(config, tmp_path / name / "config.py")
    arguments = ("lmm_jax.train", f"--config={tmp_path}/killed/config.py")
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = Path(killed.workdir) / "metrics.jsonl"
    deadline = time.time() + 200
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 4):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    again = command(*arguments)
    assert again.returncode == 0, again.stderr
    straight = command("lmm_jax.train", f"--config={tmp_path}/whole/config.py")
    assert straight.returncode == 0, straight.stderr
    same(final(killed), final(whole))


# --- Bad input ----------------------------------------------------------------------


def refused(config, says: str, error=ValueError) -> None:
    with pytest.raises(error, match=says):
        train.train(config)


def test_unknown_strategy_and_argument(tmp_path):
    config = small_config(tmp_path)
    config.strategy = dict(deepstak=dict())
    refused(config, "'deepstak' does not exist; there are .*deepstack")


def test_a_layer_out_of_range(tmp_path):
    config = small_config(tmp_path, "fastv")
    config.strategy = dict(fastv=dict(layer=6, keep=4))
    refused(config, r"fastv.layer=6.*use 1..5")


def test_unknown_config_key(tmp_path):
    config = small_config(tmp_path)
    config.model.lenguage = "x"
    refused(config, "model.lenguage does not exist .did you mean 'language'")


def test_a_workdir_of_another_run(whole, tmp_path):
    config = small_config(tmp_path, "llava")
    config.workdir = whole.workdir
    refused(config, "holds a run with strategy=.*choose another --config.workdir")


def test_a_checkpoint_of_another_model(whole, tmp_path):
    config = small_config(tmp_path)
    config.model.vision = "quickstart-vit"
    config.init.run = whole.workdir
    refused(config, "another model", CheckpointError)


def test_a_run_that_is_none(tmp_path):
    config = small_config(tmp_path)
    config.init.run = str(tmp_path)
    refused(config, "holds no config.json: give the work directory")


def test_an_unwritable_workdir(tmp_path):
    config = small_config(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    config.workdir = str(blocked / "run")
    refused(config, "cannot write to workdir .*choose another")


def test_bad_records_are_skipped_named_and_limited(tmp_path, caplog):
    config = small_config(tmp_path, steps=6)
    experiment.prepare_data(experiment.build(config))
    pages = Path(config.documents.directory)
    path = pages / "train.json"
    records = json.loads(path.read_text())
    broken = (pages / records[3]["image"]).read_bytes()
    (pages / records[3]["image"]).write_bytes(broken[: len(broken) // 2])
    records[5]["image"] = "images/not-there.png"
    del records[7]["conversations"]
    path.write_text(json.dumps(records))
    train.train(config)  # 3 bad records are allowed, and 6 x 8 samples show all
    said = caplog.text
    for index in (3, 5, 7):
        assert f"train.json[{index}]" in said
    assert "not-there.png" in said

    del records[9]["conversations"]
    path.write_text(json.dumps(records))
    limited = small_config(tmp_path / "limited")
    limited.documents, limited.data = config.documents, config.data
    refused(limited, r"4 bad records, 3 allowed", TooManyBadRecords)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config={file}", "--config.model.lenguage=x"], "Did you mean"),
        (["--config={file}", "--config.train.steps=many"], "steps"),
        (["--config={folder}/absent.py"], "absent.py"),
        (["--config.workdir={folder}"], "holds no config.json"),
        ([], "no config: give --config=FILE"),
    ],
)
def test_commands_fail_with_one_message(arguments, says, tmp_path):
    file = write_config(small_config(tmp_path), tmp_path / "config.py")
    filled = [a.format(file=file, folder=tmp_path) for a in arguments]
    done = command("lmm_jax.train", *filled)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
