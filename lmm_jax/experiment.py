"""What a config names, built: sizes, plan, model, tokenizer, data, shardings.

Everything here is constructible without devices' memory, so that a plan can be printed
and a program compiled for machines that are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from lmm_jax import config as configs
from lmm_jax import hub, strategies
from lmm_jax.data import documents
from lmm_jax.data.conversation import end_id, find_template
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.native import NativeSpec
from lmm_jax.data.placement import SampleSpec, Slots
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.depth import Plan, make_plan
from lmm_jax.lora import LEARNS
from lmm_jax.models import lmm
from lmm_jax.models.specs import LMMSpec, VisionSpec, named
from lmm_jax.parallel.axes import Axes
from lmm_jax.parallel.mesh import global_batch, make_mesh
from lmm_jax.sections import Sections

SIZES = "sizes.json"  # in a work directory, in the form of the hub's config.json
HOST_ONLY = ("id", "skipped")  # what a batch says to the host, not to the device


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config and everything it names.

    Attributes:
        config: checked sections.
        devices: for the mesh; None takes all there are.
    """

    config: Sections
    devices: tuple[jax.Device, ...] | None = None

    @functools.cached_property
    def spec(self) -> LMMSpec:
        m = self.config.model
        dtype = m.dtype
        if dtype == "auto":
            platform = (self.devices or jax.devices())[0].platform
            dtype = "float32" if platform == "cpu" else "bfloat16"
        spec, found = self._sizes, self._processor
        views = dict(mean=found.mean, std=found.std) if found else {}
        if spec.vision.native and self.config.image.max_pixels:
            views["native"] = self.config.image.max_pixels // spec.vision.patch**2
        if m.image_size:
            views["image"] = _checked_size(m.image_size, spec.vision)
        vision = dataclasses.replace(spec.vision, **views)
        return dataclasses.replace(spec, vision=vision).replaced(
            dtype=dtype, param_dtype=m.param_dtype, remat=m.remat, unroll=m.unroll
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
    def sizes_from_folder(self) -> bool:
        """Whether sizes are those of a hub folder and not named ones."""
        init = self.config.init
        return bool(init.load or init.vision or init.language or self._remembered)

    @property
    def called(self) -> str:
        """The model in words: names of sizes, or the folders they come from."""
        m, init = self.config.model, self.config.init
        if self._remembered:
            return f"sizes of {self._remembered}"
        return init.load or " + ".join(
            (init.vision or m.vision, init.language or m.language)
        )

    @property
    def _remembered(self) -> Path | None:
        """Where an earlier start wrote the sizes of folders, which may be gone."""
        told = filter(None, (self.config.workdir, self.config.init.run))
        files = (Path(run) / SIZES for run in told)
        return next((file for file in files if file.is_file()), None)

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
            return hub.read_spec(found, self._remembered.parent)
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
        plan = make_plan(geometry, (*own, *chosen), mode=self.config.model.mode)
        if train and plan.row_wide and self.config.data.pack > 1:
            raise ValueError(
                f"data.pack={self.config.data.pack}: "
                f"{', '.join(edit.name for edit in plan.row_wide)} would choose among the "
                "tokens of all samples in a row; use data.pack=1, or a reduction at the "
                "connector, which goes image by image."
            )
        return plan

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

    @functools.cached_property
    def axes(self) -> Axes:
        rules = tuple((name, tuple(to)) for name, to in self.config.axes)
        return Axes(make_mesh(self.config.mesh, self.devices), rules)

    def model(self, *, train: bool, suffix: int = 0) -> lmm.LMM:
        """The model along `plan`, its activations pinned to the mesh.

        Adapters are trained; what runs has them merged.
        """
        spec = self.config.lora.applied(self.spec) if train else self.spec
        plan = self.plan(train=train, suffix=suffix)
        return lmm.LMM(spec, plan, self.axes.constrain)

    @property
    def learned(self) -> tuple[str, ...]:
        """Patterns of all that learns, adapters included."""
        return (*self.config.train.learn, *([LEARNS] if self.config.lora.rank else []))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.config.text.tokenizer)
        if tokenizer.vocab_size > self.spec.language.vocab:
            raise ValueError(
                f"tokenizer {self.config.text.tokenizer!r} has {tokenizer.vocab_size} "
                f"tokens, {self.called} embeds {self.spec.language.vocab}: use the "
                "tokenizer of that model."
            )
        return tokenizer

    @functools.cached_property
    def end_id(self) -> int:
        """The token at which generation stops."""
        return end_id(find_template(self.config.text.template), self.tokenizer)

    def samples(self, plan: Plan) -> SampleSpec:
        """How a record becomes a sample of this plan."""
        slots, text = Slots.of(plan), self.config.text
        template = find_template(text.template)
        return SampleSpec(self.images, slots, template, self.tokenizer, text.truncate)

    def abstract_params(self, model: lmm.LMM) -> dict[str, Any]:
        """Shapes and dtypes of all parameters; nothing is allocated."""
        return jax.eval_shape(lambda key: lmm.init(model, key), jax.random.key(0))

    def placed_params(self, model: lmm.LMM) -> dict[str, Any]:
        """The same, each with its sharding on the mesh."""
        abstract = self.abstract_params(model)
        rows = (*lmm.params(model.spec), *lmm.op_params(model.plan))
        shardings = self.axes.params(abstract, rows)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            shardings,
        )

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows of this process as global arrays on the mesh; host-only keys stay here."""
        rows = {name: x for name, x in batch.items() if name not in HOST_ONLY}
        return global_batch(rows, self.axes.batch(rows))


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


def build(
    config: ml_collections.ConfigDict,
    devices: tuple[jax.Device, ...] | None = None,
) -> Experiment:
    """Checks a config and builds what it names.

    Raises:
        ValueError: an unknown, missing or ill-typed field, by name.
    """
    return Experiment(
        configs.from_config(Sections, config.to_dict(), "config"), devices
    )


def prepare_data(experiment: Experiment) -> None:
    """Generates the document set that a config asks for, once, on one process."""
    wanted = experiment.config.documents
    if wanted is None:
        return
    if jax.process_index() == 0:
        documents.generate(
            wanted.directory,
            train=wanted.train,
            validation=wanted.validation,
            seed=wanted.seed,
        )
        folder = Path(wanted.directory) / "tokenizer"
        if not folder.is_dir():
            template = find_template(experiment.config.text.template)
            turns = documents.turns(wanted.directory)
            texts = [
                template.ask.format(asked) + template.answer.format(answered)
                for asked, answered in turns
            ]
            Tokenizer.train(texts, wanted.vocab).save(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("documents")
