from __future__ import annotations

import os
import subprocess
import sys

import pytest

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")


def waits(code: str, **environment: str) -> str:
    """What GOMP_SPINCOUNT is in a new process, once ``code`` has run there."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport os; print('count', os.environ.get('GOMP_SPINCOUNT'))"],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.rpartition("count ")[2].strip()


def command(*arguments: str) -> str:
    return f"from typer.testing import CliRunner; from clipfast.cli import app; CliRunner().invoke(app, {arguments!r})"


def test_the_setting_is_there_when_pytorch_is_first_looked_for():
    # OpenMP reads it as PyTorch is imported: one that is made later changes nothing
    watch = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            os.write(1, b'count ' + os.environ.get('GOMP_SPINCOUNT').encode()); os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    assert waits(watch + command("demo")) == "20000"


def test_every_command_but_tune_makes_it():
    # tune measures for every program on this machine, and they wait as OpenMP's default says
    code = (
        "import os; from typer.testing import CliRunner\n"
        "from typer.main import get_command; from clipfast.cli import app\n"
        "made = set()\n"
        "names = set(get_command(app).commands)\n"
        "for name in names:\n"
        "    os.environ.pop('GOMP_SPINCOUNT', None); CliRunner().invoke(app, [name, '--help'])\n"
        "    made |= {name} if os.environ.get('GOMP_SPINCOUNT') == '20000' else set()\n"
        "assert len(names) > 8 and names - made == {'tune'}, names - made\n"
    )
    waits(code)


@pytest.mark.parametrize(
    ("setting", "value", "count"),
    [
        ("GOMP_SPINCOUNT", "7", "7"),
        ("OMP_WAIT_POLICY", "ACTIVE", "None"),
        ("KMP_BLOCKTIME", "0", "None"),
        ("KMP_LIBRARY", "turnaround", "None"),
    ],
)
def test_what_a_user_has_set_stays(setting, value, count):
    assert (
        waits(
            command("--version") + "\n" + "from clipfast.openmp import spin_briefly; spin_briefly()", **{setting: value}
        )
        == count
    )


@pytest.mark.parametrize("code", ["import clipfast; clipfast.list_models()", "import clipfast; clipfast.ViT"])
def test_the_library_leaves_the_setting_alone(code):
    assert waits(code) == "None"


def test_nothing_is_set_once_pytorch_is_there():
    assert waits("import torch; from clipfast.openmp import spin_briefly; assert not spin_briefly()") == "None"
