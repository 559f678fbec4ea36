"""Evaluates an encoder with a head: classes of pairs, or a ranking of all with all.

Letters: N images, C captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import json
from pathlib import Path
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from lmm_jax import runs, weights
from lmm_jax.data import pipeline
from lmm_jax.data.kinds import open_source
from lmm_jax.data.pairs import Pair
from lmm_jax.data.sets.flickr30k import Gallery
from lmm_jax.eval import tasks
from lmm_jax.eval.scores import exact, recall, vqa
from lmm_jax.experiment import Encoding

Array = jax.Array


def evaluate(exp: Encoding) -> tuple[dict[str, float], int]:
    """Metrics in percent of the section `task`, and the number of examples.

    Writes `predictions/<task>.jsonl`, or `predictions/<task>.npy`, the scores of all
    images with all captions; those that are there are not computed again.

    Raises:
        ValueError: nothing to evaluate on, or answers that are secret.
    """
    sources = exp.config.task.sources
    if len(sources) != 1:
        raise ValueError(
            f"config.task.sources has {len(sources)} sources: name the one to evaluate on."
        )
    model = exp.model(train=False)
    params = weights.prepared(weights.to_run(exp, model))
    source = open_source(sources[0], train=False)
    run = functools.partial(predictor(model), params)
    return (_ranked if exp.task.ranks else _classified)(exp, source, run)


def predictor(model: nn.Module) -> Callable[..., Array]:
    """(parameters, batch) to the logits of the head, compiled at its first call."""

    @jax.jit
    def predict(params, batch):
        return model.apply({"params": params}, batch, method="score")[0]["logits"]

    return predict


def _classified(exp: Encoding, source, run) -> tuple[dict[str, float], int]:
    names = exp.answers if exp.task.labels else exp.task.classes
    count = min(len(source), exp.config.eval.limit or len(source))
    pairs = _Part(source, count)
    samples = exp.samples(exp.plan(train=False))
    found: dict[int, int] = {}
    size = exp.config.eval.batch_size
    for batch in pipeline.in_order(pairs, samples, size, exp.axes.own_rows(size)):
        best = jnp.argmax(run(exp.place(batch)), axis=-1)
        rows = exp.axes.read({"best": best}, {"ids": batch["id"]})
        found |= zip(rows["ids"].tolist(), rows["best"].tolist())  # -1 fills up
    scorer = vqa.official if exp.task.labels else exact.score
    task = tasks.Task(
        name=exp.task.name,
        questions="",
        images="",
        suffix="",
        max_new_tokens=0,
        metrics={"accuracy": scorer},
        citation=exp.task.citation,
        protocol="classes",
    )
    rows = [_row(exp, task, pairs[i], names, found[i]) for i in range(count)]
    if jax.process_index() == 0:
        tasks.write_predictions(_folder(exp) / f"{task.name}.jsonl", rows)
    if not all(row["answers"] for row in rows):
        raise ValueError(
            f"{exp.config.task.sources[0].path} keeps its answers secret; predictions are "
            f"in {_folder(exp)}."
        )
    means = tasks.aggregate(task, rows, exp.config.eval.groups)
    return {"accuracy": means["accuracy"]["total"]}, count


def _row(exp, task, pair: Pair, names: Sequence[str], best: int) -> dict[str, Any]:
    right = pair.target.get("label")
    answers = pair.answers if right is None else (names[int(right)],)
    asked = dict(name=pair.id, prompt=pair.text, answers=answers, secret=not answers)
    return tasks.prediction(task, exp.config.name, names[best], **asked)


class _Part(Sequence[Pair]):
    """The first pairs of a source."""

    def __init__(self, source, count: int):
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._source[index]


def _ranked(exp: Encoding, source, run) -> tuple[dict[str, float], int]:
    gallery = source.gallery
    scores = _scores(exp, gallery, run)
    shares = recall.recalls(scores, gallery.image_of)
    return {name: 100 * share for name, share in shares.items()}, len(gallery.captions)


def _scores(exp: Encoding, gallery: Gallery, run) -> np.ndarray:
    """Of every image with every caption, f32 [N, C], image after image."""
    size, chief = exp.config.eval.batch_size, jax.process_index() == 0
    shape = len(gallery.images), len(gallery.captions)
    scores = _kept(exp, shape) if chief else np.full(shape, np.nan, np.float32)
    todo = np.isnan(scores).any(axis=1)
    if jax.process_count() > 1:
        todo = multihost_utils.broadcast_one_to_all(todo)
    samples = exp.samples(exp.plan(train=False))
    texts = samples.read(gallery.captions)
    rest, own = -len(gallery.captions) % size, exp.axes.own_rows(size)
    texts = {k: np.pad(x, ((0, rest), (0, 0)), mode="edge") for k, x in texts.items()}
    parts = [
        exp.place({k: x[at + own] for k, x in texts.items()})
        for at in range(0, shape[1], size)
    ]
    for i in np.flatnonzero(todo):
        pair = Pair(str(i), (gallery.images[i],), "")
        one = samples.prompt(pair, index=int(i))
        image = {k: one[k] for k in ("images", "grid") if k in one}
        image = exp.place({k: np.stack([x] * len(own)) for k, x in image.items()})
        found = jnp.concatenate([run({**image, **part}) for part in parts])
        scores[i] = exp.axes.read({"all": found})["all"][: shape[1], 0]
        if chief:
            scores.flush()
    return np.asarray(scores)


def _kept(exp: Encoding, shape: tuple[int, int]) -> np.memmap:
    """Scores on disk, NaN where there are none of these parameters yet."""
    folder, whose = _folder(exp), weights.source(exp)
    file, note = folder / f"{exp.task.name}.npy", folder / f"{exp.task.name}.json"
    about = {"parameters": whose, **runs.trained(whose)}
    folder.mkdir(parents=True, exist_ok=True)
    if not (
        file.is_file() and note.is_file() and json.loads(note.read_text()) == about
    ):
        empty = np.lib.format.open_memmap(file, "w+", np.float32, shape)
        empty[:] = np.nan
        empty.flush()
        note.write_text(json.dumps(about))
    return np.lib.format.open_memmap(file, "r+")


def _folder(exp: Encoding) -> Path:
    return Path(exp.config.workdir) / "predictions"
