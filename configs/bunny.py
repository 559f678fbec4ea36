"""Bunny (arXiv:2402.11530): SigLIP and a small language model, tuned with LoRA.

python -m lmm_jax.train --config=configs/bunny.py:lm=phi-2,stage=pretrain
python -m lmm_jax.train --config=configs/bunny.py:lm=phi-2 \\
    --config.init.run=runs/bunny-phi-2-pretrain

`tower=true` is the second recipe of Llama-3 and Phi-3, with other data, which trains the
vision tower too. Its authors release the average of the two.
"""

from lmm_jax import config, presets

LANGUAGE = {
    "phi-2": dict(align=5e-4, tune=2e-4, template="bunny", length=2048),
    "llama-3-8b": dict(align=1e-3, tune=2e-4, template="bunny_llama_3", length=2048),
    "phi-3-mini": dict(align=1e-3, tune=2e-4, template="bunny", length=4096),
}
PATCHES = 729


def get_config(arg=None):
    a = config.parse(arg, lm="phi-2", stage="finetune-lora", tower=False)
    if a.lm not in LANGUAGE:
        raise ValueError(f"lm={a.lm!r}: use one of {', '.join(LANGUAGE)}.")
    own = LANGUAGE[a.lm]
    c = presets.llava(language=a.lm, vision="siglip-so400m-384", stage=a.stage)
    c.name = "bunny"
    c.workdir = f"runs/bunny-{a.lm}-{a.stage}" + ("-tower" if a.tower else "")
    c.strategy.llava = dict()
    c.data.update(group="none", parts=1)
    if a.stage == "pretrain":
        c.image.mode = "stretch"
        source = dict(path="data/pretrain/bunny_pretrain_laion_2m.json")
        c.data.sources = (source | dict(images="data/pretrain/images"),)
        c.optim.lr = own["align"]
        c.train.steps = 7813  # one epoch of 2 M
        return c
    c.text.template = own["template"]
    c.text.suffix = own["length"] - PATCHES - c.text.prefix
    name, steps = ("llava_1.4m", 10_938) if a.tower else ("695k", 5430)  # one epoch
    source = dict(path=f"data/finetune/bunny_{name}.json")
    c.data.sources = (source | dict(images="data/finetune/images"),)
    c.train.steps = steps
    if a.stage == "finetune-lora":
        c.optim.lr = own["tune"]
    if a.tower:
        c.train.learn = (*c.train.learn, "vision")
        c.optim.lr = 1e-4 if a.lm == "llama-3-8b" else c.optim.lr
    return c
