"""umv2::Experts: torch op and both exported forms against a float64 computation from the definition."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.ops.bodies import Array, run_body
from umv2_export.bench.single_op import experts_model
from umv2_export.ops import ExpertsSignature, experts

D, INNER = 16, 12


def feed_of(signature: ExpertsSignature, tokens: int, dtype: Any = np.float32, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"ff_proj": (2 * INNER, D), "ff_out": (D, INNER)}
    feed = {name: rng.standard_normal(shapes[name.rpartition("_")[0]]) * 0.3 for name in signature.matrices}
    feed |= {
        "hidden": rng.standard_normal((tokens, D)),
        "router_logits": rng.standard_normal((tokens, signature.count)),
    }
    return {name: value.astype(dtype) for name, value in feed.items()}


def truth(signature: ExpertsSignature, feed: dict[str, Array]) -> Array:
    f = {name: value.astype(np.float64) for name, value in feed.items()}
    output = np.zeros(f["hidden"].shape)
    for t, (x, logits) in enumerate(zip(f["hidden"], f["router_logits"], strict=True)):
        probability = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-probability)[: signature.topk]
        total = probability[chosen].sum() if signature.normalize else 1.0
        for e in chosen:
            inner = f[f"ff_proj_{e}"] @ x
            linear, gate = inner[:INNER], inner[INNER:]
            output[t] += probability[e] / total * (f[f"ff_out_{e}"] @ (linear * gate / (1 + np.exp(-gate))))
    return output


def stacks(signature: ExpertsSignature, feed: dict[str, Array]) -> tuple[Array, Array]:
    """As com.microsoft::MoE wants them."""
    proj = np.stack([feed[f"ff_proj_{e}"] for e in range(signature.count)])
    interleaved = np.stack([proj[:, INNER:], proj[:, :INNER]], axis=2).reshape(proj.shape)
    return interleaved, np.stack([feed[f"ff_out_{e}"] for e in range(signature.count)])


def by_torch(signature: ExpertsSignature, feed: dict[str, Array], *, stacked: bool) -> Array:
    if stacked:
        proj, out = ([torch.from_numpy(stack)] for stack in stacks(signature, feed))
    else:
        proj, out = (
            [torch.from_numpy(feed[f"{kind}_{e}"]) for e in range(signature.count)] for kind in ("ff_proj", "ff_out")
        )
    tokens = torch.from_numpy(feed["hidden"]), torch.from_numpy(feed["router_logits"])
    output: Array = experts(*tokens, proj, out, signature.topk, signature.normalize).numpy()
    return output


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("count", "topk"), [(1, 1), (6, 2), (5, 5)])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_every_form_agrees_with_float64(normalize: bool, count: int, topk: int, tokens: int) -> None:
    signature = ExpertsSignature(count, topk, normalize)
    feed = feed_of(signature, tokens)
    proj, out = stacks(signature, feed)
    plain = {name: feed[name] for name in ("hidden", "router_logits")}
    found = [
        by_torch(signature, feed, stacked=False),
        by_torch(signature, feed, stacked=True),
        run_body(experts_model(signature), feed)[0],
    ]
    if tokens:  # the contrib op divides by the number of tokens
        contrib = experts_model(signature, form="contrib")
        found.append(run_body(contrib, plain | {"ff_proj": proj, "ff_out": out})[0])
    for output in found:
        np.testing.assert_allclose(output, truth(signature, feed), rtol=1e-5, atol=1e-5)


def test_the_body_computes_in_half_precision_too() -> None:
    signature = ExpertsSignature(6, 2, normalize=True)
    feed = feed_of(signature, 5, dtype=np.float16)
    output = run_body(experts_model(signature, dtype="float16"), feed)[0]
    assert output.dtype == np.float16
    np.testing.assert_allclose(output.astype(np.float64), truth(signature, feed), rtol=0, atol=5e-3)


def test_router_logits_of_another_number_of_experts_are_refused() -> None:
    signature = ExpertsSignature(6, 2, normalize=False)
    feed = feed_of(signature, 2)
    with pytest.raises(ValueError, match="for 6 experts"):
        by_torch(signature, feed | {"router_logits": feed["router_logits"][:, :5]}, stacked=False)


def test_the_body_is_a_valid_function() -> None:
    onnx.checker.check_model(experts_model(ExpertsSignature(3, 2, normalize=True)), full_check=True)


def test_no_two_threads_add_to_one_token() -> None:
    signature = ExpertsSignature(8, 8, normalize=False)
    feed = feed_of(signature, 2048)
    expected = by_torch(signature, feed, stacked=False)
    for _ in range(5):
        np.testing.assert_allclose(run_body(experts_model(signature), feed)[0], expected, rtol=0, atol=1e-5)


def test_no_body_scatters_with_a_sum() -> None:
    body = ExpertsSignature(4, 2, normalize=True).function_body(opset=18)
    assert not [node for node in body if "Scatter" in node.op_type and "reduction" in node.attributes]
