"""METER, in the keys of its own code and in those of PuMer's, whose checkpoints also say
which tokens they were trained to reduce.

Neither is a layout of `transformers`. The towers are known by name; METER's own code has no
`config.json`, so its folders have PuMer's fields under another model type.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from lmm_jax.hub.fields import Fields
from lmm_jax.hub.fused import Fused
from lmm_jax.models import heads, meter
from lmm_jax.models.meter import CLIP_B_16, ROBERTA_BASE, MeterSpec, co_block
from lmm_jax.nn.params import Param
from lmm_jax.strategies import Chosen

# model type -> order of the two blocks of a layer, and whether masks are soft
KINDS = {"meter": ("sequential", True), "meter_original": ("parallel", False)}
IGNORED = (
    r"\.position_ids$",
    r"^vit_model\.(?!visual\.)",  # of CLIP's text tower
    r"(^|\.)text_transformer\.pooler\.",
    r"^(mlm_score|itm_score|mpp_score)\.",
)
TOKENIZER = "roberta-base"
CLASSES = {
    "MeterForQuestionAnswering": "vqav2",
    "MeterForVisualReasoning": "nlvr2",
    "MeterForVisualEntailment": "snli_ve",
    "MeterForImageAndTextRetrieval": "flickr30k",
}
_HEADLESS = ("MeterForPreTraining", "MeterModel")
_ABOUT_TRAINING = """
    max_text_len num_layers drop_rate whole_word_masking mlm_prob draw_false_text keep_ratio
    contrast_method ib_kl itm_loss mlm_loss mpp_loss prune_method merge_style
    freeze_patterns
"""


def read(f: Fields) -> MeterSpec:
    """The spec of a config; reducers are the model's own.

    Raises:
        ValueError: a field that we do not know, or a value that we cannot compute.
    """
    kind = f.take("model_type")
    f.only("tokenizer", TOKENIZER)
    f.only("vocab_size", ROBERTA_BASE.vocab)
    f.only("prune_layers", None, [])
    f.only("merge_ratio", 0)
    f.only("sim_method", "mean_head")
    for name in _ABOUT_TRAINING.split():
        f.take(name, None)
    width, patch = f.take("hidden_size", 768), f.take("vit_patch_size", 16)
    count, hidden = f.take("num_heads", 12), width * f.take("mlp_ratio", 4)
    sides = dict(image=f.take("image_size", 288), patch=patch)
    order, soft = KINDS[kind]
    (called,) = f.only("architectures", *([name] for name in (*CLASSES, *_HEADLESS)))
    answers = f.take("vqa_label_size", 3129)
    head = heads.head(CLASSES[called], width) if called in CLASSES else None
    if head and head.task == "vqav2":
        head = dataclasses.replace(head, outputs=answers)
    return MeterSpec(
        vision=dataclasses.replace(CLIP_B_16, **sides),
        text=ROBERTA_BASE,
        block=co_block(width, count, hidden, soft_mask=soft),
        depth=f.take("num_top_layer", 6),
        order=order,
        types=f.take("token_types", 2),
        head=head,
        own=_own(f),
        kind=kind,
    )


def _own(f: Fields) -> tuple[Chosen, ...]:
    names = dict(prune="prune_r", merge="merge_r", text="merge_text")
    shares = {ours: f.take(theirs, 0) for ours, theirs in names.items()}
    layers = co_layers(f.take("reduce_layers", ()))
    if not layers or not shares["prune"]:  # their code needs both to do anything
        return ()
    if not shares["merge"]:  # and then it drops nothing
        shares["prune"] = 0
    return (Chosen.of("pumer", dict(layers=layers, preset="reference", **shares)),)


def co_layers(numbers: Sequence[int]) -> tuple[int, ...]:
    """Co-attention layers of the authors' numbers, which count both blocks of a layer.

    Raises:
        ValueError: an odd number, at which their code does nothing.
    """
    if odd := [number for number in numbers if number % 2]:
        raise ValueError(
            f"reduce_layers={list(numbers)}: {odd} are image blocks, where nothing is "
            "reduced; layer j of METER is number 2 j."
        )
    return tuple(number // 2 for number in numbers)


def rows(spec: MeterSpec) -> tuple[Param, ...]:
    """Rows in the keys of this kind, the fused tensors apart."""
    rows = meter.params(spec)
    return rows if spec.kind == "meter_original" else tuple(map(_pumer, rows))


def _pumer(row: Param) -> Param:
    if row.path.startswith("head/"):
        key = row.key.replace("snli_classifier", "ve_classifier")
    else:
        key = "meter." + row.key.replace("vit_model.visual.", "vit_model.")
    return dataclasses.replace(row, key=key)


def fused(spec: MeterSpec) -> Fused:
    """Queries, keys and values of the vision tower are one tensor."""
    tower = "meter.vit_model." if spec.kind == "meter" else "vit_model.visual."
    width, found = spec.vision.block.width, {}
    for layer in range(spec.vision.depth):
        at = f"{tower}transformer.resblocks.{layer}.attn.in_proj"
        for leaf in ("weight", "bias"):
            parts = tuple((f"{at}.{part}.{leaf}", width) for part in "qkv")
            found[f"{at}_{leaf}"] = parts
    return found


def config(spec: MeterSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again.

    Raises:
        ValueError: other towers than METER's, or edits that the layout has no names for.
    """
    classes, head = {task: name for name, task in CLASSES.items()}, spec.head
    fields = {
        "model_type": spec.kind,
        "architectures": [classes[head.task] if head else _HEADLESS[0]],
        "tokenizer": TOKENIZER,
        "vocab_size": spec.text.vocab,
        "hidden_size": spec.block.width,
        "num_heads": spec.block.heads,
        "mlp_ratio": spec.block.hidden // spec.block.width,
        "num_top_layer": spec.depth,
        "image_size": spec.vision.image,
        "vit_patch_size": spec.vision.patch,
        "token_types": spec.types,
    }
    if head and head.task == "vqav2":
        fields["vqa_label_size"] = head.outputs
    for own in spec.own:
        given = dict(getattr(own, "arguments", ()))
        fields |= {
            "reduce_layers": [2 * layer for layer in given.get("layers", ())],
            "prune_r": given.get("prune"),
            "merge_r": given.get("merge"),
            "merge_text": given.get("text"),
        }
    if not _same(read(Fields(fields)), spec):
        raise ValueError(
            f"the layout {spec.kind!r} has CLIP-ViT-B/16 and RoBERTa-base, the published "
            f"heads, order={KINDS[spec.kind][0]!r} with soft_mask={KINDS[spec.kind][1]}, "
            "and pumer with preset='reference' alone; this METER has towers of width "
            f"{spec.vision.block.width} and {spec.text.block.width}, {head}, "
            f"order={spec.order!r} with soft_mask={spec.block.soft_mask}, and "
            f"own={spec.own}."
        )
    return fields


def _same(one: MeterSpec, other: MeterSpec) -> bool:
    """Whether they differ in numerics and execution alone."""
    b = other.block
    kinds = dict(dtype=b.dtype, param_dtype=b.param_dtype)
    return one.replaced(**kinds, remat=other.remat, unroll=other.unroll) == other
