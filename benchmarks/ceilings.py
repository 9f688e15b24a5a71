"""What a run takes at least, by its multiply-adds and bytes, what it takes, and which operators take it.

The floor is the sum over the operators of the larger of two times: multiply-adds over the speed of a large matrix
product or 1 x 1 convolution, whichever is faster, and bytes over the speed of a copy. Bytes are what an operator reads
and writes, as if nothing stayed in the cache between two; torch's counter does not see the products inside the CPU's
fused attention, and takes the gradient of a depth-wise convolution for that of a full one, so training has no floor,
nor have compiled models, whose operators nothing sees. The operators' times are those of torch's profiler, of one run,
with the shares of two kinds: convolutions, linear layers and matrix products, which all code for it has, and copies;
of the copies, those of the biases of linear layers, which the CPU lays down before the product, are given apart.
Run: python benchmarks/ceilings.py [--models cmt_s deit_small_patch16_224] [--modes eager reparam compile train]
"""

import argparse
import itertools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from throughput import DTYPES, MODES, has_mode, make_run
from torch.utils._python_dispatch import TorchDispatchMode  # torch's documented way to see operators, yet private
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCTS = re.compile(r"conv|linear|mm$|attention")  # within the names of torch's operators


class OperatorCounter(TorchDispatchMode):
    """Multiply-adds and bytes of each operator; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[float, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            count = flop_registry.get(func.overloadpacket)
            macs = count(*args, **(kwargs or {}), out_val=out) / 2 if count else 0.0
            self.operators.append((macs, count_bytes((args, kwargs)) + count_bytes(out)))  # in place both count
        return out


def count_bytes(tree: object) -> int:
    return sum({id(leaf): leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}.values())


def timed(call: Callable[[], object], rounds: int, device: str) -> float:
    """The median seconds of a call."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # the first two warm up


def operator_seconds(call: Callable[[], object], device: str) -> dict[str, float]:
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device != "cpu")) as profiled:
        for _ in range(5):
            call()
    kind = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    host = torch.autograd.DeviceType.CPU  # its operators have the time of their kernels, which stand there too
    seconds: dict[str, float] = defaultdict(float)
    for event in profiled.events():
        if event.device_type == host:
            name = re.sub(r"FxGraph \w+", "FxGraph", event.name)
            if name == "aten::copy_" and event.cpu_parent is not None and event.cpu_parent.name == "aten::addmm":
                name += ", of a bias"
            seconds[name] += getattr(event, kind) / 5e6
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["cmt_s", "deit_small_patch16_224"])
    parser.add_argument("--modes", nargs="+", default=["eager", "reparam"], choices=MODES)
    parser.add_argument("--authors", type=Path, help="as for throughput.py")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16 is by autocast")
    parser.add_argument("--rounds", type=int, default=10)
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
    print("| model | G multiply-adds | GB | floor, ms | measured, ms |\n|---|---|---|---|---|")
    profiles = {}
    for name, mode in itertools.product(args.models, args.modes):
        if not has_mode(name, mode):
            continue
        run = make_run(name, mode, args.dtype, None, args.batch_size, args.device, args.authors)
        counted = "- | - | -"
        if mode in ("eager", "reparam"):
            with OperatorCounter() as counter:
                run()
            macs, moved = map(sum, zip(*counter.operators))
            floor = sum(max(m / macs_a_second, b / bytes_a_second) for m, b in counter.operators)
            counted = f"{macs / 1e9:.1f} | {moved / 1e9:.2f} | {1e3 * floor:.0f}"
        measured = timed(run, args.rounds, args.device)
        print(f"| {name}, {mode} | {counted} | {1e3 * measured:.0f} |")
        profiles[f"{name}, {mode}"] = operator_seconds(run, args.device)

    print(f"\n| operator, ms | {' | '.join(profiles)} |\n|---|{'---|' * len(profiles)}")
    operators = {operator for profile in profiles.values() for operator in profile}
    for operator in sorted(operators, key=lambda operator: -max(p.get(operator, 0) for p in profiles.values()))[:14]:
        print(f"| {operator} | {' | '.join(f'{1e3 * p.get(operator, 0):.1f}' for p in profiles.values())} |")
    print(f"| all | {' | '.join(f'{1e3 * sum(p.values()):.1f}' for p in profiles.values())} |")
    sums = {"products": PRODUCTS, "copies": re.compile("^aten::copy_"), "copies of biases": re.compile("^aten::copy_,")}
    for label, pattern in sums.items():
        parts = [sum(t for name, t in p.items() if pattern.search(name)) / sum(p.values()) for p in profiles.values()]
        print(f"| {label} | {' | '.join(f'{part:.1%}' for part in parts)} |")


if __name__ == "__main__":
    main()
