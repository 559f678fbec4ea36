"""A config that trains in seconds, for tests of the whole path."""

from __future__ import annotations

from pathlib import Path

import ml_collections

from lmm_jax import config as configs
from lmm_jax import presets
from tests.tiny import BUDGETS


def small_config(
    folder: Path, strategy: str = "deepstack", **train
) -> ml_collections.ConfigDict:
    """Generated pages, tiny sizes, character tokens; run directory `folder`/run."""
    c = presets.llava(language="tiny-lm", vision="tiny-vit")
    c.name = strategy
    c.workdir = str(folder / "run")
    c.model.remat = "none"
    if strategy in ("deepstack", "deepstack_v", "llava_hires"):
        presets.hires_views(c, 4, grid="square")
    c.strategy[strategy] = dict(BUDGETS[strategy])
    pages = folder / "pages"
    c.documents = dict(directory=str(pages), train=40, validation=8, seed=0)
    c.text.update(
        tokenizer="characters", template="short", prefix=0, suffix=160, truncate=True
    )
    c.data.sources = (dict(path=f"{pages}/train.json", images=str(pages)),)
    c.data.update(batch_size=8, seed=0, workers=0, threads=1, prefetch=1)
    c.data.update(max_skipped=3, group="none", parts=1)
    c.optim.update(lr=3e-3, weight_decay=0.1, clip=1.0)
    learn = ("vision", "connector", "language")
    c.train.update(
        dict(steps=6, learn=learn, seed=0, log_every=1, writers=("jsonl",)) | train
    )
    c.checkpoint = dict(every=3, keep=2)
    c.eval.update(
        tasks=("documents",),
        questions=f"{pages}/questions.jsonl",
        images=str(pages),
        batch_size=8,
        limit=12,
        max_new_tokens=6,
        suffix=64,
    )
    return c


def write_config(config: ml_collections.ConfigDict, path: Path) -> Path:
    """A config file for commands that run in a process of their own."""
    text = configs.to_json(config)
    path.write_text(
        "from lmm_jax import config\n\n\n"
        f"def get_config(arg=None):\n    return config.from_json({text!r})\n"
    )
    return path
