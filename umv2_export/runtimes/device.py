"""Where PyTorch computes: on the CPU, or on a GPU, where its ops are the kernels of `umv2_export.gpu`."""

import torch

from umv2_export.config import ModelConfig
from umv2_export.errors import EnvironmentUnfit
from umv2_export.gpu.ahead_of_time import require_triton
from umv2_export.model import LanguageModel

__all__ = ["lacks_memory", "placed", "require_device"]

_WHERE = "--device cuda"


def require_device(name: str, config: ModelConfig) -> None:
    """Notice before long work begins that PyTorch has no GPU, or that nothing compiles the kernels of memory layers.

    Args:
        name: cpu or cuda.
        config: of the model that is to run.

    Raises:
        EnvironmentUnfit: so it is.
    """
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        built_for_cpus = torch.version.cuda is None
        raise EnvironmentUnfit(
            "PyTorch has no CUDA device",
            where=_WHERE,
            why=f"PyTorch {torch.__version__} is a build for CPUs"
            if built_for_cpus
            else f"there is no GPU, or its driver is too old for CUDA {torch.version.cuda}",
            fix="leave out --device, or "
            + ("install a build for CUDA, see pytorch.org" if built_for_cpus else "see what nvidia-smi shows"),
        )
    if config.memory.layers:
        require_triton()


def placed(model: LanguageModel, device: torch.device) -> LanguageModel:
    """The model with all its weights on a device.

    Raises:
        EnvironmentUnfit: the GPU has less memory free than they take.
    """
    if device.type == "cuda":
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        free, _ = torch.cuda.mem_get_info(device)
        if size > free:
            raise lacks_memory(f"the weights take {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free")
    return model if device.type == "cpu" else model.to(device)


def lacks_memory(why: str) -> EnvironmentUnfit:
    """What to do where a GPU is too small."""
    return EnvironmentUnfit("the GPU has too little memory", where=_WHERE, why=why, fix="leave out --device")
