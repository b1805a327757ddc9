"""The study: its tables come from its rows, no run is lost, and variants change what they say."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torchrl.modules import MultiAgentMLP

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "study"))
import benchmark  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
import transfer  # noqa: E402
import tutorial  # noqa: E402

TINY = "--max-steps 5 --frames-per-batch 20 --minibatch-size 10 --num-epochs 1 --n-iters 1"
TINY += " --num-cells 8 --evaluation-episodes 3"


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Let the study read and write a folder of its own, with its README and without rows."""
    (tmp_path / "README.md").write_text(study.README.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(study, "STUDY", tmp_path)
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results.csv")
    return tmp_path


def row_of(runs, algorithm, seed, **measured):
    """Return a row as a finished run leaves it."""
    key = dict(zip(study.KEY, (*runs[:3], algorithm, str(seed)), strict=True))
    return dict.fromkeys(study.COLUMNS, "") | key | {"evaluated_after": "10"} | measured


# --------------------------------------------------------------------------------- rows and tables


def test_the_tables_are_those_of_the_rows():
    """`python study/study.py report` would change nothing in its README."""
    text = study.README.read_text("utf-8")
    assert text.count("<!-- table:") > 20
    numbers = tables.tidy(study.read_rows(study.RESULTS))
    assert study.with_tables(text, numbers) == text


def test_each_row_is_of_a_planned_run_and_none_is_there_twice():
    rows = study.read_rows(study.RESULTS)
    assert not rows.duplicated(study.KEY).any()
    planned = {
        (*runs[:3], algorithm, str(seed))
        for runs in study.PLAN
        for algorithm in runs.algorithms
        for seed in runs.seeds
    }
    assert set(rows[study.KEY].itertuples(index=False, name=None)) <= planned
    assert len(planned) == sum(len(runs.algorithms) * len(runs.seeds) for runs in study.PLAN)


def test_a_row_holds_numbers_for_each_evaluation_and_iteration():
    rows = study.read_rows(study.RESULTS).map(str.split)
    last = rows["evaluated_after"].str[-1].astype(int)
    assert (rows["curve_episode_reward"].map(len) == last).all()
    assert (rows["success_rate"].map(len) == rows["evaluated_after"].map(len)).all()


def test_a_report_without_rows_names_what_is_missing(place, capsys):
    study.report()
    said = capsys.readouterr().out
    assert all(f"{runs.experiment}: " in said for runs in study.PLAN)
    assert not list(place.glob("*.png"))


def test_a_report_with_a_part_of_the_rows_shows_that_part(place, capsys):
    """One algorithm of one table, and no pair of seeds to compare."""
    for seed, rate in ((0, "0.2"), (1, "0.6")):
        study.add_row(row_of(study.FLAG, "MAPPO", seed, success_rate=rate), study.RESULTS)
    study.report()
    text = study.README.read_text("utf-8")
    assert "| seeds 0 to 9 | success rate | 0.400 (worst 0.200) |  |  |  | 2 |" in text
    assert "seeds 10 to 19 | success rate" not in text
    assert "flag: 18 of 20 runs are missing (the defaults)" in capsys.readouterr().out


def test_a_comparison_pairs_the_seeds():
    data = pd.DataFrame(
        {
            "label": "a",
            "algorithm": ["MAPPO", "MAPPO", "IPPO", "IPPO", "IPPO"],
            "iterations": 10,
            "seed": [1, 0, 0, 1, 2],
            "episode_length": [50.0, 60.0, 61.0, 52.0, 99.0],
        }
    ).set_index(["label", "algorithm", "iterations", "seed"])
    line = tables.versus(data, ["episode_length"]).splitlines()[-1]
    means = "| a | steps | 55.0 (worst 60.0) | 70.7 (worst 99.0) |"
    assert line == f"{means} -1.5, 2 of 2 | 0.83 | 3 |"  # better in five of six pairs of any seeds


def test_ratios_of_times_are_those_of_a_turn():
    """The median of the ratios, not the ratio of the medians; an amount divides the seconds."""
    times = {"defaults": (3, [3.0, 6.0, 9.0]), "quick": (1, [2.0, 2.0, 6.0])}
    rows = pd.DataFrame(
        {"part": "x", "unit": "run", "name": name, "turn": turn, "amount": amount, "seconds": taken}
        for name, (amount, seconds) in times.items()
        for turn, taken in enumerate(seconds)
    )
    assert tables.speed(rows).splitlines()[-1] == "| x | quick | 2.0 s | 2.00 (1.00 to 2.00) |"


# -------------------------------------------------------------------------------------- statistics


def series(numbers, name="success_rate"):
    return pd.Series(numbers, name=name, dtype=float)


def test_a_difference_has_an_interval_only_where_it_can_be_trusted():
    """One run in ten that fails hides from most samples of ten; a spread like a normal does not."""
    zero = series([0] * 10)
    assert tables.difference(series([0.9] + [0] * 9), zero) == "+0.090, 1 of 10"
    assert tables.difference(zero, zero) == "none"
    assert tables.difference(zero + 0.3, zero) == "+0.300, 10 of 10"
    spread = series(stats.norm.ppf((np.arange(10) + 0.5) / 10), "episode_length")
    low, high = stats.ttest_1samp(spread + 0.5, 0).confidence_interval()
    shown = tables.difference(spread, series([-0.5] * 10, "episode_length"))
    assert shown == f"+0.5 [{low:+.1f}, {high:+.1f}], 3 of 10"  # fewer steps are better


def test_coverage_is_that_of_a_normal_population_where_there_is_one():
    population = series(stats.norm.ppf((np.arange(30) + 0.5) / 30))
    assert tables.coverage(population) == pytest.approx(0.95, abs=0.02)


def test_the_probability_of_improvement_counts_ties_as_half():
    assert tables.probability_better(series([1, 2]), series([1, 0])) == "0.88"
    fewer = series([1, 2], "episode_length"), series([1, 0], "episode_length")
    assert tables.probability_better(*fewer) == "0.12"
    assert tables.probability_better(series([1, 1]), series([1, 1])) == "0.50"


# ----------------------------------------------------------------------------- no run is lost


def test_a_kill_in_the_middle_of_a_write_loses_no_row(tmp_path):
    """A process dies when half of the new file is written; the old rows are there to go on with."""
    path = tmp_path / "rows.csv"
    study.add_row({"seed": 0, "text": 'with "quotes", and\na new line'}, path)
    before = path.read_bytes()
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(study.SCRIPT.parent / "study")!r})
        from pathlib import Path
        import study

        def write_half(path, text, encoding):
            with open(path, "w") as file:
                file.write(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Path.write_text = write_half
        study.add_row({{"seed": 1}}, Path({str(path)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the half file was written beside it
    assert path.read_bytes() == before
    study.add_row({"seed": 2, "text": ""}, path)
    assert study.read_rows(path)["seed"].tolist() == ["0", "2"]


def test_run_goes_on_with_what_is_missing(place, monkeypatch, capsys):
    """A run that fails is reported, and lacks its row; the others are done once."""
    runs, done = study.Runs("a test", algorithms=("MAPPO",), seeds=range(4)), []

    def train(runs, algorithm, seed):
        if seed == 3 and 3 not in done:
            done.append(3)
            raise RuntimeError("seed 3 has failed")
        done.append(seed)
        return row_of(runs, algorithm, seed)

    monkeypatch.setattr(study, "PLAN", [runs])
    monkeypatch.setattr(study, "train", train)
    study.add_row(row_of(runs, "MAPPO", 1), study.RESULTS)
    assert study.run_lacking(["a test"]) == 1
    assert "seed 3 has failed" in capsys.readouterr().err
    assert sorted(done) == [0, 2, 3]
    assert study.run_lacking(["a test"]) == 0
    assert sorted(study.read_rows(study.RESULTS)["seed"]) == ["0", "1", "2", "3"]
    capsys.readouterr()
    assert study.run_lacking(["a test"]) == 0
    assert "Nothing is missing" in capsys.readouterr().out


def test_a_run_is_evaluated_at_each_stop_and_resumed(monkeypatch, tmp_path):
    """With a stand-in for train_mappo.py that leaves the files of a run."""
    script = tmp_path / "train_mappo.py"
    script.write_text("""if True:
        import json, sys
        from pathlib import Path
        folder, n_iters = Path(sys.argv[sys.argv.index("--run-folder") + 1]), int(sys.argv[-1])
        folder.mkdir(exist_ok=True)
        done = json.loads((folder / "done").read_text()) if (folder / "done").exists() else 0
        (folder / "done").write_text(str(n_iters))
        lines = [f"{i},0.5,{done},2.0" for i in range(n_iters)]
        (folder / "metrics.csv").write_text(
            "\\n".join(["iteration,terminated_rate,episode_reward,seconds", *lines]))
        measured = {"terminated_rate": n_iters / 10, "episode_reward": done}
        (folder / "evaluation.json").write_text(json.dumps(
            {"iterations": n_iters, "untrained": {"terminated_rate": 0}, "trained": measured}))
    """)
    monkeypatch.setattr(study, "SCRIPT", script)
    row = study.train(study.Runs("a test", "--lr 1", stops=(1, 3)), "IPPO", 7)
    assert list(row) == study.COLUMNS
    assert [row[name] for name in study.KEY] == ["a test", "--lr 1", "", "IPPO", "7"]
    assert row["evaluated_after"] == "1 3"
    assert row["success_rate"] == "0.1000 0.3000" and row["untrained_success_rate"] == "0.0000"
    assert row["episode_reward"] == "0.0000 1.0000"  # the second began after one iteration
    assert row["collisions"] == "" and row["training_seconds"] == "6.0"
    assert row["curve_success_rate"] == "0.5 0.5 0.5"
    script.write_text("raise ValueError('no room')")
    with pytest.raises(RuntimeError, match="a test, MAPPO, seed 0: ValueError: no room"):
        study.train(study.Runs("a test"), "MAPPO", 0)


# ---------------------------------------------------------------------------------------- variants


def test_all_variants_at_once_run_and_are_measured():
    variant = " + ".join([study.OTHERS, study.BOOTSTRAP, "arrivals measured", study.SLOPES])
    row = study.train(study.Runs("a test", TINY, variant), "IPPO", 0)
    assert row["curve_value_at_arrival"] == "nan"  # nobody arrives within five steps
    assert len(row["curve_value_slope"].split()) == len(row["value_slope"].split()) == 1
    for name in tables.METRICS:
        assert np.isfinite(float(row[f"curve_{name}"]))


def test_the_control_runs():
    assert study.train(study.Runs("a test", TINY, study.OWN), "MAPPO", 0)["episode_length"]


@pytest.mark.parametrize(
    ("variant", "expected"), [("own distance", [5, 1, 2])] + [("others' distance", [3, 7, 6])]
)
def test_a_critic_gets_one_more_number(variant, expected, monkeypatch):
    """The distance of the robot itself, or of all others together."""
    seen, names = [], {"MultiAgentMLP": MultiAgentMLP, "torch": torch}
    [cell] = [one for one in variant_cells() if one.metadata["title"] == variant]
    exec(cell.source, names)
    sizes = {"n_agents": 3, "n_agent_inputs": 7, "n_agent_outputs": 1}
    critic = names["CriticWithDistance"](**sizes, centralized=False, share_params=True)
    monkeypatch.setattr(MultiAgentMLP, "forward", lambda self, x: seen.append(x))
    observation = torch.zeros(3, 6)
    observation[:, 4:6] = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    critic(observation)
    assert seen[0][:, :6].equal(observation)
    assert seen[0][:, 6].tolist() == expected


def test_bootstrapped_arrivals_are_hidden_from_the_advantages_only():
    hidden = []
    names = {
        "estimate_advantages": lambda batch: hidden.append(batch["next", "terminated"].clone())
    }
    [cell] = [one for one in variant_cells() if one.metadata["title"] == study.BOOTSTRAP]
    exec(cell.source, names)
    batch = {("next", "terminated"): torch.tensor([True, False])}
    names["estimate_advantages"](batch)
    assert hidden[0].tolist() == [False, False]
    assert batch["next", "terminated"].tolist() == [True, False]


def variant_cells():
    cells = jupytext.read(study.VARIANTS, fmt="py:percent").cells
    return [cell for cell in cells if "before" in cell.metadata]


def test_a_variant_adds_its_cells_and_changes_no_other():
    source = study.SCRIPT.read_text("utf-8")
    before = [cell.source for cell in jupytext.reads(source, fmt="py:percent").cells]
    for title in {title for one in variant_cells() for title in one.metadata["title"].split(", ")}:
        changed = jupytext.reads(study.with_variant(source, title), fmt="py:percent")
        added = [one.source for one in variant_cells() if title in one.metadata["title"]]
        assert [cell.source for cell in changed.cells if cell.source not in added] == before
        assert sorted(cell.source for cell in changed.cells if cell.source in added) == sorted(
            added
        )
    assert study.with_variant(source, "") == study.with_variant(source, "two threads") == source


def test_a_cell_that_is_not_there_once_is_refused():
    source = study.SCRIPT.read_text("utf-8")
    with pytest.raises(ValueError, match="no variant 'a test'"):
        study.with_variant(source, "a test")
    with pytest.raises(ValueError, match="'estimate_advantages': 2 cells"):
        study.with_variant(source + "\n# %%\nestimate_advantages = 1\n", study.OTHERS)
    with pytest.raises(ValueError, match="'loop': 0 cells"):
        study.with_variant(source.replace("estimate_advantages(batch)", "pass"), study.BOOTSTRAP)


# --------------------------------------------------------------- benchmark, transfer, tutorial


@pytest.fixture(scope="module")
def names():
    """The global names of train_mappo.py after a short run."""
    return benchmark.run_script(*TINY.split())


@pytest.mark.filterwarnings("ignore:Creating .*Updater:DeprecationWarning")
def test_the_benchmark_compares_with_the_same_gradients(names):
    bare = benchmark.BareUpdate(names)
    bare.check()
    bare.names = names | {"critic_coeff": 2.0}
    with pytest.raises(AssertionError):
        bare.check()


def test_a_run_in_this_process_leaves_it_as_it_was():
    """And one that is refused says why."""
    before = sys.argv, sys.excepthook, sys.stdout
    with pytest.raises(RuntimeError, match="num_epochs"):
        benchmark.run_script("--num-epochs", "0")
    assert (sys.argv, sys.excepthook, sys.stdout) == before


def test_a_saved_policy_is_evaluated_in_a_team(names, tmp_path, monkeypatch):
    """As the policy itself is; rows that are there are kept, and not evaluated again."""
    weights = names["policy"][0].module[0].state_dict()
    path = tmp_path / "policy.pt"
    torch.save({"state_dict": {name: value + 0.1 for name, value in weights.items()}}, path)
    (tmp_path / "hyperparameters.json").write_text(json.dumps({"seed": 4}))
    before = names["evaluate"](names["policy"])
    made = []
    monkeypatch.setattr(transfer, "TEAMS", [3])
    monkeypatch.setattr(transfer, "TRANSFER", tmp_path / "transfer.csv")
    monkeypatch.setattr(transfer, "make_team", lambda n_agents: made.append(n_agents) or names)
    transfer.run_lacking([path])
    transfer.run_lacking([path])
    rows = study.read_rows(tmp_path / "transfer.csv")
    assert rows[["n_agents", "seed"]].values.tolist() == [["3", "4"]]
    after = names["evaluate"](names["policy"])
    assert float(rows["episode_reward"][0]) == pytest.approx(after["episode_reward"], abs=1e-4)
    assert after["episode_reward"] != before["episode_reward"]
    assert tables.transfer(rows).splitlines()[-1].startswith("| 3 robots | ")


def test_the_tutorial_s_table_shows_the_runs_that_are_there(monkeypatch, tmp_path):
    curve = " ".join(str(iteration) for iteration in range(25))
    row = {"algorithm": "IPPO", "seed": 0, "episode_reward_mean": curve}
    monkeypatch.setattr(tutorial, "ROWS", tmp_path / "tutorial.csv")
    tutorial.add_row(row)
    lines = tutorial.report().splitlines()
    assert len(lines) == 3 and lines[2].startswith("| IPPO, 1 runs | 0.00 (lowest 0.00) | 4.00 ")
