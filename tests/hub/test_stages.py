"""Two LLaVA stages from folders, exported, and answering the same in `transformers`."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from lmm_jax import convert, experiment, hub, runs, weights
from lmm_jax.data import pipeline
from lmm_jax.data.pipeline import Question
from lmm_jax.decode import Generator
from tests.hub.test_vision import scramble
from tests.small import small_config, write_config
from tests.test_train import command, final, same

NEW = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tower and a language model as they are downloaded."""
    root = tmp_path_factory.mktemp("folders")
    vision = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    language = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        pad_token_id=0,
    )
    scramble(transformers.CLIPVisionModel(vision)).save_pretrained(root / "vision")
    torch.manual_seed(1)
    text = transformers.LlamaForCausalLM(language)
    text.save_pretrained(root / "language")
    return root


def stage(folder: Path, **train_fields):
    config = small_config(folder, "llava", steps=3, **train_fields)
    config.model.update(vision="-", language="-")  # the folders bring the sizes
    return config


@pytest.fixture(scope="module")
def stages(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    first = stage(root / "one", learn=("connector",))
    first.init = dict(
        vision=str(folders / "vision"), language=str(folders / "language")
    )
    second = stage(root / "two", learn=("connector", "language"))
    second.init = dict(run=first.workdir)
    for name, config in (("one", first), ("two", second)):
        (root / name).mkdir(exist_ok=True)
        file = write_config(config, root / name / "config.py")
        done = command("lmm_jax.train", f"--config={file}")
        assert done.returncode == 0, done.stderr
    return first, second


def test_stage_one_moves_the_connector_only(folders, stages):
    config = stages[0]
    params = final(config)
    exp = experiment.build(config)
    assert exp.spec.vision.run == 2, "LLaVA reads the layer before the last"
    abstract = exp.abstract_params(exp.model(train=False))
    for part, spec in (("vision", exp.spec.vision), ("language", exp.spec.language)):
        loaded = hub.load(hub.Folder(folders / part), spec, abstract[part])
        same(params[part], loaded)


def test_a_run_does_not_need_its_folders_again(folders, stages, tmp_path):
    moved = tmp_path / "moved"
    (folders / "language").rename(moved)
    try:
        config = runs.load_run(stages[0].workdir)
        assert experiment.build(config).spec.language.vocab == 101
        same(final(config), final(stages[0]))
    finally:
        moved.rename(folders / "language")


def test_the_export_answers_the_same(stages, tmp_path):
    config = stages[1]
    folder = tmp_path / "hf"
    convert.to_hub(config.workdir, folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)

    exp = experiment.build(config)
    ours = exp.model(train=False)
    page = next(Path(config.eval.images, "images").glob("validation*"))
    question = Question("q", (str(page),), "What is the title?")
    batch = next(pipeline.prompts([question], exp.samples(ours.plan), 1))
    params = weights.to_run(exp, ours)
    answer = Generator(ours, NEW, end=-1)(params, exp.place(batch))

    text = batch["tokens"][0][batch["valid"][0]]
    order = np.argsort(batch["positions"][0][batch["valid"][0]])
    text = text[order]
    at = int(batch["visual_positions"][0, 0])
    image = [model.config.image_token_id] * exp.spec.vision.patches
    tokens = torch.tensor([[*text[:at], *image, *text[at:]]])
    v = exp.spec.vision
    pixels = (batch["images"][0, 0, :1] / 255 - np.array(v.mean)) / np.array(v.std)
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens,
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)).float(),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
        )
    np.testing.assert_array_equal(answer[0], out[0, tokens.shape[1] :].numpy())


def test_conversion_there_and_back_is_bit_equal(stages, tmp_path):
    one, kept, two = tmp_path / "one", tmp_path / "kept", tmp_path / "two"
    convert.to_hub(stages[1].workdir, one)
    done = command("lmm_jax.convert", f"--from={one}", f"--to={kept}")
    assert done.returncode == 0, done.stderr
    done = command("lmm_jax.convert", f"--from={kept}", f"--to={two}")
    assert done.returncode == 0, done.stderr
    first, second = hub.Folder(one), hub.Folder(two)
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name][:], second[name][:])
    # What was converted is what a run starts from.
    config = stage(tmp_path / "run")
    config.init = dict(run=str(kept))
    exp = experiment.build(config)
    model = exp.model(train=False)
    same(jax.device_get(weights.initial(exp, model)), final(stages[1]))


def test_a_folder_is_evaluated_directly(stages, tmp_path):
    convert.to_hub(stages[1].workdir, tmp_path / "hf")
    config = stage(tmp_path / "never")
    config.init = dict(load=str(tmp_path / "hf"))
    exp = experiment.build(config)
    model = exp.model(train=False)
    same(jax.device_get(weights.to_run(exp, model)), final(stages[1]))


def test_a_tower_at_another_image_size(folders, tmp_path):
    """The run remembers it, and so does the processor that it writes."""
    config = stage(tmp_path)
    config.model.image_size = 24
    config.init = dict(
        vision=str(folders / "vision"), language=str(folders / "language")
    )
    exp = experiment.build(config)
    assert exp.spec.vision.grid == (6, 6)
    params = weights.initial(exp, exp.model(train=True))
    assert params["vision"]["positions"].shape == (37, 24)
    experiment.prepare_data(exp)
    runs.claim(config, Path(config.workdir))
    runs.describe(exp, config, Path(config.workdir))
    config.init = dict()
    again = experiment.build(config)
    assert (again.spec, again.images) == (exp.spec, exp.images)
    assert again.images.size == 24
    config.model.image_size = 3
    with pytest.raises(ValueError, match=r"image_size=3 is less than a patch of 4"):
        _ = experiment.build(config).spec


@pytest.mark.parametrize(
    ("init", "says"),
    [
        (dict(load="nowhere"), "nowhere has no config.json"),
        (dict(load="language"), "holds no whole model"),
        (dict(vision="language"), "holds no vision tower"),
        (dict(language="vision"), "holds no language model"),
    ],
)
def test_folders_of_something_else(init, says, folders, tmp_path):
    config = stage(tmp_path)
    config.model.update(vision="tiny-vit", language="tiny-lm")
    config.init = {name: str(folders / folder) for name, folder in init.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        _ = experiment.build(config).spec


def test_conversion_refuses_with_one_message(stages, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for arguments, says in (
        ([f"--from={tmp_path}/none", f"--to={tmp_path}/x"], "is no folder"),
        ([f"--from={stages[1].workdir}", f"--to={tmp_path}/full"], "is not empty"),
    ):
        done = command("lmm_jax.convert", *arguments)
        assert done.returncode == 1
        assert says in done.stderr and "Traceback" not in done.stderr
