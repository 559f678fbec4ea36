"""Checkpoints: exact resume, other meshes, parts, refusals, and failed saves."""

from __future__ import annotations

import logging
import os
from pathlib import Path
import resource
import signal
import subprocess
import sys

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from lmm_jax.checkpoint.state import CheckpointError, CheckpointReader, Checkpoints


@struct.dataclass
class TrainState:
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def shard(tree, devices: int):
    """Abstract tree with the first axis over `devices`, scalars replicated."""
    mesh = Mesh(np.array(jax.devices()[:devices]), "d")

    def spec(leaf):
        axes = PartitionSpec("d") if leaf.ndim and leaf.shape[0] % devices == 0 else ()
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(spec, jax.eval_shape(lambda: tree))


def make_state(width: int = 4, devices: int = 8) -> TrainState:
    kernel = np.arange(8 * width, dtype=np.float32).reshape(8, width)
    params = {
        "connector": {"kernel": kernel, "bias": np.ones(3, jnp.bfloat16)},
        "language": {"layers": {"kernel": kernel + 0.5}},
    }
    transformation = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    opt_state = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 7, leaf.dtype),
        jax.eval_shape(transformation.init, params),
    )
    state = TrainState(np.int32(3), params, opt_state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shard(state, devices))
    return jax.device_put(state, shardings)


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture(name="saved", scope="module")
def _saved(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 5 and 10; only read by tests."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (5, 10):
        checkpoints.save(step, make_state(), meta={"config": {"lr": 0.1}})
    checkpoints.close()
    return workdir


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_restores_onto_another_number_of_devices(saved, devices):
    abstract = shard(make_state(), devices)
    restored = CheckpointReader(saved).restore(abstract)
    assert restored.step == 10 and restored.meta == {"config": {"lr": 0.1}}
    assert_same(restored.state, make_state())
    kernel = restored.state.params["connector"]["kernel"]
    assert kernel.sharding == abstract.params["connector"]["kernel"].sharding
    assert len(kernel.sharding.device_set) == devices
    assert restored.state.params["connector"]["bias"].dtype == jnp.bfloat16


def test_layout_on_disk(saved):
    assert {path.name for path in (saved / "checkpoints").iterdir()} == {"5", "10"}
    items = {path.name for path in (saved / "checkpoints/10").iterdir()}
    assert {"state", "meta", "_CHECKPOINT_METADATA"} <= items


def test_steps_are_chosen_and_checked(saved):
    checkpoints = CheckpointReader(saved)
    assert checkpoints.steps == [5, 10] and checkpoints.latest_step == 10
    assert checkpoints.restore(shard(make_state(), 1), step=5).step == 5
    with pytest.raises(CheckpointError, match=r"step 7 .*\[5, 10\]"):
        checkpoints.restore(shard(make_state(), 1), step=7)


def test_a_part_is_restored_alone_and_cast(saved):
    checkpoints = CheckpointReader(saved)
    params = shard(make_state().params, 4)
    assert_same(checkpoints.restore_part(params, "params"), make_state().params)
    half = jax.tree.map(
        lambda x: x.update(dtype=jnp.bfloat16), params["language"]["layers"]
    )
    layers = checkpoints.restore_part(half, "params/language/layers")
    expected = make_state().params["language"]["layers"]["kernel"]
    np.testing.assert_array_equal(layers["kernel"], expected.astype(jnp.bfloat16))
    with pytest.raises(CheckpointError, match="params/connector/bias: only in"):
        del params["connector"]["bias"]
        checkpoints.restore_part(params, "params")


def test_another_model_is_one_clear_error(saved):
    checkpoints = CheckpointReader(saved)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(shard(make_state(width=6), 8))
    text = str(caught.value)
    assert "params/connector/kernel: found (8, 4) float32, want (8, 6) float32" in text
    assert "opt_state/1/0/mu/connector/kernel" in text
    assert "checkpoints/10" in text and "Use the config of that run" in text


def test_missing_extra_and_retyped_arrays_are_named(saved):
    checkpoints = CheckpointReader(saved)
    abstract = shard(make_state(), 8)
    connector = abstract.params["connector"]
    connector["scale"] = connector.pop("bias")
    connector["kernel"] = connector["kernel"].update(dtype=jnp.bfloat16)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(abstract)
    assert str(caught.value).splitlines()[1:4] == [
        "  params/connector/bias: only in the checkpoint, (3,) bfloat16",
        "  params/connector/kernel: found (8, 4) float32, want (8, 4) bfloat16",
        "  params/connector/scale: not in the checkpoint, want (3,) bfloat16",
    ]


def test_a_tree_without_shardings_is_refused(saved):
    abstract = jax.eval_shape(make_state)
    with pytest.raises(CheckpointError, match="'step' has no sharding"):
        CheckpointReader(saved).restore(abstract)


def test_the_newest_are_kept_and_due_follows_the_interval(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=10)
    assert [step for step in range(1, 31) if checkpoints.due(step)] == [10, 20, 30]
    assert checkpoints.latest_step is None
    tiny = {"x": make_state(devices=1).step}
    for step in (10, 20, 30):
        checkpoints.save(step, tiny)
    checkpoints.close()
    assert CheckpointReader(tmp_path).steps == [20, 30]


def test_frozen_parameters_stay_once_there_is_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    tree = make_state().params
    with pytest.raises(CheckpointError, match="no frozen parameters"):
        checkpoints.restore_frozen(shard(tree, 4))
    checkpoints.save_frozen(make_state(width=6).params)
    checkpoints.save_frozen(tree)  # no checkpoint yet: replaced
    assert_same(checkpoints.restore_frozen(shard(tree, 4)), tree)
    assert (tmp_path / "frozen").is_dir() and checkpoints.latest_step is None

    checkpoints.save(1, {"x": jnp.ones(3)})
    checkpoints.wait()
    checkpoints.save_frozen(jax.tree.map(lambda x: x * 0, tree))
    assert_same(checkpoints.restore_frozen(shard(tree, 4)), tree)
    with pytest.raises(CheckpointError, match=r"found \(8, 4\) float32, want \(8, 6\)"):
        checkpoints.save_frozen(make_state(width=6).params)
    checkpoints.close()


KILLED = """
import os, sys
import jax
from pathlib import Path
from lmm_jax.checkpoint.state import Checkpoints
workdir = Path(sys.argv[1])
checkpoints = Checkpoints(workdir)
checkpoints.save(1, {"x": jax.numpy.ones(3)})
checkpoints.wait()
rename = os.rename
def die(*args, **kwargs):
    os.kill(os.getpid(), 9)
os.rename = os.replace = Path.rename = Path.replace = die
checkpoints.save(2, {"x": jax.numpy.ones(3)})
checkpoints.wait()
"""


def test_a_killed_save_leaves_no_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = os.listdir(tmp_path / "checkpoints")
    assert len(left) == 2 and "1" in left and "2" not in left
    abstract = shard({"x": jnp.ones(3)}, 1)
    assert CheckpointReader(tmp_path).restore(abstract).step == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted(left)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"x": jnp.full(3, 2.0)})
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "3"]
    assert checkpoints.restore(abstract).state["x"][0] == 2.0
    checkpoints.close()


@pytest.fixture(name="tiny_disk")
def _tiny_disk():
    """Files may not grow beyond 64 KiB: writes fail in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_and_older_checkpoints_stay(tmp_path, tiny_disk):
    noise = np.random.default_rng(0).standard_normal(1 << 16)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.asarray(noise)})
    checkpoints.wait()
    tiny_disk()
    with pytest.raises(CheckpointError, match=r"older checkpoints are intact\. Make"):
        checkpoints.save(2, {"x": jnp.asarray(noise)})
        checkpoints.wait()
    assert checkpoints.latest_step == 1
    restored = CheckpointReader(tmp_path).restore(shard({"x": jnp.asarray(noise)}, 1))
    np.testing.assert_array_equal(restored.state["x"], noise.astype(np.float32))


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"opening checkpoints in .*file"):
        Checkpoints(tmp_path / "file")


def test_readers_need_a_checkpoint_and_create_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        CheckpointReader(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("numbers", [{"keep": 0}, {"every": 0}])
def test_counts_are_checked(tmp_path, numbers):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(tmp_path, **numbers)


def test_saving_is_quiet_but_others_may_talk(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, {"x": jnp.ones(3)})
        checkpoints.close()
        assert not [r for r in caplog.records if r.levelno < logging.WARNING]
        logging.getLogger("absl").info("ours")
    assert "ours" in caplog.text
