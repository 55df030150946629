"""config.json and generation_config.json of a Hugging Face OLMoE -> our configuration.

Source: `OlmoeConfig` of transformers 4.45 to 5.24, and what its models computed with each spelling, see
tests/data/olmoe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umv2_export.checkpoint.fields import without_ignored
from umv2_export.checkpoint.olmoe_fields import UNDERSTOOD, check_fields
from umv2_export.config import ExpertsConfig, MemoryConfig, ModelConfig
from umv2_export.errors import InputRejected, Unsupported, located, shown
from umv2_export.records.forms import Fields, Form, flag, integer, list_of, optional, read_as, real
from umv2_export.records.json_files import read_json

__all__ = ["CONFIG_FILE", "GENERATION_FILE", "OlmoeConfig", "read_config"]

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

DEFAULT_THETA = 10000.0
INTEGER = integer()

# Far above any model; each is compared with every new token.
MOST_END_TOKENS = 1024

# Of generation_config.json: values that leave the greedy continuation as it is. Others are of sampling, or of results.
_GREEDY: Mapping[str, tuple[object, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "do_sample": (False, None),
    "encoder_repetition_penalty": (1.0, None),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (1.0, None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beams": (1, None),
    "penalty_alpha": (0.0, None),
    "repetition_penalty": (1.0, None),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "watermarking_config": (None,),
}


@dataclass(frozen=True)
class OlmoeConfig:
    """What the two files say.

    Attributes:
        model: our configuration.
        files: that were read.
        notes: what a user should know.
    """

    model: ModelConfig
    files: list[Path]
    notes: list[str]


def read_config(path: Path, ignore_fields: Sequence[str]) -> OlmoeConfig:
    """Read both files of a checkpoint's folder.

    Raises:
        InputRejected: a field is missing, of the wrong type, out of range, or two contradict each other.
        Unsupported: an unknown field, or a value that is not implemented.
        InvalidRequest: a field that shall be ignored is not there, or is understood.
    """
    where = path / CONFIG_FILE
    data = without_ignored(read_json(where), ignore_fields, UNDERSTOOD, where=where)
    with located(where):
        noted = check_fields(data)
        end_tokens = _end_tokens(data)
    notes = [f"fields of {CONFIG_FILE} that no OLMoE computes with: {', '.join(sorted(noted))}"] if noted else []
    files = [where]
    if (path / GENERATION_FILE).exists():
        generation = read_json(path / GENERATION_FILE)
        files.append(path / GENERATION_FILE)
        with located(path / GENERATION_FILE):
            theirs = _end_tokens(generation)
        if end_tokens and not theirs:
            notes.append(f"{GENERATION_FILE} names no end token: `generate` ends at the limit, as in transformers")
        end_tokens = theirs
        changing = sorted(name for name in generation if name in _GREEDY and generation[name] not in _GREEDY[name])
        if changing:
            notes.append(f"`generate` is greedy, and does not follow {', '.join(changing)} of {GENERATION_FILE}")
    with located(where):
        return OlmoeConfig(_model_config(data, end_tokens), files, notes)


def _model_config(data: Mapping[str, Any], end_tokens: list[int]) -> ModelConfig:
    if data.get("quantization_config") is not None:
        method = data["quantization_config"]
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        raise Unsupported(
            f"field 'quantization_config' says {shown(method)}: quantized weights are not read",
            fix="take the checkpoint that was quantized",
        )
    _check_layer_types(data)
    fields = Fields(data)
    read, get = fields.read, fields.get
    heads, width = read("num_attention_heads", INTEGER), read("hidden_size", INTEGER)
    kv_heads = get("num_key_value_heads", optional(INTEGER), None)
    if data.get("head_dim") not in (None, width // max(1, heads)):
        raise Unsupported(f"field 'head_dim' is {shown(data['head_dim'])}", fix="hidden_size / heads")
    vocabulary, clip = read("vocab_size", INTEGER), get("clip_qkv", optional(real), None)
    return ModelConfig(
        hidden_size=width,
        num_layers=read("num_hidden_layers", INTEGER),
        num_heads=heads,
        # As many of both is what is written for none.
        num_kv_heads=None if kv_heads == heads else kv_heads,
        ffn_size=0,
        vocab_size=vocabulary,
        embedding_size=vocabulary,
        tie_embeddings=get("tie_word_embeddings", flag, False),
        max_sequence_length=read("max_position_embeddings", INTEGER),
        memory=MemoryConfig.absent(),
        rope_theta=_rope_theta(data),
        norm_eps=float(get("rms_norm_eps", real, 1e-5)),
        eos_token_id=end_tokens[0] if end_tokens else None,
        more_eos_token_ids=tuple(end_tokens[1:]),
        pad_token_id=get("pad_token_id", optional(INTEGER), None),
        experts=ExpertsConfig(
            _expert_count(fields),
            read("num_experts_per_tok", INTEGER),
            read("intermediate_size", INTEGER),
            get("norm_topk_prob", flag, False),
        ),
        qk_norm="full",
        clip_qkv=None if clip is None else float(clip),
    )


def _expert_count(fields: Fields) -> int:
    """`num_experts`, which transformers also calls `num_local_experts`."""
    named, local = (fields.get(name, optional(INTEGER), None) for name in ("num_experts", "num_local_experts"))
    if named is not None and local is not None and named != local:
        raise InputRejected(f"fields 'num_experts' and 'num_local_experts' are {named} and {local}")
    return fields.read("num_experts", INTEGER) if local is None else local


def _check_layer_types(data: Mapping[str, Any]) -> None:
    kinds = data.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise Unsupported(f"field 'layer_types' is {shown(kinds)}", fix="full_attention in every layer")


def _end_tokens(data: Mapping[str, Any]) -> list[int]:
    """`eos_token_id`: a number, several, or none."""
    value = data.get("eos_token_id")
    form: Form[Any] = list_of(INTEGER) if isinstance(value, list) else optional(INTEGER)
    found = read_as(form, value, "eos_token_id")
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if len(tokens) > MOST_END_TOKENS:
        raise InputRejected(f"field 'eos_token_id' has {len(tokens)} tokens, at most {MOST_END_TOKENS}")
    return list(dict.fromkeys(tokens))


def _rope_theta(data: Mapping[str, Any]) -> float:
    """The base of plain rotary embeddings, however it is spelled.

    Older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters` with both. Each place that gives the
    base must give the same: versions of transformers differ in which of them counts.
    """
    given = {"rope_theta": data.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        if data.get(name) is not None:
            _require_unscaled(name, data[name])
            given[f"{name}.rope_theta"] = data[name].get("rope_theta")
    found = {path: float(read_as(real, value, path)) for path, value in given.items() if value is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name!r} is {value}" for name, value in found.items())
        raise InputRejected(f"the base of the rotary embeddings is given twice: {listed}")
    return next(iter(found.values()), DEFAULT_THETA)


def _require_unscaled(name: str, parameters: object) -> None:
    """Refuse what scales: `default` never does, and `linear` divides by its factor, so by 1 not at all."""
    if not isinstance(parameters, Mapping):
        raise Unsupported(f"field {name!r} is {shown(parameters)}", fix="plain rotary embeddings")
    kinds = {
        parameters[key] if isinstance(parameters[key], str) else shown(parameters[key])
        for key in ("rope_type", "type")
        if parameters.get(key) is not None
    } or {"default"}
    # `partial_rotary_factor` means another function in some versions; these others are parameters of scaling.
    neutral: Mapping[str, tuple[object, ...]] = {"factor": (1, None), "partial_rotary_factor": (1, None)}
    known = {"rope_type", "type", "rope_theta", *neutral}
    if kinds == {"default"}:
        known.add("original_max_position_embeddings")
    strange = [
        key
        for key, value in parameters.items()
        if value is not None
        and (key not in known or isinstance(value, bool) or value not in neutral.get(key, (value,)))
    ]
    if not kinds <= {"default", "linear"} or strange or (kinds != {"default"} and parameters.get("factor") is None):
        raise Unsupported(
            f"field {name!r} is {shown(dict(parameters))}",
            why=f"{shown(strange[0])} scales the positions"
            if strange
            else "only plain rotary embeddings are implemented",
            fix="rope_type 'default'",
        )
