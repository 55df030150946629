"""The models that are trained: a pair of equal size, UltraMem V1, and UltraMemV2 with one thing changed.

Every one has the total and the activated parameters of the mixture of experts within 1 %: what a change takes, the FFN
gives back.
"""

from dataclasses import dataclass, replace

from samples.training.corpus import END_OF_TEXT
from umv2_export.config import ExpertsConfig, MemoryConfig, ModelConfig
from umv2_export.model.initialization import Scheme

__all__ = ["CONTENDERS", "SHIPPED", "Contender"]

LAYERS = 4


@dataclass(frozen=True)
class Contender:
    """A model to train.

    Attributes:
        config: the model.
        about: what it is, or what is changed in it.
        scheme: initialisation of the tables.
        table_rate: the learning rate of the tables starts at this many times that of all else, and ends at 1.
    """

    config: ModelConfig
    about: str
    scheme: Scheme = "principled"
    table_rate: float = 4.0


def _model(ffn_size: int, memory: MemoryConfig, experts: ExpertsConfig | None = None) -> ModelConfig:
    return ModelConfig(
        hidden_size=128,
        num_layers=LAYERS,
        num_heads=4,
        ffn_size=ffn_size,
        vocab_size=256,
        embedding_size=256,
        tie_embeddings=True,
        max_sequence_length=256,
        eos_token_id=END_OF_TEXT,
        pad_token_id=1,
        memory=memory,
        experts=experts,
    )


MEMORY = MemoryConfig(
    kind="ultramem_v2",
    keys_per_side=90,
    key_dim=32,
    value_dim=32,
    pre_value_dim=32,
    heads=1,
    topk=16,
    row_topk=16,
    placements=tuple((i, i) for i in range(LAYERS)),
    share_ratio=1 / LAYERS,
)
V1_MEMORY = MemoryConfig(
    kind="ultramem_v1",
    keys_per_side=127,
    key_dim=32,
    value_dim=64,
    pre_value_dim=0,
    heads=1,
    topk=32,
    row_topk=32,
    placements=((0, 1), (2, 3)),
    key_expansion=2,
    value_groups=4,
    query_per_rank=False,
)

CONTENDERS = {
    "moe": Contender(
        _model(0, MemoryConfig.absent(), ExpertsConfig(64, 8, 24)), "8 of 64 experts in each block", "released"
    ),
    "umv2": Contender(
        _model(114, replace(MEMORY, topk=32, row_topk=32)), "UltraMemV2: all five changes, 32 rows a token and layer"
    ),
    "umv1": Contender(_model(116, V1_MEMORY), "UltraMem V1", scheme="released"),
    # The others change one thing in this one.
    "16-rows": Contender(_model(116, MEMORY), "UltraMemV2 with 16 rows a token and layer"),
    "few-layers": Contender(
        _model(159, replace(MEMORY, placements=((1, 1), (3, 3)), keys_per_side=127, share_ratio=0.5)),
        "memory in 2 of 4 blocks, twice the rows in each",
    ),
    "group-projections": Contender(
        _model(55, replace(MEMORY, key_expansion=2, value_groups=4)),
        "values expanded four times, a projection per group of virtual addresses",
    ),
    "no-pre-values": Contender(
        _model(116, replace(MEMORY, pre_value_dim=0, value_dim=64)), "no pre-values, values twice as long", "released"
    ),
    "plain-init": Contender(_model(116, MEMORY), "tables drawn with deviation 0.02", "released"),
    "64-rows": Contender(_model(106, replace(MEMORY, topk=64, row_topk=64)), "4 times the rows, a smaller FFN"),
    "4-rows": Contender(_model(118, replace(MEMORY, topk=4, row_topk=4)), "a quarter of the rows, a larger FFN"),
    "plain-rate": Contender(_model(116, MEMORY), "tables at the learning rate of all else", table_rate=1.0),
    "shared": Contender(_model(105, replace(MEMORY, share_ratio=0.5)), "each layer sees half of the pool"),
}

SHIPPED = ("umv2", "moe", "umv1")
