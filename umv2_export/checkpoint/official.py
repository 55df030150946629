"""The authors' format: `config.yaml` beside `model.pt`, or beside `rank_{g}/model.pt` of a vertical-parallel run.

Source: the released training code (an OLMoE fork).
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from umv2_export.checkpoint.checkpoint import Checkpoint, CheckpointTensor, validate_tensors
from umv2_export.checkpoint.official_fields import check_field_classes
from umv2_export.config import MOST_REPEATS, TABLES, MemoryConfig, ModelConfig, QueryLayout
from umv2_export.errors import InputRejected, Umv2Error, Unsupported, shown
from umv2_export.files import inside, tokenizer_files

__all__ = ["CONFIG_FILE", "model_config", "read_checkpoint"]

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.pt"

# A real config.yaml has 10 KB and a real state dict's pickle 200 KB; more is an attack or another file.
MAX_CONFIG_BYTES = 2**20
MAX_PICKLE_BYTES = 64 * 2**20

# Derived copies of the cores that forks of the released code save.
IGNORED_TENSORS = ("tucker_core_uv", "tucker_core_stacked")


def read_checkpoint(path: Path, *, query_layout: QueryLayout | None, allow_non_finite: bool) -> Checkpoint:
    """Open a checkpoint in the authors' format.

    Raises:
        InputRejected: a file is missing, corrupt, unsafe or contradicts the configuration.
        Unsupported: a field or tensor that is not implemented.
    """
    config_file = path / CONFIG_FILE
    fields = _read_fields(config_file)
    weight_files = _weight_files(path, fields)
    states = [_load_state_dict(file) for file in weight_files]
    tensors = {}
    for name, first in states[0].items():
        leaf = name.rpartition(".")[2]
        if leaf in IGNORED_TENSORS:
            continue
        parts = [first]
        if leaf in TABLES and len(states) > 1:
            parts = [_rank_slice(state, name, first, file) for state, file in zip(states, weight_files, strict=True)]
        tensors[name] = CheckpointTensor(name, parts, allow_non_finite)
    try:
        config = model_config(
            fields,
            rank_and_cores=_rank_and_cores(tensors, weight_files[0]),
            query_layout=query_layout or "released",
        )
    except Umv2Error as error:
        error.where = error.where or str(config_file)
        raise
    validate_tensors(config, tensors, where=weight_files[0])
    return Checkpoint(path, "official", config, tensors, [config_file, *weight_files], tokenizer_files(path))


def model_config(
    fields: Mapping[str, Any], *, rank_and_cores: tuple[int, int], query_layout: QueryLayout = "released"
) -> ModelConfig:
    """Translate the `model:` section of a config.yaml.

    Args:
        fields: the section.
        rank_and_cores: Tucker rank and number of cores, which only the tensors tell.
        query_layout: which the file does not tell either.

    Raises:
        InputRejected: a field is missing or out of range.
        Unsupported: an unknown field, or a value that is not implemented.
    """
    check_field_classes(fields)
    read = _FieldReader(fields)
    kind = read.text("mem_type")
    if kind not in ("ultramem_v2", "ultramem_v1"):
        raise Unsupported(f"mem_type is {kind!r}", fix="supported values: ultramem_v2, ultramem_v1")
    d, layers = read.integer("d_model"), read.integer("n_layers")
    groups = read.integer("mem_value_expand_time")
    topk = read.integer("mem_knn")
    v1 = kind == "ultramem_v1"
    expansion = round(groups**0.5) if v1 else read.integer("mem_key_expand_time")
    if v1 and expansion**2 != groups:
        raise Unsupported(f"mem_value_expand_time is {groups}: UltraMem V1 needs a square")
    memory = MemoryConfig(
        kind="ultramem_v1" if v1 else "ultramem_v2",
        keys_per_side=read.integer("mem_knum"),
        key_dim=read.integer("mem_kdim"),
        value_dim=read.integer("mem_vdim"),
        pre_value_dim=read.integer("mem_pre_vdim", minimum=0),
        heads=read.integer("mem_head"),
        topk=topk,
        row_topk=topk,
        placements=_placements(read.text("mem_insert_way"), layers),
        # V1 has a table per layer and one query for both ranks, whatever these two fields say.
        share_ratio=1.0 if v1 else read.real("mem_share_ratio"),
        query_per_rank=False if v1 else read.boolean("mem_q_for_each_tucker_rank"),
        key_expansion=expansion,
        value_groups=groups,
        query_layout=query_layout,
        activation="gelu" if read.boolean("mem_use_glu_act") else "none",
        tucker_rank=rank_and_cores[0],
        tucker_cores=rank_and_cores[1],
    )
    vocab_size = read.integer("vocab_size")
    return ModelConfig(
        hidden_size=d,
        num_layers=layers,
        num_heads=read.integer("n_heads"),
        ffn_size=_ffn_size(read, d),
        vocab_size=vocab_size,
        embedding_size=vocab_size if fields.get("embedding_size") is None else read.integer("embedding_size"),
        tie_embeddings=read.boolean("weight_tying"),
        max_sequence_length=read.integer("max_sequence_length"),
        rope_theta=read.real("rope_theta"),
        norm_eps=1e-5,
        eos_token_id=read.optional_integer("eos_token_id"),
        pad_token_id=read.optional_integer("pad_token_id"),
        memory=memory,
    )


class _FieldReader:
    """Typed access to the fields of an untrusted mapping."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def _value(self, name: str) -> object:
        if name not in self._fields:
            raise InputRejected(f"field '{name}' is missing", fix="take the config.yaml that training wrote")
        return self._fields[name]

    def integer(self, name: str, *, minimum: int = 1) -> int:
        value = self._value(name)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**31:
            problem = f"field '{name}' must be an integer from {minimum} to {2**31 - 1}, got {shown(value)}"
            raise InputRejected(problem)
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self._value(name) is None else self.integer(name, minimum=0)

    def real(self, name: str) -> float:
        value = self._value(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
            raise InputRejected(f"field '{name}' must be a positive number, got {shown(value)}")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self._value(name)
        if not isinstance(value, bool):
            raise InputRejected(f"field '{name}' must be true or false, got {shown(value)}")
        return value

    def text(self, name: str) -> str:
        value = self._value(name)
        if not isinstance(value, str):
            raise InputRejected(f"field '{name}' must be text, got {shown(value)}")
        return value


def _ffn_size(read: _FieldReader, hidden_size: int) -> int:
    """Inner FFN size: `mlp_hidden_size`, or `mlp_ratio` * d_model, holds linear and gate part together."""
    both = read.optional_integer("mlp_hidden_size")
    if both is None:
        both = int(read.real("mlp_ratio") * hidden_size)
    if both < 2 or both % 2:
        raise InputRejected(f"the FFN's hidden size {both} must be even: one half is the gate")
    return both // 2


def _placements(insert_way: str, layers: int) -> tuple[tuple[int, int], ...]:
    """`full`, or `read:add` pairs separated by `/`."""
    if layers > MOST_REPEATS:
        raise Unsupported(f"n_layers is {layers}, at most {MOST_REPEATS} are supported")
    if insert_way == "full":
        return tuple((i, i) for i in range(layers))
    if not re.fullmatch(r"\d{1,6}:\d{1,6}(/\d{1,6}:\d{1,6})*", insert_way):
        raise InputRejected(f"mem_insert_way is {insert_way!r}", fix="expected 'full' or pairs such as '0:1/2:2'")
    pairs = (pair.split(":") for pair in insert_way.split("/"))
    return tuple((int(read), int(add)) for read, add in pairs)


def _read_fields(config_file: Path) -> Mapping[str, Any]:
    if not config_file.is_file():
        raise InputRejected("the configuration is not a file", where=config_file)
    if config_file.stat().st_size > MAX_CONFIG_BYTES:
        raise InputRejected(f"the file is larger than {MAX_CONFIG_BYTES} bytes", where=config_file)
    try:
        data = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except Exception as error:  # the constructors of dates and numbers raise whatever they like
        raise InputRejected("not a YAML file", where=config_file, why=" ".join(str(error).split())[:500]) from error
    fields = data.get("model") if isinstance(data, dict) else None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise InputRejected("section 'model' is missing or not a mapping", where=config_file)
    return fields


def _weight_files(path: Path, fields: Mapping[str, Any]) -> list[Path]:
    """model.pt, or rank_0/model.pt .. rank_{P-1}/model.pt: more ranks hold copies of these slices."""
    if (path / WEIGHTS_FILE).exists():
        return [inside(path, WEIGHTS_FILE)]
    if not (path / "rank_0").exists():
        raise InputRejected(f"neither {WEIGHTS_FILE} nor rank_0/{WEIGHTS_FILE} is there", where=path)
    ranks = _FieldReader(fields).integer("mem_parallel_size")
    files = []
    for rank in range(ranks):
        name = f"rank_{rank}/{WEIGHTS_FILE}"
        if not (path / name).exists():
            raise InputRejected(f"{name} is missing", where=path, why=f"mem_parallel_size is {ranks}")
        files.append(inside(path, name))
    return files


def _rank_slice(state: Mapping[str, torch.Tensor], name: str, first: torch.Tensor, file: Path) -> torch.Tensor:
    part = state.get(name)
    if part is None:
        raise InputRejected(f"tensor {name!r} missing", where=file, why="each rank holds its own slice of the tables")
    if part.dim() != 2 or first.dim() != 2 or part.shape[0] != first.shape[0]:
        raise InputRejected(
            f"tensor {name!r} has shape {list(part.shape)}, rank 0 has {list(first.shape)}",
            where=file,
            why="the slices are joined along dim 1",
        )
    return part


def _rank_and_cores(tensors: Mapping[str, CheckpointTensor], where: Path) -> tuple[int, int]:
    layer = "transformer.mem_blocks.0."
    keys = tensors.get(layer + "keys")
    if keys is None:
        raise InputRejected(f"tensor '{layer}keys' missing", where=where, why="it tells the Tucker rank")
    cores = sum(name.startswith(layer + "tucker_core.") for name in tensors)
    if not cores or len(keys.shape) != 5 or not keys.shape[-1]:
        raise InputRejected(
            f"tensor '{layer}keys' has shape {list(keys.shape)} and there are {cores} '{layer}tucker_core.*'",
            where=where,
            why="expected keys [heads, 2, keys per side, key size, Tucker rank] and at least one core",
        )
    return keys.shape[-1], cores


def _load_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Map a state dict: only tensors, no code, and no more bytes than the file has."""
    _check_archive(file)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # corrupt bytes make the unpickler raise nearly anything
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise InputRejected(
                "the file holds more than tensors",
                where=file,
                why="loading it would run code from the file",
                fix="save the state dict alone: torch.save(model.state_dict(), ...)",
            ) from error
        raise InputRejected("the file is truncated or corrupt", where=file, why=_first_line(error)) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise InputRejected("the file is not a state dict of named tensors", where=file)
    for name, value in state.items():
        # Anything else than a plain array could not be mapped, or would not mean what its bytes say.
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_neg():
            raise InputRejected(f"tensor {name!r} is not a plain array", where=file)
    return {name: value.detach() for name, value in state.items()}


def _check_archive(file: Path) -> None:
    """Reject what torch cannot map: no zip archive, or compressed entries, or a pickle of absurd size."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise InputRejected("the file cannot be read", where=file, why=_first_line(error)) from error
    except (zipfile.BadZipFile, ValueError) as error:
        raise InputRejected(
            "the file is truncated, or no torch checkpoint",
            where=file,
            why=f"not a zip archive ({_first_line(error)})",
            fix="copy the file again; a checkpoint of torch before 1.6 must be saved again with a newer torch",
        ) from error
    for entry in entries:
        too_large = entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_BYTES
        if entry.compress_type != zipfile.ZIP_STORED or too_large:
            raise InputRejected(
                f"entry {entry.filename!r} is compressed or too large ({entry.file_size} bytes)",
                where=file,
                why="torch.save stores its entries plain",
            )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
