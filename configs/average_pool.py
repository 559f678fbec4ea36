"""Average pooling before the projector: 144 instead of 576 visual tokens.

python -m lmm_jax.train --config=configs/average_pool.py:factor=2
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="vicuna-7b", stage="finetune", factor=2)
    c = presets.llava(language=a.lm, stage=a.stage)
    c.name = "average_pool"
    c.workdir = f"runs/average-pool-{a.lm}-{a.stage}"
    c.strategy.average_pool = dict(factor=a.factor)
    return c
