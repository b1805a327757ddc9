"""What the tests share: ways to run the script, and a short run of each algorithm to look into."""

import os

# Read when torch is imported, here and in processes started here.
os.environ["OMP_NUM_THREADS"] = "1"

import csv
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torchrl.checkpoint import Checkpoint, CheckpointRotation

from cells import PICTURES, PROBE, SCRIPT, cell_that_defines

REPOSITORY = SCRIPT.parent
PROGRAMS = Path(__file__).resolve().parent / "programs"  # that tests start
BAR = re.compile(r"(MAPPO|IPPO): +\d+%\|")  # a state of the progress bar
CPU = ("--device", "cpu")  # on which runs can be repeated to the bit
# No two sizes of these runs are equal, so that a wrong shape cannot pass for the right one.
TINY = {
    "device": "cpu",
    "max_steps": 20,
    "frames_per_batch": 600,
    "minibatch_size": 100,
    "num_epochs": 2,
    "n_iters": 2,
    "num_cells": 32,
    "evaluation_episodes": 10,
}
LONGEST = 300  # seconds; only a process that hangs needs as much


def options(**values):
    """Return TINY, changed by `values`, as words of a command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **values}.items()]


def start(*words, program=(SCRIPT,), **how):
    """Start the script, or another Python program, with these words; return the process."""
    return subprocess.Popen(
        [sys.executable, *map(str, [*program, *words])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **how,
    )


def finish(process, status=0):
    """Wait for a process, check its exit status, and return what it wrote to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun then ends the processes that it has started
        raise
    assert process.returncode == status, err
    return out, err


def run_inside(*words, path=SCRIPT):
    """Run the script in this process, command line and all, and return its global names."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [str(path), *map(str, words)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        names = runpy.run_path(str(path), run_name="__main__")
    plt.close("all")
    return names


class State(dict):
    """A state that a checkpoint can be loaded into, whatever it holds."""

    load_state_dict = dict.update

    def state_dict(self):
        """Return itself."""
        return self


def load(folder):
    """Return what the newest checkpoint of a run holds, by component, and its history."""
    parts = {name: State() for name in ("untrained_policy", "policy", "critic", "optimizer")}
    history = []
    CheckpointRotation(folder, keep_last=2).load_latest(Checkpoint(history=history, **parts))
    return {name: dict(state) for name, state in parts.items()} | {"history": history}


def rows(folder):
    """Return the rows of metrics.csv without the column that no two runs share."""
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in table]


def assert_same(folder, other):
    """Compare the parameters, optimizer states and measurements of two runs, bit for bit."""
    parts = ("untrained_policy", "policy", "critic", "optimizer")
    one, two = ({name: load(run)[name] for name in parts} for run in (folder, other))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert rows(folder) == rows(other)
    assert [int(row["iteration"]) for row in rows(folder)] == [*range(len(load(folder)["history"]))]


def contents(folder):
    """Return each file below a folder and what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def copy_without(folder, *names):
    """Write a copy of the script without the cells that define these names; return its path."""
    text = SCRIPT.read_text(encoding="utf-8")
    for name in names:
        source = cell_that_defines(name)
        assert text.count(source) == 1
        text = text.replace(source, "")
    path = folder / "train_mappo.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def lean(tmp_path_factory):
    """Return a copy of the script without the probe of Section 4 and the pictures, to save time."""
    return copy_without(tmp_path_factory.mktemp("lean"), PROBE, PICTURES)


@pytest.fixture(scope="session")
def drawing(tmp_path_factory):
    """Return a copy of the script that draws its pictures, without the probe."""
    return copy_without(tmp_path_factory.mktemp("drawing"), PROBE)


@pytest.fixture(scope="session")
def mappo(tmp_path_factory, drawing):
    """Return the global names of the script after a short MAPPO run."""
    words = options(run_folder=tmp_path_factory.mktemp("mappo") / "run")
    return run_inside(*words, path=drawing)


@pytest.fixture(scope="session")
def ippo(tmp_path_factory, lean):
    """Return the global names of the script after a short IPPO run."""
    words = options(run_folder=tmp_path_factory.mktemp("ippo") / "run")
    return run_inside(*words, "--no-mappo", path=lean)
