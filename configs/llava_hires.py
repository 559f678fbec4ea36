"""All hi-res tokens in the context: what DeepStack is measured against.

python -m lmm_jax.train --config=configs/llava_hires.py
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="vicuna-7b", stage="finetune", views=4)
    c = presets.llava(language=a.lm, stage=a.stage)
    c.name = "llava_hires"
    c.workdir = f"runs/llava-hires-{a.lm}-{a.stage}"
    presets.hires_views(c, a.views)
    c.strategy.llava_hires = dict()
    return c
