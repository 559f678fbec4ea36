"""LLaVA-1.5 (arXiv:2310.03744): the baseline without any edit.

python -m lmm_jax.train --config=configs/llava.py:stage=pretrain
python -m lmm_jax.train --config=configs/llava.py --config.init.run=runs/vicuna-7b-pretrain
python -m lmm_jax.train --config=configs/llava.py:stage=finetune-lora \\
    --config.init.run=runs/vicuna-7b-pretrain
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="vicuna-7b", stage="finetune")
    c = presets.llava(language=a.lm, stage=a.stage)
    c.strategy.llava = dict()
    return c
