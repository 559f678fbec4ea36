"""Selections that look at nothing: what every method must beat at the same budget.

    python -m lmm_jax.evaluate --config=configs/baselines.py:strategy=random,keep=144 \\
        --config.init.run=RUN
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, strategy="uniform", lm="vicuna-7b", keep=144)
    c = presets.llava(language=a.lm)
    c.name = a.strategy
    c.workdir = f"runs/{a.strategy}-{a.lm}"
    c.strategy[a.strategy] = dict(keep=a.keep)
    return c
