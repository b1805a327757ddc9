"""What is kept and what goes on: kills, Ctrl-C, full disks, numbers that are not finite.

Runs are started as users start them, in processes of their own. Some start through
programs/stop.py, which ends them at a chosen moment: at a call, never after a number of seconds.
"""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from torchrl.checkpoint import Checkpoint

from conftest import (
    PROGRAMS,
    SCRIPT,
    State,
    assert_same,
    contents,
    finish,
    load,
    options,
    rows,
    run_inside,
    start,
)


def stop_at(plan, script, *words, **how):
    """Run the script once for each [moment, number] of the plan; return statuses and stderr."""
    out, err = finish(
        start(json.dumps(plan), script, *words, program=[PROGRAMS / "stop.py"], **how)
    )
    return json.loads(out.rpartition("STATUSES ")[2]), err


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


def test_a_run_killed_at_any_moment_resumes_as_if_nothing_had_happened(lean, tmp_path, capfd):
    """The same command, given again after each kill, ends with the same numbers to the bit.

    A new run renames hyperparameters.json, metrics.csv and its first checkpoint, a resumed one the
    tables. Each iteration then renames a checkpoint, one that is removed, and the tables.
    """
    words = options(n_iters=12, run_folder=tmp_path / "run")
    kills = [["before", 1], ["after", 1], ["archive", 9], ["before", 2], ["after", 2]]
    kills += [["update", 5], ["archive", 30], ["before", 4], ["after", 5]]
    statuses, _ = stop_at(kills, lean, *words)
    assert statuses == [-signal.SIGKILL] * len(kills)
    assert len(load(tmp_path / "run")["history"]) in range(1, 12)
    run_inside(*words, path=lean)
    assert "of 12 iterations are done" in capfd.readouterr().out
    run_inside(*options(n_iters=12, run_folder=tmp_path / "undisturbed"), path=lean)
    assert_same(tmp_path / "run", tmp_path / "undisturbed")


def test_ctrl_c_says_how_to_resume_and_stops_a_loop_over_seeds(finished, lean, tmp_path):
    """It reaches the shell and the run, and the shell asks whether the run died of the signal."""
    folder = tmp_path / "my runs" / "seed 0"
    program = [sys.executable, PROGRAMS / "interrupt.py", 25, lean]  # in the third iteration
    run = shlex.join(map(str, [*program, *options(n_iters=5)]))
    loop = f"for s in 0 1; do {run} --seed $s --run-folder 'my runs/seed '$s; done"
    how = {"cwd": tmp_path, "start_new_session": True, "stderr": -1, "encoding": "utf-8"}
    shell = subprocess.run(["bash", "-c", loop], **how)
    assert shell.returncode == -signal.SIGINT
    assert not (tmp_path / "my runs" / "seed 1").exists()
    assert "Traceback" not in shell.stderr
    command = f"resume with: python {lean} --run-folder 'my runs/seed 0'"
    assert shell.stderr.splitlines()[-1] == f"train_mappo.py: stopped; {command}"
    assert len(rows(folder)) == 2
    run_inside("--run-folder", folder, path=lean)
    assert_same(folder, finished[5])


def test_a_host_keeps_its_own_handling_of_ctrl_c(lean, tmp_path):
    """After runpy, or at the prompt of `python -i`, an interrupt is what it was before."""
    program = [PROGRAMS / "host.py"]
    out, err = finish(start(lean, *options(run_folder=tmp_path / "run"), program=program), -2)
    assert "handler: True" in out
    assert "Traceback" in err and "KeyboardInterrupt" in err and "stopped; resume" not in err
    prompt = start(*options(run_folder=tmp_path / "run"), program=["-i", lean], stdin=-1)
    said, errors = prompt.communicate(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint(6 * 7)\n"
    )
    assert prompt.returncode == 0 and "42" in said and "stopped; resume" not in errors


def test_what_is_done_after_an_iteration_does_not_change_the_run(finished, lean, tmp_path):
    """A reader's own function, even one that evaluates and so seeds the simulator anew."""
    text = lean.read_text(encoding="utf-8")
    loop = "\n# %%\nfor function in before_training:"
    own = "def own(row):\n    row['late'] = evaluate(policy)['episode_reward']\n"
    own = f"\n# %%\n{own}\n\nafter_iteration.insert(0, own)\n"
    assert text.count(loop) == 1
    (tmp_path / "changed.py").write_text(text.replace(loop, own + loop), "utf-8")
    folder = tmp_path / "run"
    run_inside(*options(n_iters=3, run_folder=folder), path=tmp_path / "changed.py")
    found = rows(folder)
    assert all(float(row.pop("late")) for row in found)
    assert found == rows(finished[3])


def test_the_seed_decides_everything(finished, lean, tmp_path):
    """The same seed gives the same numbers to the last digit, another seed other ones."""
    for seed in (0, 1):
        run_inside(*options(n_iters=3, run_folder=tmp_path / str(seed), seed=seed), path=lean)
    assert_same(tmp_path / "0", finished[3])
    assert rows(tmp_path / "1") != rows(tmp_path / "0")


def test_a_finished_run_is_evaluated_and_drawn_again(short, drawing, capfd):
    """Nothing is trained; what is shown is made anew, also with another number of episodes."""
    run_inside("--run-folder", short, path=drawing)
    before = contents(short)
    for name in ("learning_curve.png", "learning_curves.png", "evaluation.json"):
        (short / name).unlink()
    run_inside("--run-folder", short, path=drawing)
    out = capfd.readouterr().out
    assert f"Resuming {short}: 3 of 3 iterations are done" in out
    assert "slope of the value" in out  # to the very end
    after = contents(short)
    assert after.keys() == before.keys()
    for path in before:
        if path.suffix in (".torchrl", ".csv", ".json") and path.name != "hyperparameters.json":
            assert after[path] == before[path]
    run_inside("--run-folder", short, "--evaluation-episodes", 20, path=drawing)
    evaluations = [
        json.loads(found[short / "evaluation.json"]) for found in (after, contents(short))
    ]
    assert evaluations[0]["untrained"] != evaluations[1]["untrained"]


def test_a_finished_run_can_be_made_longer(short, finished, lean, capfd):
    """Options that are not given are the run's own, which is said."""
    run_inside("--run-folder", short, "--n-iters", 5, path=lean)
    out = capfd.readouterr().out
    assert f"Resuming {short}: 3 of 5 iterations are done" in out
    [kept] = [line for line in out.splitlines() if line.startswith("Kept from the run: ")]
    assert "num_cells = 32" in kept and "n_iters" not in kept and "run_folder" not in kept
    assert_same(short, finished[5])
    assert json.loads((short / "hyperparameters.json").read_text())["n_iters"] == 5


def test_a_jump_of_an_annealed_learning_rate_is_said(lean, tmp_path, capfd):
    """A longer run falls to 0 later, so it continues with a larger rate."""
    run_inside(*options(run_folder=tmp_path / "run"), "--anneal-lr", path=lean)
    assert "The learning rate was" not in capfd.readouterr().out
    run_inside("--run-folder", tmp_path / "run", "--n-iters", 4, path=lean)
    assert "The learning rate was 0.00015. It continues at 0.00015" in capfd.readouterr().out


def test_an_older_process_does_not_replace_newer_work(short, finished, lean, tmp_path):
    """A process that read 2 of 3 iterations, while another one trained to 5, saves its third."""
    older = shutil.copytree(short, tmp_path / "older")
    (older / "checkpoint-000000000003.torchrl").unlink()
    run_inside("--run-folder", older, "--n-iters", 3, path=lean)
    run_inside("--run-folder", short, "--n-iters", 5, path=lean)
    shutil.copy(older / "checkpoint-000000000003.torchrl", short)  # late
    run_inside("--run-folder", short, path=lean)
    assert_same(short, finished[5])


def test_an_empty_folder_is_used(lean, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    run_inside(*options(n_iters=1, run_folder=tmp_path / "run"), path=lean)
    assert f"New run: {tmp_path / 'run'}" in capfd.readouterr().out


def test_runs_leave_each_other_alone(finished, lean, tmp_path, monkeypatch):
    """Runs with the same options get a folder each below runs/ and change no other."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[3], tmp_path / "runs" / "older")
    before = contents(tmp_path)
    for _ in range(2):
        run_inside(*options(n_iters=1), path=lean)
    assert len([*(tmp_path / "runs").iterdir()]) == 3
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before


def test_numbers_that_are_not_finite_stop_the_run_before_they_are_saved(short, lean):
    """A critic whose prediction is near the largest float gives a loss that is not finite."""
    newest = short / "checkpoint-000000000003.torchrl"
    parts = load(short)
    history = parts.pop("history")
    [*parts["critic"].values()][-1].fill_(3e38)
    states = {name: State(state) for name, state in parts.items()}
    newest.unlink()
    Checkpoint(format="archive", history=history, **states).save(newest)
    before = {path: path.read_bytes() for path in short.glob("checkpoint-*")}
    with pytest.raises(RuntimeError, match="non-finite"):
        run_inside("--run-folder", short, "--n-iters", 5, path=lean)
    assert {path: path.read_bytes() for path in short.glob("checkpoint-*")} == before


def no_file_above(size):
    """Return a function for a new process: writing past this size fails like a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_spares_the_last_checkpoint(short, finished, lean):
    before = {path: path.read_bytes() for path in short.glob("checkpoint-*")}
    assert all(len(content) > 40_000 for content in before.values())
    words = ("--run-folder", short, "--n-iters", 5)
    _, err = finish(start(*words, program=[lean], preexec_fn=no_file_above(40_000)), 1)
    assert "File too large" in err
    assert {path: path.read_bytes() for path in short.glob("checkpoint-*")} == before
    run_inside(*words, path=lean)  # now there is room again
    assert_same(short, finished[5])


def test_a_full_disk_leaves_no_half_picture(short, drawing):
    """What was drawn before stays, and what is drawn is whole or absent."""
    run_inside("--run-folder", short, path=drawing)
    (short / "rollout.gif").unlink(missing_ok=True)
    curves = (short / "learning_curves.png").read_bytes()
    how = {"program": [drawing], "preexec_fn": no_file_above(20_000)}
    _, err = finish(start("--run-folder", short, **how), 1)
    assert "File too large" in err
    assert (short / "learning_curves.png").read_bytes() == curves
    assert not (short / "rollout.gif").exists()
    assert not [path for path in short.iterdir() if "unfinished" in path.name]


def test_a_damaged_neighbor_does_not_spoil_the_learning_curves(short, drawing, capfd):
    damage = {
        "no number": ("iteration,frames\n0,x\n", '{"mappo": true, "scenario_name": "navigation"}'),
        "no settings": ("iteration,frames\n", "no JSON"),
        "no scenario": ("iteration,frames\n", '{"mappo": true}'),
    }
    for name, (table, settings) in damage.items():
        (short.parent / name).mkdir()
        (short.parent / name / "metrics.csv").write_text(table)
        (short.parent / name / "hyperparameters.json").write_text(settings)
    run_inside("--run-folder", short, path=drawing)
    out = capfd.readouterr().out
    for name in damage:
        assert f"{short.parent / name} is left out of the learning curves" in out


def test_a_video_that_cannot_be_rendered_is_left_out_with_its_reason(
    short, drawing, capfd, monkeypatch
):
    """The renderer's own words are printed: not every failure means that OpenGL is missing."""

    def render(*_, **__):
        raise RuntimeError("no such display")

    monkeypatch.setattr("vmas.simulator.environment.Environment.render", render)
    (short / "rollout.gif").unlink(missing_ok=True)
    run_inside("--run-folder", short, path=drawing)
    out = capfd.readouterr().out
    assert "No rollout.gif" in out and "RuntimeError: no such display" in out
    assert not (short / "rollout.gif").exists() and (short / "learning_curves.png").exists()


def test_a_strange_folder_is_no_failure_and_a_learners_own_mistake_keeps_its_traceback(
    lean, tmp_path
):
    """A name that the terminal cannot print; then an error, shown where it happened."""
    text = lean.read_text(encoding="utf-8")
    mistake = "\n# %%\nlos.backward()\n"
    (tmp_path / "changed.py").write_text(text + mistake, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    words = options(n_iters=1, run_folder=tmp_path / "実行")
    program = [tmp_path / "changed.py"]
    out, err = finish(start(*words, program=program, env=environment), 1)
    assert "The results are in" in out
    assert (tmp_path / "実行" / "policy.pt").exists()
    assert "Traceback" in err and "los.backward()" in err and "NameError" in err


def test_help_shows_section_1_as_it_stands(capfd):
    text = SCRIPT.read_text(encoding="utf-8")
    cell = text.partition("# %%\nmappo = ")[2].partition("\n\n# %%")[0]
    with pytest.raises(SystemExit) as end:
        run_inside("--help")
    assert end.value.code == 0 and "mappo = " + cell in capfd.readouterr().out


def test_checkpoints_do_not_pile_up(finished):
    """The last two are kept, and nothing is left of how they were written."""
    names = sorted(path.name for path in finished[5].iterdir())
    assert [name for name in names if "checkpoint" in name] == [
        f"checkpoint-{number:012d}.torchrl" for number in (4, 5)
    ]
    assert not [name for name in names if name.startswith(".")]
