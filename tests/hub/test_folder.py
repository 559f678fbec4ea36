"""What is wrong with a folder is said in one sentence; what is read is what is needed."""

from __future__ import annotations

import functools
import json
import shutil

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_dtypes
import numpy as np
import pytest

from lmm_jax import hub
from lmm_jax.models import decoder, specs
from tests.hub.test_language import abstract

BLOCK = specs.llama_block(16, 4, 24, kv_heads=2)
SPEC = specs.LanguageSpec(32, BLOCK, 3)


@functools.cache
def weights():
    keys = iter(np.random.default_rng(0).spawn(100))
    return jax.tree.map(
        lambda x: next(keys).normal(size=x.shape).astype(np.float32), abstract(SPEC)
    )


@pytest.fixture
def folder(tmp_path):
    """In several shards."""
    return hub.save(tmp_path / "m", SPEC, weights(), kind="llama", shard_bytes=4000)


def same(one, two) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def opened(path):
    folder = hub.Folder(path)
    return hub.load(folder, hub.read_spec(folder.config, folder.path), abstract(SPEC))


def test_several_shards_and_their_index(folder):
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert hub.read_spec(hub.read_json(folder / "config.json"), folder) == SPEC
    same(opened(folder), weights())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_comes_back_bit_for_bit(dtype, tmp_path):
    half = jax.tree.map(lambda x: x.astype(dtype), weights())
    path = hub.save(tmp_path / "half", SPEC, half, kind="llama")
    found = opened(path)
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))
    same(found, half)


def test_a_sharded_parameter_reads_its_own_rows_only(folder, monkeypatch):
    """Two of eight devices' worth of heads and vocabulary, on a mesh of 4 x 2."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    axes = {row.path: row.axes.split() for row in decoder.params(SPEC)}
    rules = {"embed": "fsdp", "kv_heads": "tensor", "heads": "tensor", "mlp": "tensor"}

    def place(path, x):
        names = axes["/".join(k.key for k in path)]
        spec = PartitionSpec(*[rules.get(name) for name in names])
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    placed = jax.tree_util.tree_map_with_path(place, abstract(SPEC))
    read = []
    real = hub.folder.OnDisk.__getitem__

    def counting(self, index):
        part = real(self, index)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(hub.folder.OnDisk, "__getitem__", counting)
    source = hub.Folder(folder)
    params = hub.load(source, SPEC, placed)
    same(jax.device_get(params), weights())
    q = params["stack"]["layers"]["q"]["kernel"]
    assert q.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
    # Every byte once: no device's part is read whole and then cut.
    assert sum(read) == sum(x.nbytes for x in jax.tree.leaves(weights()))


def edit(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "gpt9"}, "model_type='gpt9'; lmm_jax reads"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"logit_softcap": 30.0}, "does not know .* logit_softcap=30.0"),
        ({"attention_bias": True}, "attention_bias=True; lmm_jax knows False"),
        ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "scaling 'yarn'"),
        (
            {"rope_scaling": {"mrope_section": [1, 1, 2]}},
            "does not know .* mrope_section",
        ),
        ({"hidden_size": 24}, "of a model of another size"),
        ({"num_hidden_layers": 4}, r"lacks 9 tensors: model\.layers\.3.*and 1 more"),
        ({"num_hidden_layers": 2}, r"no use for 9 tensors: model\.layers\.2"),
    ],
)
def test_a_config_that_we_cannot_compute(folder, fields, says):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=says):
        source = hub.Folder(folder)
        spec = hub.read_spec(source.config, source.path)
        hub.load(source, spec, abstract(spec))


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        hub.Folder(tmp_path / "none")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        hub.Folder(tmp_path)


def test_a_missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match="lacks the shard model-00002"):
        hub.Folder(folder)


def test_a_truncated_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        hub.Folder(folder)


def test_pickled_weights_are_not_read(folder):
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled weights can run code"):
        hub.Folder(folder)


def test_tensors_of_another_model(folder, tmp_path):
    phi = tmp_path / "phi"
    shutil.copytree(folder, phi)
    fields = {"model_type": "phi", "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
    edit(phi, **fields, head_dim=None, rms_norm_eps=None)
    source = hub.Folder(phi)
    spec = hub.read_spec(source.config, source.path)
    says = r"(?s)not hold the phi .*lacks \d+ tensors: .*no use for \d+ tensors: "
    with pytest.raises(ValueError, match=says):
        hub.load(source, spec, abstract(spec))


def test_a_model_is_not_overwritten(folder):
    with pytest.raises(ValueError, match="already holds a model"):
        hub.save(folder, SPEC, weights(), kind="llama")


def test_a_write_that_dies_leaves_no_config(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.folder, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        hub.save(tmp_path / "m", SPEC, weights(), kind="llama")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        hub.Folder(tmp_path / "m")
