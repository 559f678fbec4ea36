"""Conversion: what is read, where it goes, and every way in which it is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import transformers

from lmm_jax import convert, hub
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.hub.families import llava_original
from tests import flags
from tests.hub.test_llava import TEXT, VISION
from tests.hub.test_vision import scramble
from tests.small import small_config, write_config
from tests.test_train import REPOSITORY, command, same
from tests.tiny import SPEC


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA folder of several shards, in bfloat16."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT | dict(vocab_size=110)),
        image_token_index=108,
    )
    model = scramble(transformers.LlavaForConditionalGeneration(config))
    path = tmp_path_factory.mktemp("llava") / "hf"
    model.bfloat16().save_pretrained(path, max_shard_size="40KB")
    return path


@pytest.fixture
def copied(llava, tmp_path):
    return shutil.copytree(llava, tmp_path / "hf")


def held(path: Path):
    """Parameters of a folder, in its own dtype."""
    spec = hub.lmm_spec(path)
    return hub.load(hub.Folder(path), spec, convert.placed(spec), cast=False)


def test_every_byte_is_read_once_and_spread_over_the_devices(
    llava, tmp_path, monkeypatch
):
    """Eight devices: no tensor is read whole where its part will do, none twice."""
    read, placed = [], []
    real_read, real_load = hub.folder.OnDisk.__getitem__, hub.load

    def reading(self, index):
        part = real_read(self, index)
        read.append(part.nbytes)
        return part

    def loading(*args, **options):
        placed.append(real_load(*args, **options))
        return placed[0]

    monkeypatch.setattr(hub.folder.OnDisk, "__getitem__", reading)
    monkeypatch.setattr(hub, "load", loading)
    convert.from_hub(llava, tmp_path / "run")
    table = placed[0]["language"]["embed"]["table"]
    assert table.dtype == "bfloat16"
    assert table.addressable_shards[0].data.size * 8 == table.size
    assert sum(read) == sum(x.nbytes for x in jax.tree.leaves(placed[0]))


def test_several_processes_convert_like_one(llava, tmp_path):
    for source, target in ((llava, "run"), (tmp_path / "run", "back")):
        convert = (sys.executable, "-m", "lmm_jax.convert")
        done = subprocess.run(
            [
                *(REPOSITORY / "launch" / "local.sh", "--processes=2", "--"),
                *(*convert, f"--from={source}", f"--to={tmp_path / target}"),
            ],
            env={
                **os.environ,
                "XLA_FLAGS": flags.quick(),
                "PYTHONPATH": str(REPOSITORY),
                "JAX_PLATFORMS": "cpu",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:]
    one, two = held(llava), held(tmp_path / "back")
    assert {x.dtype.name for x in jax.tree.leaves(two)} == {"bfloat16"}
    same(one, two)


def test_left_over_tensors_may_be_allowed(copied, tmp_path, caplog):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no use for 9 tensors: .*layers\.2"):
        convert.from_hub(copied, tmp_path / "run")
    with pytest.raises(ValueError, match="no use for 7 tensors"):
        convert.from_hub(copied, tmp_path / "run", allow_unused=["norm"])
    with pytest.raises(ValueError, match="is not a regex"):
        convert.from_hub(copied, tmp_path / "run", allow_unused=["*"])
    convert.from_hub(copied, tmp_path / "run", allow_unused=[r"layers\.2\."])
    assert "not used: 9 tensors: " in caplog.text


def test_a_vocabulary_grows_by_rows_of_the_mean():
    rng = np.random.default_rng(0)
    shapes = {
        "language": {"embed": {"table": (128, 48)}, "head": {"kernel": (48, 128)}}
    }
    params = jax.tree.map(
        lambda s: rng.normal(size=s).astype("float32"),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    assert convert.grown(SPEC, params, 128) == (SPEC, params)
    spec, more = convert.grown(SPEC, params, 129)
    assert spec.language.vocab == 192
    for one, two in zip(
        (params["language"]["embed"]["table"], params["language"]["head"]["kernel"].T),
        (more["language"]["embed"]["table"], more["language"]["head"]["kernel"].T),
    ):
        np.testing.assert_allclose(two[:128], one, rtol=1e-6)
        np.testing.assert_allclose(two[128:], np.tile(one.mean(0), (64, 1)), atol=1e-6)


def test_the_image_token_is_one_that_no_text_uses():
    characters = Tokenizer.load("characters")
    larger, image = characters.extended("<image>")
    assert image == characters.vocab_size == larger.vocab_size - 1
    assert larger.encode("a<image>b")[0][1] == image
    assert larger.extended("<image>")[1] == image


# --- Refusals, on the command line -----------------------------------------------------


def _lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _cut_a_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def _another_model(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["model_type"] = "qwen2"
    path.write_text(json.dumps(config))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


FAULTS = {
    "no model": (_no_config, "has no config.json: is it a model folder?"),
    "missing shard": (_lose_a_shard, "lacks the shard model-00002"),
    "truncated": (_cut_a_shard, "is no complete safetensors file"),
    "keys of another model": (_another_model, "does not hold the llava of its config"),
}


def refused(done, says: str) -> None:
    assert done.returncode == 1
    assert says in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_not_converted(fault, copied, tmp_path):
    spoil, says = FAULTS[fault]
    spoil(copied)
    done = command("lmm_jax.convert", f"--from={copied}", f"--to={tmp_path}/run")
    refused(done, says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["truncated", "keys of another model"])
def test_a_broken_folder_is_not_trained_on(fault, copied, tmp_path):
    spoil, says = FAULTS[fault]
    spoil(copied)
    done = train_from(copied, "characters", tmp_path)
    refused(done, says)
    assert not list((tmp_path / "run").glob("**/*.json")), "it may be started again"


def test_a_tokenizer_of_another_model(llava, tmp_path):
    Tokenizer.train(["some text"], 300).save(tmp_path / "words")
    done = train_from(llava, str(tmp_path / "words"), tmp_path)
    refused(done, "embeds 110: use the tokenizer of that model")
    assert not list((tmp_path / "run").glob("*"))


def train_from(folder: Path, tokenizer: str, tmp_path: Path):
    config = small_config(tmp_path, "llava", learn=("connector",))
    config.init, config.text.tokenizer = dict(load=str(folder)), tokenizer
    file = write_config(config, tmp_path / "config.py")
    return command("lmm_jax.train", f"--config={file}")


def test_a_head_with_a_bias_goes_out_in_the_original_layout(tmp_path, monkeypatch):
    """Bunny with Phi-2: transformers' LLaVA would drop the bias and answer otherwise."""
    block = dataclasses.replace(
        SPEC.language.block,
        **dict(norm="layer", activation="gelu_tanh", gated=False, bias="all"),
        parallel=True,
    )
    phi = dataclasses.replace(SPEC.language, block=block, head_bias=True, kind="phi")
    spec = dataclasses.replace(SPEC, language=phi)
    tower = dataclasses.replace(SPEC.vision, run=SPEC.vision.depth)
    monkeypatch.setitem(llava_original.TOWERS, "tiny-tower", tower)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), convert.placed(spec)
    )
    one, kept, two = (tmp_path / name for name in ("one", "kept", "two"))
    hub.save(one, spec, params, kind="bunny-phi")
    convert.from_hub(one, kept)
    with pytest.raises(ValueError, match="--kind=bunny-phi"):
        convert.to_hub(kept, tmp_path / "hf")
    with pytest.raises(ValueError, match="kind='bunny': use one of bunny-llama"):
        convert.to_hub(kept, tmp_path / "hf", "bunny")
    with pytest.raises(ValueError, match="the original layout names its tower"):
        monkeypatch.delitem(llava_original.TOWERS, "tiny-tower")
        convert.to_hub(kept, tmp_path / "hf", "bunny-phi")
    assert not (tmp_path / "hf").exists()
    monkeypatch.setitem(llava_original.TOWERS, "tiny-tower", tower)
    convert.to_hub(kept, two, "bunny-phi")
    assert hub.lmm_spec(two) == spec
    assert "lm_head.bias" in hub.Folder(two)
    same(held(two), params)
