"""Fixtures of all tests, and the two tiers: what stands in tests/integration is marked so."""

import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # several processes (pytest -n) and their children share the processors
    threads = max(torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

# The tests, and the programs that they start, load the authors' release, whatever has been published by now.
os.environ["TIMM_CMT_HUB_ORG"] = ""

# TorchScript in torch 2.6 tells operators by their addresses. torch.compile frees some, and what comes to lie there is
# taken for an operator ("builtin cannot be used as a value"). So none is freed here.
_operators = []
_register_builtin = torch.jit._builtins._register_builtin


def _register_and_keep(operator, name):
    _operators.append(operator)
    _register_builtin(operator, name)


torch.jit._builtins._register_builtin = _register_and_keep

INTEGRATION = Path(__file__).parent / "integration"
# pytest -n has to begin with them, or one process is left over with one at the end.
LONGEST = ["test_timm_suite.py", "test_demo.py", "test_detection.py", "test_registration.py"]


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's order is by the number of tests, not by their time
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(INTEGRATION):
            item.add_marker("integration")
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter, config):
    if not any(report.nodeid.startswith("tests/integration/") for report in terminalreporter.getreports("passed")):
        terminalreporter.write_line(
            "NOT TESTED: other programs (timm's suite and scripts, the Hub, exporters, detection, the demo). "
            "Run pytest tests/integration -n 2 --dist loadfile"
        )
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, line in report.user_properties:
            if name == "figures":
                terminalreporter.write_line(f"    {line}")


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty TORCH_HOME of this test's own; returns the folder that torch.hub keeps checkpoints in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    folder = tmp_path / "torch_home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder
