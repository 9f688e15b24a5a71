"""Weights come whole and from where the package says, and what is amiss with a file is said in one line."""

import argparse
import os
import pickle
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from common import RELEASE_FILES, SMALL, authors_weights
from huggingface_hub.utils import are_progress_bars_disabled

from timm_cmt import weights

URL = f"https://nowhere.invalid/{RELEASE_FILES['cmt_ti']}"


def test_a_thread_keeps_what_is_allowed_while_another_ends():
    inside, ended, allowed = threading.Event(), threading.Event(), []

    def other():
        inside.wait()
        with weights.allow_arguments():
            ended.wait(1)
            allowed.append(argparse.Namespace in torch.serialization.get_safe_globals())

    thread = threading.Thread(target=other)
    thread.start()
    with weights.allow_arguments():
        inside.set()
        time.sleep(0.1)
    ended.set()
    thread.join()
    assert allowed == [True] and argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.fixture
def state() -> dict:
    return timm.create_model("cmt_ti", **SMALL).state_dict()


def problem(path) -> str:
    with pytest.raises((RuntimeError, FileNotFoundError)) as caught:
        weights.check_file(path)
    message = str(caught.value)
    assert message.startswith((str(path), "there is no checkpoint")) and "\n" not in message
    return message


# ---- what is amiss with a file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"some text\nof two lines", "is no checkpoint: it begins with 'some text'"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it begins with 'version https://git-lfs"),
        (b"PK\x03\x04 and no more", "is cut short or no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_shown(content, message, tmp_path):
    (tmp_path / "some.pth").write_bytes(content)
    assert message in problem(tmp_path / "some.pth")


@contextmanager
def not_as_root() -> Iterator[None]:
    """As another user, where this is root, who may read and write all."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["the file", "its folder"])
def test_a_file_that_may_not_be_read_is_said_to_be_neither_broken_nor_missing(closed):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        path = Path(folder) / "folder" / "secret.pth"
        path.parent.mkdir()
        path.touch()
        os.chmod(folder, 0o755)
        (path if closed == "the file" else path.parent).chmod(0)
        with not_as_root():
            assert problem(path) == f"{path} cannot be read (Permission denied)"
        path.parent.chmod(0o700)


def test_a_cache_of_another_user_is_named_with_the_way_to_move_it(release, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        monkeypatch.setenv("TORCH_HOME", f"{folder}/torch")
        with (
            not_as_root(),
            pytest.raises(RuntimeError, match=r"cannot be written \(Permission denied\); set TORCH_HOME"),
        ):
            weights.ensure_whole(timm.models.PretrainedCfg(url=URL))


def test_a_folder_is_not_said_to_be_missing(tmp_path):
    assert "is a folder; name a checkpoint" in problem(tmp_path)


def test_a_whole_model_is_refused_with_the_line_that_helps(tmp_path):
    torch.save(timm.create_model("cmt_ti", **SMALL), tmp_path / "model.pth")
    message = problem(tmp_path / "model.pth")
    assert "torch.save(model.state_dict(), ...)" in message and len(message) < 300


def test_a_scripted_model_is_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with warnings.catch_warnings(record=True) as caught:
        assert "is refused: it holds a TorchScript program" in problem(tmp_path / "model.pt")
    assert not caught


def test_of_what_is_refused_a_few_names_are_enough(tmp_path):
    import collections
    import datetime
    import fractions
    import uuid

    extra = [collections.deque(), datetime.timedelta(1), fractions.Fraction(1), uuid.UUID(int=1)]
    torch.save(dict(model={}, extra=extra), tmp_path / "some.pth")
    message = problem(tmp_path / "some.pth")
    assert "collections.deque" in message and "more, and loading that could run code" in message


def test_a_training_checkpoint_s_command_line_is_no_problem_and_stays_disallowed_elsewhere(tmp_path, state):
    import argparse

    torch.save(dict(state_dict=state, args=argparse.Namespace(lr=1)), tmp_path / "last.pth.tar")
    weights.check_file(tmp_path / "last.pth.tar")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.pth.tar", weights_only=True)


def test_a_pickle_under_the_name_of_safetensors_is_told_so(tmp_path, state):
    torch.save(state, tmp_path / "model.safetensors")
    assert "give it a name that ends in .pth" in problem(tmp_path / "model.safetensors")


# ---- torch's cache


@pytest.fixture
def release(tmp_path, monkeypatch):
    """What a download gets: the authors' CMT-Ti. Returns the list of downloads so far."""
    file = tmp_path / "release.pth"
    torch.save(dict(model=authors_weights("cmt_ti")), file)
    downloads = []

    def download(url, path, progress):
        downloads.append(path)
        with open(path, "wb") as part:
            part.write(file.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return downloads


def test_two_machines_with_equal_process_ids_may_download_at_once(release, torch_home, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    download = torch.hub.download_url_to_file

    def download_while_another_does(url, path, progress):
        download(url, path, progress)
        if len(release) == 1:
            weights.ensure_whole(timm.models.PretrainedCfg(url=URL))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download_while_another_does)
    weights.ensure_whole(timm.models.PretrainedCfg(url=URL))
    assert len(release) == 2 and [path.name for path in torch_home.iterdir()] == [RELEASE_FILES["cmt_ti"]]


def test_who_loses_the_race_takes_the_other_s_file(release, torch_home, monkeypatch):
    replace = os.replace

    def replace_where_another_has_it_open(source, target):  # as on Windows
        replace(source, target)
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(os, "replace", replace_where_another_has_it_open)
    weights.ensure_whole(timm.models.PretrainedCfg(url=URL))
    assert [path.name for path in torch_home.iterdir()] == [RELEASE_FILES["cmt_ti"]]


def test_a_cache_that_cannot_be_written_is_named_with_the_way_to_move_it(release, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/dev/null/torch")
    with pytest.raises(RuntimeError) as caught:
        timm.create_model("cmt_ti", pretrained=True, pretrained_cfg_overlay=dict(url=URL))
    message = str(caught.value)
    assert message.startswith("torch's cache /dev/null/torch/hub/checkpoints cannot be written (Not a directory)")
    assert "set TORCH_HOME" in message and "\n" not in message
    with pytest.raises(RuntimeError, match="the folder /dev/null/mine cannot be written .* name another cache_dir"):
        weights.ensure_whole(timm.models.PretrainedCfg(url=URL), cache_dir="/dev/null/mine")


def test_an_error_is_one_traceback_with_advice_that_the_command_line_can_follow_too(torch_home, monkeypatch):
    def fail(*_, **__):
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as err:
            raise OSError(f"<urlopen error {err}>") from err

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(RuntimeError) as caught:
        timm.create_model("cmt_ti", pretrained=True, pretrained_cfg_overlay=dict(url=URL))
    text = "".join(traceback.format_exception(caught.value))
    assert text.count("Traceback") == 1 and "Connection refused" in str(caught.value)
    path = torch_home / RELEASE_FILES["cmt_ti"]
    assert f"put the file at {path} by hand" in text and "pretrained_cfg_overlay" not in str(caught.value)


# ---- what is published


@pytest.mark.parametrize(
    "text", [None, '{"org": "", "commits": {}}', '{"org": "us", "commits": {"cmt_ti.in1k": "0f"}}']
)
def test_the_hub_is_the_source_of_what_hub_json_records(text, tmp_path, monkeypatch):
    if text:
        (tmp_path / "hub.json").write_text(text)
    monkeypatch.delenv("TIMM_CMT_HUB_ORG")
    monkeypatch.setattr(weights, "files", lambda _: tmp_path)
    published = "us" in (text or "")
    assert weights.get_hub_id("cmt_ti.in1k") == ("us/cmt_ti.in1k@0f" if published else None)
    assert weights.get_hub_id("cmt_xs.in1k") is None
    monkeypatch.setenv("TIMM_CMT_HUB_ORG", "")
    assert weights.get_hub_id("cmt_ti.in1k") is None


def test_a_download_is_silent_where_that_is_asked_and_there_alone(tmp_path, monkeypatch):
    shown = []

    def download(url, path, progress):
        shown.append(progress)
        torch.save({}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for i, asked in enumerate([False, True]):
        with weights.show_progress(asked):
            weights.fetch(URL, tmp_path / str(i))
            assert are_progress_bars_disabled() is not asked
    weights.fetch(URL, tmp_path / "2")
    assert shown == [False, True, True] and not are_progress_bars_disabled()
