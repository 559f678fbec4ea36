"""Visual Region (arXiv:2412.12785): a quarter of the layers learns, spread over the depth.

python -m lmm_jax.train --config=configs/visual_region.py:lm=llama-3-8b \\
    --config.init.run=runs/bunny-llama-3-8b-pretrain
python -m lmm_jax.train --config=configs/visual_region.py:lm=vicuna-7b,mode=full,layers=top
python -m lmm_jax.aot --config=configs/visual_region.py:lm=vicuna-13b,layers=all
python -m lmm_jax.train --config=configs/visual_region.py:deepstack=true,keep=144

`layers` is "paper" or "released" (its code, one layer further up), a method of
`lmm_jax.region`, or a list such as 0+4+8; `count` of them, 0 is the paper's. `mode=lora` is
what its authors have done; `mode=full` tunes whole layers. The projector learns too.
Of Phi-3, adapters are ours: one for each projection, where its code fuses some.
"""

from lmm_jax import config, presets, region
from lmm_jax.models.specs import named

COUNT = {"llama-3-8b": 8, "phi-3-mini": 8, "vicuna-7b": 8, "vicuna-13b": 9}
NAMES = {"paper": "uniform", "released": "shifted"}


def get_config(arg=None):
    a = config.parse(
        arg,
        lm="llama-3-8b",
        mode="lora",
        layers="paper",
        count=0,
        deepstack=False,
        keep=0,
    )
    if a.lm not in COUNT or a.mode not in ("lora", "full"):
        raise ValueError(
            f"lm={a.lm!r}, mode={a.mode!r}: use one of {', '.join(COUNT)}, and one of "
            "lora, full."
        )
    lora = a.mode == "lora"
    stage = "finetune-lora" if lora else "finetune"
    if a.lm in presets.BUNNY:
        c = presets.bunny(language=a.lm, stage=stage, length=2048)
    else:
        c = presets.llava(language=a.lm, stage=stage)
    c.name = "visual-region"
    c.workdir = f"runs/visual-region-{a.lm}-{a.mode}-{a.layers}"
    depth = named("language", a.lm).depth
    layers = region.select(NAMES.get(a.layers, a.layers), depth, a.count or COUNT[a.lm])
    c.model.param_dtype = "bfloat16"  # of what is frozen
    c.train.learn = ("connector",)
    if not layers:
        c.lora.rank = 0
    elif lora:
        c.lora.layers = layers
    else:
        c.train.learn = ("connector", region.pattern(layers))
    c.data.update(group="none", parts=1, seed=234)
    c.train.seed = 234
    c.strategy.llava = dict()
    if a.deepstack:
        presets.hires_views(c, 4)
        c.strategy.deepstack = dict()
    if a.keep:
        c.strategy.fastv = dict(keep=a.keep)
    return c
