"""What a training step keeps for its backward pass: plain, with recompute_act, and with timm's gradient checkpointing.

Run: python benchmarks/memory.py [--models authors:cmt_s cmt_s ...] [--authors path/to/cmt.py] [--batch-size 2]
"""

import argparse
from pathlib import Path

import timm
import torch
from throughput import AUTHORS, make_model
from torch import Tensor, nn

from timm_cmt.cmt import VARIANTS


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, parameters and buffers apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved, kept = {}, []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # so that no address is given to another
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(saved.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*VARIANTS, "deit_small_patch16_224"])
    parser.add_argument("--authors", type=Path, help="cmt.py of a clone of the authors' code, for their models")
    parser.add_argument("--batch-size", type=int, default=2)
    args = parser.parse_args()

    print(f"MB, batch {args.batch_size}, float32, torch {torch.__version__}\n")
    print("| model | plain | recompute_act | checkpointing |\n|---|---|---|---|")
    for name in args.models:
        size = timm.get_pretrained_cfg(name.removeprefix(AUTHORS)).input_size[-1]
        x = torch.randn(args.batch_size, 3, size, size)
        models = [make_model(name, size, "train", args.authors)]
        if name in VARIANTS:
            models.append(make_model(name, size, "recompute", args.authors))
            models.append(make_model(name, size, "train", args.authors))
            models[-1].set_grad_checkpointing()
        cells = [f"{saved_bytes(model.train(), x) / 2**20:.0f}" for model in models]
        print(f"| {name} | {' | '.join((cells + ['-', '-'])[:3])} |")


if __name__ == "__main__":
    main()
