"""ViLT as `transformers` stores it.

A head of three classes for SNLI-VE, which has no class there, is one of question answering.
"""

from __future__ import annotations

from typing import Any

from lmm_jax.hub.fields import Fields
from lmm_jax.models import vilt
from lmm_jax.models.heads import HeadSpec
from lmm_jax.models.specs import vit_block
from lmm_jax.models.vilt import ViltSpec
from lmm_jax.nn.params import Param

KINDS = {"vilt": "transformers"}
IGNORED = (r"\.position_ids$", r"^mlm_score\.")
# The backbone alone is saved without its prefix.
ALIASES = ((r"^(embeddings|encoder|layernorm|pooler)\.", r"vilt.\1."),)
_ANSWERS = "ViltForQuestionAnswering"
_IMAGES = "ViltForImagesAndTextClassification"
_RANKS = "ViltForImageAndTextRetrieval"
_HEADLESS = ("ViltModel", "ViltForMaskedLM")
_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def read(f: Fields) -> ViltSpec:
    """The spec of a config; it takes in what `transformers` computes, dropout aside.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    f.only("num_channels", 3)
    f.only("qkv_bias", True)
    f.only("max_image_length", -1)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        f.take(name, 0.0)
    f.take("tie_word_embeddings", True)  # of the head for masked words
    width, heads = f.take("hidden_size", 768), f.take("num_attention_heads", 12)
    hidden, act = f.take("intermediate_size", 3072), f.activation("hidden_act", "gelu")
    eps = f.take("layer_norm_eps", 1e-12)
    block = vit_block(width, heads, hidden, act, norm_eps=eps)
    return ViltSpec(
        vision=vilt.patches(f.take("image_size", 384), f.take("patch_size", 32), block),
        block=block,
        depth=f.take("num_hidden_layers", 12),
        vocab=f.take("vocab_size", 30_522),
        places=f.take("max_position_embeddings", 40),
        segments=f.take("type_vocab_size", 2),
        types=f.take("modality_type_vocab_size", 2),
        text_eps=eps,
        head=_head(f, width),
    )


def _head(f: Fields, width: int) -> HeadSpec | None:
    classes = len(f.take("id2label", {0: "", 1: ""}))
    images = f.take("num_images", -1)
    (kind,) = f.take("architectures", [_HEADLESS[0]])
    if kind in _HEADLESS:
        return None
    if kind == _RANKS:
        # A field of ours: `transformers` has no use for what else was learned.
        return HeadSpec("flickr30k", 1, match=f.take("image_text_matching", False))
    if kind == _IMAGES:
        return HeadSpec("nlvr2", classes, images * width, images=images)
    if kind == _ANSWERS:
        return HeadSpec("snli_ve" if classes == 3 else "vqav2", classes, 2 * width)
    known = ", ".join((_ANSWERS, _IMAGES, _RANKS, *_HEADLESS))
    raise ValueError(f"architectures=[{kind!r}]: lmm_jax knows {known} of ViLT.")


def rows(spec: ViltSpec) -> tuple[Param, ...]:
    """Rows in the keys of `transformers`."""
    return vilt.params(spec)


def config(spec: ViltSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again, its edits aside.

    Raises:
        ValueError: what the layout has no place for.
    """
    b, head = spec.block, spec.head
    if (
        b.soft_mask
        or b.norm_eps != spec.text_eps
        or (head and not _fits(head, b.width))
    ):
        raise ValueError(
            "ViLT of transformers has one epsilon, no soft masks, and heads of twice its "
            f"width; this one has {b.norm_eps} and {spec.text_eps}, "
            f"soft_mask={b.soft_mask} and {head}: export it as vilt_original."
        )
    fields = {
        "model_type": "vilt",
        "architectures": [_class(head)],
        "hidden_size": b.width,
        "intermediate_size": b.hidden,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": b.heads,
        "hidden_act": _NAMES.get(b.activation, b.activation),
        "layer_norm_eps": b.norm_eps,
        "image_size": spec.vision.image,
        "patch_size": spec.vision.patch,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.places,
        "type_vocab_size": spec.segments,
        "modality_type_vocab_size": spec.types,
    }
    if head and head.hidden:
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(head.outputs)}
        fields["label2id"] = {f"LABEL_{i}": i for i in range(head.outputs)}
    if head and head.match:
        fields["image_text_matching"] = True
    if head and head.images > 1:
        fields["num_images"] = head.images
    return fields


def _class(head: HeadSpec | None) -> str:
    if head is None:
        return _HEADLESS[0]
    if not head.hidden:
        return _RANKS
    return _IMAGES if head.images > 1 else _ANSWERS


def _fits(head: HeadSpec, width: int) -> bool:
    hidden = max(2, head.images) * width if head.hidden else 0
    return head.hidden == hidden
