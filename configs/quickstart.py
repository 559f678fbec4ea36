"""Learn to read generated documents from scratch, on a laptop's CPU, within minutes.

    python -m lmm_jax.train --config=configs/quickstart.py
    python -m lmm_jax.train --config=configs/quickstart.py:strategy=llava

The pages have large print, which every strategy can read, and small print, of which
nothing is left in the view of the whole page; its four hi-res views show it.
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, strategy="deepstack", steps=1600, seed=0)
    c = presets.documents(steps=a.steps, seed=a.seed)
    c.name = a.strategy
    c.workdir = f"runs/quickstart-{a.strategy}"
    if a.strategy in ("deepstack", "deepstack_v", "llava_hires"):
        presets.hires_views(c, 4, grid="square")
    # Few layers: stacking starts with the first, so that enough are left to read.
    arguments = dict(deepstack=dict(start=0), deepstack_v=dict(start=0))
    c.strategy[a.strategy] = arguments.get(a.strategy, dict())
    return c
