"""One short run of each algorithm as a user starts it: the first test to run after a change."""

import json
import re

import pytest
from PIL import Image

from conftest import BAR, TINY, finish, options, rows, start

FILES = {
    "checkpoint.pt",
    "metrics.csv",
    "hyperparameters.json",
    "policy.pt",
    "evaluation.json",
    "learning_curve.png",
    "learning_curves.png",
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """{algorithm: (folder, stdout, stderr)} of a run of each, side by side."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("mappo", "ippo")}
    flags = {"mappo": "--mappo", "ippo": "--no-mappo"}
    processes = {name: start(*options(), flags[name], cwd=places[name]) for name in places}
    outputs = {name: finish(process) for name, process in processes.items()}
    folders = {name: next((places[name] / "runs").iterdir()) for name in places}
    return {name: (folders[name], *outputs[name]) for name in places}


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_a_run_leaves_its_files_in_a_new_folder(started, algorithm):
    folder, _, _ = started[algorithm]
    assert re.fullmatch(rf"{algorithm}-navigation-seed0-\d{{8}}-\d{{6}}-\d{{6}}", folder.name)
    assert {path.name for path in folder.iterdir()} - {"rollout.gif"} == FILES
    assert [(row["iteration"], row["frames"]) for row in rows(folder)] == [
        ("0", "600"),
        ("1", "1200"),
    ]
    recorded = json.loads((folder / "hyperparameters.json").read_text())
    assert recorded.items() >= {**TINY, "mappo": algorithm == "mappo", "world_size": 1}.items()
    for name in ("learning_curve.png", "learning_curves.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG"
    if (folder / "rollout.gif").exists():
        with Image.open(folder / "rollout.gif") as film:
            assert film.format == "GIF" and film.n_frames > 1


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_a_run_prints_its_evaluation_and_nothing_alarming(started, algorithm):
    """Beside the progress bar and the table, no warning or log line of a library."""
    folder, out, err = started[algorithm]
    lines = out.strip().splitlines()
    assert lines[0] == f"A new run in runs/{folder.name}"
    assert f"The results of this run are in runs/{folder.name}" in lines
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for name, value in evaluation["trained"].items():
        assert f"{name:<35}{evaluation['untrained'][name]:>12.3f}{value:>12.3f}" in lines
    known = ("A new run", "The results", "No rollout.gif", "10 episodes", *evaluation["trained"])
    assert [line for line in lines if line and not line.startswith(known)] == []
    assert BAR.search(err)
    assert [text for text in re.split(r"[\r\n]", err) if text.strip() and not BAR.match(text)] == []
