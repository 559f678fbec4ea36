"""A config and everything it names, constructible without devices' memory."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.experimental import multihost_utils
import ml_collections

from lmm_jax import config as configs
from lmm_jax.data import documents
from lmm_jax.data.conversation import find_template
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.experiment.base import HOST_ONLY, SIZES, Experiment
from lmm_jax.experiment.conversing import Conversing
from lmm_jax.experiment.encoding import Encoding
from lmm_jax.sections import Sections

__all__ = [
    "HOST_ONLY",
    "SIZES",
    "Conversing",
    "Encoding",
    "Experiment",
    "build",
    "prepare_data",
]


def build(
    config: ml_collections.ConfigDict,
    devices: tuple[jax.Device, ...] | None = None,
) -> Experiment:
    """Checks a config and builds what it names.

    Raises:
        ValueError: an unknown, missing or ill-typed field, by name.
    """
    checked = configs.from_config(Sections, config.to_dict(), "config")
    return (Encoding if checked.task else Conversing)(checked, devices)


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
