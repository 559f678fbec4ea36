"""What the command line can change in a config."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import pytest

from lmm_jax import cli, config, experiment, run_config, runs
from lmm_jax.sections import Sections

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
LLAVA = next(path for path in CONFIGS if path.stem == "llava")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_field_is_there_to_be_changed(path):
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    shown = module.get_config()
    before = shown.to_dict()
    assert config.completed(Sections, shown).to_dict() == before


@pytest.mark.parametrize(
    ("word", "section", "field", "value"),
    [
        ("init.load=HF_DIR", "init", "load", "HF_DIR"),
        ("model.image_size=448", "model", "image_size", 448),
        ("optim.mu_dtype=bfloat16", "optim", "mu_dtype", "bfloat16"),
        ("optim.clip=1.0", "optim", "clip", 1.0),
        ("mesh.context=2", "mesh", "context", 2),
        ("lora.rank=4", "lora", "rank", 4),
    ],
)
def test_a_field_of_the_command_line(word, section, field, value):
    changed = cli.read_config((f"--config={LLAVA}", f"--config.{word}"))
    checked = config.from_config(Sections, changed.to_dict(), "config")
    assert getattr(getattr(checked, section), field) == value


def test_a_run_from_before_a_field_existed_has_it_and_goes_on(tmp_path):
    now = cli.read_config((f"--config={LLAVA}",))
    before = now.copy_and_resolve_references()
    with before.unlocked():
        del before.mesh["context"], before.init, before.model["image_size"]
        before.axes = tuple(rule for rule in before.axes if rule[0] != "views")
    (tmp_path / "config.json").write_text(config.to_json(before))
    runs.claim(now, tmp_path)
    after = run_config.get_config(str(tmp_path))
    assert (after.mesh.context, after.init.load) == (1, "")
    exp = experiment.build(after)
    assert exp.axes.parts("views") == exp.axes.parts("batch") == jax.device_count()


def test_a_plan_needs_no_devices():
    word = "--config.mesh.tensor=4096"
    exp = experiment.build(cli.read_config((f"--config={LLAVA}", word)))
    assert exp.plan(train=True).geometry.train


def test_a_field_that_there_is_not():
    with pytest.raises(ValueError, match="the config has no field 'xyz'"):
        cli.read_config((f"--config={LLAVA}", "--config.xyz=2"))
