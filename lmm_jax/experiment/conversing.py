"""Experiments with a multimodal model that converses: it learns and gives answers."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmm_jax import hub, partition, strategies
from lmm_jax.data import conversation, noise, pipeline
from lmm_jax.data.conversation import end_id, find_template
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.native import NativeSpec
from lmm_jax.data.placement import SampleSpec, Slots
from lmm_jax.data.sources import Record
from lmm_jax.depth import Plan, Tune, make_plan
from lmm_jax.depth.cost import Learns
from lmm_jax.experiment.base import Experiment
from lmm_jax.lora import LEARNS
from lmm_jax.models import lmm
from lmm_jax.models.specs import LanguageSpec, LMMSpec, VisionSpec, named
from lmm_jax.nn import kernels
from lmm_jax.nn.kernels import Kernel
from lmm_jax.nn.params import Param, of_ops
from lmm_jax.objectives import NextToken
from lmm_jax.parallel.axes import Pins


@dataclasses.dataclass(frozen=True)
class Conversing(Experiment):
    """Of vision tower, connector and language model.

    Attributes:
        language: sizes of the language model, if not those that the config names.
    """

    language: LanguageSpec | None = None
    plain = "llava"
    init = staticmethod(lmm.init)

    @functools.cached_property
    def spec(self) -> LMMSpec:
        m = self.config.model
        spec, found = self._sizes, self._processor
        views = dict(mean=found.mean, std=found.std) if found else {}
        if spec.vision.native and self.config.image.max_pixels:
            views["native"] = self.config.image.max_pixels // spec.vision.patch**2
        if m.image_size:
            views["image"] = _checked_size(m.image_size, spec.vision)
        parts = {
            "vision": dataclasses.replace(spec.vision, **views),
            "language": self.language or spec.language,
        }
        return dataclasses.replace(spec, **parts).replaced(
            dtype=self._dtype, param_dtype=m.param_dtype, remat=m.remat, unroll=m.unroll
        )

    @property
    def whole(self) -> LMMSpec:
        """The sizes with the config's views and strategy as the model's own."""
        images, chosen = self.images, self.config.strategy.items()
        return dataclasses.replace(
            self.spec,
            own=tuple(strategies.Chosen.of(*c) for c in chosen) or self.spec.own,
            mode=images.mode,
            crops=images.crops,
            pinpoints=images.pinpoints,
            fine=images.fine,
        )

    @property
    def vocab(self) -> int:
        return self.spec.language.vocab

    @property
    def sizes_from_folder(self) -> bool:
        init = self.config.init
        if self._remembered:
            return "model_type" in hub.read_json(self._remembered)
        return bool(init.load or init.vision or init.language)

    @property
    def called(self) -> str:
        m, init = self.config.model, self.config.init
        if self._remembered:
            return f"sizes of {self._remembered}"
        return init.load or " + ".join(
            (init.vision or m.vision, init.language or m.language)
        )

    @property
    def image_processor(self) -> Path | None:
        """The file that says how the folder's model wants its images, if there is one."""
        init, kept = self.config.init, self._remembered
        folders = (kept.parent,) if kept else filter(None, (init.load, init.vision))
        files = (Path(folder) / hub.PROCESSOR for folder in folders)
        return next((file for file in files if file.is_file()), None)

    @functools.cached_property
    def _processor(self) -> ImageSpec | None:
        file = self.image_processor
        return hub.image_spec(file, self._sizes.vision) if file else None

    @functools.cached_property
    def _sizes(self) -> LMMSpec:
        m, init = self.config.model, self.config.init
        if self._remembered:
            found = hub.read_json(self._remembered)
            if self.sizes_from_folder:
                return hub.read_spec(found, self._remembered.parent)
            spec = LMMSpec(named("vision", m.vision), named("language", m.language))
            return hub.pruned.read(spec, found, str(self._remembered))
        if init.load:
            return hub.lmm_spec(init.load)
        if init.vision:
            vision = hub.tower_spec(init.vision, m.vision_layer)
        else:
            vision = named("vision", m.vision)
        if init.language:
            return LMMSpec(vision, hub.language_spec(init.language))
        return LMMSpec(vision, named("language", m.language))

    def plan(self, *, train: bool, suffix: int = 0) -> Plan:
        """The plan for learning or for running; some strategies differ between the two.

        Args:
            suffix: text slots of prompts, if not the config's (0).

        Raises:
            ValueError: a strategy that does not exist, that cannot be placed, or that would
                mix the samples of packed rows.
        """
        text, images = self.config.text, self.images
        prompt = suffix or self.config.eval.suffix or text.suffix
        geometry = lmm.geometry(
            self.spec,
            images=text.images,
            crops=images.cells,
            pinpoints=images.pinpoints,
            fine=images.fine,
            prefix=text.prefix,
            suffix=text.suffix if train else prompt,
            train=train,
        )
        chosen = strategies.build(self.config.strategy, geometry)
        named = {getattr(edit, "name", None) for edit in chosen}
        # A config that names what the model has anyway says how, not once more.
        own = (e for e in lmm.own_edits(self.spec, geometry) if e.name not in named)
        tunes = self._tunes() if train else ()
        plan = make_plan(geometry, (*own, *chosen, *tunes), mode=self.config.model.mode)
        if train and plan.row_wide and self.config.data.pack > 1:
            raise ValueError(
                f"data.pack={self.config.data.pack}: "
                f"{', '.join(edit.name for edit in plan.row_wide)} would choose among the "
                "tokens of all samples in a row; use data.pack=1, or a reduction at the "
                "connector, which goes image by image."
            )
        return plan

    def _check_context(self, plan: Plan) -> None:
        """Raises where devices cannot share the tokens of a row."""
        axes, heads = self.axes, self.spec.language.block.heads
        parts, devices = axes.parts("tokens"), axes.parts("act_heads")
        if parts == 1:
            return
        if plan.row_wide:
            raise ValueError(
                f"mesh.context={parts}: {', '.join(edit.name for edit in plan.row_wide)} "
                "chooses among the tokens of a whole row, which then lie on several "
                "devices; use mesh.context=1, or a reduction at the connector."
            )
        if heads % devices:
            raise ValueError(
                f"mesh.context={parts}: {heads} heads cannot be divided among {devices} "
                "devices (context x tensor); use fewer."
            )
        length, text = plan.entrance.length, plan.geometry.suffix
        if plan.geometry.train and length % parts:
            raise ValueError(
                f"mesh.context={parts}: rows of {length} tokens cannot be divided evenly; "
                f"use text.suffix={text + -length % parts}."
            )

    def _tunes(self) -> tuple[Tune, ...]:
        """What learns, of stacks of which not every layer does."""
        rows = lmm.params(self.config.lora.applied(self.spec))
        found = []
        for stack in ("vision", "language"):
            depth = getattr(self.spec, stack).depth
            paths = {
                row.path: range(depth) if row.layers is None else row.layers
                for row in rows
                if row.path.startswith(f"{stack}/") and partition.stacked(row.path)
            }
            layers = partition.learning_layers(self.learned, paths, depth)
            if len(layers) < depth:
                found.append(Tune(stack, layers))
        return tuple(found)

    @functools.cached_property
    def images(self) -> ImageSpec:
        """How images become views.

        Raises:
            ValueError: fields that do not go together, or mode "auto" without processor.
        """
        image, vision, found = self.config.image, self.spec.vision, self._processor
        known = self.spec.mode or (found.mode if found else "")
        if image.mode == "auto" and not known:
            raise ValueError(
                f"image.mode='auto', but {self.called} has no image processor "
                f"({hub.PROCESSOR}) that says more: set image.mode."
            )
        mode = known if image.mode == "auto" else image.mode
        own = mode == self.spec.mode and not (image.crops or image.pinpoints)
        views = self.spec if own else image
        return ImageSpec(
            vision.view,
            mode,
            views.crops,
            views.fine,
            image.grid,
            pinpoints=views.pinpoints,
            patches=vision.grid[0] if views.pinpoints else 0,
            native=self._native,
            mean=vision.mean,
            std=vision.std,
            resample=found.resample if found else "bicubic",
        )

    @property
    def _native(self) -> NativeSpec | None:
        """Limits of images that keep their own size, where the tower reads such."""
        vision, found = self.spec.vision, self._processor
        if not vision.native:
            return None
        least = self.config.image.min_pixels
        if not least and found:
            least = found.native.min_pixels
        most = vision.native * vision.patch**2
        return NativeSpec(vision.patch, vision.merge, min(least, most), most)

    def model(self, *, train: bool, suffix: int = 0) -> lmm.LMM:
        """The model along `plan`, its activations pinned to the mesh.

        Adapters are trained; what runs has them merged.

        Raises:
            ValueError: as `plan`, or a mesh that divides what it cannot.
        """
        spec = self.config.lora.applied(self.spec) if train else self.spec
        plan = self.plan(train=train, suffix=suffix)
        self._check_context(plan)
        return lmm.LMM(spec, plan, Pins(self.axes), self._kernel)

    @functools.cached_property
    def _kernel(self) -> Kernel | None:
        """What computes the language model's attention; raises as `kernels.named`."""
        axes, block = self.axes, self.spec.language.block
        name = self.config.model.attention
        return kernels.named(name, axes.platform, block, axes)

    def text_model(self, slots: int) -> lmm.LMM:
        """The model on `slots` of text alone. Without images no edit has anything to act
        on, so there is none."""
        geometry = lmm.geometry(self.spec, images=0, crops=0, prefix=0, suffix=slots)
        plan = make_plan(geometry, ())
        return lmm.LMM(self.spec, plan, Pins(self.axes), self._kernel)

    @functools.cached_property
    def end_id(self) -> int:
        """The token at which generation stops."""
        return end_id(find_template(self.config.text.template), self.tokenizer)

    def samples(self, plan: Plan) -> SampleSpec:
        """How a record becomes a sample of this plan."""
        slots, text = Slots.of(plan), self.config.text
        template = find_template(text.template)
        return SampleSpec(self.images, slots, template, self.tokenizer, text.truncate)

    def rows(self, model: lmm.LMM) -> tuple[Param, ...]:
        return (*lmm.params(model.spec), *of_ops(model.plan))

    def abstract_batch(self, model: lmm.LMM) -> dict[str, jax.ShapeDtypeStruct]:
        return lmm.abstract_batch(model, self.config.data.batch_size)

    def noise(
        self, model: lmm.LMM, size: int, *, learns: bool
    ) -> dict[str, np.ndarray]:
        slots = Slots.of(model.plan)
        return noise.batch(self.images, slots, self.vocab, size, answered=learns)

    def objective(self, model: lmm.LMM) -> NextToken:
        train = self.config.train
        shards = train.loss_shards // train.accumulate or 1
        return NextToken(model, shards, train.loss_weights)

    def learns(self, learning: Mapping[str, Any]) -> Learns:
        leaves = partition.flatten(learning)
        layers = [path for path in leaves if path.startswith("language/stack/")]
        adapters = set(partition.matching(LEARNS, layers))

        def any_of(*parts: str) -> bool:
            return any(path.startswith(parts) for path in leaves)

        return Learns(
            vision=any_of("vision/"),
            connector=any_of("connector/", "strategy_"),
            words=any_of("language/embed/"),
            head=any_of(f"language/{'embed' if self.spec.language.tied else 'head'}/"),
            kernels=bool(set(layers) - adapters),
            adapters=sum(math.prod(leaves[path].shape[1:]) for path in adapters),
        )

    def preview(self, record: Record, plan: Plan) -> str:
        samples = self.samples(plan)
        return conversation.preview(samples.encode(record.turns), self.tokenizer)

    def next_commands(self) -> str:
        workdir, told = self.config.workdir, self.config.eval
        image, question = "FILE", "What is in the picture?"
        if told.questions:
            asked = pipeline.read_questions(told.questions, told.images)
            image, question = asked[0].images[0], asked[0].text
        return f"""
ask it      python -m lmm_jax.generate --config.workdir={workdir} \\
                --image={image} --prompt="{question}"
""".strip("\n")


def _checked_size(size: int, tower: VisionSpec) -> int:
    if tower.native or tower.scales:
        raise ValueError(
            f"model.image_size={size}, but this tower reads images of any size, or at "
            "several scales: use 0."
        )
    if size < tower.patch:
        raise ValueError(
            f"model.image_size={size} is less than a patch of {tower.patch} pixels; use "
            "more, or 0 for the tower's own."
        )
    return size
