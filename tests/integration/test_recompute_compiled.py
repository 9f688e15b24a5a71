"""Recomputation where torch compiles the model, and in several processes."""

import pytest
import torch
from common import images
from test_recompute import make, step
from torch import nn


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 moves them twice where it compiles this")
def test_gradient_checkpointing_compiled_moves_the_statistics_once_a_step():
    torch.compiler.reset()
    plain, other = make(False), make(False)
    other.set_grad_checkpointing()
    step(plain, images())
    step(torch.compile(other, backend="aot_eager"), images())
    for (name, a), b in zip(other.named_buffers(), plain.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_compiled():
    torch.compiler.reset()
    plain, other = make(False), make(True)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    step(plain, images())
    step(compiled, images())
    for a, b in zip(other.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    for a, b in zip(other.buffers(), plain.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def train_in_parallel(rank: int, init: str, out: str) -> None:
    """One step of DistributedDataParallel, plain and recomputing, of this process's half of the images."""
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    steps = []
    for recompute in (False, True):
        model = nn.parallel.DistributedDataParallel(make(recompute).double())
        step(model, images(8)[4 * rank : 4 * rank + 4].double())
        steps.append([param.grad for param in model.parameters()] + [buffer.clone() for buffer in model.buffers()])
    torch.save(steps, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_in_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(train_in_parallel, (f"file://{tmp_path}/init", str(tmp_path / "step")), nprocs=2)
    ranks = [torch.load(tmp_path / f"step.{rank}") for rank in (0, 1)]
    for plain, other in ranks:
        for a, b in zip(other, plain):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    count = sum(1 for _ in make(False).parameters())
    for a, b in zip(ranks[0][1][:count], ranks[1][1][:count]):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # averaged over both
