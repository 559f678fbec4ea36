"""A `config.json`, read field by field: nothing that changes the maths goes unnoticed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lmm_jax.nn.rope import Axial, LinearScaling, Llama3Scaling, RopeSpec

# Fields about training, generation, bookkeeping: a forward pass does not read them.
_HARMLESS_NAMES = """
    _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_factor
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    max_position_embeddings max_window_layers min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences original_max_position_embeddings
    output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type projection_dim pruned_heads remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache
"""
HARMLESS = frozenset(_HARMLESS_NAMES.split())
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_REQUIRED = object()


class Fields:
    """One object of a config.

    Args:
        values: the object.
        where: its place, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self._values, self._where = values, where
        self._read: set[str] = set()

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a field; null counts as absent.

        Raises:
            ValueError: it is absent and has no default.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(
                f"{self._where} lacks {name!r}, which its model type needs."
            )
        return default

    def only(self, name: str, *accepted: Any) -> Any:
        """A field of which we know some values only; the first is what absence means.

        Raises:
            ValueError: another value.
        """
        value = self.take(name, accepted[0])
        if value not in accepted:
            known = " or ".join(map(repr, accepted))
            raise ValueError(
                f"{self._where} says {name}={value!r}; lmm_jax knows {known} only, and the "
                "results would be wrong."
            )
        return value

    def window(self, absent: int | None) -> int | None:
        """The sliding window; here null means none, and absence what a family says."""
        self._read.add("sliding_window")
        return self._values.get("sliding_window", absent)

    def called(self, kind: str) -> Fields:
        """The same object under another model type; what either reads counts as read."""
        same = Fields({**self._values, "model_type": kind}, self._where)
        same._read = self._read
        return same

    def inner(self, name: str) -> Fields:
        """An object inside this one."""
        return Fields(self.take(name), f"{self._where}: {name}")

    def activation(self, name: str, default: str) -> str:
        """One of `lmm_jax.nn.block.ACTIVATIONS`, from its name on the hub."""
        return ACTIVATIONS[self.only(name, default, *ACTIVATIONS)]

    def rope(
        self,
        *,
        base: float = 10_000.0,
        fraction: float = 1.0,
        read: Collection[str] = (),
    ) -> RopeSpec:
        """Rotary settings, in the spelling before and since transformers 5.

        Args:
            base, fraction: where the config says nothing.
            read: fields that the family reads by itself, from `rope_values`.

        Raises:
            ValueError: a type other than "default", "axial", "linear" or "llama3".
        """
        top = {"rope_theta": self.take("rope_theta", base)}
        top["partial_rotary_factor"] = self.take("partial_rotary_factor", fraction)
        found = Fields({**top, **self.rope_values()}, f"{self._where}: rope")
        kind = found.take("rope_type", found.take("type", "default"))
        for name in read:
            found.take(name, None)
        axes = Axial() if kind == "axial" else None
        if kind in ("default", "axial"):
            scaled = None
        elif kind == "linear":
            scaled = LinearScaling(found.take("factor"))
        elif kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            context = found.take("original_max_position_embeddings")
            scaled = Llama3Scaling(*map(found.take, names), context)
        else:
            raise ValueError(
                f"{self._where} asks for rope scaling {kind!r}; lmm_jax knows 'linear' "
                "and 'llama3' (and 'axial') only, and the results would be wrong."
            )
        spec = RopeSpec(
            found.take("rope_theta"), found.take("partial_rotary_factor"), scaled, axes
        )
        found.done()
        return spec

    def rope_values(self) -> dict[str, Any]:
        """What the config's rotary object holds, under either of its names."""
        return {**self.take("rope_scaling", {}), **self.take("rope_parameters", {})}

    def done(self) -> None:
        """Refuses what has not been read and may change the maths.

        Raises:
            ValueError: names the fields.
        """
        unknown = [
            f"{name}={value!r}"
            for name, value in self._values.items()
            if name not in self._read | HARMLESS and value not in (None, False, {}, [])
        ]
        if unknown:
            raise ValueError(
                f"{self._where} has fields that lmm_jax does not know for this model type "
                f"and that may change its maths: {', '.join(unknown)}."
            )


def rope_fields(spec: RopeSpec) -> dict[str, Any]:
    """The inverse of `Fields.rope`, in the spelling that every transformers reads."""
    found: dict[str, Any] = {"rope_theta": spec.base}
    if isinstance(spec.axes, Axial):
        return {"rope_parameters": found | {"rope_type": "axial"}}
    if spec.fraction != 1:
        found["partial_rotary_factor"] = spec.fraction
    match spec.scaling:
        case LinearScaling(factor):
            found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, context):
            found["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    return found
