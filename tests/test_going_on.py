"""What is kept and what goes on: kills, Ctrl-C, full disks, numbers that are not finite.

Runs are started as users start them, in processes of their own. Some start through a small program
that ends them at a chosen moment: after a number of saves, never after a number of seconds.
"""

import json
import resource
import shlex
import shutil
import signal
import sys

import pytest
import torch

from conftest import (
    SCRIPT,
    assert_same,
    contents,
    finish,
    load,
    options,
    rows,
    start,
)

# Runs the script given after a number and a word. At that many saves it stops: with "save" in the
# middle of writing the checkpoint, with "iteration" in the middle of the next iteration's learning.
# It kills itself, or, at "interrupt", sends itself what Ctrl-C sends.
STOP = """
import io, os, runpy, signal, sys, torch

number, moment = int(sys.argv[1]), sys.argv[2]
whole_save, clip = torch.save, torch.nn.utils.clip_grad_norm_
saves = 0

def save(states, file):
    global saves
    if "optimizer" not in states:
        return whole_save(states, file)
    if saves == number and moment == "save":
        whole_save(states, everything := io.BytesIO())
        file.write(everything.getvalue()[:len(everything.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    saves += 1
    whole_save(states, file)

def clip_and_stop(*args):
    if saves == number and moment != "save":
        os.kill(os.getpid(), signal.SIGINT if moment == "interrupt" else signal.SIGKILL)
    return clip(*args)

torch.save, torch.nn.utils.clip_grad_norm_ = save, clip_and_stop
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_and_stop(number, moment, *words, **how):
    """Start the script so that it stops after `number` saves."""
    return start(number, moment, SCRIPT, *words, program=["-c", STOP], **how)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of two runs that nothing disturbed, {3: of 3 iterations, 5: of 5 iterations}."""
    folders = {n: tmp_path_factory.mktemp(f"finished{n}") / "run" for n in (3, 5)}
    processes = [start(*options(n_iters=n, run_folder=folders[n])) for n in folders]
    for process in processes:
        finish(process)
    return folders


@pytest.fixture
def short(finished, tmp_path):
    """A copy of the run of 3 iterations."""
    return shutil.copytree(finished[3], tmp_path / "short")


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    """The same command, given again after each kill, ends with the same numbers to the bit.

    Two kills come in the middle of writing a checkpoint, two in the middle of learning.
    """
    folder = tmp_path / "run"
    words = options(n_iters=5, run_folder=folder)
    kept = 0
    for number, moment in ((0, "save"), (0, "iteration"), (1, "save"), (2, "iteration")):
        finish(start_and_stop(number, moment, *words), -signal.SIGKILL)
        kept += number
        done = len(load(folder)["history"]) if (folder / "checkpoint.pt").exists() else 0
        assert done == kept
    out, _ = finish(start(*words))
    assert f"Going on in {folder}: 3 of 5 iterations are done" in out
    assert_same(folder, finished[5])


def test_a_kill_between_checkpoint_and_tables_leaves_nothing_behind(finished, tmp_path):
    """The tables of a killed run may miss the last iteration; going on puts them right at once."""
    folder = shutil.copytree(finished[3], tmp_path / "run")
    (folder / "hyperparameters.json").unlink()
    (folder / "metrics.csv").unlink()
    finish(start("--run-folder", folder))
    assert_same(folder, finished[3])
    assert (folder / "hyperparameters.json").exists()


def test_ctrl_c_says_what_was_kept_and_how_to_go_on(finished, tmp_path):
    """In one line, whose command can be pasted; also where the folder's name has a space."""
    folder = tmp_path / "my runs" / "one"
    words = options(n_iters=5, run_folder=folder)
    _, err = finish(start_and_stop(2, "interrupt", *words), 130)
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    command = shlex.split(said.removeprefix("train_mappo.py: stopped; go on with: "))
    assert command == [sys.executable, str(SCRIPT), *words]  # the same command once more
    assert len(rows(folder)) == 2
    finish(start(*command[2:], program=[command[1]]))
    assert_same(folder, finished[5])


def test_ctrl_c_in_a_run_without_a_folder_of_its_own_names_it(tmp_path):
    """The command that goes on then holds the folder that the run made for itself."""
    words = options(n_iters=5)
    _, err = finish(start_and_stop(1, "interrupt", *words, cwd=tmp_path), 130)
    [folder] = (tmp_path / "runs").iterdir()
    said = err.splitlines()[-1].removeprefix("train_mappo.py: stopped; go on with: ")
    assert shlex.split(said)[-2:] == ["--run-folder", f"runs/{folder.name}"]
    assert len(rows(folder)) == 1


def test_what_is_done_after_an_iteration_does_not_change_the_run(finished, tmp_path):
    """A reader's own function, even one that evaluates and so seeds the simulator anew."""
    text = SCRIPT.read_text(encoding="utf-8")
    loop = "progress = tqdm(range("
    own = (
        "after_iteration.append(lambda row: row.update(late=evaluate(policy)['episode_reward']))\n"
    )
    (tmp_path / "changed.py").write_text(text.replace(loop, own + loop), "utf-8")
    folder = tmp_path / "run"
    finish(start(*options(n_iters=3, run_folder=folder), program=[tmp_path / "changed.py"]))
    found = rows(folder)
    assert all(float(row.pop("late")) for row in found)
    assert found == rows(finished[3])


def test_ctrl_c_works_where_it_was_ignored_at_the_start(tmp_path):
    """As in a job that a shell has put in the background."""

    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    words = options(run_folder=tmp_path / "run")
    _, err = finish(start_and_stop(0, "interrupt", *words, preexec_fn=ignore), 130)
    assert err.splitlines()[-1] == "train_mappo.py: stopped; nothing was kept"
    assert "Traceback" not in err


def test_the_seed_decides_everything(finished, tmp_path):
    """The same seed gives the same numbers to the last digit, another seed other ones."""
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    processes = [
        start(*options(n_iters=3, run_folder=folders[seed], seed=seed)) for seed in folders
    ]
    for process in processes:
        finish(process)
    assert_same(folders[0], finished[3])
    assert rows(folders[1]) != rows(folders[0])


def test_a_finished_run_is_evaluated_and_drawn_again(short):
    """Nothing is trained; what is shown is made anew, also with another number of episodes."""
    before = contents(short)
    for name in ("learning_curve.png", "learning_curves.png", "evaluation.json"):
        (short / name).unlink()
    out, _ = finish(start("--run-folder", short))
    assert f"Going on in {short}: 3 of 3 iterations are done" in out
    after = contents(short)
    assert after.keys() == before.keys()
    for name in ("checkpoint.pt", "metrics.csv", "evaluation.json"):
        assert after[short / name] == before[short / name]
    finish(start("--run-folder", short, "--evaluation-episodes", 20))
    evaluations = [
        json.loads(found[short / "evaluation.json"]) for found in (after, contents(short))
    ]
    assert evaluations[0]["untrained"] != evaluations[1]["untrained"]


def test_a_finished_run_can_be_made_longer(short, finished):
    """Options that are not given are the run's own."""
    out, _ = finish(start("--run-folder", short, "--n-iters", 5))
    assert f"Going on in {short}: 3 of 5 iterations are done" in out
    assert_same(short, finished[5])
    assert json.loads((short / "hyperparameters.json").read_text())["n_iters"] == 5


def test_an_empty_folder_is_begun_in(tmp_path):
    (tmp_path / "run").mkdir()
    out, _ = finish(start(*options(n_iters=1, run_folder=tmp_path / "run")))
    assert f"A new run in {tmp_path / 'run'}" in out


def test_runs_leave_each_other_alone(finished, tmp_path):
    """Two runs that begin at the same time below runs/ get a folder each and change no other."""
    shutil.copytree(finished[3], tmp_path / "runs" / "older")
    before = contents(tmp_path)
    processes = [start(*options(n_iters=1), cwd=tmp_path) for _ in range(2)]
    for process in processes:
        finish(process)
    assert len([*(tmp_path / "runs").iterdir()]) == 3
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before


def test_numbers_that_are_not_finite_stop_the_run_before_they_are_saved(short):
    """A critic whose prediction is near the largest float gives a loss that is not finite."""
    states = load(short)
    [*states["critic"].values()][-1].fill_(3e38)
    torch.save(states, short / "checkpoint.pt")
    before = contents(short)
    _, err = finish(start("--run-folder", short, "--n-iters", 5), 1)
    last = err.strip().splitlines()[-1]
    assert last.startswith("FloatingPointError: iteration 3 ") and str(short) in last
    assert contents(short) == before | {
        short / "hyperparameters.json": contents(short)[short / "hyperparameters.json"]
    }


def no_file_above(size):
    """A function to call in a new process: writing past this size fails like a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_spares_the_last_checkpoint(short, finished):
    before = (short / "checkpoint.pt").read_bytes()
    assert len(before) > 40_000
    words = ("--run-folder", short, "--n-iters", 5)
    _, err = finish(start(*words, preexec_fn=no_file_above(40_000)), 1)
    assert "File too large" in err
    assert (short / "checkpoint.pt").read_bytes() == before
    assert not [*short.glob("*.new")]
    finish(start(*words))  # now there is room again
    assert_same(short, finished[5])


def test_a_neighbour_that_is_damaged_does_not_spoil_the_learning_curves(short):
    for name, text in (("empty", ""), ("text", "no table"), ("other", "a,b\n1,2\n")):
        (short.parent / name).mkdir()
        (short.parent / name / "metrics.csv").write_text(text)
        (short.parent / name / "hyperparameters.json").write_text('{"mappo": true}')
    out, _ = finish(start("--run-folder", short))
    for name in ("empty", "text", "other"):
        assert f"{short.parent / name} is left out of the learning curves" in out


def test_a_picture_that_cannot_be_drawn_is_left_out_with_its_reason(short):
    """The renderer's own words are printed: not every failure means that OpenGL is missing."""
    program = (
        "import runpy, sys\n"
        "from vmas.simulator.environment import Environment\n"
        "def render(*_, **__):\n"
        "    raise RuntimeError('no such display')\n"
        "Environment.render = render\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    (short / "rollout.gif").unlink(missing_ok=True)
    out, _ = finish(start(SCRIPT, "--run-folder", short, program=["-c", program]))
    assert "No rollout.gif" in out and "RuntimeError: no such display" in out
    assert not (short / "rollout.gif").exists() and (short / "learning_curves.png").exists()


def test_a_learners_own_mistake_keeps_its_traceback(tmp_path):
    """An error in a changed file is shown where it happened, and is no refusal."""
    text = SCRIPT.read_text(encoding="utf-8")
    changed = text.replace("            loss.backward()", "            los.backward()")
    assert changed != text
    (tmp_path / "changed.py").write_text(changed, encoding="utf-8")
    words = options(run_folder=tmp_path / "run")
    _, err = finish(start(*words, program=[tmp_path / "changed.py"]), 1)
    assert "Traceback" in err and "los.backward()" in err and "NameError" in err


@pytest.mark.parametrize(
    "old, new",
    [
        ("lr = 3e-4  # learning rate of Adam\n", "lr: float = 1e-3\n"),  # annotated, no comment
        ("lr = 3e-4  # learning rate of Adam\n", "lr = 3e-4\nmomentum = 0.8\nlayers = [1, 2]\n"),
        ("# ## 1. Hyperparameters\n", "#\n"),
    ],
    ids=["annotated", "added", "heading deleted"],
)
def test_what_a_learner_does_to_the_hyperparameters_works(old, new, tmp_path):
    """Annotated, added or stripped of comments, each is still an option, and recorded."""
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / "changed.py").write_text(text.replace(old, new), encoding="utf-8")
    more = ["--momentum", "0.7", "--layers", "[3]"] if "momentum" in new else []
    words = [*options(n_iters=1, run_folder=tmp_path / "run"), "--lr", "1e-4", *more]
    finish(start(*words, program=[tmp_path / "changed.py"]))
    recorded = json.loads((tmp_path / "run" / "hyperparameters.json").read_text())
    assert recorded["lr"] == 1e-4
    if more:
        assert (recorded["momentum"], recorded["layers"]) == (0.7, [3])


def test_help_shows_section_1_as_it_stands():
    text = SCRIPT.read_text(encoding="utf-8")
    cell = text.partition("# %%\nmappo = ")[2].partition("\n\n# %%")[0]
    out, _ = finish(start("--help"))
    assert "mappo = " + cell in out
