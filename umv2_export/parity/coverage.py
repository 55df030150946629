"""How much of a model the test inputs reached: what they did not, no comparison of outputs has seen."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from umv2_export.bundle import Bundle
from umv2_export.interface import Inner
from umv2_export.parity.cases import Case
from umv2_export.runtimes.base import Array

__all__ = ["Coverage", "LayerCoverage", "Reached"]


@dataclass(frozen=True)
class LayerCoverage:
    """Of one memory layer, the shares that were reached.

    Attributes:
        rows: of the rows that the layer addresses.
        keys: of the row and column keys of all heads, those that led to a row; the scores of all keys were compared.
        blocks: of the virtual blocks; None where the bundle has no groups, so that blocks change nothing.
    """

    rows: float
    keys: float
    blocks: float | None


@dataclass(frozen=True)
class Coverage:
    """Shares that were reached, over all calls.

    Attributes:
        tokens: of the vocabulary.
        rows, keys, blocks: over all memory layers; rows of a pool that layers share count once. None without any.
        experts: of all blocks; None in a model without.
        layers: one by one.
    """

    tokens: float
    rows: float | None
    keys: float | None
    blocks: float | None
    experts: float | None
    layers: list[LayerCoverage]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


class Reached:
    """Marks what each call reached.

    Args:
        bundle: whose maps lead from virtual addresses to rows and blocks.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._config = bundle.config
        self._per_layer = bundle.layout.per_layer
        memory = self._config.memory
        weights = {} if memory.owns_its_rows or not memory.layers else bundle.weights()
        self._maps = {name: value.numpy() for name, value in weights.items() if name.endswith("_map")}
        tables = memory.layers if self._per_layer else min(1, memory.layers)
        self._rows = np.zeros((tables, bundle.layout.rows), dtype=bool)
        self._layer_rows = [np.zeros(bundle.layout.rows, dtype=bool) for _ in range(memory.layers)]
        self._keys = np.zeros((memory.layers, memory.heads, 2, memory.stored_side if memory.layers else 0), dtype=bool)
        self._blocks = np.zeros((memory.layers, memory.value_groups), dtype=bool)
        self._tokens = np.zeros(self._config.vocab_size, dtype=bool)
        experts = self._config.experts
        self._experts = np.zeros((self._config.num_layers, experts.count if experts else 0), dtype=bool)

    def add(self, case: Case, probes: Mapping[str, Array]) -> None:
        """Mark what a call reached; of a side that shows its routing."""
        real = case.real_tokens.ravel()
        ids = case.step.input_ids.ravel()[real]
        self._tokens[ids[ids < len(self._tokens)]] = True
        memory = self._config.memory
        for j in range(memory.layers):
            addresses_TK = probes[Inner.ADDRESSES.at(j)][real]
            rows_TK = self._mapped(j, "address_map", addresses_TK)
            self._layer_rows[j][rows_TK] = True
            self._rows[j if self._per_layer else 0][rows_TK] = True
            addresses_THK = addresses_TK.reshape(len(addresses_TK), memory.heads, -1)
            for h in range(memory.heads):
                self._keys[j, h, 0, addresses_THK[:, h] // memory.stored_side] = True
                self._keys[j, h, 1, addresses_THK[:, h] % memory.stored_side] = True
            if memory.value_groups > 1:
                self._blocks[j, self._mapped(j, "group_map", addresses_TK)] = True
        if self._config.experts is not None:
            for i in range(self._config.num_layers):
                logits = probes[Inner.ROUTER_LOGITS.at(i)][real]
                chosen = np.argsort(-logits, axis=1, kind="stable")[:, : self._config.experts.topk]
                self._experts[i, chosen] = True

    def coverage(self) -> Coverage:
        """All calls together."""
        memory = self._config.memory
        grouped = memory.value_groups > 1
        layers = [
            LayerCoverage(
                float(self._layer_rows[j].sum() / memory.visible_rows),
                float(self._keys[j].mean()),
                float(self._blocks[j].mean()) if grouped else None,
            )
            for j in range(memory.layers)
        ]
        return Coverage(
            tokens=float(self._tokens.mean()),
            rows=float(self._rows.mean()) if layers else None,
            keys=float(self._keys.mean()) if layers else None,
            blocks=float(self._blocks.mean()) if layers and grouped else None,
            experts=float(self._experts.mean()) if self._config.experts is not None else None,
            layers=layers,
        )

    def _mapped(self, layer: int, name: str, addresses: Array) -> Array:
        table = self._maps.get(f"transformer.mem_blocks.{layer}.{name}")
        return addresses if table is None else table[addresses]
