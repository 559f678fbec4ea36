"""FastV on LLaVA-1.5 (arXiv:2403.06764). Training-free: evaluate a run that exists.

python -m lmm_jax.depth.plan --config=configs/fastv.py:keep=144
python -m lmm_jax.evaluate --config=configs/fastv.py:keep=144 --config.init.run=RUN
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="vicuna-7b", layer=2, keep=288)  # the paper: K=2, R=50 %
    c = presets.llava(language=a.lm)
    c.name = "fastv"
    c.workdir = f"runs/fastv-{a.lm}"
    c.strategy.fastv = dict(layer=a.layer, keep=a.keep)
    return c
