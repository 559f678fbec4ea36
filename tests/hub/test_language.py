"""Language models against `transformers`, sizes drawn at random within legal ranges."""

from __future__ import annotations

import functools
from pathlib import Path

from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lmm_jax import hub
from lmm_jax.depth import Context, Layout, Role, TokenState
from lmm_jax.depth.planner import Scan
from lmm_jax.models.decoder import Decoder
from lmm_jax.models.specs import LanguageSpec

FEW = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])


@st.composite
def sizes(draw, *, grouped: bool = True):
    """Fields that all families share."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * (draw(st.integers(1, 3)) if grouped else 1)
    return {
        "hidden_size": heads * draw(st.sampled_from([8, 12, 16])),
        "intermediate_size": draw(st.integers(9, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw(st.integers(20, 60)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 1e6])),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


@st.composite
def llama(draw):
    scaling = draw(
        st.sampled_from(
            [
                None,
                {"rope_type": "linear", "factor": 2.5},
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            ]
        )
    )
    fields = {**draw(sizes()), "rope_scaling": scaling}
    return transformers.LlamaConfig(**fields)


@st.composite
def mistral(draw):
    window = draw(st.sampled_from([None, 3, 64]))
    head = {"head_dim": draw(st.sampled_from([6, 8]))}
    return transformers.MistralConfig(**draw(sizes()), **head, sliding_window=window)


@st.composite
def qwen2(draw):
    return transformers.Qwen2Config(**draw(sizes()))


@st.composite
def qwen3(draw):
    return transformers.Qwen3Config(
        **draw(sizes()), head_dim=draw(st.sampled_from([6, 10]))
    )


@st.composite
def phi(draw):
    fields = {**draw(sizes()), "tie_word_embeddings": False}
    fraction = draw(st.sampled_from([0.25, 0.5, 1.0]))
    rotated = fields["hidden_size"] / fields["num_attention_heads"] * fraction
    assume(rotated % 2 == 0)  # pairs of numbers turn
    return transformers.PhiConfig(**fields, partial_rotary_factor=fraction)


@st.composite
def phi3(draw):
    window = draw(st.sampled_from([None, 4]))
    return transformers.Phi3Config(**draw(sizes()), sliding_window=window)


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
FAMILIES = {f.__name__: f for f in (llama, mistral, qwen2, qwen3, phi, phi3)}


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_model(config, folder: Path, dtype: torch.dtype):
    """A model of that size with weights that matter, saved in a dtype; in float32."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim > 1 else 0.1
            p.copy_(torch.randn_like(p) * scale + ("norm" in name and "weight" in name))
    model.to(dtype).save_pretrained(folder)
    # Opened anew, since casting it back would keep rounded rotary frequencies.
    again = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return again.eval()


def abstract(spec: LanguageSpec):
    return jax.eval_shape(functools.partial(_init, Decoder(spec)), jax.random.key(0))


def _init(model: Decoder, key):
    def everything(module):
        state = _state(module.embed(jnp.zeros((1, 1), jnp.int32)), None)
        out = module.stack.run(state, _steps(module.spec), Context())
        return module.logits(out.state.hidden)

    return model.init(key, method=everything)["params"]


def _steps(spec: LanguageSpec):
    return (Scan(0, spec.depth),)


def _state(hidden, valid) -> TokenState:
    batch, tokens = hidden.shape[:2]
    valid = jnp.ones((batch, tokens), bool) if valid is None else valid
    zero = jnp.zeros((batch, tokens), jnp.int32)
    return TokenState(
        hidden=hidden,
        positions=jnp.maximum(jnp.cumsum(valid, 1) - 1, 0),
        valid=valid,
        segment=zero,
        role=jnp.full_like(zero, Role.USER, jnp.int8),
        turn=zero,
        size=jnp.ones((batch, tokens)),
        layout=Layout.of({"text": tokens}),
    )


def forward(spec: LanguageSpec, params, tokens, valid):
    """Hidden states of every layer as `transformers` counts them, and logits.

    The first is the embedding, the last is normalised.
    """

    def everything(module):
        state = _state(module.embed(jnp.asarray(tokens)), jnp.asarray(valid))
        states = [state.hidden]
        for layer in range(spec.depth):
            step = Scan(layer, layer + 1)
            state = module.stack.run(state, (step,), Context()).state
            states.append(state.hidden)
        last = states.pop()
        return [*states, module.norm(last)], module.logits(last)

    apply = functools.partial(Decoder(spec).apply, method=everything)
    return jax.jit(apply)({"params": params})


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, tmp_path_factory):
    @FEW
    @given(config=FAMILIES[family](), dtype=DTYPES)
    def check(config, dtype):
        folder = tmp_path_factory.mktemp(family)
        model = random_model(config, folder, dtype)
        opened = hub.Folder(folder)
        spec = hub.read_spec(opened.config, opened.path)
        params = hub.load(opened, spec, abstract(spec))

        rng = np.random.default_rng(0)
        tokens = rng.integers(3, spec.vocab, (3, 9))
        valid = np.ones_like(tokens, bool)
        valid[1, :4] = valid[2, :1] = False  # padded on the left
        with torch.no_grad():
            out = model(
                torch.tensor(tokens),
                attention_mask=torch.tensor(valid).long(),
                position_ids=torch.tensor(np.maximum(valid.cumsum(1) - 1, 0)),
                output_hidden_states=True,
            )
        states, logits = forward(spec, params, tokens, valid)
        for ours, theirs in zip(states, out.hidden_states, strict=True):
            close(ours, theirs, valid)
        close(logits, out.logits, valid)

        ids = {name: config.to_dict()[name] for name in TOKEN_IDS}
        saved = hub.save(folder / "back", spec, params, kind=spec.kind, config=ids)
        ours, theirs = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
            for path in (saved, folder)
        )
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == dtype for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    check()


def close(ours, theirs, valid):
    ours, theirs = np.asarray(ours)[valid], theirs.numpy()[valid]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
