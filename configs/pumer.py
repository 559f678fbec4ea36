"""PuMer (arXiv:2305.17530): prune by the text, merge what is alike; ViLT, METER, LLaVA.

python -m lmm_jax.depth.plan --config=configs/pumer.py:model=vilt,task=vqav2
python -m lmm_jax.train --config=configs/pumer.py:model=vilt,task=vqav2,reduce=false \\
    --config.init.load=VILT_DIR --config.init.fresh="('head',)"
python -m lmm_jax.train --config=configs/pumer.py:model=vilt,task=vqav2 \\
    --config.init.load=VILT_DIR --config.init.fresh="('head',)" \\
    --config.init.teacher=runs/pumer-vilt-vqav2-whole

`preset=reference` computes what the authors' code does with padding and the image's [CLS].
`model=llava` has the same operators in a decoder, without merging of text.
"""

from lmm_jax import config, presets
from lmm_jax.strategies.pumer import RELEASED

SIZES = {"vilt": "vilt-b-32", "meter": "meter-b-16"}
# Steps of 20 epochs at the authors' batch, rate, and factors on the rates of heads and of
# the layers where METER's streams meet. Nothing was released for retrieval.
RECIPES = {
    ("vilt", "vqav2"): dict(batch=512, steps=17_334, lr=1e-4, head=10.0),
    ("vilt", "nlvr2"): dict(batch=256, steps=6_748, lr=1e-4, head=10.0),
    ("vilt", "snli_ve"): dict(batch=512, steps=20_685, lr=1e-4, head=10.0),
    ("vilt", "flickr30k"): dict(batch=256, steps=11_328, lr=1e-4, head=1.0),
    ("meter", "vqav2"): dict(batch=256, steps=34_668, lr=5e-6, head=50.0, cross=5.0),
    ("meter", "nlvr2"): dict(batch=96, steps=17_994, lr=5e-6, head=50.0, cross=5.0),
    ("meter", "snli_ve"): dict(batch=192, steps=55_159, lr=2e-6, head=10.0, cross=5.0),
    ("meter", "flickr30k"): dict(batch=192, steps=15_104, lr=5e-6, head=1.0, cross=5.0),
}
CROSS = "(stack|text_in|image_in|text_pooler|image_pooler)"


def get_config(arg=None):
    a = config.parse(arg, model="vilt", task="vqav2", reduce=True, preset="safe")
    if a.model == "llava":
        c = presets.llava()
        c.name, c.workdir = "pumer", "runs/pumer-llava"
        c.strategy.pumer = dict(layers=(5, 13, 21), preset=a.preset)
        return c
    if (a.model, a.task) not in RECIPES:
        known = ", ".join(f"model={model},task={task}" for model, task in RECIPES)
        raise ValueError(f"model={a.model!r}, task={a.task!r}: use llava, or {known}.")
    recipe = RECIPES[a.model, a.task]
    c = presets.encoder(SIZES[a.model], a.task)
    c.name = f"pumer-{a.model}-{a.task}"
    c.workdir = f"runs/{c.name}" + ("" if a.reduce else "-whole")
    if a.reduce:
        chosen = RELEASED.get(f"{a.model}_{a.task}", RELEASED[f"{a.model}_vqav2"])
        c.strategy.pumer = dict(chosen, preset=a.preset)
    if (a.model, a.task) == ("meter", "nlvr2"):
        c.model.image_size = 288
    c.data.batch_size, c.train.steps = recipe["batch"], recipe["steps"]
    c.optim.lr = recipe["lr"]
    c.optim.lr_scale["head"] = recipe["head"]
    if "cross" in recipe:
        c.optim.lr_scale[CROSS] = recipe["cross"]
    return c
