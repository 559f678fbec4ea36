"""Does PuMer cost accuracy? A small ViLT that answers questions about generated pages.

    python -m lmm_jax.compare --config=configs/pumer_documents.py --seeds=3

The model without cuts learns first (`teacher`). From there it goes on for 400 steps as it
is (`whole`), or with cuts (`reduced`), or with cuts and taught by what it was (`taught`).
`task=nlvr2` has two pages and a sentence about them.
"""

from lmm_jax import config, presets

BASE = "teacher"
FORMS = (BASE, "whole", "reduced", "taught")


def get_config(arg=None):
    a = config.parse(
        arg, strategy=BASE, task="vqav2", steps=400, base_steps=1200, seed=0
    )
    if a.strategy not in FORMS:
        raise ValueError(f"strategy={a.strategy!r}: use one of {', '.join(FORMS)}.")
    c = presets.encoder("quickstart-vilt", a.task)
    c.name = a.strategy
    c.workdir = f"runs/pumer-documents-{a.task}-{a.strategy}"
    c.model.unroll = 0  # XLA on CPU runs unrolled layers faster
    folder = "data/document_tasks"
    c.documents = dict(directory=folder, train=8000, validation=400, seed=0, vocab=512)
    train, evaluated = presets.encoder_sets(a.task, folder, coco="vqav2")
    c.data.update(sources=(train,), batch_size=32, seed=a.seed, workers=0, threads=2)
    c.task.update(augment=False, sources=(evaluated,))
    c.text.update(tokenizer=f"{folder}/tokenizer", prefix=16)
    c.optim.update(lr=1e-3, weight_decay=0.05, clip=1.0)
    c.train.update(seed=a.seed, log_every=40)
    c.train.steps = a.base_steps if a.strategy == BASE else a.steps
    c.checkpoint = dict(every=400, keep=2)
    c.eval.batch_size = 64
    if a.strategy in ("reduced", "taught"):
        c.strategy.pumer = dict(layers=(1, 2, 4), prune=0.1, merge=0.3, text=0.2)
    if a.strategy == "taught":
        c.init.teacher = "start"
    c.compare.update(strategies=FORMS[1:], base=BASE)
    return c
