"""One short run of each algorithm as a user starts it: the first test to run after a change."""

import json
import re

import pytest
from PIL import Image

from conftest import BAR, TINY, finish, options, rows, start

FILES = {
    "checkpoint-000000000001.torchrl",
    "checkpoint-000000000002.torchrl",
    "metrics.csv",
    "hyperparameters.json",
    "policy.pt",
    "evaluation.json",
    "learning_curve.png",
    "learning_curves.png",
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return {algorithm: (folder, stdout, stderr)} of a run of each, side by side."""
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
        with Image.open(folder / "rollout.gif") as video:
            assert video.format == "GIF" and video.n_frames > 1


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_a_run_prints_its_results(started, algorithm):
    folder, out, _ = started[algorithm]
    lines = out.splitlines()
    assert f"New run: runs/{folder.name}" in lines
    assert f"The results are in runs/{folder.name}" in lines
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for name, value in evaluation["trained"].items():
        assert f"{name:<35}{evaluation['untrained'][name]:>12.3f}{value:>12.3f}" in lines
    assert f"{algorithm.upper()}, 2 iterations: slope of the value" in out


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_a_run_prints_no_warning_or_log_line_of_a_library(started, algorithm):
    _, out, err = started[algorithm]
    assert BAR.search(err)
    assert [text for text in re.split(r"[\r\n]", err) if text.strip() and not BAR.match(text)] == []
    assert not re.search(r"warn|torchrl|vmas/", out, re.IGNORECASE)
