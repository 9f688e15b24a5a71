"""The command line: ``timm-cmt demo`` and ``timm-cmt plot-bias``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import timm
import torch

from . import __version__
from .cmt import MIN_SIZE, VARIANTS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can cause is one line on stderr, without a traceback."""
    args = _build_parser().parse_args(argv)
    try:
        args.run(args)
    except ImportError as err:
        return _fail(f"{err.name} is not installed; pip install 'timm-cmt[demo]' brings it")
    except (OSError, RuntimeError, ValueError) as err:
        return _fail(str(err))
    except KeyboardInterrupt:
        return _fail("interrupted")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"timm-cmt: error: {message}\n")  # one line, without argparse's usage before it


def _fail(message: str) -> int:
    print(f"timm-cmt: error: {message}", file=sys.stderr)
    return 1


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="timm-cmt", description="The CMT models for timm.")
    parser.add_argument(
        "--version",
        action="version",
        version=f"timm-cmt {__version__}, timm {timm.__version__}, torch {torch.__version__}",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train a model on scikit-learn's handwritten digits",
        description="Write scikit-learn's handwritten digits as an ImageFolder, train a CMT on two thirds of them with "
        "timm's factories, validate it on the rest, and draw its predictions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--model", default="cmt_ti", choices=list(VARIANTS), help="the model")
    demo.add_argument("--pretrained", action="store_true", help="start from the ImageNet weights")
    demo.add_argument("--epochs", type=_positive, default=12, help="epochs over the training images")
    demo.add_argument("--img-size", type=_image_size, default=64, help="height and width in pixels")
    demo.add_argument("--output", type=Path, default=Path("timm-cmt-demo"), help="folder to write into")
    demo.add_argument("--device", type=_device, default="cpu", help="torch device, such as cpu or cuda")
    demo.set_defaults(run=_run_demo)

    plot = commands.add_parser(
        "plot-bias",
        help="draw the relative position bias before and after resizing",
        description="Draw, for each stage and head, what one query position adds to every key: as the model holds it, "
        "and resized to another image size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plot.add_argument("--model", default="cmt_s", choices=list(VARIANTS), help="the model")
    weights = plot.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="draw the ImageNet weights, not random ones")
    weights.add_argument("--checkpoint", type=Path, help="draw the weights in this file")
    plot.add_argument("--size", type=_image_size, nargs="+", default=[320], help="height and width in pixels, or one")
    plot.add_argument("--out", type=Path, default=Path("bias.png"), help="picture to write")
    plot.set_defaults(run=_run_plot_bias)
    return parser


def _run_plot_bias(args: argparse.Namespace) -> None:
    from .plot_bias import plot_bias  # matplotlib is an extra

    if len(args.size) > 2:
        raise ValueError(f"--size {' '.join(map(str, args.size))} has {len(args.size)} numbers; give one or two")
    overlay = dict(file=str(args.checkpoint)) if args.checkpoint else None
    model = timm.create_model(
        args.model, pretrained=bool(args.pretrained or args.checkpoint), num_classes=0, pretrained_cfg_overlay=overlay
    )
    plot_bias(model, (args.size[0], args.size[-1]), args.out)
    print(
        args.out
        if args.pretrained or args.checkpoint
        else f"{args.out} (random weights; --pretrained draws learnt ones)"
    )


def _run_demo(args: argparse.Namespace) -> None:
    from .demo import run_demo  # scikit-learn and matplotlib are an extra

    run_demo(args.output, args.model, args.epochs, args.img_size, args.device, args.pretrained)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of epochs; give 1 or more")
    return int(text)


def _image_size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < MIN_SIZE:
        raise argparse.ArgumentTypeError(f"{text} is no image size for CMT; give {MIN_SIZE} pixels or more")
    return int(text)


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as err:  # an unknown name, or a device that is not there
        raise argparse.ArgumentTypeError(f"{text} is no device here ({str(err).splitlines()[0]})") from err
    return text
