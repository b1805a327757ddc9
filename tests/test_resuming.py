"""What is kept and resumed: kills, Ctrl-C, full disks, numbers that are not finite."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cells import SLOW, finish, run_inside, start, write_copy
from conftest import assert_same, contents, load, options, rows, without_seconds

STOP = Path(__file__).parent / "programs" / "stop.py"
UPDATE = "            optimizer.step()\n"
MOMENTS = {  # lines of the file, and the same with the names of moments at which it can be killed
    UPDATE: f'            moment("update")\n{UPDATE}',
    "                write(file)\n": '                write(file), moment("writing")\n',
    "unfinished.replace(path)\n": ('moment("before"), unfinished.replace(path), moment("after")\n'),
    "self.write_log([row])\n": 'moment("log"), self.write_log([row])\n',
}


@pytest.fixture(scope="module")
def stoppable(tmp_path_factory):
    """Return a copy of the file that programs/stop.py can end."""
    path = tmp_path_factory.mktemp("stoppable") / "train_mappo.py"
    return write_copy(path, *SLOW, edits=MOMENTS)


def stop_at(plan, script, *words):
    """Run the script once for each [moment, number]; return exit statuses, stdout and stderr."""
    out, err = finish(start(json.dumps(plan), script, *words, program=[STOP]))
    before, _, statuses = out.rpartition("STATUSES ")
    return json.loads(statuses), before, err


def logged(folder):
    """Return {iteration: reward} of the newest CSV log, in which no iteration may occur twice."""
    newest = max((folder / "log").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    [path] = newest.rglob("episode_reward.csv")
    lines = [line.split(",") for line in path.read_text().split()]
    assert len(lines) == len({step for step, _ in lines})
    return {int(step): float(value) for step, value in lines}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, lean):
    """Return the folders of two runs that nothing disturbed, {3: of 3 iterations, 5: of 5}."""
    folders = {n: tmp_path_factory.mktemp(f"finished{n}") / "run" for n in (3, 5)}
    for n, folder in folders.items():
        run_inside(*options(n_iters=n, run_folder=folder), path=lean)
    return folders


@pytest.fixture
def short(finished, tmp_path):
    """Return a copy of the run of 3 iterations."""
    return shutil.copytree(finished[3], tmp_path / "short")


def test_a_run_killed_at_any_moment_resumes_as_if_nothing_had_happened(
    stoppable, lean, finished, tmp_path, capfd
):
    """The same command, given again after each kill, ends with the same numbers to the last bit.

    Then the disk is full for a while, which spares the last checkpoint as well. A start writes a
    checkpoint and two tables, and so does each iteration. The log of the last start has every
    iteration, under its number.
    """
    words = options(n_iters=5, run_folder=tmp_path / "run", logger="csv")
    kills = [["writing", 1], ["before", 1], ["after", 1], ["before", 3], ["update", 5]]
    kills += [["writing", 4], ["after", 4], ["update", 13], ["before", 5], ["log", 1]]
    statuses, _, err = stop_at([*kills, ["disk", 40_000]], stoppable, *words)
    assert statuses == [*[-signal.SIGKILL] * len(kills), 1] and "File too large" in err
    assert len(load(tmp_path / "run")["history"]) in range(2, 5)
    run_inside(*words, path=lean)
    assert "of 5 iterations are done" in capfd.readouterr().out
    assert_same(tmp_path / "run", finished[5])
    rewards = {row["iteration"]: row["episode_reward"] for row in load(finished[5])["history"]}
    assert logged(tmp_path / "run") == pytest.approx(rewards)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_ctrl_c_says_how_to_resume_and_stops_a_loop_over_seeds(finished, lean, tmp_path):
    """It reaches the shell and the run, and the shell asks whether the run died of the signal."""
    stop = "            if len(history) == 2 and minibatch_losses:\n"
    stop += "                os.killpg(os.getpgrp(), 2)  # SIGINT, as a terminal does\n"
    script = write_copy(tmp_path / "train_mappo.py", *SLOW, edits={UPDATE: UPDATE + stop})
    run = shlex.join(map(str, [sys.executable, script, *options(n_iters=5)]))
    loop = f"for s in 0 1; do {run} --seed $s --run-folder 'my runs/seed '$s; done"
    how = {"cwd": tmp_path, "start_new_session": True, "capture_output": True, "text": True}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    shell = subprocess.run(["bash", "-c", loop], **how)
    assert shell.returncode == -signal.SIGINT, shell.stderr
    assert not (tmp_path / "my runs" / "seed 1").exists()
    assert "Traceback" not in shell.stderr
    command = f"python {script} --run-folder 'my runs/seed 0'"
    assert shell.stderr.splitlines()[-1].endswith(command) and command in shell.stdout
    assert len(rows(tmp_path / "my runs" / "seed 0")) == 2
    run_inside("--run-folder", tmp_path / "my runs" / "seed 0", path=lean)
    assert_same(tmp_path / "my runs" / "seed 0", finished[5])


def test_a_run_on_a_gpu_is_resumed_where_there_is_none(short, finished, lean, capsys, monkeypatch):
    """Without --device: what was recorded cannot be kept, so the default is taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.save(
        load(short) | {"config": load(short)["config"] | {"device": "cuda"}},
        short / "checkpoint.pt",
    )
    run_inside("--run-folder", short, "--n-iters", 5, path=lean)
    assert "device = " not in capsys.readouterr().out
    assert_same(short, finished[5])


@pytest.mark.parametrize("network", ["policy", "critic"])
def test_weights_that_are_not_finite_are_never_saved(network, short, tmp_path):
    spoil = f"if len(history) == 4: next({network}.parameters()).data[0, 0] = math.nan"
    spoil = f"{UPDATE}            {spoil}\n"
    script = write_copy(tmp_path / "train_mappo.py", *SLOW, edits={UPDATE: spoil})
    with pytest.raises(FloatingPointError):
        run_inside("--run-folder", short, "--n-iters", 5, path=script)
    saved = load(short)
    assert all(value.isfinite().all() for value in saved[network].values())
    assert len(saved["history"]) == len(rows(short)) == 4


@pytest.mark.parametrize("scenario", ["navigation", "wind_flocking"])
def test_the_seed_decides_everything(scenario, lean, tmp_path):
    """The same seed gives the same numbers to the last digit, another seed other ones.

    Also in a scenario that draws numbers wherever it can, and whatever the process did before.
    """
    values = {"scenario_name": scenario, "n_agents": 2 if scenario == "wind_flocking" else 3}
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(hash(name))
        run_inside(*options(run_folder=tmp_path / name, seed=seed, **values), path=lean)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert rows(tmp_path / "one")[0]["loss_critic"] != rows(tmp_path / "three")[0]["loss_critic"]


def test_a_finished_run_is_evaluated_and_drawn_again(short, drawing, capfd):
    """Nothing is trained; what is shown is made anew, also with another number of episodes."""
    run_inside("--run-folder", short, path=drawing)
    before = contents(short)
    for path in [*short.glob("*.png"), short / "evaluation.json"]:
        path.unlink()
    run_inside("--run-folder", short, path=drawing)
    out = capfd.readouterr().out
    assert f"Resuming {short}: 3 of 3 iterations are done" in out
    assert "the value has slope s = " in out  # to the very end
    after, evaluation = contents(short), short / "evaluation.json"
    assert after.keys() == before.keys()
    for path in (evaluation, short / "metrics.csv"):
        assert after[path] == before[path]
    run_inside("--run-folder", short, "--evaluation-episodes", 20, path=drawing)
    again = json.loads(evaluation.read_text())
    assert again["untrained"] != json.loads(after[evaluation])["untrained"]


def test_a_finished_run_can_be_made_longer(short, finished, lean, capfd):
    """Options that are not given are the run's own, which is said."""
    run_inside("--run-folder", short, "--n-iters", 5, path=lean)
    out = capfd.readouterr().out
    assert f"Resuming {short}: 3 of 5 iterations are done" in out
    [kept] = [line for line in out.splitlines() if line.startswith("Kept from the saved run: ")]
    assert "num_cells = 32" in kept and "n_iters" not in kept and "run_folder" not in kept
    assert_same(short, finished[5])
    assert json.loads((short / "hyperparameters.json").read_text())["n_iters"] == 5


def test_a_jump_of_an_annealed_learning_rate_is_said(lean, tmp_path, capfd):
    """A longer run falls to 0 later, so it continues with a larger rate."""
    run_inside(*options(run_folder=tmp_path / "run", n_iters=3, anneal_lr=True), path=lean)
    assert "learning rate" not in capfd.readouterr().out
    run_inside("--run-folder", tmp_path / "run", "--n-iters", 9, path=lean)
    assert "The learning rate was 0.0001. Training continues at 0.0002" in capfd.readouterr().out


def test_runs_leave_each_other_alone(finished, lean, tmp_path, monkeypatch, capfd):
    """Runs with the same options get a folder each below runs/; an empty one is used."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[3], tmp_path / "runs" / "older")
    (tmp_path / "runs" / "empty").mkdir()
    before = contents(tmp_path)
    for words in ((), (), ("--run-folder", "runs/empty")):
        run_inside(*options(n_iters=1), *words, path=lean)
    assert len([*(tmp_path / "runs").iterdir()]) == 4
    assert "New run: runs/empty" in capfd.readouterr().out
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before


def test_a_folder_may_be_named_relative_to_home(lean, tmp_path, monkeypatch):
    """As in `--run-folder=~/mine`, which no shell expands; and as `.`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run_inside(*options(n_iters=1, run_folder="~/mine"), path=lean)
    monkeypatch.chdir(tmp_path / "mine")
    run_inside("--run-folder", ".", "--n-iters", 2, path=lean)
    assert len(rows(tmp_path / "mine")) == 2 and not (tmp_path / "mine" / "~").exists()


def test_a_table_or_a_log_that_cannot_be_written_does_not_end_the_training(
    finished, tmp_path, capfd
):
    """Another program may hold or remove them; the checkpoint has all of it, and says so."""
    harm = ["import shutil", "shutil.rmtree(folder / 'log')", "(folder / 'log').touch()"]
    harm += ["(folder / 'metrics.csv').unlink()", "(folder / 'metrics.csv').mkdir()"]
    harm = "    if iteration == 1:\n        " + "\n        ".join(harm) + "\n"
    old = "    history.append(row)\n"
    script = write_copy(tmp_path / "train_mappo.py", *SLOW, edits={old: harm + old})
    run_inside(*options(n_iters=3, run_folder=tmp_path / "run", logger="csv"), path=script)
    err = capfd.readouterr().err
    assert "metrics.csv could not be written" in err and "The csv log could not be written" in err
    found, expected = (load(run)["history"] for run in (tmp_path / "run", finished[3]))
    assert without_seconds(found) == without_seconds(expected)
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_run_from_standard_input_takes_its_options(lean, tmp_path):
    """As in `uv run - --seed 3 < train_mappo.py`; the terminal cannot print the folder's name."""
    words, ascii_only = options(n_iters=1, run_folder="実行", seed=3), {"PYTHONIOENCODING": "ascii"}
    with open(lean, encoding="utf-8") as text:
        how = {"cwd": tmp_path, "stdin": text, "env": os.environ | ascii_only}
        finish(start("-", *words, program=(), **how))
    assert load(tmp_path / "実行")["config"]["seed"] == 3
