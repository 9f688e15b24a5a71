"""What an evaluation takes at least, by its multiply-adds and bytes, what it takes, and which operators take it.

The floor is the sum over the operators of the larger of two times: multiply-adds over the speed of a large matrix
product or 1 x 1 convolution, whichever is faster, and bytes over the speed of a copy. Bytes are what an operator reads
and writes, as if nothing stayed in the cache between two; torch's counter does not see the products inside the CPU's
fused attention. The operators' times are those of torch's profiler, of one call, and copies their share of all.
Run: python benchmarks/ceilings.py [--models cmt_s deit_small_patch16_224] [--dtype bfloat16] [--batch-size 8]
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
from torch.utils.flop_counter import flop_registry


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
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def operator_seconds(call: Callable[[], object], device: str) -> dict[str, float]:
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device != "cpu")) as profiled:
        for _ in range(5):
            call()
    kind = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    host = torch.autograd.DeviceType.CPU  # its operators have the time of their kernels, which stand there too
    return {event.key: getattr(event, kind) / 5e6 for event in profiled.key_averages() if event.device_type == host}


@torch.no_grad()  # in inference mode a TorchDispatchMode sees operators before they are taken apart
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
    print("| model | G multiply-adds | GB | floor, ms | measured, ms |\n|---|---|---|---|---|")
    profiles = {}
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

            with OperatorCounter() as counter:
                call()
            macs, moved = map(sum, zip(*counter.operators))
            floor = sum(max(m / macs_a_second, b / bytes_a_second) for m, b in counter.operators)
            measured = timed(call, args.rounds, args.device)
            print(f"| {label} | {macs / 1e9:.1f} | {moved / 1e9:.2f} | {1e3 * floor:.0f} | {1e3 * measured:.0f} |")
            profiles[label] = operator_seconds(call, args.device)

    print(f"\n| operator, ms | {' | '.join(profiles)} |\n|---|{'---|' * len(profiles)}")
    operators = {operator for profile in profiles.values() for operator in profile}
    for operator in sorted(operators, key=lambda operator: -max(p.get(operator, 0) for p in profiles.values()))[:14]:
        print(f"| {operator} | {' | '.join(f'{1e3 * p.get(operator, 0):.1f}' for p in profiles.values())} |")
    print(f"| all | {' | '.join(f'{1e3 * sum(p.values()):.1f}' for p in profiles.values())} |")
    shares = (profile.get("aten::copy_", 0) / sum(profile.values()) for profile in profiles.values())
    print(f"| copies | {' | '.join(f'{share:.1%}' for share in shares)} |")


if __name__ == "__main__":
    main()
