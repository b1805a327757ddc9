"""The numbers of the README are those of assets/study.csv, and the statistics are right where they can be done by hand.

    python -m pytest tests/test_study.py
"""

import csv

import numpy as np
import pytest

import study

TINY = "--n-iters 1 --num-epochs 1 --frames-per-batch 600 --minibatch-size 100 --evaluation-episodes 10"


def test_readme_shows_the_results_of_the_table():
    """Whoever changes a number in the README or a result in assets/study.csv alone is found out."""
    tables = study.tables_in((study.ROOT / "README.md").read_text(encoding="utf-8"))
    assert tables and tables == {name: study.table(name) for name in tables}


def test_results_belong_to_the_experiments():
    """Each row of assets/study.csv is a run that tests/study.py would do, and no run is counted twice."""
    with open(study.ASSETS / "study.csv", newline="") as file:
        rows = [study.Run(*(row[column] for column in study.Run._fields)) for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) == len(study.read())
    assert set(rows) <= {run for runs in study.EXPERIMENTS.values() for run in runs}


def test_a_table_is_found_between_its_marks():
    text = "a\n<!-- study:flag -->\n| 1 |\n<!-- /study -->\nb\n<!-- study:agents -->\n\n| 2 |\n\n<!-- /study -->\n| 3 |"
    assert study.tables_in(text) == {"flag": "| 1 |", "agents": "| 2 |"}


@pytest.mark.parametrize("values, expected", [
    ([8, 1, 7, 2, 6, 3, 5, 4], 4.5),  # of 3, 4, 5, 6
    ([1, 2, 3, 4, 5, 6, 7, 100], 4.5),  # an outlier changes nothing
    ([0, 0, 1, 2, 3, 4, 5, 6, 90, 90], 3.5),  # of the 6 in the middle: 10 // 4 = 2 are cut off at each end
    ([1, 2, 9], 4),  # few runs: the plain mean
])
def test_interquartile_mean(values, expected):
    assert study.center(np.array(values, dtype=float)) == pytest.approx(expected)


def test_probability_of_improvement():
    x, y = np.array([1.0, 2.0, 2.0]), np.array([2.0, 0.0])
    assert study.improvement(x, y) == pytest.approx(4 / 6)  # 1 > 0, 2 > 0 twice, 2 = 2 twice for one half each
    assert study.improvement(y, x) == pytest.approx(2 / 6)
    assert study.improvement(x, y, np.array([5.0]), np.array([7.0])) == pytest.approx(2 / 6)  # mean over two tasks


def test_bootstrap_interval():
    assert tuple(study.interval(study.center, np.array([3.0, 3.0, 3.0]))) == (3, 3)
    assert tuple(study.interval(study.center, np.array([0.0, 1.0]))) == (0, 1)  # both have a probability of 1/4
    low, high = study.interval(study.center, np.arange(100.0))  # the mean of the middle 50 of 0 .. 99
    assert low < 49.5 < high and (low, high) == pytest.approx((49.5 - high + 49.5, high), abs=1)


def test_bootstrap_keeps_tasks_apart():
    """Each task alike in all its runs, nothing is left to chance; runs mixed over tasks would give an interval."""
    better, worse = np.array([2.0, 2.0]), np.array([1.0, 1.0])
    assert tuple(study.interval(study.improvement, better, worse, worse, better)) == (0.5, 0.5)


def test_table_by_hand(tmp_path, monkeypatch):
    """Two agents, two runs of each algorithm: means, extremes, and fewer steps and collisions being better."""
    monkeypatch.setattr(study, "ASSETS", tmp_path)
    results = {("MAPPO", "0"): ["1.000", "3.000", "50.000", "0.010"], ("MAPPO", "1"): ["0.500", "2.000", "70.000", "0"],
               ("IPPO", "0"): ["0.000", "1.000", "90.000", "0"], ("IPPO", "1"): ["0.500", "2.500", "60.000", "0"]}
    for run in study.runs("navigation", range(2), 2):
        study.append("agents", run, [*results[run.algorithm, run.seed], "8.000"])
    mappo, ippo, both = study.table("agents").splitlines()[2:]
    assert mappo == ("| 2 | MAPPO | 2 | 0.75 [0.50, 1.00] | 2.50 [2.00, 3.00] | 60.0 [50.0, 70.0] |"
                     " 0.005 [0.000, 0.010] |")
    assert ippo.startswith("| 2 | IPPO | 2 | 0.25 [0.00, 0.50] | 1.75 [1.00, 2.50] | 75.0 [60.0, 90.0] | 0.000 ")
    cells = [cell.split(" [")[0].strip() for cell in both.split("|")[1:-1]]
    assert cells == ["2", "P(MAPPO better)", "", "0.88", "0.75", "0.75", "0.25"]  # 0.875, 3/4, 3/4, two ties of 4


def test_study_runs_what_is_missing(tmp_path, monkeypatch, capfd):
    """A run adds its row, a failed one is told and leaves the others alone, and only what is missing is done again."""
    monkeypatch.setattr(study, "ASSETS", tmp_path)
    good, bad = (study.runs("navigation", [0], algorithms=["IPPO"], options=options) for options in (TINY, "--lr 0"))
    monkeypatch.setattr(study, "EXPERIMENTS", {"flag": bad + good})
    assert study.run_missing(["flag"]) == 1
    assert "--lr 0" in capfd.readouterr().err
    [(run, (success, reward, length, collisions, seconds))] = study.read().items()
    assert run == good[0] and 0 <= success <= 1 and 1 <= length <= 100 and collisions >= 0 and np.isfinite(reward)
    assert (tmp_path / "study.csv").read_text().splitlines()[1].startswith("flag,navigation,IPPO,0,3,True,True,--n-it")

    monkeypatch.setattr(study, "EXPERIMENTS", {"flag": good})
    before = (tmp_path / "study.csv").read_bytes()
    assert study.run_missing(["flag"]) == 0 and (tmp_path / "study.csv").read_bytes() == before


def test_report_draws_each_study(tmp_path, monkeypatch):
    """A table of results with a few runs only gives figures, and none of what has no runs."""
    monkeypatch.setattr(study, "ASSETS", tmp_path)
    for name in ("flag", "scenarios", "sharing"):
        for run in study.EXPERIMENTS[name][:7]:
            if run not in study.read():
                study.append(name, run, ["0.500", "1.000", "60.000", "0.010" * (run.scenario == "navigation"), "8.000"])
    for name in study.EXPERIMENTS:
        study.draw(name)
    drawn = {path.name for path in tmp_path.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")}
    assert drawn == {"study_flag.png", "study_scenarios.png", "study_sharing.png", "study_agents.png"}
