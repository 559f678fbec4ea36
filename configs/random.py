"""Keep randomly drawn visual tokens: a baseline for every selection.

python -m lmm_jax.evaluate --config=configs/random.py:keep=144 --config.init.run=RUN
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="vicuna-7b", keep=144)
    c = presets.llava(language=a.lm)
    c.name = "random"
    c.workdir = f"runs/random-{a.lm}"
    c.strategy.random = dict(keep=a.keep)
    return c
