"""What a config names, built: sizes, plan, model, tokenizer, data, shardings.

Everything here is constructible without devices' memory, so that a plan can be printed
and a program compiled for machines that are not there.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

from flax import linen as nn
import jax
import numpy as np

from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.depth import Plan
from lmm_jax.depth.cost import Learns
from lmm_jax.lora import LEARNS
from lmm_jax.nn.params import Param
from lmm_jax.objectives import TEACHER, Objective
from lmm_jax.parallel.axes import RULES, Axes
from lmm_jax.parallel.mesh import make_mesh
from lmm_jax.sections import Sections

SIZES = "sizes.json"  # in a work directory, in the form of the hub's config.json
HOST_ONLY = ("id", "skipped")  # what a batch says to the host, not to the device
# (model, key) to random parameters.
Init = Callable[[nn.Module, jax.Array], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Experiment(abc.ABC):
    """A config and everything it names.

    Attributes:
        config: checked sections.
        devices: for the mesh; None takes all there are.
        plain: how reports call the model without a strategy.
        init: random parameters of a model.
    """

    config: Sections
    devices: tuple[jax.Device, ...] | None = None
    plain: ClassVar[str]
    init: ClassVar[Init]

    @functools.cached_property
    @abc.abstractmethod
    def spec(self) -> Any:
        """Sizes of the model, without adapters."""

    @property
    @abc.abstractmethod
    def called(self) -> str:
        """The model in words: names of sizes, or the folders they come from."""

    @property
    @abc.abstractmethod
    def vocab(self) -> int:
        """Tokens that the model embeds."""

    @property
    @abc.abstractmethod
    def sizes_from_folder(self) -> bool:
        """Whether sizes are those of a hub folder and not named ones."""

    @abc.abstractmethod
    def plan(self, *, train: bool, suffix: int = 0) -> Plan:
        """The plan for learning or for running; some strategies differ between the two."""

    @abc.abstractmethod
    def model(self, *, train: bool, suffix: int = 0) -> nn.Module:
        """The model along `plan`, its activations pinned to the mesh."""

    def teacher(self, model: nn.Module) -> nn.Module | None:
        """What a model imitates while it learns; its parameters are `TEACHER`'s."""
        return None

    @abc.abstractmethod
    def rows(self, model: nn.Module) -> tuple[Param, ...]:
        """Rows of all its parameters."""

    @abc.abstractmethod
    def abstract_batch(self, model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of `data.batch_size`, for tracing without data."""

    @abc.abstractmethod
    def noise(
        self, model: nn.Module, size: int, *, learns: bool
    ) -> dict[str, np.ndarray]:
        """A batch that fills all slots of a model, with targets if it `learns`."""

    @abc.abstractmethod
    def learns(self, learning: Mapping[str, Any]) -> Learns:
        """What a training step costs depends on, from the parameters that learn."""

    @property
    def candidates(self) -> int:
        """Sequences of text that an example of training has."""
        return 1

    @abc.abstractmethod
    def objective(self, model: nn.Module) -> Objective:
        """What training minimises."""

    @abc.abstractmethod
    def samples(self, plan: Plan) -> Any:
        """How a record becomes a sample of this plan."""

    @abc.abstractmethod
    def preview(self, record: Any, plan: Plan) -> str:
        """A record with what is supervised in colour; raises BadRecord."""

    @abc.abstractmethod
    def next_commands(self) -> str:
        """What a user may want to type after training."""

    @functools.cached_property
    def axes(self) -> Axes:
        # Those of an older run lack names that came later.
        told = {name: tuple(to) for name, to in self.config.axes}
        rules = tuple((dict(RULES) | told).items())
        return Axes(make_mesh(self.config.mesh, self.devices), rules)

    @property
    def learned(self) -> tuple[str, ...]:
        """Patterns of all that learns, adapters included."""
        return (*([LEARNS] if self.config.lora.rank else []), *self.config.train.learn)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.config.text.tokenizer)
        if tokenizer.vocab_size > self.vocab:
            raise ValueError(
                f"tokenizer {self.config.text.tokenizer!r} has {tokenizer.vocab_size} "
                f"tokens, {self.called} embeds {self.vocab}: use the tokenizer of that "
                "model."
            )
        return tokenizer

    def fresh(self, model: nn.Module, key: jax.Array) -> dict[str, Any]:
        """Random parameters, a teacher's too. Call it under `jax.jit`."""
        teacher = self.teacher(model)
        taught = {TEACHER: self.init(teacher, key)} if teacher else {}
        return {**self.init(model, key), **taught}

    def abstract_params(self, model: nn.Module) -> dict[str, Any]:
        """Shapes and dtypes of all parameters; nothing is allocated."""
        teacher = self.teacher(model)
        taught = {TEACHER: _shapes(self.init, teacher)} if teacher else {}
        return {**_shapes(self.init, model), **taught}

    def placed_params(self, model: nn.Module) -> dict[str, Any]:
        """The same, each with its sharding on the mesh."""
        abstract = self.abstract_params(model)
        shardings = self.axes.params(abstract, self.rows(model))
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            shardings,
        )

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows of this process as global arrays on the mesh; host-only keys stay here."""
        rows = {name: x for name, x in batch.items() if name not in HOST_ONLY}
        return self.axes.place(rows)

    def gathered(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows of all processes, in the order of the global batch, for every process to
        read; not waited for."""
        return self.axes.whole(self.axes.place(rows))

    @property
    def _remembered(self) -> Path | None:
        """Where an earlier start wrote the sizes of folders, which may be gone."""
        told = filter(None, (self.config.workdir, self.config.init.run))
        files = (Path(run) / SIZES for run in told)
        return next((file for file in files if file.is_file()), None)

    @property
    def _dtype(self) -> str:
        dtype = self.config.model.dtype
        if dtype != "auto":
            return dtype
        platform = (self.devices or jax.devices())[0].platform
        return "float32" if platform == "cpu" else "bfloat16"


@functools.lru_cache(maxsize=32)
def _shapes(init: Init, model: nn.Module) -> dict[str, Any]:
    """Of a model's parameters. Tracing takes seconds, and every command needs them more
    than once."""
    return jax.eval_shape(functools.partial(init, model), jax.random.key(0))
