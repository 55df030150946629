"""Saves a golden checkpoint as two ranks of a run save it with torch.distributed.checkpoint (torch 2.13, gloo).

python make_distributed.py
"""

import multiprocessing
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

HERE = Path(__file__).parent
SOURCE = HERE.parent / "official" / "v2_insert_map"
TARGET = HERE / "distributed"

RANKS = 2

# Saved by each rank whole, as FSDP leaves buffers.
BUFFERS = ("shuffle_index", "tucker_core_u", "tucker_core_v")


def save(rank: int) -> None:
    """What one rank does."""
    # The metadata holds the path as it is given.
    os.chdir(TARGET)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    state = torch.load(SOURCE / "model.pt", weights_only=True)
    model = {
        f"_fsdp_wrapped_module.{name}": tensor
        if name.endswith(BUFFERS)
        else distribute_tensor(tensor, mesh, [Shard(0)])
        for name, tensor in state.items()
    }
    norm = "transformer.ln_f.weight"
    moments = {"exp_avg": distribute_tensor(torch.ones_like(state[norm]), mesh, [Shard(0)]), "step": 3}
    whole = {"model": model, "optim": {"state": {norm: moments}, "param_groups": [{"lr": 1e-3}]}}
    save_checkpoint(whole, checkpoint_id="model_and_optim")
    dist.destroy_process_group()


if __name__ == "__main__":
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir()
    for file in ("config.yaml", "expected.npz"):
        shutil.copyfile(SOURCE / file, TARGET / file)
    processes = [multiprocessing.Process(target=save, args=(rank,)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
