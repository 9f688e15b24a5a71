"""One of the processes of test_distributed's FSDP2 run: train, evaluate, save and load; results go to a folder.

python -m torch.distributed.run --nproc-per-node=2 fsdp_worker.py FOLDER
"""

import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

BUILT, OTHER = 64, 96  # pixels: what the model is built for, and what the bias is resized for at run time


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cmt_ti", img_size=BUILT, num_classes=10, depths=(1, 1, 2, 1))


def shard(model: nn.Module) -> nn.Module:
    """FSDP2 as its documentation has it: every block a group of its own, the rest another."""
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block)
    return fully_shard(model)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)  # so much that a bias kept from before shows


def images(size: int) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, size: int) -> float:
    """One update on a batch that is the same in all processes, so that there is nothing to average; the loss."""
    model.train()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images(size)), torch.arange(4))
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, size: int) -> Tensor:
    return model.eval()(images(size))


def run(model: nn.Module) -> dict:
    """Evaluate, train and evaluate again, at the model's own size and at another."""
    optimizer = make_optimizer(model)
    before = {size: evaluate(model, size) for size in (BUILT, OTHER)}
    losses = [step(model, optimizer, size) for size in (BUILT, OTHER, OTHER)]
    after = {size: evaluate(model, size) for size in (BUILT, OTHER)}
    return dict(before=before, losses=losses, after=after, optimizer=optimizer)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    model = shard(make(seed=0))
    sharded = {name for name, param in model.named_parameters() if isinstance(param, DTensor)}
    results = dict(run(model), sharded=sharded)
    optimizer = results.pop("optimizer")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    weights = {name: weight.clone() for name, weight in weights.items()}  # buffers are the live ones

    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states)), checkpoint_id=str(folder / "checkpoint"))
    loaded = shard(make(seed=1))
    other_optimizer = make_optimizer(loaded)  # before any forward pass, which leaves the root's parameters gathered
    results["unloaded"] = evaluate(loaded, OTHER)
    states = dict(zip(("model", "optimizer"), get_state_dict(loaded, other_optimizer)))
    dcp.load(states, checkpoint_id=str(folder / "checkpoint"))
    set_state_dict(loaded, other_optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    results["loaded"] = {size: evaluate(loaded, size) for size in (BUILT, OTHER)}
    results["next losses"] = [step(model, optimizer, OTHER), step(loaded, other_optimizer, OTHER)]

    if dist.get_rank() == 0:
        torch.save(dict(results, weights=weights), folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
