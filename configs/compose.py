"""Two strategies in one plan: DeepStack stacks hi-res tokens, FastV cuts after them.

python -m lmm_jax.depth.plan --config=configs/compose.py:keep=144
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="vicuna-7b", stage="finetune", layer=8, keep=288)
    c = presets.llava(language=a.lm, stage=a.stage)
    c.name = "deepstack+fastv"
    c.workdir = f"runs/deepstack-fastv-{a.lm}-{a.stage}"
    presets.hires_views(c, 4)
    c.strategy.deepstack = dict()
    c.strategy.fastv = dict(layer=a.layer, keep=a.keep)
    return c
