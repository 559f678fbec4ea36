"""Keep evenly spaced visual tokens: a baseline for every selection.

python -m lmm_jax.evaluate --config=configs/uniform.py:keep=144 --config.init.run=RUN
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="vicuna-7b", keep=144)
    c = presets.llava(language=a.lm)
    c.name = "uniform"
    c.workdir = f"runs/uniform-{a.lm}"
    c.strategy.uniform = dict(keep=a.keep)
    return c
