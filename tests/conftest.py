"""What the tests share: two ways to run the script, and one short run of each algorithm for tests that look inside."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in every process started from here

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "train_mappo.py"
TEXT = SCRIPT.read_text(encoding="utf-8")
# No two sizes of these runs are equal, so that a wrong shape cannot pass for the right one.
TINY = {"n_iters": 2, "num_epochs": 1, "frames_per_batch": 600, "minibatch_size": 150, "evaluation_episodes": 10,
        "device": "cpu"}
BAR = re.compile(r"(MAPPO|IPPO): +\d+%\|")  # a state of the progress bar


def command_line(folder, *options):
    """The script with tiny settings and its results below `folder`; later options overrule earlier ones."""
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    return [str(SCRIPT), *tiny, f"--output-dir={folder}", *options]


def start(folder, *options):
    """Run the script as a user does, as a process of its own, and return that process with all that it printed."""
    return subprocess.run([sys.executable, *command_line(folder, *options)], cwd=folder, capture_output=True, text=True)


def run_inside(folder, *options):
    """Run the script in this process, command line and all, and return its global names."""
    arguments, hook = sys.argv, sys.excepthook
    sys.argv = command_line(folder, *options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as outside pytest
            return runpy.run_path(str(SCRIPT))
    finally:
        sys.argv, sys.excepthook = arguments, hook


def measurements(run_folder):
    """The rows of a run's metrics.csv, header included, without the seconds, which differ from run to run."""
    rows = [line.split(",") for line in (run_folder / "metrics.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    return [row[:seconds] + row[seconds + 1:] for row in rows]


@pytest.fixture(scope="session")
def mappo(tmp_path_factory):
    """The global names of the script after a short MAPPO run."""
    return run_inside(tmp_path_factory.mktemp("mappo"))


@pytest.fixture(scope="session")
def ippo(tmp_path_factory):
    """The global names of the script after a short IPPO run."""
    return run_inside(tmp_path_factory.mktemp("ippo"), "--no-mappo")
