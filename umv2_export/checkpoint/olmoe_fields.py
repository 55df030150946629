"""The fields of a Hugging Face OLMoE's config.json, sorted by what they do; a field in no class is an error.

The rule: what decides what is computed is followed or refused. What does not is listed here once, and let through: in
silence where transformers writes it for every OLMoE, with a note where something else did.

Source: `OlmoeConfig` and `PretrainedConfig` of transformers 4.45 to 5.24.
"""

import re
from collections.abc import Mapping
from typing import Any

from umv2_export.checkpoint.fields import ignore_fix
from umv2_export.errors import Unsupported, shown

__all__ = ["UNDERSTOOD", "check_fields"]

# Fields that decide what is computed and have few values that are implemented. Where the file does not have one, what
# is implemented is the default.
FIXED: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False, None),
    "attention_bias": (False, None),
    "cross_attention_hidden_size": (None,),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "per_layer_config": (None, {}),
    "pruned_heads": ({}, None),
    "sliding_window": (None,),
    # Names the file of the weights.
    "transformers_weights": (None,),
    "use_sliding_window": (False, None),
}

# Read in olmoe_config.py.
READ = frozenset(
    """
    clip_qkv eos_token_id head_dim hidden_size intermediate_size layer_types max_position_embeddings model_type
    norm_topk_prob num_attention_heads num_experts num_experts_per_tok num_hidden_layers num_key_value_heads
    num_local_experts pad_token_id quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    tie_word_embeddings vocab_size
""".split()
)

UNDERSTOOD = READ | FIXED.keys()

# Written by transformers for every OLMoE: of training, of how results are returned, or of the writer.
SILENT = frozenset(
    """
    architectures attention_dropout bos_token_id dtype initializer_range output_router_logits router_aux_loss_coef
    torch_dtype transformers_version use_cache
""".split()
)

# Fields of every model's configuration in transformers, or of the tools around it, that no OLMoE computes with.
NOTED = frozenset(
    """
    auto_map attn_implementation bad_words_ids begin_suppress_tokens chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder label2id
    length_penalty max_length min_length model_max_length name_or_path neftune_noise_alpha no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores
    prefix pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    router_jitter_noise sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_last_hidden_states tokenizer_class top_k top_p torchscript typical_p unsloth_fixed
    use_bfloat16 use_flash_attention_2
""".split()
)

# Version stamps: `unsloth_version: "2025.3.1"`, `peft_version: "0.14.0.dev0"`.
_STAMP_NAME = re.compile(r"\w+_version")
_STAMP_VALUE = re.compile(r"v?\d+(\.\d+)+([.+-]?\w+)*")


def check_fields(data: Mapping[str, Any]) -> list[str]:
    """Refuse unknown fields, and values that are not implemented; returns the names that deserve a note.

    Raises:
        Unsupported: a field or value that is not implemented.
    """
    noted = []
    for name, value in data.items():
        if name in FIXED:
            # `1 == True` in Python, not in the file.
            if not any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in FIXED[name]
            ):
                supported = " or ".join(repr(choice) for choice in FIXED[name] if choice is not None) or "null"
                raise Unsupported(f"field {name!r} is {shown(value)}", fix=f"supported: {supported}")
        elif name in UNDERSTOOD or name in SILENT:
            continue
        elif name in NOTED or name.startswith("_") or value is None or _is_stamp(name, value):
            noted.append(name)
        else:
            raise Unsupported(
                f"unknown field {shown(name)}", why="it may change what is computed", fix=ignore_fix(name)
            )
    return noted


def _is_stamp(name: str, value: object) -> bool:
    return bool(_STAMP_NAME.fullmatch(name)) and isinstance(value, str) and bool(_STAMP_VALUE.fullmatch(value))
