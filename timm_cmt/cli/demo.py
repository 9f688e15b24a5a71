"""Train a CMT on scikit-learn's handwritten digits with timm's own factories, as ``timm-cmt demo`` does."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy, get_state_dict
from torch import Tensor, nn

from .models import create_cmt, get_cfg, refuse_without_weights
from .pictures import save_picture
from .recipe import join

__all__ = ["predict_snippet", "run_demo", "train_command", "validate_command", "write_digits"]

BATCH_SIZE = 32
EMA_DECAY = 0.98
NUM_CLASSES = 10
SMOOTHING = 0.1
DROP_PATH = 0.05
OPTIMIZER: dict[str, Any] = dict(opt="adamw", lr=1e-3, weight_decay=0.05)
SCHEDULE: dict[str, Any] = dict(sched="cosine", min_lr=1e-5, warmup_epochs=2, warmup_lr=1e-5)
# Digits are neither mirrored nor recoloured, and all of a digit stays in view.
AUGMENTATION: dict[str, Any] = dict(scale=(0.7, 1.0), ratio=(0.8, 1.25), hflip=0.0, color_jitter=0.0)
CROP_PCT = 1.0


def write_digits(folder: Path) -> None:
    """Write the 1797 scans of scikit-learn's digits as folder/{train,validation}/<digit>/<number>.png, 64 x 64 pixels.

    A third of each digit's scans, always the same, goes to validation.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, validation = train_test_split(
        range(len(digits.target)), test_size=1 / 3, stratify=digits.target, random_state=0
    )
    for split, numbers in (("train", train), ("validation", validation)):
        for number in numbers:
            path = folder / split / str(digits.target[number]) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scan = Image.fromarray((digits.images[number] * (255 / 16)).astype("uint8"))  # 8 x 8, values 0 to 16
            scan.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB").save(path)


def run_demo(
    output: Path,
    model_name: str = "cmt_ti",
    epochs: int = 8,
    img_size: int = 64,
    device: str = "cpu",
    pretrained: bool = False,
) -> float:
    """Train and validate, and write the data, the last checkpoint and predictions.png into `output`.

    Args:
        output: Folder to write into; made where it is not there.
        model_name: One of the CMT models.
        epochs: Epochs over the 1198 training images.
        img_size: Height and width in pixels that the model is built for and the digits are resized to.
        device: A torch device.
        pretrained: Start from the ImageNet weights.

    Returns:
        Top-1 accuracy in percent on the 599 validation images, by the averaged weights.

    Raises:
        FileExistsError: There is something in `output` already.
        ValueError: There are no pretrained weights of the model.
    """
    from tqdm import tqdm

    if pretrained:
        refuse_without_weights(model_name)
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"there is something in {output} already; name another folder by --output, or remove it")
    start = time.monotonic()
    output = output.resolve()  # the commands printed at the end are for another folder
    torch.manual_seed(0)
    data = output / "digits"
    write_digits(data)
    model = create_cmt(
        model_name, pretrained=pretrained, img_size=img_size, num_classes=NUM_CLASSES, drop_path_rate=DROP_PATH
    ).to(device)
    config = resolve_data_config({}, model=model)
    common: dict[str, Any] = dict(
        input_size=config["input_size"],
        batch_size=BATCH_SIZE,
        interpolation="bicubic",
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        persistent_workers=False,
        pin_memory=False,
        device=torch.device(device),
    )
    train_set = create_dataset("", root=str(data), split="train", is_training=True)
    validation_set = create_dataset("", root=str(data), split="validation")
    train_loader = create_loader(train_set, is_training=True, **AUGMENTATION, **common)
    validation_loader = create_loader(validation_set, crop_pct=CROP_PCT, **common)

    optimizer = create_optimizer_v2(model, **OPTIMIZER)
    updates = len(train_loader)
    scheduler, epochs = create_scheduler_v2(
        optimizer, num_epochs=epochs, step_on_epochs=False, updates_per_epoch=updates, **SCHEDULE
    )
    ema = ModelEmaV3(model, decay=EMA_DECAY)
    loss_fn = LabelSmoothingCrossEntropy(SMOOTHING)
    checkpoint = output / "last.pth.tar"

    bar = tqdm(total=epochs * updates, unit="batch", desc=f"training {model_name}")
    top1 = 0.0
    for epoch in range(epochs):
        model.train()
        for step, (images, labels) in enumerate(train_loader, start=epoch * updates + 1):
            loss = loss_fn(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model, step=step)
            scheduler.step_update(num_updates=step)
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", top1=f"{top1:.1f}")
            bar.update()
        scheduler.step(epoch + 1)
        logits, labels = predict(ema.module, validation_loader)
        top1 = accuracy(logits, labels)[0].item()
        _save(checkpoint, model, ema, epoch, top1, data)
    bar.close()
    draw_predictions(validation_set, logits, labels, output / "predictions.png")

    print(f"top-1 {top1:.2f} % on {len(validation_set)} held-out digits, {time.monotonic() - start:.0f} s")
    print(f"checkpoint  {checkpoint}")
    print(f"pictures    {output / 'predictions.png'}")
    digit = validation_set.filename(0, absolute=True)
    print(
        f"\nIts answer to one of the digits, in Python:\n\n{predict_snippet(checkpoint, model_name, img_size, digit)}"
    )
    folder = output / "model"
    print("\nA folder for timm, transformers and the Hugging Face Hub, and from it to ONNX:\n")
    print(join(["timm-cmt", "convert", str(checkpoint), "--out", str(folder)]))
    print(join(["timm-cmt", "export", str(folder), "--to", "onnx", "--out", str(output / "model.onnx")]))
    print("\nThe same training and validation with timm's own scripts, in a clone of timm:\n")
    print(train_command(data, model_name, epochs, img_size, device, pretrained), end="\n\n")
    print(validate_command(data, model_name, img_size, device, checkpoint))
    return top1


def predict_snippet(checkpoint: Path, model_name: str, img_size: int, image: str) -> str:
    """Python that prints the class of an image, by a checkpoint of `run_demo`."""
    options = f"img_size={img_size}, num_classes={NUM_CLASSES}, checkpoint_path={str(checkpoint)!r}"
    return (
        f"import timm, PIL.Image\n"
        f"model = timm.create_model({model_name!r}, {options}).eval()\n"
        f"transform = timm.data.create_transform({img_size}, crop_pct={CROP_PCT}, interpolation='bicubic')\n"
        f"print(model(transform(PIL.Image.open({image!r}))[None]).argmax().item())"
    )


def _save(path: Path, model: nn.Module, ema: nn.Module, epoch: int, top1: float, data: Path) -> None:
    """Write the checkpoint as train.py does, with its arguments, but without the optimizer, two thirds of the file."""
    name, (*_, img_size) = (get_cfg(model)[key] for key in ("architecture", "input_size"))
    args = argparse.Namespace(
        model=name,
        model_kwargs=dict(img_size=img_size),
        num_classes=NUM_CLASSES,
        img_size=img_size,
        gp=None,
        mean=None,
        std=None,
        crop_pct=CROP_PCT,
        interpolation="bicubic",
        data_dir=str(data),
        train_split="train",
    )
    state = dict(
        epoch=epoch,
        arch=name,
        version=2,
        args=args,
        state_dict=get_state_dict(model),
        state_dict_ema=get_state_dict(ema),
        metric=top1,
    )
    part = path.with_name(f".{path.name}.part")
    torch.save(state, part)
    part.replace(path)


@torch.inference_mode()
def predict(model: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    """-> logits [N, classes] and labels [N] of the loader's N images."""
    model.eval()
    outputs = [(model(images).cpu(), labels.cpu()) for images, labels in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*outputs))
    return logits, labels


def draw_predictions(
    dataset: Any, logits: Tensor, labels: Tensor, path: Path, rows: int = 6, columns: int = 10
) -> None:
    """Draw validation images with predicted and true labels: what is wrong first, then some of what is right."""
    from matplotlib.figure import Figure
    from PIL import Image

    probability, predicted = logits.softmax(dim=-1).max(dim=-1)
    is_right = predicted == labels
    wrong, right = ((is_right == value).nonzero().flatten() for value in (False, True))
    wrong = wrong[: rows * columns]
    evenly = torch.linspace(0, len(right) - 1, rows * columns - len(wrong)).long() if len(right) else right
    chosen = [*wrong.tolist(), *right[evenly].tolist()]
    figure = Figure(figsize=(columns * 1.1, rows * 1.35), layout="constrained")
    figure.suptitle(f"{is_right.sum()} of {len(labels)} right; wrong ones first, in red")
    for axes, index in zip(figure.subplots(rows, columns, squeeze=False).flat, chosen):
        axes.imshow(Image.open(dataset.filename(index, absolute=True)))
        axes.set_title(
            f"{predicted[index]} ({probability[index]:.0%})\ntrue {labels[index]}",
            fontsize=7,
            color="black" if is_right[index] else "tab:red",
        )
        axes.axis("off")
    save_picture(figure, path)


def train_command(
    data: Path, model_name: str, epochs: int, img_size: int, device: str, pretrained: bool = False
) -> str:
    """The command with which timm's train.py trains as `run_demo` does."""
    options: dict[str, Any] = dict(
        data_dir=data,
        model=model_name,
        pretrained=pretrained,
        img_size=img_size,
        model_kwargs=f"img_size={img_size}",  # not every version of the scripts builds the model at --img-size
        num_classes=NUM_CLASSES,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        **OPTIMIZER,
        **SCHEDULE,
        sched_on_updates=True,
        smoothing=SMOOTHING,
        drop_path=DROP_PATH,
        **AUGMENTATION,
        train_interpolation="bicubic",
        crop_pct=CROP_PCT,
        model_ema=True,
        model_ema_decay=EMA_DECAY,
        device=device,
        output="output",
        experiment="digits",
    )
    return join(["python", "train.py", *_to_options(options)])


def validate_command(data: Path, model_name: str, img_size: int, device: str, checkpoint: Path) -> str:
    """The command with which timm's validate.py validates a checkpoint as `run_demo` does."""
    options: dict[str, Any] = dict(
        data_dir=data,
        model=model_name,
        img_size=img_size,
        model_kwargs=f"img_size={img_size}",
        num_classes=NUM_CLASSES,
        crop_pct=CROP_PCT,
        use_ema=True,
        checkpoint=checkpoint,
        device=device,
    )
    return join(["python", "validate.py", *_to_options(options)])


def _to_options(arguments: dict[str, Any]) -> list[str]:
    words = []
    for name, value in arguments.items():
        if value is not False:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words
