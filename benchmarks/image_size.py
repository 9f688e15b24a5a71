"""What changing the image size costs: a model built at 224 run at other sizes, against models built at those sizes.

Every round times each size once, both ways, so that what else the machine does falls on all alike; what is printed are
medians over the rounds. Run: python benchmarks/image_size.py [--model cmt_s] [--sizes 160 192 224 256 288 320 384]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from throughput import describe
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cmt_s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 192, 224, 256, 288, 320, 384])
    parser.add_argument("--built-at", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()

    model = timm.create_model(args.model, img_size=args.built_at, device=args.device).eval()
    native = {}
    for size in args.sizes:
        native[size] = timm.create_model(args.model, img_size=size, device=args.device).eval()
        native[size].load_state_dict(model.state_dict())

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    resizing, resized, built = ({size: [] for size in args.sizes} for _ in range(3))
    with torch.inference_mode():
        for round_ in tqdm(range(args.rounds + 1), unit="round"):
            for size in args.sizes:
                x = torch.randn(args.batch_size, 3, size, size, device=args.device)
                runs = [(resized, model), (built, native[size])]
                for times, m in runs if round_ % 2 else reversed(runs):
                    seconds = timed(lambda m=m, x=x: m(x))
                    if round_:  # the first is to warm up
                        times[size].append(seconds)
                pairs = [
                    (old.rel_pos_bias, new.rel_pos_bias.query_size)
                    for old, new in zip(model.stages, native[size].stages)
                ]
                seconds = timed(
                    lambda pairs=pairs: [bias._resize(bias.weight, bias.query_size, grid) for bias, grid in pairs]
                )
                if round_:
                    resizing[size].append(seconds)

    reference = statistics.median(built[args.sizes[0]])
    print(f"\n{args.model} built at {args.built_at}, batch {args.batch_size}, {args.device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds\n")
    print(
        f"| size | time / time at {args.sizes[0]} | another size / model built at the size | resizing / forward pass |"
    )
    print("|---|---|---|---|")
    rows = []
    for size in args.sizes:
        at = statistics.median(built[size])
        ratio = statistics.median(a / b for a, b in zip(resized[size], built[size]))
        cost = statistics.median(resizing[size]) / at
        print(f"| {size} | {at / reference:.2f} | {ratio:.3f} | {cost:.1%} |")
        rows.append(dict(size=size, seconds=at, other_to_own=round(ratio, 4), resizing=round(cost, 4)))
    if args.json:
        result = dict(vars(args), machine=describe(args.device), torch=torch.__version__, rows=rows)
        args.json.write_text(json.dumps(result, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
