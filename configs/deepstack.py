"""DeepStack on LLaVA-1.5 (arXiv:2406.04334): hi-res tokens stacked into layers.

python -m lmm_jax.depth.plan --config=configs/deepstack.py:lm=vicuna-13b
python -m lmm_jax.train --config=configs/deepstack.py:form=v

`form=l` stacks them into language layers 1..4, `form=v` into the last layers of the vision
tower, which learns then. `tower=true` lets it learn in any form.
"""

from lmm_jax import config, presets

FORMS = {
    "l": dict(strategy="deepstack", start=1, grid="aspect", tower=False),
    "v": dict(strategy="deepstack_v", start=20, grid="square", tower=True),
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
    return c
