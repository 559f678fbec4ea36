"""DeepStack (arXiv:2406.04334): hi-res tokens stacked into layers.

python -m lmm_jax.depth.plan --config=configs/deepstack.py:lm=vicuna-13b
python -m lmm_jax.depth.plan --config=configs/deepstack.py:lm=qwen3-8b
python -m lmm_jax.train --config=configs/deepstack.py:stage=pretrain
python -m lmm_jax.train --config=configs/deepstack.py \\
    --config.init.run=runs/deepstack-vicuna-7b-pretrain
python -m lmm_jax.train --config=configs/deepstack.py:form=hd --config.init.load=HF_DIR

`form=l` stacks them into language layers 1..4 of LLaVA-1.5, `form=v` into the last layers
of its vision tower, `form=hd` into language layers of LLaVA-NeXT, from whose folder it
starts. The tower learns with `form=v`, `form=hd` and `tower=true`.
"""

import math

from lmm_jax import config, presets
from lmm_jax.data.images import candidates

FORMS = {
    "l": dict(strategy="deepstack", start=1, grid="aspect", tower=False),
    "v": dict(strategy="deepstack_v", start=20, grid="square", tower=True),
    "hd": dict(strategy="deepstack_hd", start=1, grid="aspect", tower=True),
}


def get_config(arg=None):
    a = config.parse(
        arg,
        form="l",
        lm="vicuna-7b",
        stage="finetune",
        views=4,
        start=-1,  # the form's own
        interval=1,
        tower=False,
    )
    if a.form not in FORMS:
        raise ValueError(f"form={a.form!r}: use one of {', '.join(FORMS)}.")
    own = FORMS[a.form]
    c = presets.llava(language=a.lm, stage=a.stage)
    c.name = own["strategy"]
    c.workdir = f"runs/{c.name}-{a.lm}-{a.stage}"
    presets.hires_views(c, a.views, own["grid"])
    start = own["start"] if a.start < 0 else a.start
    c.strategy[c.name] = dict(start=start, interval=a.interval)
    if a.stage != "pretrain" and (own["tower"] or a.tower):
        c.train.learn = (*c.train.learn, "vision")
        c.optim.lr_scale.vision = 2e-6 / c.optim.lr  # Table 10; the text has 1e-6
    if a.form == "hd":
        long_context(c, a)
    return c


def long_context(c, a):
    """Tiles in the context, and the data of DeepStack-HD.

    Raises:
        ValueError: another stage than the one it has.
    """
    if a.stage != "finetune":
        raise ValueError(
            f"form=hd, stage={a.stage}: it is finetuned from a LLaVA-NeXT; use "
            "stage=finetune and --config.init.load=HF_DIR."
        )
    presets.hires_tiles(c, candidates(a.views), math.isqrt(a.views))
    c.text.suffix = 1056  # with 64 before and 2976 of an image: 4096
    c.train.learn = (*c.train.learn, "strategy_anyres")  # the newline
    # 16 public sets; their mixture is not published as one file.
    c.data.sources = (dict(path="data/deepstack_hd_748k.json", images="data/images"),)
    c.train.steps = 5844
