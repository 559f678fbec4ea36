"""Does attention pool better than the mean, and what do queries add? On generated pages.

    python -m lmm_jax.compare --config=configs/pooling.py --seeds=3

All start from one model that has learned to read small print from all 16 patches of the
page and of its quadrants. Then, as FlashSloth (arXiv:2412.04317) does it, the encoder is
frozen, and the rest learns for 700 steps to read each of them from one token.
"""

from lmm_jax import config, presets

BASE = "read"
FORMS = {
    BASE: dict(pool="average", window=1, queries=0),
    "average": dict(pool="average", window=4, queries=0),
    "average-queries": dict(pool="average", window=4, queries=4),
    "attention": dict(pool="attention", window=4, queries=0),
    "attention-queries": dict(pool="attention", window=4, queries=4),
}


def get_config(arg=None):
    a = config.parse(
        arg, strategy="attention-queries", steps=700, base_steps=800, seed=0
    )
    if a.strategy not in FORMS:
        raise ValueError(f"strategy={a.strategy!r}: use one of {', '.join(FORMS)}.")
    form = FORMS[a.strategy]
    steps = a.base_steps if a.strategy == BASE else a.steps
    c = presets.documents(steps=steps, seed=a.seed)
    c.name = a.strategy
    c.workdir = f"runs/pooling-{a.strategy}"
    c.strategy.flashsloth = dict(form, layer=1)
    presets.hires_views(c, 4, grid="square")
    c.text.suffix += 3 * form["queries"]  # a page is asked about three times
    c.eval.suffix += form["queries"]
    learn = ["connector", "language"]
    if a.strategy == BASE:
        learn.append("vision")
    if form["pool"] == "attention":
        learn.append("strategy_flashsloth_pool")
    if form["queries"]:
        learn.append("strategy_flashsloth_query")
    c.train.learn = tuple(learn)
    names = tuple(name for name in FORMS if name != BASE)
    c.compare.update(strategies=names, base=BASE, category="hires")
    return c
