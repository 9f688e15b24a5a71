"""A web page that classifies a picture and shows what in it speaks for the answer, as ``timm-cmt app`` opens it.

gradio makes the page and serves it. The page may be open to strangers, so all that they can send is bounded.
"""

import os
import socket
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import gradio as gr
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import resolve_data_config
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..cmt import CMT, MIN_SIZE
from .models import get_cfg
from .predict import BadPicture, check_classifier, list_best, read_picture

__all__ = ["explain", "make_page", "run_app"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # not all of Pillow's: for EPS it starts another program
MAX_MEGABYTES = 20  # of a file
MAX_MEGAPIXELS = 100  # of the picture in it; 0.3 GB
MAX_SIZE = 768  # pixels that a visitor may have it brought to
MAX_WAITING = 32  # pictures, while one is classified
KEPT = 3600  # seconds that gradio keeps what was sent
SHOWN = 448  # pixels; smaller pictures are enlarged smoothly


def run_app(model: CMT, labels: list[str], host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serve the page until the process is ended.

    Args:
        model: The model, for inference.
        labels: The names of its classes; [] for numbers.
        host: The address to listen on; 0.0.0.0 for all that this machine has.
        port: The port; None for the first free one from 7860 on.

    Raises:
        ValueError: One cannot listen there, or the model has no classifier or takes no pictures.
    """
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as err:  # gradio would say less
        reason = getattr(err, "strerror", None) or err
        where = f"{host}, port {port}" if port else host
        raise ValueError(f"one cannot listen on {where} ({reason}); name another by --host and --port") from None
    # Pillow refuses pictures of more than twice as many pixels as this, and warns of those in between.
    Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 1_000_000 // 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = make_page(model, labels)
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=f"{MAX_MEGABYTES}mb",
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
        )
        print(f"{url} (Ctrl-C ends it)", flush=True)
        while True:  # gradio's threads end with this one
            time.sleep(3600)


def make_page(model: CMT, labels: list[str]) -> gr.Blocks:
    """The page, to be served by gradio.

    Raises:
        ValueError: The model has no classifier, or takes no pictures.
    """
    check_classifier(model)
    own_size = max(get_cfg(model)["input_size"][1:])
    largest = max(MAX_SIZE, own_size)
    # gradio shows a name once; two of ImageNet's classes are called crane
    labels = [f"{name} ({i})" if labels.count(name) > 1 else name for i, name in enumerate(labels)]

    def classify(file: str | None, side: int | None) -> tuple[str, Any, Any, Any]:
        if file is None:
            return "", None, None, None
        if side is None or not MIN_SIZE <= side <= largest:
            return f"height and width are {MIN_SIZE} to {largest} pixels, not {side}", None, None, None
        path, start = Path(file), time.perf_counter()
        try:
            x = read_picture(model, path, (side, side), FORMATS)
        except BadPicture as err:
            return str(err).replace(str(path), path.name), None, None, None
        logits, heat = explain(model, x[None])
        best, (picture, overlay) = list_best(logits[0], labels), draw(model, x, heat[0])
        said = f"{path.name}: {time.perf_counter() - start:.2f} s at {side} x {side} pixels"
        return said, dict(best), picture, overlay

    with gr.Blocks(title="CMT", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(
            f"# What is in the picture?\n`{get_cfg(model)['architecture']}` answers with one of {model.num_classes} "
            "classes. Grad-CAM shows what in the picture speaks for its answer."
        )
        with gr.Row():
            with gr.Column():
                file = gr.File(label=f"Picture ({', '.join(FORMATS)}; up to {MAX_MEGABYTES} MB)", height=160)
                size = gr.Number(
                    own_size,
                    precision=0,
                    label="Height and width in pixels",
                    info=f"What the picture is brought to: {MIN_SIZE} to {largest}. The model was made for {own_size}.",
                )
                said = gr.Textbox(show_label=False, container=False, placeholder="Drop a picture")
            answer = gr.Label(label="Answer, and what else is likely")
        with gr.Row():
            picture, overlay = (
                gr.Image(label=label, format="png", height=400, interactive=False, buttons=[])
                for label in ("What the model sees", "What in it speaks for the answer (Grad-CAM)")
            )
        dropped, answers = gr.State(), [said, answer, picture, overlay]
        # The field is emptied at once, so that the next picture can be dropped.
        file.upload(lambda path: (path, None), file, [dropped, file], api_visibility="private")
        gr.on(
            [dropped.change, size.submit, size.blur],
            classify,
            [dropped, size],
            answers,
            api_visibility="private",
            concurrency_limit=1,
            trigger_mode="always_last",
        )
    return page.queue(api_open=False, max_size=MAX_WAITING)


def explain(model: CMT, x: Tensor) -> tuple[Tensor, Tensor]:
    """The answer to images, and where what speaks for it is: Grad-CAM on the last stage, as the grad-cam package
    scales it.

    Only the head is differentiated, so this takes hardly more time and memory than the answer alone.

    Args:
        model: The model, for inference.
        x: Images, [B, C, H, W].

    Returns:
        Logits, [B, classes], and maps for the likeliest class of each image, [B, H, W], 0 to 1.
    """
    with torch.no_grad():
        maps = model.stages(model.stem(x))  # [B, D, H / 32, W / 32]
    maps.requires_grad_()
    logits = model.forward_head(model.final_conv(maps))
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), maps)
    heat = (gradient.mean((2, 3), keepdim=True) * maps).detach().sum(1, keepdim=True).relu()
    heat = F.interpolate(heat, x.shape[2:], mode="bilinear")[:, 0]
    heat = heat - heat.amin((1, 2), keepdim=True)
    return logits.detach(), heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-7)


def draw(model: CMT, x: Tensor, heat: Tensor) -> tuple[Image.Image, Image.Image]:
    """What the model sees, [C, H, W], and the same under the colours of its map, [H, W]."""
    data = resolve_data_config(dict(input_size=tuple(x.shape)), model=model)
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = to_pil_image((x * std + mean).clamp(0, 1)[:3]).convert("RGB"), to_pil_image(heat)
    size = (max(x.shape[2], SHOWN), max(x.shape[1], SHOWN))
    picture, grey = (image.resize(size, Image.Resampling.BICUBIC) for image in images)
    colours = ImageOps.colorize(grey, black="navy", mid="lime", white="red")
    return picture, Image.blend(picture, colours, 0.5)
