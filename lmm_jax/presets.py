"""Sections that configs share. A config file says only what is different."""

from __future__ import annotations

import ml_collections

from lmm_jax.config import completed
from lmm_jax.data.documents import HIRES_CATEGORIES, LOWRES_CATEGORIES
from lmm_jax.sections import Sections

TEMPLATES = {  # of language models that have one; others get LLaVA-1.5's
    "phi-3-mini": "phi3_instruct",
    "qwen2-0.5b": "chatml",
    "qwen2-7b": "chatml",
    "qwen3-8b": "chatml",
}
STAGES = ("pretrain", "finetune", "finetune-lora")


def llava(
    *,
    language: str = "vicuna-7b",
    vision: str = "clip-l-336",
    stage: str = "finetune",
) -> ml_collections.ConfigDict:
    """LLaVA-1.5 (arXiv:2310.03744): model, data, and the recipe of one of its stages.

    Args:
        stage: "pretrain" aligns the projector on captions, "finetune" trains projector
            and language model on conversations, "finetune-lora" projector and adapters.
            The vision encoder is always frozen.

    Raises:
        ValueError: another stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: use one of {', '.join(STAGES)}.")
    pretrain, adapts = stage == "pretrain", stage == "finetune-lora"
    c = ml_collections.ConfigDict()
    c.name = "llava"
    c.workdir = f"runs/{language}-{stage}"
    c.model = dict(
        vision=vision,
        language=language,
        dtype="auto",
        param_dtype="bfloat16" if adapts else "float32",
        remat="full",
        unroll=1,
        attention="auto",
        mode="drop",
    )
    c.image = dict(
        mode="crop" if pretrain else "pad",
        crops=0,
        fine=0,
        grid="aspect",
        pinpoints=(),
    )
    c.text = dict(
        tokenizer=f"data/tokenizers/{language}",
        template="plain" if pretrain else TEMPLATES.get(language, "vicuna_v1"),
        prefix=0 if pretrain else 64,
        suffix=256 if pretrain else 1408,
        images=1,
        truncate=True,
    )
    c.strategy = ml_collections.ConfigDict()
    path = "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    images = "LLaVA-Pretrain/images"
    if not pretrain:
        path, images = "llava_v1_5_mix665k.json", "."
    c.data = dict(
        sources=(dict(path=f"data/{path}", images=f"data/{images}"),),
        batch_size=256 if pretrain else 128,
        seed=42,
        group="none" if pretrain else "modality_length",
        parts=1 if pretrain else 8,  # the recipe's GPUs
        pack=1,
        workers=8,
        threads=4,
        prefetch=4,
        max_skipped=1000,
    )
    c.documents = None
    c.lora = dict(
        rank=128 if adapts else 0,
        alpha=256.0,
        dropout=0.05,
        targets=("language",),
        layers=(),
    )
    c.optim = dict(
        lr={"pretrain": 1e-3, "finetune": 2e-5, "finetune-lora": 2e-4}[stage],
        warmup_ratio=0.03,
        schedule="cosine",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=None,  # the published DeepSpeed files leave it off
        lr_scale=dict(connector=0.1) if adapts else dict(),
    )
    c.train = dict(
        steps=2181 if pretrain else 5198,
        learn=("connector", "language") if stage == "finetune" else ("connector",),
        seed=42,
        accumulate=1,
        loss_shards=1,
        log_every=10,
        writers=("jsonl", "csv", "tensorboard"),
        profile=(),
        loss_weights=dict(),
    )
    c.checkpoint = dict(every=500, keep=2)
    c.eval = dict(
        tasks=(),
        questions="",
        images="",
        choices="",
        batch_size=32,
        suffix=192,
        buckets=(),
        chunk=0,
        weights="float",
        limit=0,
        max_new_tokens=0,
        groups=dict(),
        after_training=False,
    )
    return completed(Sections, c)


BUNNY = {  # rate of alignment, template, length
    "phi-2": (5e-4, "bunny", 2048),
    "llama-3-8b": (1e-3, "bunny_llama_3", 2048),
    "phi-3-mini": (1e-3, "bunny", 4096),
}
_SIGLIP_PATCHES = 729


def bunny(
    *, language: str = "phi-2", stage: str = "finetune-lora", length: int = 0
) -> ml_collections.ConfigDict:
    """Bunny (arXiv:2402.11530), the first of its recipes: SigLIP in place of CLIP.

    Args:
        length: tokens of a conversation and its image; 0 is the model's own.

    Raises:
        ValueError: another language model, or stage.
    """
    if language not in BUNNY:
        raise ValueError(f"lm={language!r}: use one of {', '.join(BUNNY)}.")
    rate, template, own = BUNNY[language]
    c = llava(language=language, vision="siglip-so400m-384", stage=stage)
    c.name = "bunny"
    c.workdir = f"runs/bunny-{language}-{stage}"
    c.data.update(group="none", parts=1)
    if stage == "pretrain":
        c.image.mode = "stretch"
        source = dict(path="data/pretrain/bunny_pretrain_laion_2m.json")
        c.data.sources = (source | dict(images="data/pretrain/images"),)
        c.optim.lr = rate
        c.train.steps = 7813  # one epoch of 2 M
        return c
    c.text.template = template
    c.text.suffix = (length or own) - _SIGLIP_PATCHES - c.text.prefix
    source = dict(path="data/finetune/bunny_695k.json")
    c.data.sources = (source | dict(images="data/finetune/images"),)
    c.train.steps = 5430  # one epoch
    return c


ENCODER_TEXT = {"vqav2": 32}  # tokens of a question; of other tasks' texts, 40


def encoder(name: str, task: str) -> ml_collections.ConfigDict:
    """An encoder with the head of a task, trained as PuMer's authors train (arXiv:
    2305.17530, appendix, and their code): model, data, recipe.

    Args:
        name: of `lmm_jax.models.encoders`.
        task: "vqav2", "nlvr2", "snli_ve" or "flickr30k".
    """
    c = llava()
    c.name = f"{name}-{task}"
    c.workdir = f"runs/{name}-{task}"
    c.model = dict(
        encoder=name,
        dtype="auto",
        param_dtype="float32",
        remat="none",
        unroll=1,
        mode="drop",
    )
    c.image = dict(mode="stretch", crops=0, fine=0)
    c.text = dict(
        tokenizer=f"data/tokenizers/{name}", prefix=ENCODER_TEXT.get(task, 40)
    )
    train, evaluated = encoder_sets(task, "data")
    c.task = dict(name=task, negatives=15, augment=True, scale=1.0)
    c.task.update(distill=1.0, temperature=1.0, sources=(evaluated,))
    c.data.update(sources=(train,), group="none", parts=1)
    c.optim.update(lr=1e-4, warmup_ratio=0.1, schedule="linear", final_lr_ratio=1e-3)
    c.optim.update(b2=0.98, weight_decay=0.01, lr_scale=dict())
    # By name, as they do it: norms of a vision tower and of a classifier have others.
    c.optim.no_decay = ("(.*/)?bias", "((text|stack)/(.*[_/])?)?norm/scale")
    c.train.learn = ("(?!teacher/).*",)
    c.eval.after_training = True
    return completed(Sections, c)


def encoder_sets(
    task: str, folder: str, coco: str = "coco"
) -> tuple[dict[str, str], dict[str, str]]:
    """Sources of training and of evaluation, as they are published, below a folder;
    `coco` is that of COCO's images."""
    images = f"{folder}/flickr30k/images"
    karpathy = f"{folder}/flickr30k/dataset_flickr30k.json"

    def vqav2(split: str) -> dict[str, str]:
        path = f"{folder}/vqav2"
        return dict(
            kind="vqav2",
            path=f"{path}/v2_OpenEnded_mscoco_{split}2014_questions.json",
            annotations=f"{path}/v2_mscoco_{split}2014_annotations.json",
            images=f"{folder}/{coco}/{split}2014",
            answers=f"{path}/answers.json",
        )

    def nlvr2(split: str) -> dict[str, str]:
        images = f"{folder}/nlvr2/images/{split}"
        return dict(kind="nlvr2", path=f"{folder}/nlvr2/{split}.json", images=images)

    def snli_ve(split: str) -> dict[str, str]:
        path = f"{folder}/snli_ve/snli_ve_{split}.jsonl"
        return dict(kind="snli_ve", path=path, images=images)

    def flickr30k(split: str) -> dict[str, str]:
        return dict(kind="flickr30k", path=karpathy, images=images, split=split)

    return {
        "vqav2": (vqav2("train"), vqav2("val")),
        "nlvr2": (nlvr2("train"), nlvr2("dev")),
        "snli_ve": (snli_ve("train"), snli_ve("dev")),
        "flickr30k": (flickr30k("train"), flickr30k("test")),
    }[task]


def documents(*, steps: int, seed: int) -> ml_collections.ConfigDict:
    """A model of 1 M parameters that learns to read generated documents on a CPU."""
    c = llava(language="quickstart-lm", vision="quickstart-vit")
    c.model.remat, c.model.unroll = "none", 0  # XLA on CPU runs unrolled layers faster
    c.image.mode = "stretch"
    folder = "data/quickstart"
    c.documents = dict(directory=folder, train=8000, validation=200, seed=0, vocab=512)
    c.text.update(
        tokenizer=f"{folder}/tokenizer",
        template="short",
        prefix=0,
        suffix=60,
        truncate=False,
    )
    c.data.sources = (dict(path=f"{folder}/train.json", images=folder),)
    c.data.update(batch_size=16, seed=seed, workers=0, threads=2, max_skipped=10)
    c.data.update(group="none", parts=1)

    c.optim.update(lr=6e-4, warmup_ratio=0.05, weight_decay=0.05, b2=0.98, clip=1.0)
    c.train.update(steps=steps, learn=("vision", "connector", "language"), seed=seed)
    c.train.log_every = 40
    c.checkpoint = dict(every=400, keep=2)
    c.eval.update(
        tasks=("documents",),
        questions=f"{folder}/questions.jsonl",
        images=folder,
        batch_size=64,
        suffix=24,
        max_new_tokens=12,
        groups=dict(hires=HIRES_CATEGORIES, lowres=LOWRES_CATEGORIES),
        after_training=True,
    )
    return c


def hires_views(c: ml_collections.ConfigDict, crops: int, grid: str = "aspect") -> None:
    """Adds hi-res views; they are stretched, and so must the whole image be."""
    c.image.mode, c.image.crops, c.image.grid = "stretch", crops, grid


def hires_tiles(
    c: ml_collections.ConfigDict, grids: tuple[tuple[int, int], ...], fine: int
) -> None:
    """Stretched tiles of one of these grids instead, each view again as fine x fine."""
    c.image.update(mode="stretch", crops=0, pinpoints=grids, fine=fine)
