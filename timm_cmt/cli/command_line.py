"""The command line, ``timm-cmt``: its commands and options, and how it ends.

torch and timm take seconds to import, so this module does without them until a command needs them.
"""

import argparse
import ast
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can cause is one line on stderr, without a traceback."""
    if "torch" not in sys.modules:
        # Threads of OpenMP that wait for one another by spinning make training many times slower where another program
        # wants the processors too. OpenMP reads this once, when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(sys.stdout, "reconfigure"):  # a name of a class or file that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _ended_by_signals():
            try:
                with _ended_at_once_by_ctrl_c():
                    args = _build_parser().parse_args(argv)
                    import_module(f".{args.module}", __package__)  # and with it torch and timm
                args.run(args)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
    except ModuleNotFoundError as err:
        extra = "app" if err.name == "gradio" else "demo"
        return _fail(f"{err.name} is not installed; pip install 'timm-cmt[{extra}]' brings it")
    except BrokenPipeError:  # what reads the output, such as `head`, has had enough
        _drop_output()
        return 128 + 13  # as if ended by SIGPIPE
    except OSError as err:
        if err.strerror is None:  # one of ours, a sentence
            return _fail(str(err))
        return _fail(f"{err.filename or 'the output'} cannot be read or written ({err.strerror})")
    except (RuntimeError, ValueError) as err:
        return _fail(str(err))
    except KeyboardInterrupt:
        _fail("interrupted")
        return 128 + signal.SIGINT
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"timm-cmt: error: {message}\n")  # one line, without argparse's usage before it


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import timm
        import torch

        print(f"timm-cmt {__version__}, timm {timm.__version__}, torch {torch.__version__}")
        parser.exit()


class _ParseKwargs(argparse.Action):
    """NAME=VALUE ... as timm's scripts take them, without a traceback for what is none."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        kwargs = {}
        for text in values:
            name, equals, value = text.partition("=")
            if not equals:
                parser.error(f"--model-kwargs {text} is no NAME=VALUE")
            try:
                kwargs[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                kwargs[name] = value  # a word, such as act_layer=silu
        setattr(namespace, self.dest, kwargs)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and the end of the terminal end the command as an exception does: nothing is left half-written."""

    def end(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    if threading.current_thread() is not threading.main_thread():  # others may not
        numbers = []
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _ended_at_once_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process while nothing is written yet, not by an exception: torch goes on after one that comes
    while it imports numpy, and Python wraps some in errors of its own.
    """

    def end(*_: Any) -> NoReturn:
        _fail("interrupted")
        os._exit(128 + signal.SIGINT)

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _fail(message: str) -> int:
    print(f"timm-cmt: error: {message}", file=sys.stderr)
    return 1


def _drop_output() -> None:
    """Let what is left to print go nowhere, so that Python does not complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="timm-cmt", description="The CMT models for timm.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of timm-cmt, timm and torch")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    a_model = "one of timm.list_models('cmt*'), such as cmt_s"
    a_size = "size of the images: one number, or height and width as 224x320"

    demo = commands.add_parser(
        "demo",
        help="train a model on scikit-learn's handwritten digits",
        description="Write scikit-learn's handwritten digits as an ImageFolder, train a CMT on two thirds of them with "
        "timm's factories, validate it on the rest, and draw its predictions.",
    )
    demo.add_argument("--model", default="cmt_ti", type=_model, help=f"{a_model} (default: %(default)s)")
    demo.add_argument("--pretrained", action="store_true", help="start from the ImageNet weights")
    demo.add_argument(
        "--epochs", type=_count("epochs"), default=8, help="epochs over the training images (default: %(default)s)"
    )
    demo.add_argument(
        "--img-size", type=_image_size, default=64, help="height and width in pixels (default: %(default)s)"
    )
    demo.add_argument(
        "--output", type=Path, default=Path("timm-cmt-demo"), help="new folder to write into (default: %(default)s)"
    )
    demo.add_argument(
        "--device", type=_device, default="cpu", help="torch device, such as cpu or cuda (default: %(default)s)"
    )
    demo.set_defaults(run=_run_demo, module="demo")

    plot = commands.add_parser(
        "plot-bias",
        help="draw the relative position bias before and after resizing",
        description="Draw, for each stage and head, what one query position adds to every key: as the model holds it, "
        "and resized to another image size.",
    )
    plot.add_argument("--model", type=_model, help=f"{a_model} (default: the checkpoint's, or cmt_s)")
    _add_model_kwargs(plot, "arguments that the checkpoint's model was built with")
    weights = plot.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="draw the ImageNet weights, not random ones")
    weights.add_argument("--checkpoint", type=Path, help="draw the weights in this file")
    plot.add_argument(
        "--size",
        type=_image_size,
        nargs="+",
        default=[320],
        metavar="N",
        help="height and width in pixels, or one number (default: 320)",
    )
    plot.add_argument(
        "--out", type=Path, default=Path("bias.png"), metavar="FILE", help="picture to write (default: %(default)s)"
    )
    plot.set_defaults(run=_run_plot_bias, module="plot_bias")

    conversion = commands.add_parser(
        "convert",
        help="convert a checkpoint to a folder that timm and transformers load",
        description="Write model.safetensors, config.json and a model card, and check that they load back bit for bit. "
        "What timm's train.py was told stands in its checkpoints and is taken from there; an option overrules it. "
        "Without a checkpoint the authors' release is downloaded.",
    )
    conversion.add_argument("checkpoint", type=Path, nargs="?", help="a checkpoint of timm's train.py or the authors'")
    conversion.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    conversion.add_argument("--model", type=_model, help=f"{a_model}; needed where the checkpoint does not say it")
    _add_model_kwargs(conversion, "arguments it was built with")
    conversion.add_argument("--num-classes", type=int, metavar="N", help="classes, to be checked")
    conversion.add_argument("--img-size", type=_image_size, metavar="N", help="height and width in pixels")
    conversion.add_argument("--gp", metavar="POOL", help="global pooling: avg, max, avgmax, catavgmax, fast")
    conversion.add_argument("--mean", type=float, nargs="+", metavar="X", help="mean of the channels, of 0 to 1")
    conversion.add_argument("--std", type=float, nargs="+", metavar="X", help="standard deviation of the channels")
    conversion.add_argument("--crop-pct", type=float, metavar="X", help="part of the image that the centre crop keeps")
    conversion.add_argument("--interpolation", metavar="NAME", help="resizing of the images, such as bicubic")
    names = conversion.add_mutually_exclusive_group()
    names.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, one a line, in their order")
    names.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="the ImageFolder, whose class folders have the names"
    )
    conversion.set_defaults(run=_run_convert, module="convert")

    exportation = commands.add_parser(
        "export",
        help="write a model as a file for torch.export, ONNX, OpenVINO, ExecuTorch or LiteRT",
        description="Fold a model and write it for another program, for any number of images (ExecuTorch and LiteRT: "
        "one). The file says how its images are prepared and what its classes are called. It is run and compared with "
        "the model before it gets its name.",
    )
    _add_source(exportation)
    formats = ["torch", "onnx", "openvino", "executorch", "litert"]
    exportation.add_argument("--to", required=True, choices=formats, help="format of the file")
    exportation.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".pt2, .onnx, .xml, .pte or .tflite to write"
    )
    exportation.add_argument(
        "--size", type=_height_and_width, metavar="PIXELS", help=f"{a_size} (default: the model's)"
    )
    exportation.add_argument(
        "--dynamic-size", action="store_true", help="take images of any size; this takes a minute of computation"
    )
    exportation.add_argument(
        "--images", type=Path, nargs="+", default=[], metavar="IMAGE", help="pictures to compare on (default: random)"
    )
    exportation.add_argument("--int8", action="store_true", help="write 8 bits, for onnx and openvino")
    exportation.add_argument(
        "--calibrate", type=Path, metavar="FOLDER", help="pictures that --int8 needs, such as the model is for"
    )
    exportation.set_defaults(run=_run_export, module="export")

    prediction = commands.add_parser(
        "predict",
        help="print what a model sees in pictures",
        description="Print the five likeliest classes of each picture, which is prepared as timm does it.",
    )
    _add_source(prediction)
    prediction.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="pictures")
    prediction.add_argument("--size", type=_height_and_width, metavar="PIXELS", help=f"{a_size} (default: the model's)")
    prediction.set_defaults(run=_run_predict, module="predict")

    app = commands.add_parser(
        "app",
        help="open a web page that classifies pictures",
        description="Serve a web page that classifies a dropped picture at any size, and shows what in it speaks for "
        "the answer (Grad-CAM). Nothing leaves this machine.",
    )
    _add_source(app, default="cmt_s")
    app.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    app.add_argument("--port", type=_count("port"), help="port to listen on (default: the first free one from 7860 on)")
    app.set_defaults(run=_run_app, module="app")

    publication = commands.add_parser(
        "publish",
        help="upload the authors' release to the Hugging Face Hub",
        description="Convert the authors' release and upload it to ORG/<model>.in1k, one commit a repository, with the "
        "account that `hf auth login` or HF_TOKEN gives. Re-running uploads what has changed. At the end, ORG and the "
        "commits are recorded in timm_cmt/hub.json of a checkout, whose next release then loads from there.",
    )
    publication.add_argument("--org", required=True, help="organisation or user on the Hub")
    publication.add_argument(
        "--models", nargs="+", type=_model, metavar="MODEL", help="the models (default: all that have weights)"
    )
    publication.add_argument(
        "--space", action="store_true", help="upload the page of `timm-cmt app` as the Space ORG/cmt, and link to it"
    )
    publication.add_argument("--private", action="store_true", help="make new repositories private")
    publication.add_argument("--create-pr", action="store_true", help="open pull requests; nothing is recorded")
    publication.add_argument("--dry-run", action="store_true", help="convert and say what would be uploaded")
    publication.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="hub.json to record ORG and the commits in (default: that of the checkout of timm-cmt that the command "
        "runs in; without one they are printed)",
    )
    publication.set_defaults(run=_run_publish, module="publish")

    recipe = commands.add_parser(
        "recipe",
        help="print a training recipe for timm's or torchvision's train.py",
        description="Print the path of a recipe, for `train.py -c` of timm. With any of the options, and always for "
        "torchvision's (coco-...), print the whole command for one machine instead, with the learning rate that the "
        "recipe has for so many images.",
    )
    recipe.add_argument("name", nargs="?", help="the recipe; without one, an error that lists them")
    recipe.add_argument("--batch-size", type=_count("images"), help="images on each GPU (default: the recipe's)")
    recipe.add_argument("--gpus", type=_count("GPUs"), help="GPUs of the machine (default: 1)")
    recipe.add_argument("--data-dir", help="the data set's folder (default: DIR, to be filled in)")
    recipe.set_defaults(run=_run_recipe, module="recipe")

    cost = commands.add_parser(
        "cost",
        help="print what a model costs, by the paper's formulas and as counted",
        description="Print for each stage the multiply-adds by the paper's formulas beside those counted, parameters, "
        "tokens, the position bias's share, and the activations that training keeps.",
    )
    cost.add_argument("model", nargs="?", default="cmt_s", type=_model, help=f"{a_model} (default: %(default)s)")
    cost.add_argument(
        "--size",
        type=_height_and_width,
        nargs="+",
        metavar="PIXELS",
        help="image sizes: one number, or height and width as 800x1333 (default: the model's own)",
    )
    cost.add_argument(
        "--plot", type=Path, metavar="FILE", help="picture of the growth with the size, against DeiT-S and Swin-T"
    )
    cost.set_defaults(run=_run_cost, module="cost")

    configs = commands.add_parser("hub-configs", help="write the configurations and model cards of published models")
    configs.add_argument(
        "--out", type=Path, default=Path("hub_configs"), help="folder to write into (default: %(default)s)"
    )
    configs.set_defaults(run=_run_hub_configs, module="cards")
    return parser


def _add_source(parser: argparse.ArgumentParser, default: str = "") -> None:
    """What `open_model` takes."""
    what = "cmt_s and such, hf-hub:ORG/NAME, a folder of `timm-cmt convert`, a checkpoint"
    if default:
        parser.add_argument("source", metavar="MODEL", nargs="?", default=default, help=f"{what} (default: {default})")
    else:
        parser.add_argument("source", metavar="MODEL", help=what)
    parser.add_argument("--model", type=_model, help="which model a checkpoint is of, where it does not say it")
    _add_model_kwargs(parser, "arguments it was built with")


def _add_model_kwargs(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--model-kwargs", nargs="*", action=_ParseKwargs, metavar="NAME=VALUE", help=what)


def _run_predict(args: argparse.Namespace) -> None:
    from .opened import open_model
    from .predict import BadPicture, predict

    model, labels = open_model(args.source, dict(model=args.model, model_kwargs=args.model_kwargs))
    status = 0
    for path in args.images:
        try:
            best = predict(model, labels, path, args.size)
        except BadPicture as err:  # the others are still of use
            status = _fail(str(err))
            continue
        print(path, *(f"{100 * probability:7.2f} %  {name}" for name, probability in best), sep="\n", flush=True)
    if status:
        sys.exit(status)


def _run_app(args: argparse.Namespace) -> None:
    from .app import run_app
    from .opened import open_model

    run_app(*open_model(args.source, dict(model=args.model, model_kwargs=args.model_kwargs)), args.host, args.port)


def _run_export(args: argparse.Namespace) -> None:
    from .export import export
    from .opened import open_model

    if args.int8 != (args.calibrate is not None):
        raise ValueError("--int8 and --calibrate FOLDER go together; give both or none")
    model, labels = open_model(args.source, dict(model=args.model, model_kwargs=args.model_kwargs))
    if args.size:
        model.set_input_size(args.size)
    print(export(model, labels, args.out, args.to, args.dynamic_size, args.images, args.calibrate))
    print(args.out)


def _run_convert(args: argparse.Namespace) -> None:
    from .convert import convert, convert_release

    names = ("model", "model_kwargs", "num_classes", "img_size", "gp", "mean", "std", "crop_pct", "interpolation")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.checkpoint is None:
        if given.keys() != {"model"} or args.labels or args.data_dir:
            raise ValueError("without a checkpoint, convert takes --model and --out alone; name a checkpoint as well")
        convert_release(args.model, args.out)
    else:
        print(*convert(args.checkpoint, args.out, given, args.labels, args.data_dir), sep="\n")
    print(args.out)


def _run_publish(args: argparse.Namespace) -> None:
    from .cards import TOP1
    from .publish import find_record, publish

    models = args.models or list(TOP1)
    publish(args.org, models, args.private, args.create_pr, args.dry_run, args.record or find_record(), args.space)


def _run_recipe(args: argparse.Namespace) -> None:
    from .recipe import find_recipe, is_for_torchvision, make_command

    given = {
        name: getattr(args, name) for name in ("batch_size", "gpus", "data_dir") if getattr(args, name) is not None
    }
    print(make_command(args.name, **given) if given or is_for_torchvision(args.name) else find_recipe(args.name))


def _run_cost(args: argparse.Namespace) -> None:
    from ..cmt import default_cfgs
    from .cost import LEFT_OUT, count_cost, format_costs, plot_growth
    from .pictures import check_picture  # matplotlib is an extra

    if args.plot:
        check_picture(args.plot)
    for size in args.size or [default_cfgs[args.model].default.input_size[1:]]:
        print(format_costs(args.model, size, count_cost(args.model, size)), end="\n\n")
    print(LEFT_OUT)
    if args.plot:
        plot_growth(args.model, args.plot)
        print(args.plot)


def _run_hub_configs(args: argparse.Namespace) -> None:
    from .cards import write_hub_configs

    print(*write_hub_configs(args.out), sep="\n")


def _run_plot_bias(args: argparse.Namespace) -> None:
    if len(args.size) > 2:
        raise ValueError(f"--size {' '.join(map(str, args.size))} has {len(args.size)} numbers; give one or two")
    from .models import create_cmt, get_cfg, refuse_without_weights
    from .plot_bias import plot_bias  # matplotlib is an extra
    from .trained import build, read_checkpoint, resolve

    name, note = args.model or "cmt_s", ""
    if args.checkpoint:
        checkpoint = read_checkpoint(args.checkpoint)
        model = build(checkpoint, resolve(checkpoint, dict(model=args.model, model_kwargs=args.model_kwargs)))
        weights = f"{get_cfg(model)['architecture']} in {args.checkpoint.name}"
    else:
        if args.pretrained:
            refuse_without_weights(name)
        model = create_cmt(name, pretrained=args.pretrained, num_classes=0)
        weights = f"{name}, ImageNet weights" if args.pretrained else f"{name} with random weights"
        note = "" if args.pretrained else " (random weights; --pretrained draws learnt ones)"
    plot_bias(model, (args.size[0], args.size[-1]), args.out, weights)
    print(f"{args.out}{note}")


def _run_demo(args: argparse.Namespace) -> None:
    from .demo import run_demo  # scikit-learn and matplotlib are an extra

    run_demo(args.output, args.model, args.epochs, args.img_size, args.device, args.pretrained)


def _model(text: str) -> str:
    from ..cmt import VARIANTS

    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{text} is no CMT; choose from {', '.join(VARIANTS)}")
    return text


def _count(what: str) -> Callable[[str], int]:
    """A type for argparse: one or more of `what`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text} is no number of {what}; give 1 or more")
        return int(text)

    return parse


def _image_size(text: str) -> int:
    from ..cmt import MIN_SIZE

    if not text.isascii() or not text.isdigit() or int(text) < MIN_SIZE:
        raise argparse.ArgumentTypeError(f"{text} is no image size for CMT; give {MIN_SIZE} pixels or more")
    return int(text)


def _height_and_width(text: str) -> tuple[int, int]:
    sides = [_image_size(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text} is no image size for CMT; give one number, or HEIGHTxWIDTH")
    return sides[0], sides[-1]


def _device(text: str) -> str:
    if text == "cpu":
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as err:  # an unknown name, or a device that is not there
        raise argparse.ArgumentTypeError(f"{text} is no device here ({str(err).splitlines()[0]})") from err
    return text
