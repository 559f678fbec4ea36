"""ViLT in the keys of its own code and of PuMer's, whose checkpoints also say which tokens
they were trained to reduce.

PuMer's `config.json` has the model type of ViLT in `transformers` and other fields. ViLT's
own code has none: its folders have PuMer's fields.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from lmm_jax.hub.fields import Fields
from lmm_jax.hub.fused import Fused
from lmm_jax.models import heads, vilt
from lmm_jax.models.specs import vit_block
from lmm_jax.models.vilt import ViltSpec
from lmm_jax.nn.params import Param
from lmm_jax.strategies import Chosen

KINDS = {"vilt_original": "vilt"}  # our name -> its model type
IGNORED = (r"\.position_ids$", r"^(mlm|mpp)_score\.", r"^itm_score\.")
ALIASES = (
    (r"^(text_embeddings|token_type_embeddings|transformer|pooler)\.", r"vilt.\1."),
)
CLASSES = {
    "ViltForQuestionAnswering": "vqav2",
    "ViltForVisualReasoning": "nlvr2",
    "ViltForVisualEntailment": "snli_ve",
    "ViltForImageAndTextRetrieval": "flickr30k",
}
# Queries, keys and values are one tensor there; these names are of its parts.
NAMES = vilt.Names(
    "vilt.transformer.blocks.{layer}.",
    {
        "attn_norm": "norm1",
        "q": "attn.q",
        "k": "attn.k",
        "v": "attn.v",
        "o": "attn.proj",
        "mlp_norm": "norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    text="vilt.text_embeddings.",
    patch="vilt.transformer.patch_embed.proj",
    cls="vilt.transformer.cls_token",
    positions="vilt.transformer.pos_embed",
    types="vilt.token_type_embeddings.weight",
    norm="vilt.transformer.norm",
    classifier="",
)
_HEADLESS = ("ViltForPreTraining", "ViltModel")
_SCORES = {
    "mean_head": "attention",
    "mh": "attention",
    "first_head": "first_head",
    "fh": "first_head",
    "k_metric": "keys",
    "km": "keys",
    "qk": "queries",
}
_ABOUT_TRAINING = """
    whole_word_masking mlm_prob draw_false_text drop_rate keep_ratio distill contrast_method
    ib_kl itm_loss mlm_loss mpp_loss
"""


def read(f: Fields) -> ViltSpec:
    """The spec of a config; reducers are the model's own.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    f.only("tokenizer", "bert-base-uncased")
    f.only("prune_layers", None, [])
    f.only("merge_ratio", 0)
    for name in _ABOUT_TRAINING.split():
        f.take(name, None)
    width, heads_ = f.take("hidden_size", 768), f.take("num_heads", 12)
    hidden = int(width * f.take("mlp_ratio", 4))
    block = vit_block(width, heads_, hidden, "gelu", norm_eps=1e-6)
    block = dataclasses.replace(block, soft_mask=True)
    patch, image = _sides(f.take("vit", "vit_base_patch32_384"))
    classes = f.take("vqa_label_size", 3129)
    (kind,) = f.only("architectures", *([name] for name in (*CLASSES, *_HEADLESS)))
    head = heads.head(CLASSES[kind], width) if kind in CLASSES else None
    if head and head.task == "vqav2":
        head = dataclasses.replace(head, outputs=classes)
    return ViltSpec(
        vision=vilt.patches(image, patch, block),
        block=block,
        depth=f.take("num_layers", 12),
        vocab=f.take("vocab_size", 30_522),
        places=f.take("max_text_len", 40),
        types=f.take("token_types", 2),
        head=head,
        own=_own(f),
        kind="vilt_original",
    )


def _sides(name: str) -> tuple[int, int]:
    """Pixels a side of a patch and of an image, from the name of a tower."""
    found = re.fullmatch(r"vit_\w+_patch(\d+)_(\d+)", name)
    if found is None:
        raise ValueError(f"vit={name!r}: it says nothing like vit_base_patch32_384.")
    return int(found[1]), int(found[2])


def _own(f: Fields) -> tuple[Chosen, ...]:
    layers = f.take("reduce_layers", ())
    score = f.only("sim_method", *_SCORES)
    if not layers:
        # Without layers their code merges text and image as one, a baseline of theirs.
        f.only("merge_r", 0)
        f.take("prune_r", 0)
        f.take("merge_text", 0)
        f.take("merge_style", None)
        return ()
    f.only("merge_style", "tome")
    arguments = dict(
        layers=tuple(layers),
        prune=f.take("prune_r", 0),
        merge=f.take("merge_r", 0),
        text=f.take("merge_text", 0),
        score=_SCORES[score],
        preset="reference",
    )
    return (Chosen.of("pumer", arguments),)


def rows(spec: ViltSpec) -> tuple[Param, ...]:
    """Rows in these keys, the fused tensors apart."""
    return vilt.params(spec, NAMES)


def fused(spec: ViltSpec) -> Fused:
    """Queries, keys and values are one tensor."""
    width, found = spec.block.width, {}
    for layer in range(spec.depth):
        at = f"vilt.transformer.blocks.{layer}.attn."
        for leaf in ("weight", "bias"):
            parts = tuple((f"{at}{name}.{leaf}", width) for name in "qkv")
            found[f"{at}qkv.{leaf}"] = parts
    return found


def config(spec: ViltSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again.

    Raises:
        ValueError: what the layout has no place for.
    """
    b, v, head = spec.block, spec.vision, spec.head
    classes = {task: name for name, task in CLASSES.items()}
    fields = {
        "model_type": "vilt",
        "architectures": [classes[head.task] if head else _HEADLESS[0]],
        "tokenizer": "bert-base-uncased",
        "hidden_size": b.width,
        "num_heads": b.heads,
        "num_layers": spec.depth,
        "mlp_ratio": b.hidden / b.width,
        "vit": f"vit_base_patch{v.patch}_{v.image}",
        "vocab_size": spec.vocab,
        "max_text_len": spec.places,
        "token_types": spec.types,
    }
    if head and head.task == "vqav2":
        fields["vqa_label_size"] = head.outputs
    for own in spec.own:
        said = dict(getattr(own, "arguments", ()))
        scores = {ours: theirs for theirs, ours in reversed(_SCORES.items())}
        fields |= {
            "reduce_layers": list(said.get("layers", ())),
            "prune_r": said.get("prune"),
            "merge_r": said.get("merge"),
            "merge_text": said.get("text"),
            "merge_style": "tome",
            "sim_method": scores.get(said.get("score")),
        }
    again = read(Fields(fields))
    numerics = dict(dtype=b.dtype, param_dtype=b.param_dtype)
    block = dataclasses.replace(again.block, **numerics)
    same = dict(block=block, vision=v, remat=spec.remat, unroll=spec.unroll)
    if dataclasses.replace(again, **same, kind=spec.kind) != spec:
        raise ValueError(
            "the layout of ViLT's own code has soft masks, epsilons of 1e-6 and 1e-12, the "
            "published heads, and pumer with preset='reference' alone; this ViLT has "
            f"soft_mask={b.soft_mask}, {b.norm_eps} and {spec.text_eps}, {head} and "
            f"own={spec.own}."
        )
    return fields
