"""OLMoE checkpoints in the layout of Hugging Face: `config.json` of OlmoeForCausalLM beside `*.safetensors`.

Source: the published configuration and tensor names of allenai/OLMoE-1B-7B-0924, and what transformers 4.46 and 5.24
save and load; checked against both, see tests/data/olmoe.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from umv2_export.checkpoint.checkpoint import Checkpoint, CheckpointTensor, ReadOptions, validate_tensors
from umv2_export.checkpoint.olmoe_config import CONFIG_FILE, read_config
from umv2_export.checkpoint.safetensors_files import map_tensors, weight_notes
from umv2_export.checkpoint.tensor_names import unwrapped_names
from umv2_export.config import ModelConfig, tensor_shapes
from umv2_export.errors import InputRejected, Unsupported, located, shown
from umv2_export.records.tokenizer_files import tokenizer_files

__all__ = ["CONFIG_FILE", "is_olmoe", "read_checkpoint"]

MODEL_TYPE, ARCHITECTURE = "olmoe", "OlmoeForCausalLM"

# transformers would load it in place of the weights.
ADAPTER_FILE = "adapter_config.json"

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Elements of an embedding that are compared at a time (32 MB of fp64).
COMPARED = 4 * 2**20

# Of a block, ours -> theirs.
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "q_norm.weight": "self_attn.q_norm.weight",
    "k_norm.weight": "self_attn.k_norm.weight",
    "attn_out.weight": "self_attn.o_proj.weight",
    "ff_norm.weight": "post_attention_layernorm.weight",
    "router.weight": "mlp.gate.weight",
}

# Before every name of the base model.
BASE = "model."

_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")

_Tensors = dict[str, torch.Tensor]


def is_olmoe(data: Mapping[str, Any], where: Path) -> bool:
    """Whether a config.json is that of an OLMoE; false where no model of Hugging Face is named.

    Raises:
        Unsupported: it is that of another model of Hugging Face.
    """
    kind, architectures = data.get("model_type"), data.get("architectures")
    if kind == MODEL_TYPE or (kind is None and architectures == [ARCHITECTURE]):
        return True
    if kind is not None or architectures is not None:
        named = f"'model_type' is {shown(kind)}" if kind is not None else f"'architectures' is {shown(architectures)}"
        raise Unsupported(f"field {named}", where=where, fix=f"of Hugging Face's models, {MODEL_TYPE!r} is read")
    return False


def read_checkpoint(path: Path, options: ReadOptions) -> Checkpoint:
    """Open a checkpoint.

    Raises:
        InputRejected: a file is missing, corrupt, unsafe or contradicts the configuration.
        Unsupported: a field or tensor that is not implemented.
        InvalidRequest: a field that shall be ignored is not there, or is understood.
    """
    if (path / ADAPTER_FILE).exists():
        raise Unsupported(
            f"the folder holds an adapter ({ADAPTER_FILE})",
            where=path,
            why="transformers would apply it to other weights",
            fix="merge it into its model and save that: PeftModel.merge_and_unload()",
        )
    read = read_config(path, options.ignore_fields)
    config, notes = read.model, [*read.notes, *weight_notes(path)]
    stored, files = map_tensors(path)
    with located(path):
        tensors = _our_tensors(_unwrapped(stored, notes), config, options.allow_non_finite)
        validate_tensors(config, tensors)
    return Checkpoint(
        path,
        "olmoe",
        config,
        tensors,
        [*read.files, *files],
        tokenizer_files(path),
        ignored_fields=list(options.ignore_fields),
        notes=notes,
    )


def _our_tensors(theirs: _Tensors, config: ModelConfig, allow_non_finite: bool) -> dict[str, CheckpointTensor]:
    """Their tensors, all of them, under our names."""
    _drop_frequencies(theirs, config)
    if config.tie_embeddings:
        _drop_tied_head(theirs)
    for i in range(config.num_layers):
        _split_experts(theirs, config, f"model.layers.{i}.mlp.experts.")
    tensors, shapes = {}, tensor_shapes(config)
    for name, parts in _sources(config).items():
        missing = [part for part in parts if part not in theirs]
        if missing:
            raise InputRejected(f"tensor {missing[0]!r} missing", why="the configuration asks for it")
        for part, shape in zip(parts, _part_shapes(config, name, shapes[name], len(parts)), strict=True):
            if tuple(theirs[part].shape) != shape:
                raise InputRejected(
                    f"tensor {part!r} has shape {list(theirs[part].shape)}, the configuration says {list(shape)}"
                )
        tensors[name] = CheckpointTensor(name, [theirs.pop(part) for part in parts], allow_non_finite, axis=0)
    if theirs:
        raise Unsupported(
            f"unknown tensor {sorted(theirs)[0]!r}", why="a tensor that is left out would change the output"
        )
    return tensors


def _part_shapes(config: ModelConfig, name: str, whole: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """Of the tensors that are joined along dim 0: equal ones, but queries have heads of their own."""
    if name.endswith("att_proj.weight"):
        width = config.kv_heads * config.head_size
        return [(config.hidden_size, whole[1]), (width, whole[1]), (width, whole[1])]
    return [(whole[0] // count, *whole[1:])] * count


def _unwrapped(stored: _Tensors, notes: list[str]) -> _Tensors:
    """Tensors under the names of `OlmoeForCausalLM`: without wrappers, with the prefix that its base model lacks."""
    tensors, wrappers = unwrapped_names(stored)
    # The base model's prefix is one of its own, and stands before every tensor where the embeddings are tied.
    wrappers = [wrapper for wrapper in wrappers if wrapper != BASE]
    if wrappers:
        notes.append(f"names of tensors are read without the wrappers {', '.join(wrappers)}")
    if not any(name.startswith(BASE) for name in tensors):
        tensors = {name if name.startswith("lm_head.") else BASE + name: value for name, value in tensors.items()}
    return tensors


def _drop_frequencies(tensors: _Tensors, config: ModelConfig) -> None:
    """Older checkpoints store what follows from rope_theta; a file of scaled frequencies is another model."""
    half = config.head_size // 2
    expected = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    for name in [name for name in tensors if _FREQUENCIES.fullmatch(name)]:
        stored = tensors.pop(name)
        # fp32 frequencies are computed in fp32: their power has a relative error of about 1e-6.
        tolerance = 1e-5 if stored.dtype == torch.float32 else 2.0 ** (-7 if stored.dtype == torch.bfloat16 else -10)
        if stored.shape != expected.shape or not torch.allclose(stored.double(), expected, rtol=tolerance, atol=1e-7):
            raise InputRejected(
                f"tensor {name!r} is not the frequencies of rope_theta {config.rope_theta:g}",
                why="the model was trained with another base, or with scaled positions, which the configuration lacks",
            )


def _drop_tied_head(tensors: _Tensors) -> None:
    """A tied head may be stored too, or in place of the embedding; it must be the embedding."""
    head = tensors.pop(HEAD, None)
    if head is None:
        return
    embedding = tensors.setdefault(EMBEDDING, head)
    same = head.shape == embedding.shape and all(
        torch.equal(first.double(), second.double())
        for first, second in zip(head.reshape(-1).split(COMPARED), embedding.reshape(-1).split(COMPARED), strict=True)
    )
    if not same:
        raise InputRejected(
            f"tensor {HEAD!r} differs from {EMBEDDING!r}",
            why="tie_word_embeddings is true, which says that they are one",
            fix="set tie_word_embeddings to false if the model was trained with both",
        )


def _split_experts(tensors: _Tensors, config: ModelConfig, prefix: str) -> None:
    """Give each expert its tensors where one tensor holds those of all, as transformers 5 keeps them.

    `gate_up_proj` is [E, 2I, d], gate first, and `down_proj` [E, d, I]: a matrix of nn.Linear for each expert.
    """
    experts = config.experts
    if experts is None:
        return
    count, inner, width = experts.count, experts.inner_size, config.hidden_size
    for name, shape in (("gate_up_proj", (count, 2 * inner, width)), ("down_proj", (count, width, inner))):
        stored = tensors.get(prefix + name)
        if stored is None:
            continue
        if tuple(stored.shape) != shape:
            raise InputRejected(
                f"tensor {prefix + name!r} has shape {list(stored.shape)}, the configuration says {list(shape)}"
            )
        for e, matrix in enumerate(stored):
            parts = (
                {"down_proj": matrix}
                if name == "down_proj"
                else {"gate_proj": matrix[:inner], "up_proj": matrix[inner:]}
            )
            for part, value in parts.items():
                expert = f"{prefix}{e}.{part}.weight"
                if expert in tensors:
                    raise InputRejected(f"tensors {expert!r} and {prefix + name!r} hold the same expert")
                tensors[expert] = value
        del tensors[prefix + name]


def _sources(config: ModelConfig) -> dict[str, list[str]]:
    """Our name -> their tensors, to be joined along dim 0."""
    sources = {"transformer.wte.weight": [EMBEDDING]}
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
        sources["transformer.ff_out.weight"] = [HEAD]
    return sources
