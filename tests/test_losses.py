"""Cross-entropy against numpy in f64, its normalisations, and the sum of terms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import losses

next_token = jax.jit(losses.next_token, static_argnames="shards")


@pytest.fixture(name="batch")
def _batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (4, 5, 7)).astype(np.float32)
    targets = generator.integers(0, 7, (4, 5), dtype=np.int32)
    mask = (generator.random((4, 5)) < 0.5).astype(np.float32)
    mask[0], mask[1] = 1.0, 0.0
    return logits, targets, mask


def nats(logits, targets) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logsum = np.log(np.exp(logits).sum(-1))
    return (
        logsum - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    )


def test_mean_over_all_supervised_tokens(batch):
    loss, scalars = next_token(*batch)
    logits, targets, mask = batch
    expected = (nats(logits, targets) * mask).sum() / mask.sum()
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(scalars["loss"], expected, rtol=1e-5)
    assert scalars["tokens"] == mask.sum()
    hits = (logits.argmax(-1) == targets) * mask
    np.testing.assert_allclose(scalars["accuracy"], hits.sum() / mask.sum())


def test_shards_average_their_own_means_and_skip_empty_ones(batch):
    loss, _ = next_token(*batch, shards=4)
    logits, targets, mask = batch
    values = nats(logits, targets)
    rows = [i for i in range(4) if mask[i].sum()]
    assert 1 not in rows
    expected = np.mean([(values[i] * mask[i]).sum() / mask[i].sum() for i in rows])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not np.isclose(loss, next_token(*batch)[0])


def test_bf16_logits_are_reduced_in_f32():
    logits = np.zeros((1, 1, 1000), jnp.bfloat16)
    loss, _ = next_token(logits, np.zeros((1, 1), int), np.ones((1, 1)))
    np.testing.assert_allclose(loss, np.log(1000), rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 2])
def test_nothing_supervised_is_zero_with_zero_gradients(batch, shards):
    logits, targets, mask = batch

    def loss(logits):
        return next_token(logits, targets, mask * 0, shards=shards)

    (value, scalars), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    assert value == scalars["accuracy"] == scalars["tokens"] == 0
    assert not np.any(gradient)


def test_masked_targets_do_not_matter(batch):
    logits, targets, mask = batch
    ignored = np.where(mask > 0, targets, -100)
    assert next_token(logits, ignored, mask) == next_token(*batch)


def test_shapes_and_shards_are_checked(batch):
    logits, targets, mask = batch
    with pytest.raises(ValueError, match=r"\(4, 4, 7\).*must share"):
        losses.next_token(logits[:, :-1], targets, mask)
    with pytest.raises(ValueError, match="shards=3 must divide the batch of 4"):
        losses.next_token(logits, targets, mask, shards=3)


def test_total_is_the_weighted_sum_and_zero_switches_off():
    terms = {"next_token": jnp.float32(2.0), "budget": jnp.float32(np.nan)}
    assert losses.total(terms, {"next_token": 0.5, "budget": 0.0}) == 1.0
    terms["budget"] = jnp.float32(3.0)
    np.testing.assert_allclose(
        losses.total(terms, {"next_token": 0.5, "budget": 0.1}), 1.3
    )


def test_total_names_both_sides_of_a_mismatch():
    with pytest.raises(ValueError, match=r"\['router'\].*\['routr'\]"):
        losses.total({"router": jnp.zeros(())}, {"routr": 1.0})
