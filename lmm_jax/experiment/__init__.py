"""A config and everything it names, constructible without devices' memory."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.experimental import multihost_utils
import ml_collections

from lmm_jax import config as configs
from lmm_jax.data import document_tasks, documents
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
        made = (document_tasks if experiment.config.task else documents).generate(
            wanted.directory,
            train=wanted.train,
            validation=wanted.validation,
            seed=wanted.seed,
        )
        if not (Path(made) / "tokenizer").is_dir():
            _train_tokenizer(experiment)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("documents")


def _train_tokenizer(experiment: Experiment) -> None:
    """On the conversations of the document set."""
    wanted = experiment.config.documents
    template = find_template(experiment.config.text.template)
    texts = [
        template.ask.format(asked) + template.answer.format(answered)
        for asked, answered in documents.turns(wanted.directory)
    ]
    Tokenizer.train(texts, wanted.vocab).save(Path(wanted.directory) / "tokenizer")
