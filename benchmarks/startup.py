"""What timm-cmt adds to `import torch`, `import torchvision` and `import timm`, and how long its models take to make.

"Without" is with torch's autoload switched off, so that the package is not looked at. Each import is in a fresh
interpreter, with and without in turn. Where these scatter by more than the difference, the time in the package's own
modules is the least that it can be: all of them but `timm_cmt` itself, which `-X importtime` does not see torch import.
Run: python benchmarks/startup.py [--rounds 10]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time

import timm
from tqdm import tqdm

PEERS = ["deit_small_patch16_224", "swin_small_patch4_window7_224", "twins_svt_base", "vit_base_patch16_224"]


def run_import(module: str, autoload: str, *options: str) -> tuple[float, str]:
    """The seconds of an import in a fresh interpreter, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *options, "-c", f"import {module}"],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload},
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"startup.py: error: import {module} failed\n{done.stderr}")
    return time.perf_counter() - start, done.stderr


def own_milliseconds() -> float:
    """What `import timm` spends in the package's own modules, without what they import."""
    _, report = run_import("timm", "1", "-X", "importtime")
    return sum(int(own) for own in re.findall(r"^import time: +(\d+) \| +\d+ \| +timm_cmt\b", report, re.M)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="2 or more")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"{args.rounds} rounds have no quartiles; give 2 or more")

    print("| | without, s | with, s | difference, ms | quartiles |\n|---|---|---|---|---|")
    for module in ("torch", "torchvision", "timm"):
        pairs = []
        for round_ in tqdm(range(args.rounds + 1), desc=f"import {module}", leave=False):
            order = "01" if round_ % 2 else "10"
            taken = {autoload: run_import(module, autoload)[0] for autoload in order}
            pairs.append((taken["0"], taken["1"]))
        without, with_ = map(statistics.median, zip(*pairs[1:]))  # the first fills the disk's cache
        low, middle, high = (1e3 * q for q in statistics.quantiles([b - a for a, b in pairs[1:]], n=4))
        print(f"| import {module} | {without:.2f} | {with_:.2f} | {middle:.0f} | {low:.0f} to {high:.0f} |")
    own = statistics.median(own_milliseconds() for _ in range(5))
    print(f"\nThe package's own modules take {own:.0f} ms of `import timm` (python -X importtime).")

    names = [*timm.list_models("cmt*"), *PEERS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    params = {}
    for _ in tqdm(range(args.rounds + 1), desc="create_model", leave=False):
        for name in names:
            start = time.perf_counter()
            model = timm.create_model(name)
            seconds[name].append(time.perf_counter() - start)
            params[name] = sum(param.numel() for param in model.parameters())
    print("\n| model | parameters, M | create_model, s | quartiles |\n|---|---|---|---|")
    for name in names:
        low, middle, high = statistics.quantiles(seconds[name][1:], n=4)  # the first imports what making models needs
        print(f"| {name} | {params[name] / 1e6:.1f} | {middle:.2f} | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
    main()
