"""Bunny (arXiv:2402.11530): SigLIP and a small language model, tuned with LoRA.

python -m lmm_jax.train --config=configs/bunny.py:lm=phi-2,stage=pretrain
python -m lmm_jax.train --config=configs/bunny.py:lm=phi-2 \\
    --config.init.run=runs/bunny-phi-2-pretrain

`tower=true` is the second recipe of Llama-3 and Phi-3, with other data, which trains the
vision tower too. Its authors release the average of the two.
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="phi-2", stage="finetune-lora", tower=False)
    c = presets.bunny(language=a.lm, stage=a.stage)
    c.strategy.llava = dict()
    if a.tower and a.stage != "pretrain":
        c.workdir += "-tower"
        source = dict(path="data/finetune/bunny_llava_1.4m.json")
        c.data.sources = (source | dict(images="data/finetune/images"),)
        c.train.steps = 10_938  # one epoch
        c.train.learn = (*c.train.learn, "vision")
        c.optim.lr = 1e-4 if a.lm == "llama-3-8b" else c.optim.lr
    return c
