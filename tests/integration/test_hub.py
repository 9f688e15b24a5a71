"""Convert, publish and load by name, with the real huggingface_hub client against a Hub on localhost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from common import RELEASE_FILES, SIZES, WITH_WEIGHTS, authors_weights, parity_input
from hub_server import running_hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save

import timm_cmt
from timm_cmt.cli import main
from timm_cmt.cli.cards import TOP1, make_card, write_hub_configs
from timm_cmt.cli.publish import find_record

ROOT = Path(__file__).parents[2]
TOKEN = "hf_test"
EMPTY = dict(org="", commits={})


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(release))
        assert main(["convert", "--model", "cmt_ti", "--out", str(out)]) == 0
    return out


@pytest.fixture
def hub():
    with running_hub(tokens={TOKEN: ["me", "org"]}) as server:
        yield server


@pytest.fixture
def user(hub, installed, release, tmp_path):
    """Run Python in fresh processes, as a user of that Hub who has installed the wheel."""
    site = tmp_path / "site"
    shutil.copytree(installed, site)
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

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "timm_cmt", *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True)

    run.start = start
    run.folder = tmp_path
    run.record = site / "timm_cmt" / "hub.json"
    run.record.write_text(json.dumps(EMPTY))  # whatever the checkout's own says by now
    return run


@pytest.fixture
def publish(hub, converted, tmp_path, monkeypatch, capsys):
    """`timm-cmt publish` in this process, with the release converted once for all; returns status, output and error."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)

    def convert_release(name: str, out: Path, org: str, space: bool) -> None:
        shutil.copytree(converted, out)
        if space:
            (out / "README.md").write_text(make_card(name, org, space))

    monkeypatch.setattr("timm_cmt.cli.publish.convert_release", convert_release)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    sleep = time.sleep  # the client would wait for 20 s between its attempts
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.1)))
    record = tmp_path / "recorded.json"

    def run(*options: str, org: str = "org", token: str = TOKEN) -> tuple[int, str, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        capsys.readouterr()
        status = main(["publish", "--org", org, "--models", "cmt_ti", "--record", str(record), *options])
        return status, *capsys.readouterr()

    run.record = record
    return run


def load(user, *names: str, more: str = "", **extra: str) -> list[torch.Tensor]:
    """The logits of each name, loaded in a fresh process without the release in torch's cache, which then runs more."""
    code = f"""
import timm, torch
images = torch.load("input.pt")
for i, name in enumerate({names}):
    model = timm.create_model(name, pretrained=True).eval()
    with torch.inference_mode():
        torch.save(model(images), f"logits{{i}}.pt")
"""
    torch.save(parity_input(160), user.folder / "input.pt")
    done = user("-c", code + more, TORCH_HOME=str(user.folder / "no_release"), **extra)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(user.folder / f"logits{i}.pt") for i in range(len(names))]


def assert_each(logits: list[torch.Tensor], expected: torch.Tensor):
    assert all(torch.equal(each, expected) for each in logits)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    overlay = dict(state_dict=authors_weights("cmt_ti"))
    model = timm.create_model("cmt_ti", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        return model(parity_input(160))


def one_line(error: str) -> str:
    """The one line on stderr of a command that failed (progress bars and the client's retries aside)."""
    lines = [line for line in re.split(r"[\r\n]+", error) if line.strip() and "it/s" not in line and "B/s" not in line]
    lines = [
        line
        for line in lines
        if not re.search(r"\d+%\|| files? .*: |Processing|New Data|Uploading|Retry|thrown while", line)
    ]
    assert len(lines) == 1 and lines[0].startswith("timm-cmt: error: "), error
    return lines[0]


# ---- the committed configurations and cards


def test_the_committed_configurations_and_cards_are_up_to_date(tmp_path):
    write_hub_configs(tmp_path)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    committed = ROOT / "hub_configs"
    folders = [path for path in committed.iterdir() if path.is_dir()]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert fresh == {path.relative_to(committed): path.read_text() for path in paths}
    assert sorted(folder.name for folder in folders) == [*sorted(f"{name}.in1k" for name in WITH_WEIGHTS), "space"]


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


def test_the_accuracies_are_the_paper_s():
    assert dict(cmt_ti=79.2, cmt_xs=81.8, cmt_s=83.5, cmt_b=84.5).items() <= TOP1.items()


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_card_is_one_that_the_hub_understands(name):
    card = ModelCard.load(ROOT / "hub_configs" / f"{name}.in1k" / "README.md")
    data = card.data
    assert data.license == "mit" and data.library_name == "timm" and data.datasets == ["imagenet-1k"]
    assert data.pipeline_tag == "image-classification" and "timm" in data.tags
    (result,) = data.eval_results
    assert result.metric_value == TOP1[name]
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


def test_convert_on_a_full_disk_leaves_nothing(release, tmp_path, user):
    # A process can limit the size of its files; the error is that of a full disk but for its number.
    code = """
import resource, signal, sys
import timm_cmt
from timm_cmt.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(main(["convert", "--model", "cmt_ti", "--out", "out"]))
"""
    done = user("-c", code)
    assert done.returncode == 1
    assert "File too large" in one_line(done.stderr) or os.strerror(errno.ENOSPC) in done.stderr
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_convert_that_is_told_to_end_leaves_nothing(user, tmp_path):
    process = user.start("convert", "--model", "cmt_ti", "--out", "out")
    while process.poll() is None and not list(tmp_path.glob(".out-*/out/*")):
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 143 and not list(tmp_path.glob("*out*"))


def test_of_two_converts_to_one_name_one_writes_it_and_the_other_says_so(user, tmp_path):
    processes = [user.start("convert", "--model", "cmt_ti", "--out", "out") for _ in range(2)]
    said = [process.communicate()[1] for process in processes]
    errors = [one_line(error) for error, process in zip(said, processes) if process.returncode]
    assert len(errors) == 1 and "out is there already; name another folder, or remove it" in errors[0]
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"] and len(list((tmp_path / "out").iterdir())) == 3


# ---- publish and load


def test_from_the_release_to_the_hub_and_back_by_name_online_and_offline(hub, user, expected):
    arguments = ("-m", "timm_cmt", "publish", "--org", "org", "--models", "cmt_ti")
    done = user(*arguments, "--record", str(user.record), HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    repo = "org/cmt_ti.in1k"
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.files(repo))
    assert not [name for name in hub.files(repo) if name.endswith((".bin", ".pth"))]
    assert f'"hf-hub:{repo}"' in hub.files(repo)["README.md"].decode()
    commit = hub.commits(repo)[-1]
    recorded = user.record.read_text()
    assert json.loads(recorded) == dict(org="org", commits={"cmt_ti.in1k": commit})
    assert f"{repo}@{commit}" in done.stdout

    assert_each(load(user, "cmt_ti", f"hf-hub:{repo}@{commit}"), expected)
    assert any(f"/resolve/{commit}/model.safetensors" in path for _, path in hub.requests)
    count = len(hub.requests)
    assert_each(load(user, "cmt_ti", HF_HUB_OFFLINE="1"), expected)
    assert len(hub.requests) == count

    # Again, from a package that is no checkout: nothing has changed, and the record is printed, not written.
    user.record.unlink()
    before = hub.commits(repo)
    done = user(*arguments, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and hub.commits(repo) == before and not user.record.exists(), done.stderr
    assert "There is no checkout of timm-cmt here" in done.stdout and done.stdout.endswith(recorded)


def test_the_record_belongs_into_the_checkout_that_one_stands_in(tmp_path, monkeypatch):
    (tmp_path / "timm_cmt" / "recipes").mkdir(parents=True)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    monkeypatch.chdir(tmp_path / "timm_cmt" / "recipes")
    assert find_record() == tmp_path / "timm_cmt" / "hub.json"
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = another\n")
    assert find_record() == ROOT / "timm_cmt" / "hub.json"  # that of the package itself, which runs from a checkout


def test_publishing_more_adds_to_the_record_and_another_organisation_replaces_it(hub, publish):
    publish.record.write_text(json.dumps(dict(org="org", commits={"cmt_s.in1k": "0" * 40})))
    assert publish()[0] == 0
    (commit,) = hub.commits("org/cmt_ti.in1k")[-1:]
    assert json.loads(publish.record.read_text())["commits"] == {"cmt_s.in1k": "0" * 40, "cmt_ti.in1k": commit}
    assert publish(org="me")[0] == 0
    recorded = json.loads(publish.record.read_text())
    assert recorded["org"] == "me" and list(recorded["commits"]) == ["cmt_ti.in1k"]


def test_a_record_that_is_none_is_refused_before_anything_is_uploaded(hub, publish):
    publish.record.write_text("{}")
    status, _, error = publish()
    assert status == 1 and "is no record of" in one_line(error) and not hub.requests


def test_dry_run_says_what_it_would_upload_and_asks_the_hub_nothing(hub, publish):
    status, output, error = publish("--dry-run", token="")
    assert status == 0, error
    assert "org/cmt_ti.in1k" in output and re.search(r"model.safetensors +38\.3 MB", output)
    assert not hub.requests and not publish.record.exists()


def test_a_pull_request_records_nothing(hub, publish):
    hub.add("org/cmt_ti.in1k", {"README.md": b"mine"})
    status, _, error = publish("--create-pr")
    assert status == 0, error
    assert hub.files("org/cmt_ti.in1k")["README.md"] == b"mine"
    assert "model.safetensors" in hub.files("org/cmt_ti.in1k", revision="refs/pr/1")
    assert not publish.record.exists()


def test_the_space_is_uploaded_after_its_weights_and_the_card_links_to_it(hub, publish, release, monkeypatch):
    status, output, error = publish("--space")
    assert status == 0, error
    address = "spaces/org/cmt"
    assert f"{address}@{hub.commits(address)[-1]}" in output.splitlines()[-2]
    assert list(json.loads(publish.record.read_text())["commits"]) == ["cmt_ti.in1k"]
    files = {name: content.decode() for name, content in hub.files(address).items()}
    assert files.keys() >= {"README.md", "app.py", "requirements.txt"}
    metadata = yaml.safe_load(files["README.md"].split("---")[1])
    assert (metadata["sdk"], metadata["app_file"], metadata["models"]) == ("gradio", "app.py", ["org/cmt_ti.in1k"])
    minimum = re.search(r"gradio>=([\d.]+)", (ROOT / "setup.cfg").read_text())[1]
    assert metadata["sdk_version"].startswith(minimum)
    assert files["requirements.txt"].endswith(f"\ntimm-cmt[app]=={timm_cmt.__version__}\n")

    asked = []
    monkeypatch.setattr("timm_cmt.cli.main", lambda arguments: asked.extend(arguments) or 0)
    with pytest.raises(SystemExit):
        exec(files["app.py"], {})  # noqa: S102
    assert asked == ["app", "hf-hub:org/cmt_ti.in1k", "--host", "0.0.0.0"]
    assert f"(https://huggingface.co/{address})" in hub.files("org/cmt_ti.in1k")["README.md"].decode()

    before = hub.commits(address)
    assert publish("--space")[0] == 0 and hub.commits(address) == before


def test_a_private_repository_needs_the_token(hub, publish, user, expected):
    assert publish("--private")[0] == 0
    user.record.write_text(publish.record.read_text())
    without = """
import os
os.environ["HF_TOKEN"] = ""
try:
    timm.create_model("cmt_ti", pretrained=True, cache_dir="elsewhere")
except Exception as err:
    assert "401" in str(err), err
else:
    raise AssertionError("loaded without a token")
"""
    assert_each(load(user, "cmt_ti", more=without, HF_TOKEN=TOKEN), expected)


def test_an_organisation_in_the_environment_is_a_mirror(hub, user, converted, expected):
    hub.add("mirror/cmt_ti.in1k", {path.name: path.read_bytes() for path in converted.iterdir()})
    names = ("cmt_ti", "cmt_ti.in1k", "hf-hub:mirror/cmt_ti.in1k")
    more = """
overlay = dict(mean=(0.5, 0.5, 0.5))  # which names no source
cfg = timm.create_model("cmt_ti", pretrained=True, pretrained_cfg_overlay=overlay).pretrained_cfg
assert (cfg["hf_hub_id"], cfg["mean"]) == ("mirror/cmt_ti.in1k", (0.5, 0.5, 0.5)), cfg
"""
    assert_each(load(user, *names, more=more, TIMM_CMT_HUB_ORG="mirror"), expected)


def test_a_source_that_is_named_goes_before_the_organisation_in_the_environment(monkeypatch, expected):
    monkeypatch.setenv("TIMM_CMT_HUB_ORG", "nobody")
    overlay = dict(state_dict=authors_weights("cmt_ti"))
    model = timm.create_model("cmt_ti", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        assert torch.equal(model(parity_input(160)), expected)


def test_transformers_loads_the_same_repository(hub, user, converted, expected, tmp_path):
    hub.add("org/cmt_ti.in1k", {path.name: path.read_bytes() for path in converted.iterdir()})
    torch.save(parity_input(160), tmp_path / "input.pt")
    code = """
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("org/cmt_ti.in1k")
with torch.inference_mode():
    torch.save(model(torch.load("input.pt")).logits, "logits.pt")
print(AutoImageProcessor.from_pretrained("org/cmt_ti.in1k").data_config["input_size"])
"""
    done = user("-c", code)
    if "No module named 'transformers'" in done.stderr:
        pytest.skip("NOT TESTED: transformers; pip install transformers")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "160, 160" in done.stdout
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
def test_a_publication_that_fails_is_one_line_and_records_nothing(fault, message, hub, publish):
    for name, value in fault.items():
        getattr(hub, name).update(value)
    status, _, error = publish()
    assert status == 1 and re.search(message, one_line(error)), error
    assert not publish.record.exists()
    try:
        assert "model.safetensors" not in hub.files("org/cmt_ti.in1k")
    except KeyError:
        pass  # there is no such repository


def test_no_token_and_another_s_organisation(publish):
    assert "HF_TOKEN" in one_line(publish(token="")[2])
    assert "stranger/cmt_ti.in1k is not published" in one_line(publish(org="stranger")[2])


def test_a_broken_repository_is_one_error(hub, user, converted, release):
    whole = {path.name: path.read_bytes() for path in converted.iterdir()}
    weights = whole["model.safetensors"]
    pickle = (release / "hub" / "checkpoints" / RELEASE_FILES["cmt_ti"]).read_bytes()
    other = save(timm.create_model("cmt_xs").state_dict())
    hub.add("org/variant", {**whole, "model.safetensors": other})
    hub.add("org/cut", {**whole, "model.safetensors": weights[:1_000_000]})
    hub.add("org/pickle", {**whole, "model.safetensors": pickle})
    hub.add("org/unknown", {**whole, "config.json": whole["config.json"].replace(b'"cmt_ti"', b'"cmt_xxl"')})
    code = """
import timm
for name in ("variant", "cut", "pickle", "unknown"):
    try:
        timm.create_model(f"hf-hub:org/{name}", pretrained=True)
    except RuntimeError as err:
        print(" ".join(str(err).split()))
"""
    lines = user("-c", code).stdout.splitlines()
    for line, message in zip(lines, ("this checkpoint is cmt_xs", "org/cut", "org/pickle", "Unknown model")):
        assert message in line
    assert len(lines) == 4


def test_a_download_from_the_hub_that_is_cut_leaves_nothing_that_looks_whole(hub, user, converted, expected):
    hub.add("org/cmt_ti.in1k", {path.name: path.read_bytes() for path in converted.iterdir()})
    hub.cut["model.safetensors"] = 2_000_000
    hub.cut["/lfs/"] = 2_000_000
    done = user(
        "-c", "import timm; timm.create_model('hf-hub:org/cmt_ti.in1k', pretrained=True)", HF_HUB_DOWNLOAD_TIMEOUT="2"
    )
    assert done.returncode != 0
    hub.cut.clear()
    assert_each(load(user, "hf-hub:org/cmt_ti.in1k"), expected)


def test_the_metadata_of_every_card_is_yaml():
    for name in WITH_WEIGHTS:
        text = (ROOT / "hub_configs" / f"{name}.in1k" / "README.md").read_text()
        assert yaml.safe_load(text.split("---")[1])["model-index"][0]["name"] == f"{name}.in1k"


def test_a_detector_s_backbone_is_the_same_from_the_hub_and_from_the_release_and_silent_if_asked(publish, user):
    assert publish()[0] == 0
    code = """
import torch, torchvision
names = "in1k", "hf-hub:org/cmt_ti.in1k"
models = [torchvision.models.get_model("retinanet_cmt_ti_fpn", weights_backbone=name, progress=False) for name in names]
released, hub = (model.backbone.body.state_dict() for model in models)
print(all(torch.equal(value, hub[key]) for key, value in released.items()))
"""
    done = user("-c", code)
    assert done.stdout.strip() == "True", done.stderr[-3000:]
    assert "%|" not in done.stderr
