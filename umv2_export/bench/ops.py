"""The native ops against their peers and against the plain gather ceiling of the machine, in one run."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from umv2_export.bench.ceilings import gather_rate
from umv2_export.bench.memory_layer import memory_layer_model
from umv2_export.bench.sessions import open_session, share_threads
from umv2_export.bench.single_op import key_scores_model, lookup_model, repeated, tucker_model, with_constants
from umv2_export.bench.timing import Timing, time_in_turns
from umv2_export.layout import TableLayout
from umv2_export.onnx.signatures import op_signatures
from umv2_export.ops import KeyScoresSignature, LookupSignature
from umv2_export.presets import PRESETS
from umv2_export.system.host_memory import anonymous_memory

__all__ = ["OpResult", "benchmark_ops"]

Array = npt.NDArray[Any]
Call = Callable[[int], object]

# Large against any last-level cache, and what a 24 GiB machine holds beside its peers.
TABLE_BYTES = 4 * 2**30
VALUE_DIM = 1024
HITS = 64

# Nodes in one graph while a call is short, as the layers of a model: else the call of a session, 20 us, counts in full.
FEW_TOKENS, NODES = 8, 20

# Of the layout that a signature is asked for; no shard is made.
SHARD_BYTES = 2 * 10**9

# Indices of this many calls are drawn beforehand.
CALLS = 64

_TYPES = {
    "fp32": (torch.float32, "float", 1),
    "fp16": (torch.float16, "float16", 10),
    "bf16": (torch.bfloat16, "bfloat16", 16),
    "int8": (torch.int8, "int8", 3),
}


@dataclass(frozen=True)
class OpResult:
    """One line of the report.

    Attributes:
        measure: what is compared.
        batch: tokens.
        native, peer: times in ms; no peer time where the peer is a rate.
        ratio: time of the peer / time of the native op, or share of the ceiling.
        target: what the project aims at.
        gigabytes_per_second: rate of the native op where it moves rows.
    """

    measure: str
    batch: int
    native: Timing
    peer: Timing | None
    ratio: float
    target: float
    gigabytes_per_second: float | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def benchmark_ops(*, rounds: int, threads: int, table_bytes: int = TABLE_BYTES) -> Iterator[OpResult]:
    """Run all comparisons, one table in memory at a time."""
    share_threads(threads)
    torch.set_num_threads(threads)
    for dtype in ("fp32", "bf16", "int8"):
        yield from _lookups(dtype, rounds, threads, table_bytes)
    yield from _lookups("bf16", rounds, threads, table_bytes, huge_pages=True)
    yield from _pre_value_lookups(rounds, table_bytes)
    published = [_key_signature(preset) for preset in ("umv2-227m-1.2b", "umv2-1b-7b")]
    # Beside the two published shapes, more keys of fewer elements: the retrieval of 1024 keys that is timed below.
    for signature in (*published, replace(published[0], key_dim=256, keys_per_side=1024)):
        yield from _key_scores(signature, rounds)
    yield from _retrievals(rounds)
    yield from _memory_layers(rounds)


def _random_table(rows: int, columns: int, dtype: torch.dtype, *, huge_pages: bool = False) -> torch.Tensor:
    """Filled piece by piece; int8 and 16-bit rows need no fp32 copy of the whole."""
    memory = anonymous_memory(rows * columns * dtype.itemsize, huge_pages=huge_pages)
    table = torch.frombuffer(memory, dtype=dtype).reshape(rows, columns)
    for piece in table.split(2**16):
        drawn = torch.randn(piece.shape)
        piece.copy_((drawn * 40).clamp(-127, 127) if dtype == torch.int8 else drawn)
    return table


def _ort_value(table: torch.Tensor, dtype: str) -> Any:
    """The table as an input of a session, without a copy where numpy knows the type."""
    bits = table.view(torch.uint16).numpy() if dtype == "bf16" else table.numpy()
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _TYPES[dtype][2])


def _bound_call(session: Any, fixed: dict[str, Any], changing: dict[str, list[Array]]) -> Call:
    """A call whose inputs were bound beforehand: the table is never copied, and no binding is timed."""
    bindings = [session.io_binding() for _ in range(CALLS)]
    for number, binding in enumerate(bindings):
        for name, value in fixed.items():
            binding.bind_ortvalue_input(name, value)
        for name, arrays in changing.items():
            binding.bind_cpu_input(name, arrays[number])
        for output in session.get_outputs():
            binding.bind_output(output.name)

    def call(number: int) -> None:
        session.run_with_iobinding(bindings[number % CALLS])

    return call


def _lookups(
    dtype: str, rounds: int, threads: int, table_bytes: int, *, huge_pages: bool = False
) -> Iterator[OpResult]:
    torch_dtype, onnx_type, _ = _TYPES[dtype]
    rows = table_bytes // (VALUE_DIM * torch_dtype.itemsize)
    table = _random_table(rows, VALUE_DIM, torch_dtype, huge_pages=huge_pages)
    label = f"lookup {dtype}{', huge pages' if huge_pages else ''}"
    words = table.view(torch.uint8).reshape(-1).view(torch.float32).numpy()
    ceiling = gather_rate(words, VALUE_DIM * torch_dtype.itemsize, threads)
    signature = LookupSignature(shards=1, pre_values=False, quantized=dtype == "int8")
    model = lookup_model(signature, pre_value_dim=0, rows_per_shard=rows, rows=onnx_type)
    fixed = {"rows_0": _ort_value(table, dtype)}
    if dtype == "int8":
        scales = np.full((rows, 2), 1 / 40, dtype=np.float32)
        fixed["row_scales"] = onnxruntime.OrtValue.ortvalue_from_numpy(scales)
    rng = np.random.default_rng(0)
    for batch in (1, 8, 64, 512):
        nodes = NODES if batch <= FEW_TOKENS else 1
        session = open_session(repeated(model, "row", nodes), native=True, threads=None)
        indices = [[rng.integers(0, rows, (batch, HITS)) for _ in range(CALLS)] for _ in range(nodes)]
        scores = [rng.standard_normal((batch, HITS, 1)).astype(np.float32)] * CALLS
        changing = {f"indices.{i}": indices[i] for i in range(nodes)} | {f"scores.{i}": scores for i in range(nodes)}
        contenders = [_bound_call(session, fixed, changing)]
        if dtype != "int8":
            contenders.append(_embedding_bag(table, indices, scores[0]))
        native, *peers = (timing.divided(nodes) for timing in time_in_turns(contenders, rounds=rounds))
        size = batch * HITS * VALUE_DIM * torch_dtype.itemsize
        rate = size / (native.p50 * 1e-3)
        goal = 0.8 if batch == 1 and dtype == "int8" else 0.85 if batch == 1 or dtype == "int8" else 1.0
        yield OpResult(
            f"{label} / gather ceiling {ceiling / 1e9:.1f} GB/s",
            batch,
            native,
            None,
            rate / ceiling,
            goal,
            rate / 1e9,
        )
        for peer in peers:
            yield OpResult(
                f"{label} / torch embedding_bag",
                batch,
                native,
                peer,
                peer.p50 / native.p50,
                1.9 if batch == 1 else 1.3,
                rate / 1e9,
            )


def _embedding_bag(table: torch.Tensor, indices: list[list[Array]], scores: Array) -> Call:
    """The strongest peer of torch, once for each node."""
    chosen = [[torch.from_numpy(array) for array in node] for node in indices]
    weights = torch.from_numpy(scores[:, :, 0]).to(table.dtype)

    def call(number: int) -> None:
        for node in chosen:
            torch.nn.functional.embedding_bag(node[number % CALLS], table, mode="sum", per_sample_weights=weights)

    return call


def _pre_value_lookups(rounds: int, table_bytes: int) -> Iterator[OpResult]:
    size = 256
    rows = table_bytes // (2 * size * 4)
    table = {"rows_0": _ort_value(_random_table(rows, 2 * size, torch.float32), "fp32")}
    model = lookup_model(LookupSignature(shards=1), pre_value_dim=size, rows_per_shard=rows)
    rng = np.random.default_rng(0)
    for batch in (1, 8, 64):
        nodes = NODES if batch <= FEW_TOKENS else 1
        several = repeated(model, "row", nodes)
        sessions = [open_session(several, native=native, threads=None) for native in (True, False)]
        changing: dict[str, list[Array]] = {}
        for i in range(nodes):
            changing |= {
                f"indices.{i}": [rng.integers(0, rows, (batch, HITS)) for _ in range(CALLS)],
                f"scores.{i}": [rng.standard_normal((batch, HITS, 2)).astype(np.float32)] * CALLS,
                f"query.{i}": [rng.standard_normal((batch, size)).astype(np.float32)] * CALLS,
            }
        contenders = [_bound_call(session, table, changing) for session in sessions]
        native, stock = (timing.divided(nodes) for timing in time_in_turns(contenders, rounds=rounds))
        rate = batch * HITS * 2 * size * 4 / (native.p50 * 1e-3)
        yield OpResult(
            "lookup with pre-values / ONNX Runtime standard ops",
            batch,
            native,
            stock,
            stock.p50 / native.p50,
            3.0,
            rate / 1e9,
        )


def _key_signature(preset: str) -> KeyScoresSignature:
    config = PRESETS[preset]
    signature = op_signatures(config, TableLayout.of(config.memory, torch.float32, SHARD_BYTES)).key_scores
    if signature is None:
        raise AssertionError(f"{preset} has no memory layers")
    return signature


def _key_scores(signature: KeyScoresSignature, rounds: int) -> Iterator[OpResult]:
    """One node against the nodes that stock ONNX Runtime makes of its body; keys are constants of the model in both."""
    columns = signature.heads * signature.keys_per_side * signature.ranks // len(signature.row_chunks)
    rng = np.random.default_rng(0)
    for batch, goal in ((1, 1.5), (4, 1.3), (8, 1.3), (64, 1.0), (256, 1.0)):
        nodes = NODES if batch <= FEW_TOKENS else 1
        keys = {
            f"{name}.{i}": (rng.standard_normal((signature.key_dim, columns)) * 0.1).astype(np.float32)
            for name in signature.matrices
            for i in range(nodes)
        }
        model = with_constants(repeated(key_scores_model(signature), "queries", nodes), keys)
        size = signature.query_chunks * signature.key_dim
        queries = [rng.standard_normal((batch, size)).astype(np.float32) for _ in range(CALLS)]
        sessions = [open_session(model, native=native, threads=None) for native in (True, False)]
        contenders = [_bound_call(session, {}, {"queries": queries}) for session in sessions]
        native, stock = (timing.divided(nodes) for timing in time_in_turns(contenders, rounds=rounds))
        shape = f"{signature.key_dim} x {signature.keys_per_side}"
        yield OpResult(
            f"key_scores {shape} / ONNX Runtime standard ops", batch, native, stock, stock.p50 / native.p50, goal
        )


def _retrievals(rounds: int) -> Iterator[OpResult]:
    model = tucker_model(row_topk=HITS, topk=HITS)
    sessions = [open_session(model, native=native, threads=None) for native in (True, False)]
    rng = np.random.default_rng(0)
    for batch in (1, 8, 64):
        shapes = {
            "row_scores": (batch, 1, 1024, 2),
            "col_scores": (batch, 1, 1024, 2),
            "u": (1, 2),
            "v": (1, 2),
            "cores": (2, 1, 2, 2),
        }
        changing: dict[str, list[Array]] = {
            name: [rng.standard_normal(shape).astype(np.float32) for _ in range(CALLS)]
            for name, shape in shapes.items()
        }
        native, stock = time_in_turns([_bound_call(session, {}, changing) for session in sessions], rounds=rounds)
        yield OpResult(
            "tucker_topk n 1024, m 64 / ONNX Runtime standard ops", batch, native, stock, stock.p50 / native.p50, 2.0
        )


def _memory_layers(rounds: int) -> Iterator[OpResult]:
    """Projections, scores, retrieval and lookup; keys in 32 bits on both sides, then in 16 bits on the native one."""
    config = PRESETS["umv2-227m-1.2b"]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for key_dtype, native in ((torch.float32, True), (torch.float16, True), (torch.float32, False)):
            model = memory_layer_model(config, Path(folder), key_dtype)
            sessions.append(open_session(model, native=native, threads=None))
        for batch, goal in ((1, 2.5), (8, 3.0), (64, 3.0)):
            hidden: list[Array] = [
                rng.standard_normal((batch, config.hidden_size)).astype(np.float32) for _ in range(CALLS)
            ]
            contenders = [_bound_call(session, {}, {"hidden": hidden}) for session in sessions]
            *timings, stock = time_in_turns(contenders, rounds=rounds)
            for keys, timing in zip(("", ", fp16 keys"), timings, strict=True):
                name = f"memory layer, 227M/1.2B shape{keys} / stock ONNX Runtime"
                yield OpResult(name, batch, timing, stock, stock.p50 / timing.p50, goal)
