"""From torch ops to ONNX nodes, and an exporter that keeps quiet meanwhile."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import onnxscript
import torch
from onnx.defs import OpSchema

from umv2_export.ops import DOMAIN, VERSION, OpSignatures
from umv2_export.ops.domain import CONTRIB_DOMAIN, PLUGIN_ATTRIBUTES
from umv2_export.ops.experts import contrib_attributes, contrib_schema
from umv2_export.ops.tucker_topk import schema as tucker_topk_schema

__all__ = ["quiet_exporter", "translations"]

Signature = TypeVar("Signature")


def translations(signatures: OpSignatures) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Torch op -> ONNX node, all opaque; a translation to an onnxscript function would be inlined."""
    domain = onnxscript.values.Opset(DOMAIN, VERSION)

    def node(schema: OpSchema, inputs: Sequence[Any], **attributes: Any) -> Any:
        return onnxscript.values.Op(domain, schema.name, schema)(*inputs, **attributes)

    def mixture(
        hidden: Any, router_logits: Any, ff_proj: Sequence[Any], ff_out: Sequence[Any], topk: int, normalize: bool
    ) -> Any:
        signature = _of_model(signatures.experts)
        # A stack has a dimension more; the length does not tell one expert from one stack.
        if len(ff_proj[0].shape) == 2:
            return node(signature.schema(), (hidden, router_logits, *ff_proj, *ff_out))
        contrib = onnxscript.values.Opset(CONTRIB_DOMAIN, 1)
        inputs = (hidden, router_logits, ff_proj[0], None, ff_out[0])
        return onnxscript.values.Op(contrib, "MoE", contrib_schema())(*inputs, **contrib_attributes(signature))

    def scores(queries: Any, keys: Sequence[Any], *_: Any) -> Any:
        signature = _of_model(signatures.key_scores)
        return node(signature.schema(), (queries, *keys), **signature.attributes)

    def tucker(row_scores: Any, col_scores: Any, u: Any, v: Any, cores: Any, row_topk: int, topk: int) -> Any:
        inputs = (row_scores, col_scores, u, v, cores)
        return node(tucker_topk_schema(), inputs, row_topk=row_topk, topk=topk, **PLUGIN_ATTRIBUTES)

    def lookup(
        indices: Any,
        scores: Any,
        group: Any,
        query: Any,
        row_scales: Any,
        rows: Sequence[Any],
        pre_value_dim: int,
        activation: str,
        rows_per_shard: int,
        groups: int,
    ) -> Any:
        optional = [tensor for tensor in (group, query, row_scales) if tensor is not None]
        return node(
            _of_model(signatures.lookup).schema(),
            (indices, scores, *optional, *rows),
            pre_value_dim=pre_value_dim,
            activation=activation,
            rows_per_shard=rows_per_shard,
            groups=groups,
            **PLUGIN_ATTRIBUTES,
        )

    def attention(*inputs: Any) -> Any:
        return node(_of_model(signatures.attention).schema(), inputs)

    return {
        torch.ops.umv2.Experts.default: mixture,
        torch.ops.umv2.KeyScores.default: scores,
        torch.ops.umv2.TuckerTopK.default: tucker,
        torch.ops.umv2.MemoryLookup.default: lookup,
        torch.ops.umv2.StaticAttention.default: attention,
    }


def _of_model(signature: Signature | None) -> Signature:
    """The signature of an op that was met in the model."""
    if signature is None:
        raise AssertionError("the model holds an op of which it has no signature")
    return signature


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes on its own internals: a user can do nothing about them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
