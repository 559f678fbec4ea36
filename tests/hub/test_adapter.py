"""What a LoRA run has learned, put on its base by `peft`."""

from __future__ import annotations

import dataclasses

from flax import traverse_util
import jax
import numpy as np
from peft import PeftModel
import pytest
import torch
import transformers

from lmm_jax import hub
from lmm_jax.checkpoint.params import flatten
from lmm_jax.lora import LEARNS, LoraConfig, merged
from lmm_jax.models import lmm
from lmm_jax.partition import join, select, split
from tests.golden import reference
from tests.hub.test_llava import PAIRS, expanded, folder, ours, prompts  # noqa: F401

LORA = LoraConfig(rank=3, alpha=5.0, dropout=0.1)
CASES = {
    "all": {},
    "attention": dict(targets=("language/.*/(q|v)",)),
    "one layer": dict(layers=(1,)),
}


def learned(model, params, lora: LoraConfig):
    """(adapted model, what it learned, all its parameters), random."""
    adapted = model.clone(spec=lora.applied(model.spec))
    abstract = jax.eval_shape(lambda k: lmm.init(adapted, k), jax.random.key(0))
    rng, flat = np.random.default_rng(0), flatten(params)
    for path, leaf in flatten(abstract).items():
        if path not in flat or path.startswith("connector"):
            flat[path] = rng.normal(size=leaf.shape).astype(np.float32) * 0.3
    whole = traverse_util.unflatten_dict(flat, sep="/")
    selection = select(whole, ["connector", LEARNS])
    learning, frozen = split(whole, selection)
    return adapted, learning, join(learning, frozen, selection)


@pytest.mark.parametrize("folder", PAIRS[:2], indirect=True, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(folder, case, tmp_path):  # noqa: F811
    path, _ = folder
    model, params, batch = ours(path)
    lora = dataclasses.replace(LORA, **CASES[case])
    adapted, learning, whole = learned(model, params, lora)
    hub.save_adapter(tmp_path / "adapter", adapted.spec, learning, base=str(path))
    base = transformers.LlavaForConditionalGeneration.from_pretrained(path)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()

    ids, mask, pixels = prompts()
    tokens, seen = expanded(ids, mask)
    with torch.no_grad():
        out = theirs(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            pixel_values=torch.tensor(pixels),
        )
    state, logits = reference.run(adapted, whole, batch)
    expected = out.logits.numpy()
    bound = 1e-5 * np.abs(expected).max()
    for row, mine in enumerate(reference.in_order(logits, state)):
        right = expected[row][seen[row].numpy() == 1]
        np.testing.assert_allclose(mine, right, rtol=0, atol=bound)

    plain = merged(whole, adapted.spec.language.block.lora)
    hub.save(tmp_path / "merged", model.spec, plain, kind="llava")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged"
    )
    right = theirs.merge_and_unload().state_dict()
    mine = again.state_dict()
    assert mine.keys() == {name for name in right if "vision_tower.head." not in name}
    for name in mine:
        np.testing.assert_allclose(mine[name], right[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("folder", PAIRS[2:], indirect=True, ids="-".join)
def test_what_peft_has_no_place_for(folder, tmp_path):  # noqa: F811
    """Phi-3 adapts its fused projections as one."""
    model, params, _ = ours(folder[0])
    adapted, learning, _ = learned(model, params, LORA)
    with pytest.raises(ValueError, match="export it merged"):
        hub.save_adapter(tmp_path / "adapter", adapted.spec, learning, base="")
    with pytest.raises(ValueError, match="has no adapters"):
        hub.save_adapter(tmp_path / "adapter", model.spec, learning, base="")
