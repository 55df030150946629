"""Train one contender on the CPU and save its checkpoint, with what it took and what it reaches.

    python -m samples.training.train umv2 -o umv2-trained

The shipped models took 20 to 28 minutes on one core. The checkpoint is written in bf16, and its bits per byte are
measured after rounding.
"""

import json
import math
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import click
import torch

from samples.training.byte_tokenizer import save_byte_tokenizer
from samples.training.contenders import CONTENDERS, Contender
from samples.training.corpus import Corpus, standard_library
from samples.training.layers import router_losses, trainable_model
from umv2_export.checkpoint.own_format import TensorStream, save_checkpoint
from umv2_export.config import TABLES, ExpertsConfig, count_parameters
from umv2_export.interface import Inner
from umv2_export.model.initialization import random_tensors
from umv2_export.model.transformer import LanguageModel, empty_past

BATCH, SEQUENCE = 8, 256
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
LOWEST_RATE = 0.1
BALANCE_WEIGHT, ROUTER_Z_WEIGHT = 0.01, 0.001

EVALUATED_SEQUENCES = 512
CURVE_STEPS = 50


@dataclass(frozen=True)
class Schedule:
    """Steps, and the learning rate at its highest."""

    steps: int
    rate: float

    def share(self, step: int) -> float:
        """Of the highest rate: linear warm-up, then half a cosine."""
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        done = (step - WARMUP_STEPS) / max(1, self.steps - WARMUP_STEPS)
        return LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * done))

    def table_share(self, step: int, start: float) -> float:
        """The tables' own factor, from `start` to 1."""
        return start + (1 - start) * step / self.steps


@click.command()
@click.argument("name", type=click.Choice(list(CONTENDERS)))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=2400, show_default=True)
@click.option("--rate", default=5e-3, show_default=True, help="Highest learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(name: str, output: Path, steps: int, rate: float, seed: int, threads: int) -> None:
    """Train one contender and save its checkpoint."""
    torch.set_num_threads(threads)
    contender, corpus = CONTENDERS[name], standard_library()
    state = {
        stream.name: torch.cat(list(stream.pieces))
        for stream in random_tensors(contender.config, seed=seed, scheme=contender.scheme)
    }
    model = trainable_model(contender.config, state)
    started = time.monotonic()
    curve = train(model, contender, corpus, Schedule(steps, rate), seed)
    seconds = time.monotonic() - started
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    tensors = []
    for tensor_name, tensor in model.state_dict().items():
        stored = tensor.bfloat16() if tensor_name in dict(model.named_parameters()) else tensor
        tensors.append(TensorStream(tensor_name, tuple(stored.shape), stored.dtype, [stored]))
    with tempfile.TemporaryDirectory() as folder:
        save_byte_tokenizer(tokenizer := Path(folder) / "tokenizer.json")
        save_checkpoint(output, contender.config, tensors, [tokenizer])
    record = {
        "name": name,
        "about": contender.about,
        "parameters": count_parameters(contender.config).as_dict(),
        "seed": seed,
        "steps": steps,
        "tokens": steps * BATCH * SEQUENCE,
        "learning_rate": rate,
        "table_rate": contender.table_rate,
        "initialisation": contender.scheme,
        "seconds": round(seconds),
        "python": platform.python_version(),
        "corpus_sha256": corpus.digest,
        "bits_per_byte": round(bits_per_byte(model, corpus.held_out), 4),
        "loss_curve": curve,
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    click.echo(f"{name}: {record['bits_per_byte']} bits per byte after {seconds:.0f} s")


def train(
    model: LanguageModel, contender: Contender, corpus: Corpus, schedule: Schedule, seed: int
) -> list[tuple[int, float]]:
    """Train in place.

    Returns:
        (step, mean training loss in bits per byte of the steps since the last entry).
    """
    optimizer = _optimizer(model)
    generator = torch.Generator().manual_seed(seed)
    curve, losses = [], []
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            tables = schedule.table_share(step, contender.table_rate) if group["tables"] else 1.0
            group["lr"] = schedule.rate * schedule.share(step) * tables
        start_B = torch.randint(len(corpus.training) - SEQUENCE - 1, (BATCH, 1), generator=generator)
        text_BS = corpus.training[start_B + torch.arange(SEQUENCE + 1)].long()
        loss, auxiliary = _losses(model, text_BS)
        optimizer.zero_grad(set_to_none=True)
        (loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if len(losses) == CURVE_STEPS or step + 1 == schedule.steps:
            curve.append((step + 1, round(sum(losses) / len(losses), 4)))
            click.echo(f"step {curve[-1][0]:5d}: {curve[-1][1]:.4f} bits per byte", err=True)
            losses = []
    return curve


def _optimizer(model: LanguageModel) -> torch.optim.AdamW:
    groups: dict[str, list[torch.nn.Parameter]] = {"tables": [], "decayed": [], "plain": []}
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        matrix = parameter.dim() == 2 and "tucker_core" not in name and "wte" not in name
        groups["tables" if leaf in TABLES else "decayed" if matrix else "plain"].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "tables": kind == "tables",
                "weight_decay": WEIGHT_DECAY if kind == "decayed" else 0.0,
            }
            for kind, parameters in groups.items()
            if parameters
        ],
        betas=(0.9, 0.95),
        fused=True,
    )


def _losses(model: LanguageModel, text_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy in nats per byte, and what keeps the routers of experts in balance."""
    ids_BS, next_BS = text_BS[:, :-1], text_BS[:, 1:]
    output = model(ids_BS, torch.ones_like(ids_BS), empty_past(model.config, len(ids_BS)))
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), next_BS.flatten())
    auxiliary = torch.zeros(())
    routers = output.of(Inner.ROUTER_LOGITS)
    for logits_TE in routers:
        experts = cast("ExpertsConfig", model.config.experts)
        balance, z = router_losses(logits_TE, experts.topk)
        auxiliary = auxiliary + (BALANCE_WEIGHT * balance + ROUTER_Z_WEIGHT * z) / len(routers)
    return loss, auxiliary


@torch.no_grad()
def bits_per_byte(model: LanguageModel, text: torch.Tensor) -> float:
    """Mean over sequences evenly spread over a text, each predicted from its own start."""
    model.eval()
    starts = torch.linspace(0, len(text) - SEQUENCE - 1, EVALUATED_SEQUENCES).long()
    total = 0.0
    for start_B in starts.split(BATCH):
        text_BS = text[start_B[:, None] + torch.arange(SEQUENCE + 1)].long()
        total += _losses(model, text_BS)[0].item() * len(text_BS)
    return total / len(starts) / math.log(2)


if __name__ == "__main__":
    main()
