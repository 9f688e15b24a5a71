"""Convert, publish and load by name, with the real huggingface_hub client against a Hub on localhost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from common import RELEASE_FILES, SIZES, authors_weights, parity_input
from hub_server import running_hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from timm_cmt import hub as timm_cmt_hub
from timm_cmt.cli import main

ROOT = Path(__file__).parents[2]
TOKEN = "hf_test"
WITH_WEIGHTS = list(RELEASE_FILES)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A TORCH_HOME into which the authors' release has been downloaded (CMT-Ti and CMT-XS)."""
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("cmt_ti", "cmt_xs"):
        torch.save(dict(model=authors_weights(name)), folder / RELEASE_FILES[name])
    return home


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "cmt_ti.in1k"
    checkpoint = release / "hub" / "checkpoints" / RELEASE_FILES["cmt_ti"]
    assert main(["convert", str(checkpoint), "--model", "cmt_ti", "--out", str(out)]) == 0
    return out


@pytest.fixture
def hub():
    with running_hub(tokens={TOKEN: ["me", "org"]}) as server:
        yield server


@pytest.fixture
def user(hub, release, tmp_path):
    """Run Python in fresh processes, as a user of that Hub with a copy of the package of their own."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "timm_cmt", site / "timm_cmt", ignore=shutil.ignore_patterns("__pycache__"))
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TIMM_CMT"))},
        "PYTHONPATH": str(site),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TORCH_HOME": str(release),
    }

    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env={**environ, **extra}, capture_output=True, text=True
        )

    return run


def publish(user, *options: str, **extra: str) -> subprocess.CompletedProcess:
    arguments = ("-m", "timm_cmt", "publish", "--org", "org", "--models", "cmt_ti", *options)
    return user(*arguments, **{"HF_TOKEN": TOKEN, **extra})


def load(user, name: str, **extra: str) -> torch.Tensor:
    """The logits of `name` loaded in a fresh process without the release in torch's cache."""
    code = f"""
import timm, torch
model = timm.create_model({name!r}, pretrained=True).eval()
with torch.inference_mode():
    torch.save(model(torch.load("input.pt")), "logits.pt")
"""
    folder = Path(user("-c", "import os; print(os.getcwd())").stdout.strip())
    torch.save(parity_input(160), folder / "input.pt")
    done = user("-c", code, TORCH_HOME=str(folder / "no_release"), **extra)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "logits.pt")


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    overlay = dict(state_dict=authors_weights("cmt_ti"))
    model = timm.create_model("cmt_ti", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        return model(parity_input(160))


def one_line(done: subprocess.CompletedProcess) -> str:
    """The one line on stderr of a command that failed (progress bars and the client's retries aside)."""
    lines = [
        line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and "it/s" not in line and "B/s" not in line
    ]
    lines = [
        line
        for line in lines
        if not re.search(r"\d+%\|| files? .*: |Processing|New Data|Uploading|Retry|thrown while", line)
    ]
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and lines[0].startswith("timm-cmt: error: "), done.stderr
    return lines[0]


# ---- the committed configurations and cards


def test_the_committed_configurations_and_cards_are_up_to_date(tmp_path):
    timm_cmt_hub.write_hub_configs(tmp_path)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    folder = ROOT / "hub_configs"
    assert fresh == {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.in1k" for name in WITH_WEIGHTS)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_configuration_is_what_timm_saves(name, tmp_path):
    ours = json.loads((ROOT / "hub_configs" / f"{name}.in1k" / "config.json").read_text())
    timm.models.save_for_hf(timm.create_model(name), str(tmp_path))
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert "model_args" not in ours
    for key in ("architecture", "num_classes", "num_features"):
        assert ours[key] == theirs[key]
    # An instance says that it takes any size; the registry says fixed, so that timm builds the model at its size.
    differing = {
        key for key in theirs["pretrained_cfg"] if theirs["pretrained_cfg"][key] != ours["pretrained_cfg"][key]
    }
    assert differing <= {"fixed_input_size"}
    cfg = timm.get_pretrained_cfg(f"{name}.in1k")
    for key, value in ours["pretrained_cfg"].items():
        assert getattr(cfg, key) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_card_is_one_that_the_hub_understands(name):
    card = ModelCard.load(ROOT / "hub_configs" / f"{name}.in1k" / "README.md")
    data = card.data
    assert data.license == "mit" and data.library_name == "timm" and data.datasets == ["imagenet-1k"]
    assert data.pipeline_tag == "image-classification" and "timm" in data.tags
    (result,) = data.eval_results
    assert result.metric_value == dict(cmt_ti=79.2, cmt_xs=81.8, cmt_s=83.5, cmt_b=84.5)[name]
    assert result.verified is False and "reported by the authors" in result.metric_name
    assert f"{SIZES[name]} x {SIZES[name]}" in card.text and "$" not in card.text
    if name == "cmt_ti":
        assert "79.0" in card.text


def test_the_snippets_of_a_card_run(release, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(release))
    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((320, 240), (-2, -1, 1, 1), 50).convert("RGB").save("image.jpg")
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "hub_configs" / "cmt_ti.in1k" / "README.md").read_text(), re.S
    )
    assert len(snippets) == 3
    for snippet in snippets:
        names: dict = {}
        exec(snippet, names)  # noqa: S102
        if "embedding" in names:
            assert names["embedding"].shape == (1, 1280)


# ---- convert


def test_convert_writes_what_timm_loads_bit_for_bit(converted, expected):
    assert sorted(path.name for path in converted.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    committed = ROOT / "hub_configs" / "cmt_ti.in1k"
    for name in ("README.md", "config.json"):
        assert (converted / name).read_text() == (committed / name).read_text()
    model = timm.create_model(f"local-dir:{converted}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(parity_input(160)), expected)


def test_convert_without_a_checkpoint_takes_the_release(release, tmp_path, monkeypatch, converted):
    monkeypatch.setenv("TORCH_HOME", str(release))
    assert main(["convert", "--model", "cmt_ti", "--out", str(tmp_path / "out")]) == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_convert_takes_a_fine_tuned_checkpoint_of_any_size(tmp_path):
    model = timm.create_model("cmt_ti", img_size=(64, 96), num_classes=7, in_chans=1)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "tuned.pth.tar")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "tuned.pth.tar"), "--model", "cmt_ti", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 7
    assert config["pretrained_cfg"]["input_size"] == [1, 64, 96]
    card = ModelCard.load(out / "README.md")
    assert card.data.eval_results is None and "7 classes at 64 x 96" in card.text
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint at"),
        (b"no checkpoint", "is cut short or no checkpoint"),
        ("cmt_xs", "this checkpoint is cmt_xs"),
        ("resnet18", "not of a CMT"),
    ],
)
def test_convert_refuses_what_is_no_checkpoint_of_the_model(content, message, tmp_path, capsys):
    path = tmp_path / "some.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(timm.create_model(content).state_dict(), path)
    assert main(["convert", str(path), "--model", "cmt_ti", "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} <= {"some.pth"}


def test_convert_on_a_full_disk_leaves_nothing(release, tmp_path, user):
    # A process can limit the size of its files; the error is that of a full disk but for its number.
    code = """
import resource, signal, sys
from timm_cmt.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(main(["convert", "--model", "cmt_ti", "--out", "out"]))
"""
    done = user("-c", code)
    assert "File too large" in one_line(done) or os.strerror(errno.ENOSPC) in done.stderr
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_convert_does_not_overwrite(converted, capsys):
    assert main(["convert", "--model", "cmt_ti", "--out", str(converted)]) == 1
    assert "is there already" in capsys.readouterr().err


# ---- publish and load


def test_from_the_release_to_the_hub_and_back_by_name_online_and_offline(hub, user, expected, tmp_path):
    done = publish(user)
    assert done.returncode == 0, done.stderr
    repo = "org/cmt_ti.in1k"
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.files(repo))
    assert not [name for name in hub.files(repo) if name.endswith((".bin", ".pth"))]
    assert f'"hf-hub:{repo}"' in hub.files(repo)["README.md"].decode()
    recorded = json.loads((tmp_path / "site" / "timm_cmt" / "hub.json").read_text())
    commit = hub.commits(repo)[-1]
    assert recorded == dict(org="org", commits={"cmt_ti.in1k": commit})
    assert f"{repo}@{commit}" in done.stdout

    assert torch.equal(load(user, "cmt_ti"), expected)
    assert any(f"/resolve/{commit}/model.safetensors" in path for _, path in hub.requests)
    count = len(hub.requests)
    assert torch.equal(load(user, "cmt_ti", HF_HUB_OFFLINE="1"), expected)
    assert len(hub.requests) == count
    assert torch.equal(load(user, f"hf-hub:{repo}@{commit}"), expected)

    # Again: nothing has changed, so there is no new commit.
    before = hub.commits(repo)
    assert publish(user).returncode == 0
    assert hub.commits(repo) == before


def test_dry_run_says_what_it_would_upload_and_asks_the_hub_nothing(hub, user, tmp_path):
    done = publish(user, "--dry-run", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    assert "org/cmt_ti.in1k" in done.stdout and re.search(r"model.safetensors +38\.3 MB", done.stdout)
    assert not hub.requests
    assert json.loads((tmp_path / "site" / "timm_cmt" / "hub.json").read_text())["commits"] == {}


def test_a_pull_request_records_nothing(hub, user, tmp_path):
    hub.add("org/cmt_ti.in1k", {"README.md": b"mine"})
    done = publish(user, "--create-pr")
    assert done.returncode == 0, done.stderr
    assert hub.files("org/cmt_ti.in1k")["README.md"] == b"mine"
    assert "model.safetensors" in hub.files("org/cmt_ti.in1k", revision="refs/pr/1")
    assert json.loads((tmp_path / "site" / "timm_cmt" / "hub.json").read_text())["commits"] == {}


def test_a_private_repository_needs_the_token(hub, user, expected):
    assert publish(user, "--private").returncode == 0
    assert torch.equal(load(user, "cmt_ti", HF_TOKEN=TOKEN), expected)
    done = user("-c", "import timm; timm.create_model('cmt_ti', pretrained=True, cache_dir='elsewhere')", HF_TOKEN="")
    assert done.returncode != 0 and "401" in done.stderr


def test_an_organisation_in_the_environment_is_a_mirror(hub, user, converted, expected):
    hub.add("mirror/cmt_ti.in1k", {path.name: path.read_bytes() for path in converted.iterdir()})
    assert torch.equal(load(user, "cmt_ti", TIMM_CMT_HUB_ORG="mirror"), expected)
    assert torch.equal(load(user, "cmt_ti.in1k", TIMM_CMT_HUB_ORG="mirror"), expected)
    assert torch.equal(load(user, "hf-hub:mirror/cmt_ti.in1k"), expected)


def test_a_source_that_is_named_goes_before_the_organisation_in_the_environment(monkeypatch, expected):
    monkeypatch.setenv("TIMM_CMT_HUB_ORG", "nobody")
    overlay = dict(state_dict=authors_weights("cmt_ti"))
    model = timm.create_model("cmt_ti", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        assert torch.equal(model(parity_input(160)), expected)


def test_as_shipped_nothing_is_recorded_and_the_release_is_the_source():
    shipped = subprocess.run(["git", "show", "HEAD:timm_cmt/hub.json"], cwd=ROOT, capture_output=True, text=True).stdout
    shipped = shipped or (ROOT / "timm_cmt" / "hub.json").read_text()
    assert json.loads(shipped) == dict(org="", commits={})
    assert timm.get_pretrained_cfg("cmt_s").hf_hub_id is None


def test_transformers_loads_the_same_repository(hub, user, converted, expected, tmp_path):
    hub.add("org/cmt_ti.in1k", {path.name: path.read_bytes() for path in converted.iterdir()})
    torch.save(parity_input(160), tmp_path / "input.pt")
    Image.effect_mandelbrot((320, 240), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "image.jpg")
    code = """
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
model = AutoModelForImageClassification.from_pretrained("org/cmt_ti.in1k")
with torch.inference_mode():
    torch.save(model(torch.load("input.pt")).logits, "logits.pt")
print(AutoImageProcessor.from_pretrained("org/cmt_ti.in1k").data_config["input_size"])
print(len(pipeline("image-classification", model="org/cmt_ti.in1k", top_k=3)("image.jpg")))
"""
    done = user("-c", code)
    if "No module named 'transformers'" in done.stderr:
        pytest.skip("NOT TESTED: transformers; pip install transformers")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"160, 160.*\n3", done.stdout)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


# ---- faults


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (dict(fail={"whoami": 401}), "whoami|who you are"),
        (dict(fail={"repos/create": 403}), "403"),
        (dict(fail={"repos/create": 404}), "404"),
        (dict(fail={"/commit/": 500}), "500"),
        (dict(drop={"/lfs/"}), "not published"),
    ],
)
def test_a_publication_that_fails_is_one_line_and_records_nothing(fault, message, hub, user, tmp_path):
    for name, value in fault.items():
        getattr(hub, name).update(value)
    line = one_line(publish(user))
    assert re.search(message, line), line
    assert json.loads((tmp_path / "site" / "timm_cmt" / "hub.json").read_text()) == dict(org="", commits={})
    try:
        assert "model.safetensors" not in hub.files("org/cmt_ti.in1k")
    except KeyError:
        pass  # there is no such repository


def test_no_token_and_another_s_organisation(hub, user):
    assert "HF_TOKEN" in one_line(publish(user, HF_TOKEN=""))
    done = user("-m", "timm_cmt", "publish", "--org", "stranger", "--models", "cmt_ti", HF_TOKEN=TOKEN)
    assert "stranger/cmt_ti.in1k is not published" in one_line(done)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", "another variant", "this checkpoint is cmt_xs"),
        ("model.safetensors", "cut", "org/cmt_ti.in1k"),
        ("model.safetensors", "pickle", "org/cmt_ti.in1k"),
        ("config.json", "unknown architecture", "Unknown model"),
    ],
)
def test_a_broken_repository_is_one_error(file, content, message, hub, user, converted, release):
    files = {path.name: path.read_bytes() for path in converted.iterdir()}
    if content == "another variant":
        from safetensors.torch import save

        files[file] = save(timm.create_model("cmt_xs").state_dict())
    elif content == "cut":
        files[file] = files[file][:1_000_000]
    elif content == "pickle":
        files[file] = (release / "hub" / "checkpoints" / RELEASE_FILES["cmt_ti"]).read_bytes()
    else:
        files[file] = files[file].replace(b'"cmt_ti"', b'"cmt_xxl"')
    hub.add("org/cmt_ti.in1k", files)
    done = user("-c", "import timm; timm.create_model('hf-hub:org/cmt_ti.in1k', pretrained=True)")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and last.startswith("RuntimeError: ") and message in last, done.stderr


def test_a_download_from_the_hub_that_is_cut_leaves_nothing_that_looks_whole(hub, user, converted, expected):
    hub.add("org/cmt_ti.in1k", {path.name: path.read_bytes() for path in converted.iterdir()})
    hub.cut["model.safetensors"] = 2_000_000
    hub.cut["/lfs/"] = 2_000_000
    done = user(
        "-c", "import timm; timm.create_model('hf-hub:org/cmt_ti.in1k', pretrained=True)", HF_HUB_DOWNLOAD_TIMEOUT="2"
    )
    assert done.returncode != 0
    hub.cut.clear()
    assert torch.equal(load(user, "hf-hub:org/cmt_ti.in1k"), expected)


def test_the_metadata_of_every_card_is_yaml():
    for name in WITH_WEIGHTS:
        text = (ROOT / "hub_configs" / f"{name}.in1k" / "README.md").read_text()
        assert yaml.safe_load(text.split("---")[1])["model-index"][0]["name"] == f"{name}.in1k"
