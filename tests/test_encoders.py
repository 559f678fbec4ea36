"""Encoders with a head, the whole path: start, train, stop, resume, teach, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image
import pytest
import transformers

from lmm_jax import classify, evaluate, experiment, presets, runs, train, weights
from lmm_jax.data import document_tasks
from lmm_jax.models import encoders
from lmm_jax.objectives import TEACHER
from tests.hub.test_vision import scramble
from tests.test_train import interrupt, same

CUTS = dict(layers=(0, 1), prune=0.2, merge=0.3, text=0.2)
ONE = (jax.devices()[0],)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pages of two tasks; and Flickr30k with four images of five captions, a split each
    for training and for ranking."""
    root = tmp_path_factory.mktemp("data")
    document_tasks.generate(root, train=24, validation=5, seed=0)
    rng, rows, folder = np.random.default_rng(0), [], root / "flickr30k" / "images"
    folder.mkdir(parents=True)
    for image in range(8):
        name = f"{image}.jpg"
        pixels = rng.integers(0, 256, (6, 9, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        sentences = [{"raw": f"title {image} {i}", "sentid": i} for i in range(5)]
        split = "train" if image < 4 else "test"
        rows.append(dict(filename=name, split=split, sentences=sentences))
    file = root / "flickr30k" / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": rows}))
    return root


def configured(data: Path, workdir: Path, task: str = "vqav2", cuts: bool = True):
    """A ViLT that trains for four steps."""
    c = presets.encoder("tiny-vilt", task)
    c.name, c.workdir = "small", str(workdir)
    trained, evaluated = presets.encoder_sets(task, str(data), coco="vqav2")
    c.data.update(sources=(trained,), batch_size=8, seed=0, workers=0, threads=1)
    c.task.update(sources=(evaluated,), negatives=3)
    c.text.update(tokenizer=f"{data}/tokenizer", prefix=12)
    c.optim.update(lr=1e-3)
    c.train.update(steps=4, seed=0, log_every=1, writers=("jsonl",))
    c.checkpoint = dict(every=2, keep=2)
    c.eval.update(batch_size=8)
    if cuts:
        c.strategy.pumer = dict(CUTS)
    return c


def params(config) -> dict:
    exp = experiment.build(config)
    found = runs.load_params(exp, exp.model(train=True), config.workdir)
    return jax.device_get(found)


def curve(config, name: str) -> list[float]:
    lines = (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()
    return [row[f"train/{name}"] for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run without cuts."""
    config = configured(data, tmp_path_factory.mktemp("runs") / "whole", cuts=False)
    train.train(config)
    return config


def taught(data, workdir, teacher):
    config = configured(data, workdir)
    config.init.update(run=teacher.workdir, teacher="start", fresh=("head",))
    config.train.update(steps=8, seed=1)
    config.optim.lr, config.task.scale, config.task.augment = 3e-3, 0.0, False
    return config


def test_a_teacher_stays_as_it_is_and_its_student_nears_it(
    data, whole, tmp_path, monkeypatch
):
    """Also when it is interrupted, after which all is as if it had not been."""
    config = taught(data, tmp_path / "taught", whole)
    train.train(config)
    after = params(config)
    same(after[TEACHER], params(whole))
    apart = curve(config, "distillation")
    assert apart[0] > 1e-3 and np.mean(apart[-3:]) < 0.8 * np.mean(apart[:2])

    again = taught(data, tmp_path / "again", whole)
    interrupt(monkeypatch, at=4)  # the last checkpoint is that of step 2
    with pytest.raises(KeyboardInterrupt):
        train.train(again)
    monkeypatch.undo()
    train.train(again)
    same(params(again), after)
    assert curve(again, "distillation") == apart

    exp = experiment.build(again)
    learned = runs.load_learned(exp, exp.model(train=True), again.workdir)
    assert set(learned) == set(after) - {TEACHER}  # which is saved once, beside them


def test_answers_are_scored_and_written(whole):
    (record,) = evaluate.evaluate(experiment.build(whole))
    rows = (Path(whole.workdir) / "predictions" / "vqav2.jsonl").read_text()
    rows = [json.loads(row) for row in rows.splitlines()]
    assert record.examples == len(rows) and record.metric == "accuracy"
    mean = np.mean([row["score"]["accuracy"] for row in rows])
    assert record.value == pytest.approx(100 * mean)


def test_secret_answers_are_predicted_and_not_scored(whole):
    config = runs.load_run(whole.workdir)
    secret = dict(config.task.sources[0], annotations="", answers="")
    config.task.sources = (secret,)
    with pytest.raises(
        ValueError, match="keeps its answers secret; predictions are in"
    ):
        evaluate.evaluate(experiment.build(config))
    config.task.sources = (secret, secret)
    with pytest.raises(ValueError, match="2 sources: name the one to evaluate on"):
        evaluate.evaluate(experiment.build(config))


def test_two_images_of_an_example(data, tmp_path):
    config = configured(data, tmp_path / "run", "nlvr2")
    train.train(config)
    (record,) = evaluate.evaluate(experiment.build(config))
    assert record.examples == 10 and 0 <= record.value <= 100
    rows = (tmp_path / "run" / "predictions" / "nlvr2.jsonl").read_text().splitlines()
    assert {json.loads(row)["text"] for row in rows} <= {"False", "True"}


def test_rankings_go_on_where_they_stopped(data, tmp_path):
    config = configured(data, tmp_path / "run", "flickr30k")
    train.train(config)
    exp = experiment.build(config)
    first = {record.metric: record.value for record in evaluate.evaluate(exp)}
    assert set(first) == {f"{way}@{k}" for way in ("ir", "tr") for k in (1, 5, 10)}
    assert first["ir@5"] == 100  # of four images

    file = tmp_path / "run" / "predictions" / "flickr30k.npy"
    scores = np.load(file)
    assert scores.shape == (4, 20) and np.isfinite(scores).all()
    broken = scores.copy()
    broken[2:] = np.nan
    broken[0] = 7.0  # there, so it stays
    np.save(file, broken)
    classify.evaluate(exp)
    found = np.load(file)
    np.testing.assert_array_equal(found[0], broken[0])
    np.testing.assert_array_equal(found[1:], scores[1:])

    note = (
        tmp_path / "run" / "training.json"
    )  # of other parameters, so all is done again
    note.write_text(json.dumps({"steps": 6, "seconds": 1.0}))
    classify.evaluate(exp)
    np.testing.assert_array_equal(np.load(file), scores)


# --- Published encoders of another task -----------------------------------------------

SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
    vocab_size=400,
    max_position_embeddings=40,
)
PUBLISHED = {
    "nothing": transformers.ViltModel,
    "words": transformers.ViltForMaskedLM,
    "answers": transformers.ViltForQuestionAnswering,
    "ranks": transformers.ViltForImageAndTextRetrieval,
}


@pytest.mark.parametrize("task", ["nlvr2", "flickr30k"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_model_starts_another_task(kind, task, data, tmp_path):
    theirs = scramble(PUBLISHED[kind](transformers.ViltConfig(**SIZES)))
    theirs.save_pretrained(tmp_path / "folder")
    config = configured(data, tmp_path / "run", task)
    config.init.update(load=str(tmp_path / "folder"), fresh=("head",))
    exp = experiment.build(config, ONE)
    found = jax.device_get(weights.initial(exp, exp.model(train=True)))
    base = getattr(theirs, "vilt", theirs).state_dict()
    types = base["embeddings.token_type_embeddings.weight"].numpy()
    images = 2 if task == "nlvr2" else 1
    np.testing.assert_array_equal(found["types"], types[[0, 1, 1][: 1 + images]])
    words = base["embeddings.text_embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(found["text"]["words"], words)
    if task == "nlvr2":
        assert found["head"]["first"]["kernel"].shape == (2 * 16, 2 * 16)
    else:
        theirs = {"rank"}  # that of `transformers` matches nothing
        assert set(found["head"]) == (theirs if kind == "ranks" else {"match", "rank"})


def test_a_head_that_is_not_there_must_be_told(data, tmp_path):
    model = transformers.ViltModel(transformers.ViltConfig(**SIZES))
    model.save_pretrained(tmp_path / "folder")
    config = configured(data, tmp_path / "run", "nlvr2")
    config.init.load = str(tmp_path / "folder")
    exp = experiment.build(config, ONE)
    with pytest.raises(ValueError, match=r"(?s)lacks .*classifier\.0.*init\.fresh"):
        weights.initial(exp, exp.model(train=True))


def test_a_run_from_a_folder_remembers_its_head(data, tmp_path):
    """And needs the folder no more."""
    model = scramble(transformers.ViltModel(transformers.ViltConfig(**SIZES)))
    model.save_pretrained(tmp_path / "folder")
    config = configured(data, tmp_path / "run", "flickr30k", cuts=False)
    config.init.update(load=str(tmp_path / "folder"), fresh=("head",))
    config.train.steps = 2
    train.train(config)
    spec = experiment.build(config).spec
    config.init.load = str(tmp_path / "gone")
    assert experiment.build(config).spec == spec
    assert spec.head == encoders.headed(spec, "flickr30k").head
