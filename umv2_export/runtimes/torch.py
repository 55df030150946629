"""PyTorch in fp32: the literal reference of a checkpoint, or the folded model rebuilt from a bundle's weights."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from umv2_export.bundle import MODEL_FILE, Bundle
from umv2_export.checkpoint import Checkpoint
from umv2_export.dtypes import torch_dtype
from umv2_export.errors import InputRejected
from umv2_export.model import LanguageModel, reference_model
from umv2_export.model.folded import folded_model
from umv2_export.model.transformer import ModelOutput
from umv2_export.runtimes.base import Array, Cache, StepInput, StepOutput
from umv2_export.runtimes.device import lacks_memory, placed

__all__ = ["TorchRuntime", "require_same_model"]


class TorchRuntime:
    """A torch model behind the interface of the runtimes; its arithmetic is fp32 whatever its weights were stored in.

    Args:
        model: the reference or the folded model.
        cache_dtype: a cache is rounded to it, as the exported graph's own cache is.
        device: where the model computes.

    Raises:
        EnvironmentUnfit: the device has too little memory.
    """

    name = "torch"

    def __init__(
        self, model: LanguageModel, cache_dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.model = placed(model, self.device)
        self.cache_dtype = cache_dtype

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, bundle: Bundle, device: str = "cpu") -> "TorchRuntime":
        """The literal reference, its weights rounded as `bundle` stores them.

        Raises:
            InputRejected: the bundle was made from another model.
        """
        checkpoint = checkpoint.with_query_layout(bundle.config.memory.query_layout)
        require_same_model(bundle, checkpoint)
        stored = bundle.manifest
        dtype = torch_dtype(stored.dtype)
        model = reference_model(
            checkpoint,
            dtype=dtype,
            key_dtype=torch_dtype(stored.key_dtype),
            table_dtype=torch_dtype(stored.table_dtype),
        )
        return cls(model, dtype, device)

    @classmethod
    def from_bundle(cls, bundle: Bundle, device: str = "cpu") -> "TorchRuntime":
        """The folded model, its tables mapped from the bundle.

        Raises:
            InputRejected: the graph's initializers are not those of the model in the manifest.
        """
        with torch.device("meta"):
            model = folded_model(replace(bundle.form, dtype=torch.float32, key_dtype=torch.float32))
        declared = model.state_dict()
        expected = {name: tuple(value.shape) for name, value in declared.items()}
        weights = bundle.weights()
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if found != expected:
            name = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
            raise InputRejected(
                f"initializer {name!r} has shape {found.get(name)}, the manifest's model needs {expected.get(name)}",
                where=bundle.path / MODEL_FILE,
            )
        for name, value in weights.items():
            if value.is_floating_point() != declared[name].is_floating_point():
                raise InputRejected(
                    f"initializer {name!r} has dtype {value.dtype}, the manifest's model needs {declared[name].dtype}",
                    where=bundle.path / MODEL_FILE,
                )
        rows = {shard.name for shard in bundle.form.shards()}
        # Rows stay as they are stored, mapped.
        state = {n: value if n in rows else value.to(declared[n].dtype) for n, value in weights.items()}
        model.load_state_dict(state, assign=True)
        return cls(model.requires_grad_(False), torch_dtype(bundle.manifest.dtype), device)

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        """One forward with the model's own routing."""
        return self._output(self._forward(step, None), probe)

    def run_parts(self, step: StepInput) -> StepOutput:
        """One forward that shows what every part puts out."""
        return self.run(step, probe=True)

    def run_forced(
        self, step: StepInput, addresses: list[Array], given: Mapping[str, Array] | None = None
    ) -> StepOutput:
        """One forward that uses the given virtual addresses, per memory layer, instead of its own top-k; probed.

        Args:
            step: the input.
            addresses: int64 [B*S, hits] of each memory layer.
            given: inner values from which the parts behind them go on; the probes hold what was computed there.
        """
        values = {name: self._tensor(value).float() for name, value in (given or {}).items()}
        return self._output(self._forward(step, [self._tensor(layer) for layer in addresses], values), probe=True)

    @torch.inference_mode()
    def _forward(
        self, step: StepInput, forced: list[torch.Tensor] | None, given: Mapping[str, torch.Tensor] | None = None
    ) -> ModelOutput:
        past = [(self._rounded(keys), self._rounded(values)) for keys, values in step.past]
        ids, mask = self._tensor(step.input_ids), self._tensor(step.attention_mask)
        try:
            with self.device:  # for the tensors that a forward makes: positions, masks
                output: ModelOutput = self.model(ids, mask, past, forced, given)
        except torch.OutOfMemoryError as error:
            raise lacks_memory(str(error)) from error
        return output

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _rounded(self, array: Array) -> torch.Tensor:
        return self._tensor(array).to(self.cache_dtype).float()

    def _output(self, output: ModelOutput, probe: bool) -> StepOutput:
        # Under autocast some are in 16 bits.
        present: Cache = [(_array(keys), _array(values)) for keys, values in output.present]
        probes = {name: _array(value) for name, value in (output.inner.items() if probe else ())}
        return StepOutput(_array(output.logits), present, probes)


def _array(tensor: torch.Tensor) -> Array:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def require_same_model(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another configuration than the bundle's.

    Raises:
        InputRejected: naming the first field that differs.
    """
    if checkpoint.config != bundle.config:
        ours, theirs = checkpoint.config.as_dict(), bundle.config.as_dict()
        field = next(name for name in ours if ours[name] != theirs[name])
        raise InputRejected(
            f"the bundle was not made from this checkpoint: {field} is {theirs[field]} in the bundle, "
            f"{ours[field]} in the checkpoint",
            where=checkpoint.path,
        )
