"""Two scripts in benchmarks/ run as they stand, at the smallest sizes; what they measure is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMANDS = {
    "throughput.py": "--models cmt_ti --modes eager reparam train recompute --size 64 --batch-size 2 --rounds 2",
    "image_size.py": "--model cmt_ti --built-at 64 --sizes 32 64 --rounds 2",
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_benchmark_runs_and_writes_its_figures(script, tmp_path):
    pytest.importorskip("tqdm", reason="NOT TESTED: benchmarks; pip install tqdm")
    command = [sys.executable, BENCHMARKS / script, *COMMANDS[script].split(), "--json", "figures.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "figures.json").read_text())
