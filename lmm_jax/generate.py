"""Answers a question about an image file, token by token.

    python -m lmm_jax.generate --config.workdir=runs/quickstart --image=page.png \\
        --prompt="What is the title?"
"""

from __future__ import annotations

import sys

from absl import flags
import jax
import numpy as np

from lmm_jax import cli, experiment, weights
from lmm_jax.data import pipeline
from lmm_jax.data.pipeline import BadRecord, Question
from lmm_jax.decode import Generator, Sampling, words

_IMAGE = flags.DEFINE_multi_string(
    "image", [], "Image file; several for several images."
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to ask.", required=True)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Probability mass to draw from.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main(argv: list[str], config) -> None:
    exp = experiment.build(config)
    model = exp.model(train=False)
    params = weights.to_run(exp, model)
    question = Question("prompt", tuple(_IMAGE.value), _PROMPT.value)
    try:
        batch = next(pipeline.prompts([question], exp.samples(model.plan), 1))
    except BadRecord as error:
        raise ValueError(str(error)) from error
    sampling = Sampling(_TEMPERATURE.value, _TOP_P.value)
    generator = Generator(model, _TOKENS.value, exp.end_id, sampling)
    said: list[int] = []
    shown = ""
    for token in generator.stream(
        params, exp.place(batch), jax.random.key(_SEED.value)
    ):
        said.append(int(token[0]))
        # The whole answer is decoded each time: a character may span tokens.
        text = words(np.asarray(said), exp.tokenizer, exp.end_id)
        if text.startswith(shown):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write("\n")


if __name__ == "__main__":
    cli.run(main)
