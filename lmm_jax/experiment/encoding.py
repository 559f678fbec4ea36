"""Experiments with an encoder: its head classifies, or ranks, images with their texts."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from pathlib import Path
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from lmm_jax import hub, strategies
from lmm_jax.data import noise
from lmm_jax.data.augment import RandAugment
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.pairs import Pair, PairSpec
from lmm_jax.data.vocabulary import Vocabulary
from lmm_jax.depth import Plan, make_plan
from lmm_jax.depth.cost import Learns
from lmm_jax.experiment.base import Experiment
from lmm_jax.models import encoders
from lmm_jax.models.encoders import EncoderSpec
from lmm_jax.nn.params import Param, of_ops
from lmm_jax.objectives import TEACHER, Headed
from lmm_jax.parallel.axes import Pins
from lmm_jax.tasks import Task, named


@dataclasses.dataclass(frozen=True)
class Encoding(Experiment):
    """Of an encoder, a head and perhaps a teacher, which is the encoder without cuts."""

    plain = "whole"
    init = staticmethod(encoders.init)

    @functools.cached_property
    def spec(self) -> EncoderSpec:
        m, task = self.config.model, self.task
        spec = self._sizes
        if task.labels and self.answers:
            spec = encoders.classes(spec, len(self.answers))
        if m.image_size:
            vision = dataclasses.replace(spec.vision, image=m.image_size)
            spec = dataclasses.replace(spec, vision=vision)
        return spec.replaced(
            dtype=self._dtype, param_dtype=m.param_dtype, remat=m.remat, unroll=m.unroll
        )

    @functools.cached_property
    def _sizes(self) -> EncoderSpec:
        task, folder = self.config.task.name, self.config.init.load
        if file := self._remembered:
            return hub.read_spec(hub.read_json(file), file.parent)
        if not folder:
            return encoders.named(self.config.model.encoder, task)
        return encoders.headed(hub.read_spec(hub.Folder(folder).config, folder), task)

    @property
    def answers(self) -> tuple[str, ...]:
        """The data's vocabulary, a class each; () where there is none yet."""
        told = (source.answers for source in self.config.data.sources)
        found = [Path(path) for path in told if path and Path(path).exists()]
        return Vocabulary.read(found[0]).answers if found else ()

    @property
    def task(self) -> Task:
        """What the head is for."""
        return named(self.config.task.name)

    @property
    def vocab(self) -> int:
        return self._geometry(train=False).vocab

    @property
    def called(self) -> str:
        if self._remembered:
            return f"sizes of {self._remembered}"
        return self.config.init.load or self.config.model.encoder

    @property
    def sizes_from_folder(self) -> bool:
        return bool(self.config.init.load or self._remembered)

    def plan(self, *, train: bool, suffix: int = 0) -> Plan:
        """The config's cuts, or those that the model was published with.

        Args:
            suffix: text slots, if not the config's (0).

        Raises:
            ValueError: a strategy that does not exist, or cannot be placed.
        """
        geometry = self._geometry(train=train, text=suffix)
        chosen = strategies.build(self.config.strategy, geometry)
        own = () if chosen else (e for make in self.spec.own for e in make(geometry))
        return make_plan(geometry, (*own, *chosen), mode=self.config.model.mode)

    def _geometry(self, *, train: bool, text: int = 0):
        family = encoders.family(self.spec)
        found = family.geometry(self.spec, text=text or self.config.text.prefix)
        return dataclasses.replace(found, train=train)

    def model(self, *, train: bool, suffix: int = 0) -> nn.Module:
        plan = self.plan(train=train, suffix=suffix)
        return encoders.build(self.spec, plan, Pins(self.axes))

    def teacher(self, model: nn.Module) -> nn.Module | None:
        """The same encoder without cuts."""
        sizes = model.plan.geometry
        if not (self.config.init.teacher and sizes.train):
            return None
        plain = make_plan(dataclasses.replace(sizes, train=False), ())
        return model.clone(plan=plain)

    def rows(self, model: nn.Module) -> tuple[Param, ...]:
        own = encoders.family(self.spec).params(model.spec)
        taught = [row.under(f"{TEACHER}/", "") for row in own]
        return (
            *own,
            *of_ops(model.plan),
            *(taught if self.teacher(model) else ()),
        )

    def abstract_batch(self, model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
        return self._arrays(model, self.config.data.batch_size, learns=True)

    def _arrays(self, model: nn.Module, size: int, *, learns: bool):
        found = encoders.abstract_batch(model, size)
        if not learns:
            return found
        negatives = self.config.task.negatives
        return self.task.arrays(found, self.spec.head.outputs, negatives)

    def noise(
        self, model: nn.Module, size: int, *, learns: bool
    ) -> dict[str, np.ndarray]:
        below = {"tokens": self.vocab, "label": self.spec.head.outputs}
        return noise.like(self._arrays(model, size, learns=learns), below)

    def learns(self, learning: Mapping[str, Any]) -> Learns:
        return Learns(vision="vision" in learning)

    @property
    def candidates(self) -> int:
        return 1 + self.config.task.negatives * self.task.ranks

    def objective(self, model: nn.Module) -> Headed:
        task = self.config.task
        return Headed(
            model,
            self.task,
            scale=task.scale,
            teacher=self.teacher(model),
            distill=task.distill,
            temperature=task.temperature,
            weights=self.config.train.loss_weights,
        )

    def samples(self, plan: Plan) -> PairSpec:
        task, g = self.config.task, plan.geometry
        return PairSpec(
            self.images,
            g.prefix,
            self.tokenizer,
            images=g.rows,
            negatives=self.candidates - 1 if g.train else 0,
            augment=RandAugment() if task.augment and g.train else None,
            seed=self.config.data.seed,
        )

    @property
    def images(self) -> ImageSpec:
        """How an image becomes the one view that is read."""
        vision = self.spec.vision
        mode = self.config.image.mode
        colours = dict(mean=vision.mean, std=vision.std)
        return ImageSpec(vision.view, mode, **colours, resample=self.spec.resample)

    def preview(self, record: Pair, plan: Plan) -> str:
        said = ", ".join(record.answers) or {
            k: v.tolist() for k, v in record.target.items()
        }
        return f"{record.text} -> {said}"

    def next_commands(self) -> str:
        return ""
