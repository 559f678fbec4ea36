"""DeepStack-L on LLaVA-1.5 (arXiv:2406.04334): hi-res tokens stacked into layers 1..4.

python -m lmm_jax.depth.plan --config=configs/deepstack.py:lm=vicuna-13b
python -m lmm_jax.train --config=configs/deepstack.py
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(
        arg, lm="vicuna-7b", stage="finetune", views=4, start=1, interval=1
    )
    c = presets.llava(language=a.lm, stage=a.stage)
    c.name = "deepstack"
    c.workdir = f"runs/deepstack-{a.lm}-{a.stage}"
    presets.hires_views(c, a.views)
    c.strategy.deepstack = dict(start=a.start, interval=a.interval)
    return c
