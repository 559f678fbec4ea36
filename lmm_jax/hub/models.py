"""A folder of the hub as a spec and parameters, and back."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
import re
from typing import Any

from absl import logging
import jax

from lmm_jax.checkpoint.params import (
    Tensor,
    from_published,
    names,
    progress,
    published,
)
from lmm_jax.hub import folder as folders
from lmm_jax.hub import pruned
from lmm_jax.hub.families import FAMILIES
from lmm_jax.hub.fields import Fields
from lmm_jax.hub.folder import Folder
from lmm_jax.hub.fused import Split, fused_of, joined
from lmm_jax.hub.positions import at_size
from lmm_jax.hub.types import of_images
from lmm_jax.models.meter import MeterSpec
from lmm_jax.models.specs import LanguageSpec, LMMSpec, VisionSpec
from lmm_jax.models.vilt import ViltSpec

Spec = VisionSpec | LanguageSpec | LMMSpec | ViltSpec | MeterSpec
# Original code that saves under another layout's model type, and a field that betrays it:
# LLaVA's first releases and PuMer under what is the name of that of `transformers` now,
# FlashSloth under that of its language model.
_ORIGINAL = {
    "mm_vision_tower": {"llava": "llava_llama", "phi": "flashsloth"},
    "max_text_len": {"vilt": "vilt_original"},
}


def read_spec(config: Mapping[str, Any], where: str | Path) -> Spec:
    """The architecture that a `config.json` describes.

    Args:
        config: its contents.
        where: its folder, for messages.

    Raises:
        ValueError: a model type, a field or a value that we do not know.
    """
    kind = _kind(config)
    if kind not in FAMILIES:
        raise ValueError(
            f"{where}: config.json has model_type={kind!r}; lmm_jax reads "
            f"{', '.join(sorted(FAMILIES))}."
        )
    fields = Fields({**config, "model_type": kind}, f"{where}: config.json")
    spec = FAMILIES[kind].read(fields)
    fields.take(pruned.FIELD, None)
    fields.done()
    found = pruned.read(spec, config, f"{where}: config.json")
    if found is not spec and found.language.depth != spec.language.depth:
        raise ValueError(
            f"{where}: config.json keeps {found.language.depth} layers, but "
            f"num_hidden_layers is {spec.language.depth}: correct the one that is wrong."
        )
    return found


def lmm_spec(path: str | Path) -> LMMSpec:
    """Sizes of a whole LMM's folder.

    Raises:
        FileNotFoundError, ValueError: no such folder, or it holds something else.
    """
    return _spec_of(path, LMMSpec, "a whole model (vision, projector and language)")


def language_spec(path: str | Path) -> LanguageSpec:
    """Sizes of a language model's folder; raises as `lmm_spec`."""
    return _spec_of(path, LanguageSpec, "a language model")


def tower_spec(path: str | Path, layer: int) -> VisionSpec:
    """Sizes of a vision tower's folder, run up to hidden state `layer` (-1: the last).

    Raises:
        FileNotFoundError, ValueError: as `lmm_spec`, or no such layer.
    """
    return _spec_of(path, VisionSpec, "a vision tower").read_at(layer)


def _spec_of(path: str | Path, kind: type, what: str) -> Any:
    spec = read_spec(folders.read_json(Path(path) / "config.json"), path)
    if not isinstance(spec, kind):
        raise ValueError(f"{path} holds no {what.removeprefix('a ')}; give {what}.")
    return spec


def load(
    folder: Folder,
    spec: Spec,
    abstract: Mapping[str, Any],
    *,
    without: Collection[str] = (),
    cast: bool = True,
    allow_unused: Sequence[str] = (),
) -> dict[str, Any]:
    """The parameters of a folder.

    Args:
        folder: opened.
        spec: from `read_spec`; it may run fewer layers, or read images of another size,
            for which learned positions are interpolated, or more images.
        abstract: shapes, dtypes and, if they are to be placed, shardings.
        without: branches of `abstract` that come from elsewhere.
        cast: see `from_published`.
        allow_unused: patterns of tensors that may be left over.

    Raises:
        ValueError: tensors are missing, left over, or of another shape.
    """
    family = FAMILIES[_kind(folder.config)]
    tensors = Split(
        _Renamed(folder, getattr(family, "ALIASES", ())), fused_of(family, spec)
    )
    rows = family.rows(spec)
    if (tower := _tower(spec)) is not None:
        stored = _tower(read_spec(folder.config, folder.path))
        tensors = at_size(tensors, rows, stored, tower)
    tensors = of_images(tensors, rows, getattr(spec, "types", 0))
    wanted = {name: x for name, x in abstract.items() if name not in without}
    # A tied head may be stored all the same.
    excused = _any_of((*family.IGNORED, r"(^|\.)lm_head\.weight$"))
    missing = names(rows, wanted) - set(tensors)
    replaced = _replaced(folder, family, without)
    left = set(tensors) - names(rows, abstract) - replaced
    unused = {name for name in left if not excused.search(name)}
    may_be_left = _any_of(allow_unused)
    allowed = {name for name in unused if may_be_left.search(name)}
    if allowed:
        logging.warning("%s: not used: %s", folder.path, _listed(allowed))
    if missing or unused - allowed:
        raise ValueError(_misfit(folder, missing, unused - allowed))
    return from_published(tensors, rows, wanted, cast=cast)


def _replaced(folder: Folder, family: Any, without: Collection[str]) -> set[str]:
    """Keys that a folder has for branches that come from elsewhere, perhaps others than
    ours: a head of another task."""
    if not without:
        return set()
    rows = family.rows(read_spec(folder.config, folder.path))
    return {row.key for row in rows if row.path.split("/")[0] in without}


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    try:
        return re.compile("|".join(f"(?:{p})" for p in patterns) or r"(?!)")
    except re.error as error:
        raise ValueError(
            f"pattern {error.pattern!r} is not a regex: {error}"
        ) from error


def _misfit(folder: Folder, missing: set[str], unused: set[str]) -> str:
    lines = [
        f"{folder.path} does not hold the {_kind(folder.config)} of its config.json:"
    ]
    if missing:
        lines.append(f"  it lacks {_listed(missing)}")
        lines.append(
            "  (a part in a folder of its own: init.vision, init.language; one that is "
            "yet to be learned: init.fresh)"
        )
    if unused:
        lines.append(f"  it has no use for {_listed(unused)}")
        lines.append(
            "  (lmm_jax.convert can leave tensors out: --allow_unused=PATTERN)"
        )
    return "\n".join(lines)


def _listed(keys: set[str], shown: int = 8) -> str:
    found = sorted(keys)
    more = f", and {len(found) - shown} more" if len(found) > shown else ""
    return f"{len(found)} tensors: {', '.join(found[:shown])}{more}"


def image_token(kind: str) -> str | None:
    """The text that marks an image in a layout whose tokenizers may lack it."""
    return getattr(FAMILIES.get(kind), "IMAGE_TOKEN", None)


def branches(spec: LMMSpec, kind: str) -> set[str]:
    """The branches of a model's parameter tree that a layout holds."""
    return {row.path.split("/")[0] for row in _writer(kind).rows(spec)}


def model_config(spec: Spec, kind: str) -> dict[str, Any]:
    """A `config.json` from which `read_spec` gives `spec` again.

    Raises:
        ValueError: nobody writes this kind, or it has no place for this model.
    """
    return {**_writer(kind).config(spec), **pruned.fields(spec)}


def save(
    path: str | Path,
    spec: Spec,
    params: Mapping[str, Any],
    *,
    kind: str,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = folders.SHARD_BYTES,
) -> Path:
    """Writes a folder that `transformers` opens.

    Args:
        path: of the folder.
        spec, params: the model.
        kind: model type, which decides keys and layout.
        config: fields to add, such as token ids.
        shard_bytes: see `folder.write`.

    Raises:
        ValueError: the folder already holds a model, or nobody writes this kind.
    """
    family = _writer(kind)
    rows = family.rows(spec)
    tensors = progress(
        published(params, rows), "writing", "tensor", len(names(rows, params))
    )
    tensors = joined(tensors, fused_of(family, spec))
    fields = {**model_config(spec, kind), **(config or {})}
    if jax.process_index():  # it takes part in gathering; process 0 writes
        collections.deque(tensors, maxlen=0)
        return Path(path)
    return folders.write(path, fields, tensors, shard_bytes=shard_bytes)


def _writer(kind: str) -> Any:
    if kind not in FAMILIES:
        raise ValueError(f"kind={kind!r}: use one of {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[kind]


def _tower(spec: Spec) -> VisionSpec | None:
    return spec if isinstance(spec, VisionSpec) else getattr(spec, "vision", None)


def _kind(config: Mapping[str, Any]) -> str | None:
    kind = config.get("model_type")
    kinds = (named for field, named in _ORIGINAL.items() if field in config)
    return next((named[kind] for named in kinds if kind in named), kind)


class _Renamed(Mapping[str, Tensor]):
    """Tensors under the names of a family, whatever spelling the folder uses."""

    def __init__(
        self, tensors: Mapping[str, Tensor], aliases: Sequence[tuple[str, str]]
    ):
        self._tensors, self._theirs = tensors, {}
        for name in tensors:
            ours = name
            for pattern, replacement in aliases:
                ours = re.sub(pattern, replacement, ours)
            self._theirs[ours] = name

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._theirs[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)
