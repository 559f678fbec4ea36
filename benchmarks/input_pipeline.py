"""How many images a second are read, decoded and made into views, a core?

    python benchmarks/input_pipeline.py --config=configs/llava.py
    python benchmarks/input_pipeline.py --config=configs/deepstack.py --step=1.9

Photographs of 640 x 480 (smooth noise, JPEG at quality 90), each with a short
conversation, through the config's own pipeline in one process with one thread. With
`--step`, seconds of a training step (`lmm_jax.aot` estimates them), it says how many cores
keep up.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
import tempfile
import time

from absl import flags
import numpy as np
from PIL import Image

from lmm_jax import cli, experiment
from lmm_jax.data import pipeline
from lmm_jax.data.kinds import SourceConfig

_IMAGES = flags.DEFINE_integer("images", 64, "Different photographs.")
_BATCHES = flags.DEFINE_integer(
    "batches", 8, "Timed batches of 16, after one that is not."
)
_STEP = flags.DEFINE_float(
    "step", 0.0, "Seconds of a training step; 0 does not compare."
)
SIZE = (640, 480)
BATCH = 16


def photographs(folder: Path, count: int) -> Path:
    """Writes images and their LLaVA JSON; returns the JSON."""
    rng, records = np.random.default_rng(0), []
    turns = (
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A picture of soft colours. " * 4},
    )
    for i in range(count):
        few = rng.integers(0, 256, (24, 32, 3), np.uint8)
        image = Image.fromarray(few).resize(SIZE, Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.jpg", quality=90)
        records.append({"id": i, "image": f"{i}.jpg", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def rate(exp: experiment.Experiment, path: Path) -> float:
    """Images a second."""
    source = SourceConfig(path=str(path), images=str(path.parent))
    data = dataclasses.replace(
        exp.config.data,
        sources=(source,),
        batch_size=BATCH,
        group="none",
        parts=1,
        workers=0,
        threads=1,
        prefetch=1,
    )
    samples = exp.samples(exp.plan(train=True))
    # By number and not as a stream, which reads ahead.
    made = pipeline.all_batches(pipeline.open_sources(data), samples, data)
    made[0]
    start = time.perf_counter()
    for number in range(1, 1 + _BATCHES.value):
        made[number]
    return BATCH * _BATCHES.value / (time.perf_counter() - start)


def main(argv: list[str], config) -> None:
    # Its time is small, and others need a download.
    config.text.update(tokenizer="characters", prefix=256)
    exp = experiment.build(config)
    with tempfile.TemporaryDirectory() as folder:
        found = rate(exp, photographs(Path(folder), _IMAGES.value))
    images = exp.images
    print(
        f"{exp.config.name}: {1 + images.cells} views of {images.size} pixels, mode "
        f"{images.mode!r}: {found:.1f} images/s a core"
    )
    if _STEP.value:
        wanted = exp.config.data.batch_size / _STEP.value
        print(
            f"a step of {exp.config.data.batch_size} in {_STEP.value} s reads "
            f"{wanted:.0f} images/s: {wanted / found:.0f} cores of all hosts together"
        )


if __name__ == "__main__":
    cli.run(main)
