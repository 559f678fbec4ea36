"""PuMer (arXiv:2305.17530): prune by the text, merge what is alike; ViLT, METER, LLaVA.

python -m lmm_jax.depth.plan --config=configs/pumer.py:model=vilt,task=vqav2
python -m lmm_jax.train --config=configs/pumer.py:model=vilt,task=vqav2,reduce=false \\
    --config.init.load=VILT_DIR --config.init.fresh="('head',)"
python -m lmm_jax.train --config=configs/pumer.py:model=vilt,task=vqav2 \\
    --config.init.load=VILT_DIR --config.init.fresh="('head',)" \\
    --config.init.teacher=runs/pumer-vilt-vqav2-whole

A model whose fine-tuning is on top of its teacher (METER on SNLI-VE) has `init.run` and
`init.teacher=start`. `preset=reference` computes what the authors' code does with padding
and the image's [CLS].
`model=llava` has the same operators in a decoder, without merging of text.
"""

from lmm_jax import config, presets
from lmm_jax.strategies.pumer import RELEASED

SIZES = {"vilt": "vilt-b-32", "meter": "meter-b-16"}
RECORDS = {"vqav2": 443_757, "nlvr2": 86_373, "snli_ve": 529_527, "flickr30k": 145_000}
# The authors' batch, rate, and factors on the rates of heads and of the layers where
# METER's streams meet. Nothing was released for retrieval.
RECIPES = {
    ("vilt", "vqav2"): dict(batch=512, lr=1e-4, head=10.0),
    ("vilt", "nlvr2"): dict(batch=256, lr=1e-4, head=10.0),
    ("vilt", "snli_ve"): dict(batch=512, lr=1e-4, head=10.0),
    ("vilt", "flickr30k"): dict(batch=256, lr=1e-4, head=1.0),
    ("meter", "vqav2"): dict(batch=256, whole=192, lr=5e-6, head=50.0, cross=5.0),
    ("meter", "nlvr2"): dict(batch=96, lr=5e-6, head=50.0, cross=5.0),
    ("meter", "snli_ve"): dict(batch=192, lr=2e-6, head=10.0, cross=5.0),
    ("meter", "flickr30k"): dict(batch=192, lr=5e-6, head=1.0, cross=5.0),
}
EPOCHS, WHOLE_EPOCHS = 20, 10
LAST_RATE = 1e-7
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
    epochs, batch = EPOCHS, recipe["batch"]
    if not a.reduce:
        epochs, batch = WHOLE_EPOCHS, recipe.get("whole", batch)
    c.data.batch_size = batch
    c.train.steps = round(epochs * RECORDS[a.task] / batch)
    c.optim.update(lr=recipe["lr"], final_lr_ratio=LAST_RATE / recipe["lr"])
    c.optim.lr_scale["head"] = recipe["head"]
    if "cross" in recipe:
        c.optim.lr_scale[CROSS] = recipe["cross"]
    return c
