"""The three classes of fields of the authors' config.yaml; a field in none of them is an error.

Any field that is silently left out could change what the model computes.
"""

from collections.abc import Mapping
from typing import Any

from umv2_export.checkpoint.fields import ignore_fix
from umv2_export.errors import InputRejected, Unsupported, shown

__all__ = ["UNDERSTOOD", "check_field_classes"]

# Read by `official_config`; docs/checkpoints.md names the case that shows each.
SUPPORTED = frozenset(
    """
    d_model n_heads n_kv_heads multi_query_attention n_layers mlp_hidden_size mlp_ratio rope_theta
    max_sequence_length vocab_size embedding_size weight_tying eos_token_id pad_token_id block_type
    attention_layer_norm layer_norm_eps clip_qkv scale_logits convert2fp32 rope_full_precision
    moe_num_experts moe_top_k mem_type mem_knum mem_kdim mem_vdim mem_pre_vdim mem_knn mem_head
    mem_insert_way mem_share_ratio mem_value_expand_time mem_key_expand_time
    mem_q_for_each_tucker_rank mem_use_glu_act vertical_parallel mem_parallel_size
""".split()
)

# Only these values are implemented: the shipped configurations have them.
REQUIRED: Mapping[str, tuple[object, ...]] = {
    "activation_type": ("swiglu",),
    "alibi": (False,),
    "attention_layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "embedding_layer_norm": (False,),
    "include_bias": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "norm_after": (False,),
    "rope": (True,),
}

# Likewise, in a file that has them; and those that only blocks of experts read.
REQUIRED_WHERE_PRESENT: Mapping[str, tuple[object, ...]] = {"moe_interleave": (False, None)}
REQUIRED_WITH_EXPERTS: Mapping[str, tuple[object, ...]] = {
    "moe_dropless": (True,),
    "moe_mlp_impl": ("sparse", "grouped"),
    "moe_shared_expert": (False, None),
}

UNDERSTOOD = SUPPORTED | REQUIRED.keys() | REQUIRED_WHERE_PRESENT.keys() | REQUIRED_WITH_EXPERTS.keys()

# Fields of training, or of a feature that a required value switches off.
IGNORED = frozenset(
    """
    alibi_bias_max attention_dropout embedding_dropout emb_init_std flash_attention
    init_cutoff_factor init_device init_fn init_std mem_final_top_expand_time
    mem_key_balance_reg_coef mem_log_interval mem_output_dropout_rate mem_tucker_rank_penalty
    moe_capacity_factor moe_lbl_in_fp32 moe_log_expert_assignment moe_loss_weight moe_zloss_weight
    precision residual_dropout scale_emb_init
""".split()
)


def check_field_classes(fields: Mapping[str, Any]) -> None:
    """Refuse unknown fields, and values that are not implemented.

    Raises:
        InputRejected: a field is missing whose default differs between versions of the code.
        Unsupported: a field or value that is not implemented.
    """
    with_experts = fields.get("block_type") == "moe"
    required = {**REQUIRED, **REQUIRED_WHERE_PRESENT, **(REQUIRED_WITH_EXPERTS if with_experts else {})}
    for name, value in fields.items():
        if name in required:
            # `is` for booleans: YAML's 1 is not true.
            if not any(
                value is allowed or (value == allowed and type(value) is type(allowed)) for allowed in required[name]
            ):
                allowed = " or ".join(repr(choice) for choice in required[name])
                raise Unsupported(f"field '{name}' is {shown(value)}", why=f"only {allowed} is implemented")
        elif name not in SUPPORTED and name not in IGNORED and name not in REQUIRED_WITH_EXPERTS:
            raise Unsupported(
                f"unknown field '{name}'",
                why="a field that is left out could change what is computed",
                fix=ignore_fix(name),
            )
    for name in REQUIRED:
        if name not in fields:
            raise InputRejected(f"field '{name}' is missing", why="its default differs between versions of the code")
