"""Which quarter of the layers should learn to see? On generated pages.

    python -m lmm_jax.compare --config=configs/region_documents.py --seeds=3

All start from one model, which has learned to read small print from hi-res tokens in its
context. Then, as in Visual Region (arXiv:2412.12785), the encoder is frozen, and projector
and some of eight language layers learn to see differently: the same tokens stacked into
layers (DeepStack). All layers learn, none, or two: spread, the lowest, the highest.
"""

from lmm_jax import config, presets, region
from lmm_jax.models.specs import named

BASE = "read"
FORMS = (BASE, "all", "uniform", "bottom", "top", "none")


def get_config(arg=None):
    a = config.parse(
        arg, strategy="uniform", steps=300, base_steps=800, count=2, seed=0
    )
    if a.strategy not in FORMS:
        raise ValueError(f"strategy={a.strategy!r}: use one of {', '.join(FORMS)}.")
    steps = a.base_steps if a.strategy == BASE else a.steps
    c = presets.documents(steps=steps, seed=a.seed)
    c.name = a.strategy
    c.workdir = f"runs/region-documents-{a.strategy}"
    c.model.language = "region-lm"
    presets.hires_views(c, 4, grid="square")
    if a.strategy == BASE:
        c.strategy.llava_hires = dict()
    else:
        c.strategy.deepstack = dict(start=0)
        layers = region.select(
            a.strategy, named("language", "region-lm").depth, a.count
        )
        learn = (region.pattern(layers),) if layers else ()
        c.train.learn = ("connector", *learn)
    c.compare.update(strategies=FORMS[1:], base=BASE, category="hires")
    return c
