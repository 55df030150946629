"""The outputs of a graph, logits and cache, beside the reference's."""

from collections.abc import Iterator, Mapping

import numpy as np

from umv2_export.config import ModelConfig
from umv2_export.interface import LOGITS, named_cache
from umv2_export.parity.cases import Case
from umv2_export.parity.compare import Check, Difference, Tolerance, worst
from umv2_export.runtimes import StepOutput
from umv2_export.runtimes.base import Array

__all__ = ["check_outputs", "outputs_of", "worst_difference"]


def outputs_of(case: Case, output: StepOutput) -> dict[str, dict[str, Array]]:
    """What is compared, padding left out: logits [tokens, columns], and each tensor of the cache.

    Tensor by tensor, because each is judged by its own size: keys are normalised, values are not.
    """
    attended = case.step.attention_mask > 0
    cache = {name: tensor.transpose(0, 2, 1, 3)[attended] for name, tensor in named_cache(output.present).items()}
    return {LOGITS: {LOGITS: output.logits[case.real_tokens]}, "present": cache}


def worst_difference(
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    tolerance: Tolerance,
    rounded: Mapping[str, Array] | None = None,
) -> tuple[Difference, float | None]:
    """The tensor that exceeds its tolerance most, and the absolute tolerance that would have passed all.

    Args:
        ours: the reference's tensors by name.
        theirs: the runtime's.
        tolerance: of both.
        rounded: the reference's with rounding, which shows how much a model amplifies it.
    """
    return worst(
        tolerance.difference(theirs[name], reference, None if rounded is None else rounded[name])
        for name, reference in ours.items()
    )


def check_outputs(
    name: str, case: Case, expected: StepOutput, actual: StepOutput, tolerance: Tolerance, config: ModelConfig
) -> Iterator[Check]:
    """Logits and cache of one call, compared with the reference's."""
    ours, theirs = outputs_of(case, expected), outputs_of(case, actual)
    for output, references in ours.items():
        found, required = worst_difference(references, theirs[output], tolerance)
        agreement = None
        if output == LOGITS and theirs[output][output].shape == references[output].shape:
            sides = (theirs[output][output], references[output])
            best = [array[:, : config.vocab_size].argmax(-1) for array in sides]
            agreement = float(np.mean(best[0] == best[1]))
        yield Check(
            runtime=name,
            case=case.name,
            output=output,
            status="pass" if found.within else "fail",
            max_abs=found.max_abs,
            max_rel=found.max_rel,
            median_abs=found.median_abs,
            rms=found.rms,
            required_atol=required,
            atol=found.atol,
            rtol=found.rtol,
            allowed_rms=found.broad,
            argmax_agreement=agreement,
            note=found.problem,
        )
