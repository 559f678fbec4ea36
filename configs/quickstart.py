"""Learn to read generated documents from scratch, on a laptop's CPU, within minutes.

    python -m lmm_jax.train --config=configs/quickstart.py
    python -m lmm_jax.train --config=configs/quickstart.py:strategy=llava

The pages have large print, which every strategy can read, and small print, of which
nothing is left in the view of the whole page; its four hi-res views show it.
"""

from lmm_jax import config, presets
from lmm_jax.data.documents import HIRES_CATEGORIES, LOWRES_CATEGORIES


def get_config(arg=None):
    a = config.parse(arg, strategy="deepstack", steps=1600, seed=0)
    c = presets.llava(language="quickstart-lm", vision="quickstart-vit")
    c.name = a.strategy
    c.workdir = f"runs/quickstart-{a.strategy}"
    c.model.remat, c.model.unroll = "none", 0  # XLA on CPU runs unrolled layers faster
    if a.strategy in ("deepstack", "llava_hires"):
        presets.hires_views(c, 4, grid="square")
    else:
        c.image.mode = "stretch"
    # Six layers: stacking starts with the first, so that enough are left to read.
    arguments = dict(deepstack=dict(start=0))
    c.strategy[a.strategy] = arguments.get(a.strategy, dict())

    folder = "data/quickstart"
    c.documents = dict(directory=folder, train=8000, validation=200, seed=0)
    c.text.update(
        tokenizer=f"{folder}/tokenizer",
        template="short",
        prefix=0,
        suffix=60,
        truncate=False,
    )
    c.data.sources = (dict(path=f"{folder}/train.json", images=folder),)
    c.data.update(batch_size=16, seed=a.seed, workers=0, threads=2, max_skipped=10)
    c.data.update(group="none", parts=1)

    c.optim.update(lr=6e-4, warmup_ratio=0.05, weight_decay=0.05, b2=0.98, clip=1.0)
    c.train.update(
        steps=a.steps, learn=("vision", "connector", "language"), seed=a.seed
    )
    c.train.log_every = 40
    c.checkpoint = dict(every=400, keep=2)
    c.eval.update(
        tasks=("documents",),
        questions=f"{folder}/questions.jsonl",
        images=folder,
        batch_size=64,
        suffix=24,
        max_new_tokens=12,
        groups=dict(hires=HIRES_CATEGORIES, lowres=LOWRES_CATEGORIES),
        after_training=True,
    )
    return c
