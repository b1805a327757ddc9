"""One short run of each algorithm as a user starts it: the first test to run after a change."""

import json
import re

import pytest
from PIL import Image

from cells import finish, start
from conftest import BAR, TINY, options, rows, strange_lines

FILES = {"checkpoint.pt", "metrics.csv", "hyperparameters.json", "evaluation.json", "policy.pt"}
FILES |= {"best_policy.pt", "learning_curves.png", "arrows.png", "rollout.gif"}
ALGORITHMS = pytest.mark.parametrize("algorithm", ["mappo", "ippo"])


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return {algorithm: (folder, stdout, stderr)} of a run of each, side by side."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("mappo", "ippo")}
    processes = {
        name: start(*options(mappo=name == "mappo"), cwd=place) for name, place in places.items()
    }
    outputs = {name: finish(process) for name, process in processes.items()}
    folders = {name: next((place / "runs").iterdir()) for name, place in places.items()}
    return {name: (folders[name], *outputs[name]) for name in places}


@ALGORITHMS
def test_a_run_leaves_its_files_in_a_new_folder(started, algorithm):
    folder, out, _ = started[algorithm]
    assert re.fullmatch(rf"{algorithm}-navigation-seed0-\d{{8}}-\d{{6}}-\d{{6}}", folder.name)
    found = {path.name for path in folder.iterdir()}
    assert found == (FILES - {"rollout.gif"} if "No rollout.gif" in out else FILES)
    table = [(row["iteration"], row["frames"]) for row in rows(folder)]
    assert table == [("0", "600"), ("1", "1200")]
    recorded = json.loads((folder / "hyperparameters.json").read_text())
    assert recorded.items() >= {**TINY, "mappo": algorithm == "mappo", "world_size": 1}.items()
    for name in found & {"learning_curves.png", "arrows.png", "rollout.gif"}:
        with Image.open(folder / name) as picture:
            assert picture.size > (100, 100) and (".png" in name or picture.n_frames > 5)


@ALGORITHMS
def test_a_run_prints_its_results(started, algorithm):
    folder, out, _ = started[algorithm]
    lines, words = out.splitlines(), [" ".join(line.split()) for line in out.splitlines()]
    assert f"New run: runs/{folder.name}" in lines
    assert f"The results are in runs/{folder.name}" in lines
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["iterations"] == 2
    for name, value in evaluation["trained"].items():
        before = evaluation["untrained"][name]
        assert f"{name} {before:.3f} {value:.3f}" in words
        last = rows(folder)[-1][f"test_{name}"]  # the test of the last iteration, the same one
        assert float(last) == value
    for sentence in ("of the arrows point away from the goal", "the value has slope s = "):
        assert re.search(rf"{algorithm.upper()}, 2 iterations: .*{sentence}", out)


@ALGORITHMS
def test_a_run_prints_no_warning_or_log_line_of_a_library(started, algorithm):
    _, out, err = started[algorithm]
    assert BAR.search(err) and strange_lines(err) == []
    assert not re.search(r"warn|torchrl|vmas/", out, re.IGNORECASE)
