"""The page of `timm-cmt app`, as a visitor uses it in Chromium, and what it sends and takes.

TIMM_CMT_SCREENSHOT=benchmarks/examples/app.png keeps a picture of the page.
"""

import base64
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from timm_cmt.cli import main
from timm_cmt.cli.convert import convert

if importlib.util.find_spec("gradio") is None:
    pytest.skip("NOT TESTED: the page; pip install 'timm-cmt[app]' playwright, and Chromium", allow_module_level=True)

# Runs the command, and tells on stderr of each address that it asks for beyond this machine.
COMMAND = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[0] if event.endswith("info") else args[1][0] if isinstance(args[1], tuple) else "localhost"
        if host not in (None, "localhost", "127.0.0.1"):
            print("asks", host, file=sys.stderr)
sys.addaudithook(watch)
from timm_cmt.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with a small model of digits, `model`, and with a digit that it is sure of for each of two classes."""
    load_digits = pytest.importorskip("sklearn.datasets", reason="NOT TESTED: the page; pip install scikit-learn")
    folder = tmp_path_factory.mktemp("desk")
    scans = load_digits.load_digits()
    labels = torch.from_numpy(scans.target)
    images = F.interpolate(torch.from_numpy(scans.images).float()[:, None] / 16, (64, 64), mode="bicubic")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more wait for each other where the processors are busy
    widths = dict(embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1))
    model = timm.create_model("cmt_ti", img_size=64, in_chans=1, num_classes=10, **widths)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, 40)
    for _ in range(40):
        batch = torch.randint(len(labels), (32,))
        loss = F.cross_entropy(model(images[batch] * 2 - 1), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.inference_mode():
        probabilities = model.eval()(images * 2 - 1).softmax(1)
    for digit in (4, 7):
        surest = int(torch.where(labels == digit, probabilities[:, digit], 0).argmax())
        Image.fromarray((images[surest, 0].clamp(0, 1) * 255).byte().numpy()).save(folder / f"a_{digit}.png")
    torch.save(model.state_dict(), folder / "own.pth")
    (folder / "names.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    given = dict(model="cmt_ti", model_kwargs=widths, mean=[0.5], std=[0.5], crop_pct=1.0)
    convert(folder / "own.pth", folder / "model", given, labels=folder / "names.txt")
    return folder


@pytest.fixture(scope="module")
def server(desk):
    """`timm-cmt app` on a free port; stops as a program that is told to end should, without a word."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("GRADIO_")}
    with open(desk / "stderr", "w") as stderr:
        command = [sys.executable, "-c", COMMAND, "app", "model", "--port", str(port)]
        process = subprocess.Popen(command, cwd=desk, env=environ, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            process.url = process.stdout.readline().partition(" ")[0]
            assert process.url == f"http://127.0.0.1:{port}/", (desk / "stderr").read_text()
            process.port = port
            yield process
        finally:
            process.terminate()
            status = process.wait()
    assert status == 143 and (desk / "stderr").read_text() == ""


@pytest.fixture(scope="module")
def page(server):
    """The page in Chromium; `page.asked` are the addresses that it has asked for."""
    browsers = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    chromium = next(browsers, None)
    if chromium is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("NOT TESTED: the page in a browser; pip install playwright, and install Chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # root needs that
        page = browser.new_page(base_url=server.url, viewport=dict(width=1100, height=880))
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto("/")
        yield page
        browser.close()


def drop(page, name: str, content: bytes, zeros: int = 0) -> None:
    """Drop a file with the content, and so many zeros after it."""
    script = """async ([name, content, zeros]) => {
        const answer = await fetch("data:;base64," + content)
        const dropped = new DataTransfer()
        dropped.items.add(new File([await answer.blob(), new Uint8Array(zeros)], name))
        return dropped
    }"""
    dropped = page.evaluate_handle(script, [name, base64.b64encode(content).decode(), zeros])
    field = page.locator("button", has=page.locator("input[type=file]"))
    field.dispatch_event("drop", dict(dataTransfer=dropped))


def expect_line(page, pattern: str) -> None:
    from playwright.sync_api import expect

    expect(page.get_by_placeholder("Drop a picture")).to_have_value(re.compile(f"^{pattern}$"))


def expect_answer(page, label: str) -> None:
    from playwright.sync_api import expect

    expect(page.get_by_test_id("label-output-value")).to_have_text(label)
    expect(page.locator("img")).to_have_count(2)


def fetch_pictures(page) -> list[torch.Tensor]:
    """What the model sees, and the map, each [3, 64, 64]."""
    addresses = [image.get_attribute("src") for image in page.locator("img").all()]
    pictures = [Image.open(io.BytesIO(page.request.get(address).body())) for address in addresses]
    return [pil_to_tensor(picture.convert("RGB").resize((64, 64))).float() for picture in pictures]


def test_a_dropped_picture_has_its_label_and_four_others_its_map_and_the_time(page, desk):
    drop(page, "a_4.png", (desk / "a_4.png").read_bytes())
    expect_line(page, r"a_4\.png: \d+\.\d\d s at 64 x 64 pixels")
    expect_answer(page, "digit 4")
    assert page.get_by_text(re.compile(r"^digit \d$")).count() == 1 + 5
    seen, overlay = fetch_pictures(page)
    assert (seen - pil_to_tensor(Image.open(desk / "a_4.png"))).abs().mean() < 8
    assert (overlay[0] - overlay[2]).std() > 20 > (seen[0] - seen[2]).std()  # red here, blue there
    if path := os.environ.get("TIMM_CMT_SCREENSHOT"):
        page.screenshot(path=path)


def test_the_size_is_the_visitor_s_within_bounds(page, desk):
    drop(page, "a_4.png", (desk / "a_4.png").read_bytes())
    size = page.get_by_role("spinbutton")
    for given in (96, 100_000, 768, 31, 64):
        size.fill(str(given))
        size.press("Enter")
        taken = rf"a_4\.png: [\d.]+ s at {given} x {given} pixels"
        expect_line(page, taken if 32 <= given <= 768 else f"height and width are 32 to 768 pixels, not {given}")


def make_bad_files() -> dict[str, tuple[bytes, str]]:
    """Name -> what is in it, and what the page says to it, as a pattern."""
    jpeg, huge, line = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.effect_noise((300, 200), 50).save(jpeg, "JPEG")
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    Image.new("1", (1, 100_000)).save(line, "PNG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # for which Pillow starts Ghostscript
    unread, unknown = "is no picture that can be read", "cannot identify image file"
    return {
        "text.txt": (b"hello", rf"text\.txt {unread} \({unknown} 'text\.txt'\)"),
        "huge.png": (huge.getvalue(), r"huge\.png has more than 100 million pixels; make it smaller"),
        "cut.jpg": (jpeg.getvalue()[:5000], rf"cut\.jpg {unread} \(image file is truncated .*\)"),
        "line.png": (line.getvalue(), rf"line\.png {unread} \(1 x 100000 pixels are a line; cut a piece out of it\)"),
        "drawing.eps": (eps, rf"drawing\.eps {unread} \({unknown} 'drawing\.eps'\)"),
    }


def test_what_is_no_picture_is_one_line_and_the_next_picture_has_its_label(page, desk):
    for name, (content, line) in make_bad_files().items():
        drop(page, name, content)
        expect_line(page, line)
        assert page.locator("img").count() == 0
    drop(page, "a_7.png", (desk / "a_7.png").read_bytes())
    expect_line(page, r"a_7\.png: .*")
    expect_answer(page, "digit 7")


def test_a_file_that_is_too_large_is_refused_by_the_page_and_by_the_server(page, server):
    drop(page, "large.png", b"", zeros=21_000_000)
    page.get_by_text("exceed the maximum allowed size of 20").wait_for()
    head = '--part\r\nContent-Disposition: form-data; name="files"; filename="large.png"\r\n\r\n'
    body = head.encode() + bytes(21_000_000) + b"\r\n--part--\r\n"
    request = Request(f"{server.url}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=part"})
    with pytest.raises(HTTPError, match="413"):
        urlopen(request)


def test_nothing_is_asked_for_beyond_this_machine_and_nobody_beyond_it_is_listened_to(page, server):
    hosts = {urlsplit(address).netloc for address in page.asked}
    assert hosts - {""} == {f"127.0.0.1:{server.port}"}  # of the server's own process, `server` looks at the end
    assert page.get_by_role("link").count() == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "99999"], "127.0.0.1, port 99999 ("),
        (["--host", "192.0.2.1"], "192.0.2.1 (Cannot assign requested address"),
    ],
)
def test_an_address_that_is_none_is_one_line(options, reason, desk, capsys):
    assert main(["app", str(desk / "model"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"timm-cmt: error: one cannot listen on {reason}") and error.count("\n") == 1


def test_the_map_is_that_of_the_grad_cam_library():
    library = pytest.importorskip("pytorch_grad_cam", reason="NOT TESTED: the page's map; pip install grad-cam")
    from timm_cmt.cli.app import explain

    torch.manual_seed(0)
    model = timm.create_model("cmt_ti", img_size=96, num_classes=3).eval()
    x = torch.randn(2, 3, 96, 160)
    logits, heat = explain(model, x)
    with library.GradCAM(model, target_layers=[model.stages[-1]]) as cam:
        expected = torch.from_numpy(cam(x, targets=None))  # for the likeliest class of each
    torch.testing.assert_close(logits, model(x).detach())
    torch.testing.assert_close(heat, expected, rtol=1e-3, atol=1e-3)
