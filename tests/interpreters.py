"""Runs code in processes of their own: fresh interpreters, and cheap ones in which only torch has been imported."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from common import MODELS

SHOW = "import timm; print(*sorted(timm.list_models('cmt*')))"
FIVE = " ".join(sorted(MODELS))

# Takes packages out of sys.modules, as notebooks and test-suites do.
PURGE = """
import sys

def purge(*packages):
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
"""

# Forks one child for each line it reads, and answers with the child's exit status.
_FORKS = """
import gc, json, os, signal, sys, traceback
import torch, torchvision, huggingface_hub.hf_api  # of what timm imports, what takes longest

gc.freeze()  # the children then leave these modules alone, and are twice as fast
for line in sys.stdin:
    code, stdout, stderr = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(int(sys.argv[1]))  # a deadlock ends here
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = 0
        try:
            exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(limit=-8)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def clean_environ(**environ: str) -> dict[str, str]:
    """The environment with torch's autoload on, whatever this process was started with."""
    return {**{key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}, **environ}


def python(code: str, *options: str, **environ: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter."""
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=clean_environ(**environ), capture_output=True, text=True, timeout=300)


def said(done: subprocess.CompletedProcess) -> str:
    """What a process printed; it has to have ended well and said nothing on stderr."""
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.strip()


class Forks:
    """Processes forked from an interpreter that has imported torch: as fresh for timm, at a tenth of the price."""

    def __init__(self, folder: Path, seconds: int = 120, **environ: str):
        """Write what they say into a folder, and end each after so many seconds."""
        self._files = [str(folder / "stdout"), str(folder / "stderr")]
        command = [sys.executable, "-c", _FORKS, str(seconds)]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, env=clean_environ(**environ), stdin=pipe, stdout=pipe, text=True)

    def run(self, code: str) -> subprocess.CompletedProcess:
        """Run code in a process of its own, in which `import torch` has been done."""
        self._server.stdin.write(json.dumps([textwrap.dedent(code), *self._files]) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(Path(file).read_text() for file in self._files))

    def close(self) -> None:
        self._server.communicate()
