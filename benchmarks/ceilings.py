"""What the arithmetic of an evaluation allows: its multiply-adds and bytes, against what the machine does at best.

The floor of the time is the larger of multiply-adds over the speed of a large matrix product or 1 x 1 convolution,
whichever is faster, and bytes over the speed of a copy. Bytes are what each operator reads and writes, as if nothing
stayed in the cache between two of them. Copies are the share of the operators' time, in torch's profiler, that goes to
moving tensors from one layout or precision to another.
Run: python benchmarks/ceilings.py [--models cmt_s deit_small_patch16_224] [--batch-size 8]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from timm.utils import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode  # torch's documented way to see operators, yet private
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that operators read and write; views cost nothing."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            given = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in given.values())
        return out


def timed(call: Callable[[], object], rounds: int, device: str) -> float:
    """The median seconds of a call."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def share_of_copies(call: Callable[[], object], device: str) -> float:
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device != "cpu")) as profiled:
        for _ in range(5):
            call()
    kind = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    time_of = {event.key: getattr(event, kind) for event in profiled.key_averages()}
    return time_of["aten::copy_"] / sum(time_of.values())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["cmt_s", "deit_small_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is by autocast")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    square = torch.randn(4096, 4096, device=args.device, dtype=dtype)
    product = 4096**3 / timed(lambda: square @ square, args.rounds, args.device)
    maps = torch.randn(16, 32, 32, 1024, device=args.device, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.randn(1024, 1024, 1, 1, device=args.device, dtype=dtype)
    convolution = (
        16 * 32**2 * 1024**2 / timed(lambda: torch.nn.functional.conv2d(maps, weight), args.rounds, args.device)
    )
    macs_a_second = max(product, convolution)
    line = torch.randn(64 * 2**20, device=args.device)
    target = torch.empty_like(line)
    bytes_a_second = 2 * line.nbytes / timed(lambda: target.copy_(line), args.rounds, args.device)
    print(f"{args.device}, {args.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads; a second:")
    print(f"{product / 1e9:.0f} G multiply-adds in a matrix product, {convolution / 1e9:.0f} G in a convolution,")
    print(f"{bytes_a_second / 1e9:.1f} GB in a copy\n")
    print("| model | G multiply-adds | GB | floor by arithmetic, ms | floor by memory, ms | measured, ms | copies, % |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        model = timm.create_model(name, device=args.device).eval()
        size = model.pretrained_cfg["input_size"][-1]
        x = torch.randn(args.batch_size, 3, size, size, device=args.device)
        variants = [(name, model)]
        if name.startswith("cmt"):
            variants.append((f"{name}, reparameterized", reparameterize_model(model)))
        for label, variant in variants:

            def call(variant=variant, x=x):
                with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
                    return variant(x)

            with ByteCounter() as moved, FlopCounterMode(display=False) as counter:
                call()
            macs = counter.get_total_flops() / 2
            measured = timed(call, args.rounds, args.device)
            floors = macs / macs_a_second, moved.bytes / bytes_a_second
            cells = f"{macs / 1e9:.1f} | {moved.bytes / 1e9:.2f}", *(f"{1e3 * t:.0f}" for t in (*floors, measured))
            copies = share_of_copies(call, args.device)
            print(f"| {label} | {' | '.join(cells)} | {100 * copies:.1f} |")


if __name__ == "__main__":
    main()
