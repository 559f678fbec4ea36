"""The text tower against `transformers`."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import torch
import transformers

from lmm_jax.checkpoint.params import check_rows, from_published, to_published
from lmm_jax.models import roberta
from lmm_jax.models.roberta import Roberta, TextSpec
from lmm_jax.models.specs import vit_block
from tests.hub.test_language import FEW
from tests.hub.test_vision import scramble


@st.composite
def sizes(draw):
    heads = draw(st.integers(1, 3))
    return transformers.RobertaConfig(
        vocab_size=draw(st.integers(9, 30)),
        hidden_size=heads * draw(st.sampled_from([4, 6])),
        intermediate_size=draw(st.integers(5, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        max_position_embeddings=14,
        type_vocab_size=draw(st.integers(1, 2)),
        layer_norm_eps=1e-5,
    )


def spec_of(config: transformers.RobertaConfig) -> TextSpec:
    block = vit_block(
        config.hidden_size, config.num_attention_heads, config.intermediate_size, "gelu"
    )
    return TextSpec(
        config.vocab_size,
        config.max_position_embeddings,
        dataclasses.replace(block, post_norm=True),
        config.num_hidden_layers,
        config.type_vocab_size,
    )


@FEW
@given(sizes(), st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_equals_transformers(config, lengths):
    model = scramble(transformers.RobertaModel(config, add_pooling_layer=False))
    module, rng = Roberta(spec_of(config)), np.random.default_rng(0)
    valid = np.arange(12) < np.array(lengths)[:, None]
    words = rng.integers(2, config.vocab_size, valid.shape).astype(np.int32)
    tokens = np.where(valid, words, 1)
    abstract = jax.eval_shape(module.init, jax.random.key(0), tokens, valid)["params"]
    rows = roberta.params(module.spec)
    check_rows(rows, abstract)
    theirs = {name: p.detach().numpy() for name, p in model.named_parameters()}
    params = from_published(theirs, rows, abstract)
    back = to_published(params, rows)
    assert set(back) == set(theirs)
    assert all((back[name] == theirs[name]).all() for name in theirs)

    with torch.no_grad():
        found = model(torch.tensor(tokens), torch.tensor(valid).int())
    ours = module.apply({"params": params}, tokens, valid)
    right = found.last_hidden_state.numpy()
    np.testing.assert_allclose(ours, right, rtol=0, atol=1e-5 * np.abs(right).max())
