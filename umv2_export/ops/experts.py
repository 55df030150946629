"""umv2::Experts: the SwiGLU experts that a token chooses.

    p = softmax(router_logits),   chosen = top-k of p,   [linear; gate] = ff_proj[e] @ hidden[t]
    output[t] = sum over chosen e of p[t, e] * ff_out[e] @ (linear * silu(gate))

The baseline that memory layers are measured against, exported in two forms. `contrib` is one com.microsoft::MoE node,
which wants all experts stacked and the rows of gate and linear part interleaved.
`standard` is a function of standard ops: each expert gathers its tokens. Source: OLMoE, arXiv 2409.02060.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx.defs import OpSchema

from umv2_export.ops.domain import CONTRIB_DOMAIN, op_schema, parse_body

__all__ = ["NAME", "ExpertsSignature", "contrib_attributes", "contrib_schema", "experts"]

NAME = "Experts"


@torch.library.custom_op(f"umv2::{NAME}", mutates_args=())
def experts(
    hidden: torch.Tensor,
    router_logits: torch.Tensor,
    ff_proj: Sequence[torch.Tensor],
    ff_out: Sequence[torch.Tensor],
    topk: int,
    normalize: bool,
) -> torch.Tensor:
    """Route tokens to experts; eager reference.

    Args:
        hidden: [T, D].
        router_logits: [T, E].
        ff_proj: E matrices [2I, D], linear part first; or one stack [E, 2I, D] of rows gate 0, linear 0, gate 1, ...
        ff_out: E matrices [D, I], or one stack [E, D, I].
        topk: experts of a token.
        normalize: divide the weights of the chosen experts by their sum.

    Returns:
        [T, D] in the dtype of hidden.

    Raises:
        ValueError: shapes contradict each other.
    """
    stacked = ff_proj[0].dim() == 3
    count = len(ff_proj[0]) if stacked else len(ff_proj)
    if router_logits.shape != (len(hidden), count) or not 1 <= topk <= count:
        raise ValueError(f"router_logits {list(router_logits.shape)} and top {topk} for {count} experts")
    weight_TK, chosen_TK = router_logits.float().softmax(-1).topk(topk)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    output = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    for e in range(count):
        token, place = (chosen_TK == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        inner = hidden[token] @ (ff_proj[0][e] if stacked else ff_proj[e]).T
        gate, linear = (inner[:, 0::2], inner[:, 1::2]) if stacked else inner.chunk(2, -1)[::-1]
        expert_output = (torch.nn.functional.silu(gate) * linear) @ (ff_out[0][e] if stacked else ff_out[e]).T
        output.index_add_(0, token, expert_output.float() * weight_TK[token, place, None])
    return output.to(hidden.dtype)


@experts.register_fake
def _(
    hidden: torch.Tensor,
    router_logits: torch.Tensor,
    ff_proj: Sequence[torch.Tensor],
    ff_out: Sequence[torch.Tensor],
    topk: int,
    normalize: bool,
) -> torch.Tensor:
    return torch.empty_like(hidden)


@dataclass(frozen=True)
class ExpertsSignature:
    """What is the same in all Experts nodes of a model of the standard form.

    Attributes:
        count: experts.
        topk: of them, for each token.
        normalize: divide the weights of the chosen experts by their sum.
    """

    count: int
    topk: int
    normalize: bool

    @property
    def matrices(self) -> list[str]:
        """Names of the inputs that hold weights, in order."""
        return [f"{kind}_{e}" for kind in ("ff_proj", "ff_out") for e in range(self.count)]

    def schema(self) -> OpSchema:
        """The ONNX schema of this arity. No plugin attributes: every runtime computes it in its own ops."""
        return op_schema(
            NAME,
            "SwiGLU experts, each applied to the tokens that choose it.",
            inputs=[("hidden", "T"), ("router_logits", "T"), *((name, "T") for name in self.matrices)],
            outputs=[("output", "T")],
            type_constraints={"T": ("float", "float16", "bfloat16")},
            attributes={},
            plugin=False,
        )

    def function_body(self, *, opset: int) -> ir.Function:
        """The op in standard ONNX ops."""
        text = _ROUTE.format(topk=self.topk)
        text += (
            "total = ReduceSum <keepdims = 1> (top, last)\nweight_TK = Div (top, total)\n"
            if self.normalize
            else ("weight_TK = Identity (top)\n")
        )
        for e in range(self.count):
            text += _EXPERT.format(e=e)
        outputs, places = (", ".join(f"{name}_{e}" for e in range(self.count)) for name in ("weighted", "place_N2"))
        text += f"outputs = Concat <axis = 0> ({outputs})\nplaces = Concat <axis = 0> ({places})\n{_SUM}"
        return parse_body(self.schema(), text, opset=opset)


def contrib_schema() -> OpSchema:
    """com.microsoft::MoE with the inputs and attributes that are used; ONNX Runtime knows the whole."""
    kinds = {
        "k": OpSchema.AttrType.INT,
        "activation_type": OpSchema.AttrType.STRING,
        "swiglu_fusion": OpSchema.AttrType.INT,
        "normalize_routing_weights": OpSchema.AttrType.INT,
        "activation_alpha": OpSchema.AttrType.FLOAT,
        "activation_beta": OpSchema.AttrType.FLOAT,
    }
    parameter = OpSchema.FormalParameter
    optional = OpSchema.FormalParameterOption.Optional
    return OpSchema(
        "MoE",
        CONTRIB_DOMAIN,
        1,
        inputs=[
            parameter("input", "T"),
            parameter("router_probs", "T"),
            parameter("fc1_experts_weights", "T"),
            parameter("fc1_experts_bias", "T", param_option=optional),
            parameter("fc2_experts_weights", "T"),
        ],
        outputs=[parameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(name, kind, required=False) for name, kind in kinds.items()],
    )


def contrib_attributes(signature: ExpertsSignature) -> dict[str, int | float | str]:
    """The attributes of a com.microsoft::MoE node that computes SwiGLU on interleaved rows."""
    return {
        "k": signature.topk,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": int(signature.normalize),
    }


_ROUTE = """
    last = Constant <value = int64[1] {{-1}}> ()
    topk = Constant <value = int64[1] {{{topk}}}> ()
    logits_f = Cast <to = 1> (router_logits)
    probability = Softmax <axis = -1> (logits_f)
    top, chosen_TK = TopK <axis = -1, largest = 1, sorted = 0> (probability, topk)
"""

# The token indices of those that choose expert e, and its output for them. An expert that nobody chooses multiplies
# matrices of no rows.
_EXPERT = """
    number_{e} = Constant <value = int64 {{{e}}}> ()
    here_{e} = Equal (chosen_TK, number_{e})
    place_2N_{e} = NonZero (here_{e})
    place_N2_{e} = Transpose <perm = [1, 0]> (place_2N_{e})
    weight_{e} = GatherND (weight_TK, place_N2_{e})
    weight_N1_{e} = Unsqueeze (weight_{e}, last)
    token_N1_{e}, place_N1_{e} = Split <axis = 1, num_outputs = 2> (place_N2_{e})
    input_{e} = GatherND (hidden, token_N1_{e})
    inner_{e} = Gemm <transB = 1> (input_{e}, ff_proj_{e})
    linear_{e}, gate_{e} = Split <axis = 1, num_outputs = 2> (inner_{e})
    sigmoid_{e} = Sigmoid (gate_{e})
    silu_{e} = Mul (gate_{e}, sigmoid_{e})
    active_{e} = Mul (silu_{e}, linear_{e})
    output_{e} = Gemm <transB = 1> (active_{e}, ff_out_{e})
    output_f_{e} = Cast <to = 1> (output_{e})
    weighted_{e} = Mul (output_f_{e}, weight_N1_{e})
"""

# Each choice of a token has a place of its own, and the places are summed. ScatterND that adds is a race in ONNX
# Runtime on a CPU: several threads add to one token. 5 of 5 parity runs with 256 tokens failed, logits off by up to
# 1.1.
_SUM = """
    choices = Shape (chosen_TK)
    size = Shape <start = 1> (hidden)
    shape = Concat <axis = 0> (choices, size)
    zeros = ConstantOfShape <value = float[1] {0.0}> (shape)
    chosen_TKD = ScatterND (zeros, places, outputs)
    choice = Constant <value = int64[1] {1}> ()
    output_f = ReduceSum <keepdims = 0> (chosen_TKD, choice)
    output = CastLike (output_f, hidden)
"""
