"""The command line, ``timm-cmt``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import timm
import torch

from . import __version__
from .cmt import MIN_SIZE, VARIANTS
from .recipe import find_recipe, make_command

__all__ = ["main"]

WITH_WEIGHTS = [name for name in VARIANTS if timm.get_pretrained_cfg(name).has_weights]


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
    demo.add_argument("--epochs", type=_count("epochs"), default=12, help="epochs over the training images")
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

    conversion = commands.add_parser(
        "convert",
        help="convert a checkpoint to a folder that timm and transformers load",
        description="Write model.safetensors, config.json and a model card, and check that they load back bit for bit. "
        "Without a checkpoint the authors' release is downloaded; a download that is interrupted starts again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    conversion.add_argument("checkpoint", type=Path, nargs="?", help="a checkpoint of the authors' or of timm")
    conversion.add_argument("--model", required=True, choices=list(VARIANTS), help="the model that it is of")
    conversion.add_argument("--out", type=Path, required=True, help="folder to write")
    conversion.set_defaults(run=_run_convert)

    publication = commands.add_parser(
        "publish",
        help="upload the authors' release to the Hugging Face Hub",
        description="Convert the authors' release and upload it to ORG/<model>.in1k, one commit a repository, with the "
        "account that `hf auth login` or HF_TOKEN gives. Re-running uploads what has changed. At the end, ORG and the "
        "commits are recorded in the package, whose next release then loads from there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    publication.add_argument("--org", required=True, help="organisation or user on the Hub")
    publication.add_argument("--models", nargs="+", default=WITH_WEIGHTS, choices=WITH_WEIGHTS, help="the models")
    publication.add_argument("--private", action="store_true", help="make new repositories private")
    publication.add_argument("--create-pr", action="store_true", help="open pull requests; nothing is recorded")
    publication.add_argument("--dry-run", action="store_true", help="convert and say what would be uploaded")
    publication.set_defaults(run=_run_publish)

    recipe = commands.add_parser(
        "recipe",
        help="print a training recipe for timm's train.py",
        description="Print the path of a recipe, for `train.py -c`. With any of the options, print the whole command "
        "for one machine instead, with the learning rate that the recipe has for so many images.",
    )
    recipe.add_argument("name", nargs="?", help="the recipe; without one, an error that lists them")
    recipe.add_argument("--batch-size", type=_count("images"), help="images on each GPU (default: the recipe's)")
    recipe.add_argument("--gpus", type=_count("GPUs"), help="GPUs of the machine (default: 1)")
    recipe.add_argument("--data-dir", help="the data set's folder (default: DIR, to be filled in)")
    recipe.set_defaults(run=_run_recipe)

    configs = commands.add_parser(
        "hub-configs",
        help="write the configurations and model cards of the published models",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    configs.add_argument("--out", type=Path, default=Path("hub_configs"), help="folder to write into")
    configs.set_defaults(run=_run_hub_configs)
    return parser


def _run_convert(args: argparse.Namespace) -> None:
    from .hub import convert

    convert(args.model, args.out, args.checkpoint)
    print(args.out)


def _run_publish(args: argparse.Namespace) -> None:
    from .hub import publish

    publish(args.org, args.models, args.private, args.create_pr, args.dry_run)


def _run_recipe(args: argparse.Namespace) -> None:
    given = {
        name: getattr(args, name) for name in ("batch_size", "gpus", "data_dir") if getattr(args, name) is not None
    }
    print(make_command(args.name, **given) if given else find_recipe(args.name))


def _run_hub_configs(args: argparse.Namespace) -> None:
    from .hub import write_hub_configs

    print(*write_hub_configs(args.out), sep="\n")


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


def _count(what: str) -> Callable[[str], int]:
    """A type for argparse: one or more of `what`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text} is no number of {what}; give 1 or more")
        return int(text)

    return parse


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
