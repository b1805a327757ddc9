"""What the tests share: tiny sizes, and a short run of each algorithm to look into."""

import os

# Read when torch is imported, here and in processes started here.
os.environ["OMP_NUM_THREADS"] = "1"

import csv
import re

import pytest
import torch

from cells import SLOW, run_inside, write_copy

BAR = re.compile(r"(MAPPO|IPPO): +\d+%\|")  # a state of the progress bar
# No two sizes of these runs are equal, so that a wrong shape cannot pass for the right one.
TINY = {
    "device": "cpu",  # on which runs can be repeated to the bit
    "max_steps": 20,
    "frames_per_batch": 600,
    "minibatch_size": 100,
    "num_epochs": 2,
    "n_iters": 2,
    "num_cells": 32,
    "evaluation_interval": 2,
    "evaluation_episodes": 10,
}


def options(**values):
    """Return TINY, changed by `values`, as words of a command line."""
    words = []
    for name, value in {**TINY, **values}.items():
        option = name.replace("_", "-")
        flag = f"--{option}" if value else f"--no-{option}"
        words.append(flag if isinstance(value, bool) else f"--{option}={value}")
    return words


def load(folder):
    """Return what the checkpoint of a run holds."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def rows(folder):
    """Return the rows of metrics.csv, without the column that no two runs share."""
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in table]


def without_seconds(history):
    """Return the measurements of a run, but for the time."""
    return [{name: x for name, x in row.items() if name != "seconds"} for row in history]


def assert_same(folder, other):
    """Compare the weights, optimizer states and measurements of two runs, bit for bit."""
    one, two = ({**load(run)} for run in (folder, other))
    parts = ("policy", "critic", "optimizer", "best_policy")
    for name in parts:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    histories = [without_seconds(found["history"]) for found in (one, two)]
    assert histories[0] == histories[1]
    assert rows(folder) == rows(other)


def contents(folder):
    """Return each file and folder below a folder, and what is in it."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def strange_lines(err):
    """Return the lines on stderr that are not states of the progress bar."""
    return [line for line in re.split(r"[\r\n]", err) if line.strip() and not BAR.match(line)]


@pytest.fixture(scope="session")
def lean(tmp_path_factory):
    """Return a copy of the file without the cells that take longer than a tiny training."""
    return write_copy(tmp_path_factory.mktemp("lean") / "train_mappo.py", *SLOW)


@pytest.fixture(scope="session")
def drawing(tmp_path_factory):
    """Return a copy of the file that draws its pictures, but no video, without the probe."""
    return write_copy(tmp_path_factory.mktemp("drawing") / "train_mappo.py", "probe", "video")


@pytest.fixture(scope="session")
def mappo(tmp_path_factory, drawing):
    """Return the global names of the file after a short MAPPO run."""
    folder = tmp_path_factory.mktemp("mappo") / "run"
    return run_inside(*options(run_folder=folder), path=drawing)


@pytest.fixture(scope="session")
def ippo(tmp_path_factory, drawing):
    """Return the global names of the file after a short IPPO run."""
    folder = tmp_path_factory.mktemp("ippo") / "run"
    return run_inside(*options(run_folder=folder, mappo=False), path=drawing)
