"""OLMoE checkpoints in the layout of Hugging Face: `config.json` of OlmoeForCausalLM beside `*.safetensors`.

Source: the published configuration and tensor names of allenai/OLMoE-1B-7B-0924; checked against transformers, see
tests/data/olmoe.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umv2_export.checkpoint.checkpoint import Checkpoint, CheckpointTensor, validate_tensors
from umv2_export.checkpoint.safetensors_files import map_tensors
from umv2_export.config import ExpertsConfig, MemoryConfig, ModelConfig, tensor_shapes
from umv2_export.errors import InputRejected, Unsupported, shown
from umv2_export.files import read_json, tokenizer_files

__all__ = ["CONFIG_FILE", "MODEL_TYPE", "read_checkpoint"]

CONFIG_FILE = "config.json"
MODEL_TYPE = "olmoe"

# Fields that decide what is computed and have one value that is implemented.
_FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_scaling": None,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}

# Read below.
_READ = frozenset(
    {
        "architectures",
        "clip_qkv",
        "eos_token_id",
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "norm_topk_prob",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "rope_parameters",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)

# Of training, of generation, or of the program that wrote the file.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Of a block, ours -> theirs.
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "q_norm.weight": "self_attn.q_norm.weight",
    "k_norm.weight": "self_attn.k_norm.weight",
    "attn_out.weight": "self_attn.o_proj.weight",
    "ff_norm.weight": "post_attention_layernorm.weight",
    "router.weight": "mlp.gate.weight",
}


def read_checkpoint(path: Path, *, allow_non_finite: bool) -> Checkpoint:
    """Open a checkpoint.

    Raises:
        InputRejected: a file is missing, corrupt, unsafe or contradicts the configuration.
        Unsupported: a field or tensor that is not implemented.
    """
    config = _config(read_json(path / CONFIG_FILE), path / CONFIG_FILE)
    theirs, files = map_tensors(path)
    tensors, shapes = {}, tensor_shapes(config)
    for name, parts in _sources(config).items():
        missing = [part for part in parts if part not in theirs]
        if missing:
            raise InputRejected(f"tensor {missing[0]!r} missing", where=path, why="the configuration asks for it")
        whole = shapes[name]
        for part in parts:
            shape = (whole[0] // len(parts), *whole[1:])
            if tuple(theirs[part].shape) != shape:
                raise InputRejected(
                    f"tensor {part!r} has shape {list(theirs[part].shape)}, the configuration says {list(shape)}",
                    where=path,
                )
        tensors[name] = CheckpointTensor(name, [theirs.pop(part) for part in parts], allow_non_finite, axis=0)
    if theirs:
        raise Unsupported(
            f"unknown tensor {sorted(theirs)[0]!r}", where=path, why="a tensor that is left out would change the output"
        )
    validate_tensors(config, tensors, where=path)
    return Checkpoint(path, "olmoe", config, tensors, [path / CONFIG_FILE, *files], tokenizer_files(path))


def _sources(config: ModelConfig) -> dict[str, list[str]]:
    """Our name -> their tensors, to be joined along dim 0."""
    sources = {"transformer.wte.weight": ["model.embed_tokens.weight"]}
    for i in range(config.num_layers):
        ours, theirs = f"transformer.blocks.{i}.", f"model.layers.{i}."
        sources |= {ours + name: [theirs + other] for name, other in _BLOCK.items()}
        sources[ours + "att_proj.weight"] = [f"{theirs}self_attn.{part}_proj.weight" for part in "qkv"]
        for e in range(config.experts.count if config.experts else 0):
            expert = f"{theirs}mlp.experts.{e}."
            # The linear part first: silu is applied to their gate.
            sources[f"{ours}experts.{e}.ff_proj.weight"] = [expert + "up_proj.weight", expert + "gate_proj.weight"]
            sources[f"{ours}experts.{e}.ff_out.weight"] = [expert + "down_proj.weight"]
    sources["transformer.ln_f.weight"] = ["model.norm.weight"]
    if not config.tie_embeddings:
        sources["transformer.ff_out.weight"] = ["lm_head.weight"]
    return sources


def _config(data: Mapping[str, Any], where: Path) -> ModelConfig:
    for name, value in data.items():
        if name in _FIXED and value != _FIXED[name]:
            raise Unsupported(f"field {name!r} is {shown(value)}", where=where, fix=f"supported: {_FIXED[name]!r}")
        if name not in _READ | _IGNORED | _FIXED.keys():
            raise Unsupported(f"unknown field {shown(name)}", where=where, why="it may change what is computed")
    heads = _integer(data, "num_attention_heads", where)
    if data.get("num_key_value_heads") not in (None, heads):
        raise Unsupported(
            f"{shown(data['num_key_value_heads'])} key-value heads for {heads} heads",
            where=where,
            fix="as many of both",
        )
    if data.get("head_dim") not in (None, _integer(data, "hidden_size", where) // max(1, heads)):
        raise Unsupported(f"field 'head_dim' is {shown(data['head_dim'])}", where=where, fix="hidden_size / heads")
    eos, pad = (_optional_integer(data, name, where) for name in ("eos_token_id", "pad_token_id"))
    vocabulary = _integer(data, "vocab_size", where)
    try:
        return ModelConfig(
            hidden_size=_integer(data, "hidden_size", where),
            num_layers=_integer(data, "num_hidden_layers", where),
            num_heads=heads,
            ffn_size=0,
            vocab_size=vocabulary,
            embedding_size=vocabulary,
            tie_embeddings=_boolean(data, "tie_word_embeddings", where),
            max_sequence_length=_integer(data, "max_position_embeddings", where),
            memory=MemoryConfig.absent(),
            rope_theta=_rope_theta(data, where),
            norm_eps=_real(data, "rms_norm_eps", 1e-5, where),
            eos_token_id=eos,
            pad_token_id=pad,
            experts=ExpertsConfig(
                _integer(data, "num_experts", where),
                _integer(data, "num_experts_per_tok", where),
                _integer(data, "intermediate_size", where),
                _boolean(data, "norm_topk_prob", where),
            ),
            qk_norm="full",
            clip_qkv=None if data.get("clip_qkv") is None else _real(data, "clip_qkv", 0.0, where),
        )
    except (InputRejected, Unsupported) as error:
        error.where = error.where or str(where)
        raise


def _rope_theta(data: Mapping[str, Any], where: Path) -> float:
    """Top-level in older files, under `rope_parameters` in newer ones."""
    parameters = data.get("rope_parameters")
    if parameters is None:
        return _real(data, "rope_theta", 10000.0, where)
    if (
        not isinstance(parameters, Mapping)
        or parameters.keys() - {"rope_type", "rope_theta"}
        or parameters.get("rope_type", "default") != "default"
    ):
        raise Unsupported(f"field 'rope_parameters' is {shown(parameters)}", where=where, fix="rope_type 'default'")
    theta = _real(parameters, "rope_theta", 10000.0, where)
    if data.get("rope_theta") not in (None, theta):
        raise InputRejected(f"fields 'rope_theta' are {shown(data['rope_theta'])} and {theta}", where=where)
    return theta


def _integer(data: Mapping[str, Any], name: str, where: Path) -> int:
    value = _optional_integer(data, name, where)
    if value is None:
        raise InputRejected(f"field {name!r} is missing", where=where)
    return value


def _optional_integer(data: Mapping[str, Any], name: str, where: Path) -> int | None:
    value = data.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InputRejected(f"field {name!r} must be an integer, got {shown(value)}", where=where)
    return value


def _boolean(data: Mapping[str, Any], name: str, where: Path) -> bool:
    """False where it is missing, as in the published default."""
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise InputRejected(f"field {name!r} must be true or false, got {shown(value)}", where=where)
    return value


def _real(data: Mapping[str, Any], name: str, default: float, where: Path) -> float:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise InputRejected(f"field {name!r} must be a number, got {shown(value)}", where=where)
    return float(value)
