"""What can go wrong, and what is kept: kills, Ctrl-C, full disks, bad input, strangers' checkpoints, many processes.

Runs are started as users start them, in processes of their own. Two things differ: the many refusals share one process,
because importing torch takes longer than a refusal, and a few runs start through a small script that ends them at a
chosen moment or looks into them at the end.
"""
import ast
import csv
import json
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "train_mappo.py"
CPU = ("--device", "cpu")  # on which runs can be repeated to the bit
TINY = (*CPU, *"--max-steps 20 --frames-per-batch 600 --minibatch-size 100 --num-epochs 3 --num-cells 32 "
        "--evaluation-episodes 10".split())
LONGEST = 180  # seconds; only a process that hangs needs as much


def start(*words, program=(SCRIPT,), **how):
    """Start the script, or another Python program, with the options `words`."""
    return subprocess.Popen([sys.executable, *map(str, [*program, *words])], stdout=subprocess.PIPE, encoding="utf-8",
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **how)


def finish(process, status=0):
    """Wait for a process, check its exit status, and return what it wrote to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun then ends the processes that it has started
        raise
    assert process.returncode == status, err
    return out, err


def last_line(err):
    """The last line of stderr; it must be the only one by the script, and stand where a traceback would stand."""
    lines = err.splitlines()
    assert "Traceback" not in err and sum(line.startswith("train_mappo.py: ") for line in lines) == 1
    assert lines[-1].startswith("train_mappo.py: ")
    return lines[-1]


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def rows(folder):
    """The rows of metrics.csv without the column that no two runs share."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(folder, other):
    """Two runs have the same parameters, the same state of the optimizer and the same metrics, bit for bit."""
    one, two = ({name: load(run)[name] for name in ("policy", "critic", "optimizer")} for run in (folder, other))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert rows(folder) == rows(other)
    assert [row["iteration"] for row in rows(folder)] == [str(i) for i in range(len(load(folder)["metrics"]))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of two runs that nothing disturbed, {3: of 3 iterations, 6: of 6 iterations}."""
    outputs = {n: tmp_path_factory.mktemp(f"finished{n}") for n in (3, 6)}
    processes = [start(*TINY, "--n-iters", n, "--output-dir", output) for n, output in outputs.items()]
    for process in processes:
        finish(process)
    return {n: next(output.iterdir()) for n, output in outputs.items()}


@pytest.fixture
def short(finished, tmp_path):
    """A copy of the run of 3 iterations."""
    return shutil.copytree(finished[3], tmp_path / "runs" / "short")


# Runs that are stopped

DIE_WHILE_SAVING = """
import io, os, runpy, signal, sys, torch

whole_save, saves_before = torch.save, int(sys.argv[1])

def save(states, file):
    global saves_before
    saves_before -= 1
    if saves_before >= 0:
        return whole_save(states, file)
    whole_save(states, everything := io.BytesIO())
    file.write(everything.getvalue()[:len(everything.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    """Two kills come in the middle of writing a checkpoint, three at random moments; none leaves a trace in the end."""
    moments, folder = random.Random(7), None
    for saves_before in (0, 1, None, None, None):
        done = len(load(folder)["metrics"]) if folder else 0
        options = ["--resume", folder, *CPU] if folder else [*TINY, "--n-iters", 6, "--output-dir", tmp_path]
        if saves_before is None:
            begun = time.time_ns()
            process = start(*options)
            while not any(path.stat().st_mtime_ns > begun for path in tmp_path.glob("*/hyperparameters.json")):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.5))  # training has begun; the run lasts longer than this
            process.kill()
        else:
            process = start(saves_before, SCRIPT, *options, program=["-c", DIE_WHILE_SAVING])
        finish(process, -signal.SIGKILL)
        folder = next((path.parent for path in tmp_path.glob("*/checkpoint.pt")), None)
        if saves_before is not None:
            assert (len(load(folder)["metrics"]) if folder else 0) == done + saves_before  # the last one that was whole
    finish(start("--resume", folder, *CPU))
    assert_same(folder, finished[6])
    assert len([*tmp_path.glob("*/checkpoint.pt")]) == 1  # each start after the first checkpoint used the same folder


def test_ctrl_c_says_what_was_kept_and_how_to_go_on(finished, tmp_path):
    """The command that goes on can be pasted into a shell, also where the folder's name has a space."""
    output = tmp_path / "my runs"
    process = start(*TINY, "--n-iters", 6, "--output-dir", output)
    while not [*output.glob("*/checkpoint.pt")]:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    command = shlex.split(last_line(finish(process, 130)[1]).split("go on with ")[1])
    folder, = output.iterdir()
    assert command == ["python", "train_mappo.py", "--resume", str(folder)]
    assert len(rows(folder)) < 6
    finish(start(*command[2:], *CPU, program=[command[1]], cwd=SCRIPT.parent))
    assert_same(folder, finished[6])


# Runs that are complete

def show_again(run, *options):
    """Resume a complete run of 3 iterations, check that it shows its results and does not train; return its stdout."""
    before = contents(run)
    (run / "learning_curve.png").unlink()
    out, _ = finish(start("--resume", run, *CPU, *options))
    assert f"{run}: 3 of 3 iterations are done" in out
    assert "untrained" in out and "success rate" in out
    after = contents(run)
    assert after.keys() == before.keys()
    assert all(after[run / name] == before[run / name] for name in ("checkpoint.pt", "metrics.csv"))
    return out


def test_a_complete_run_is_shown_again_and_not_trained(short):
    show_again(short)


def test_a_complete_run_can_be_made_longer(short, finished):
    out, _ = finish(start("--resume", short, "--n-iters", 6, *CPU))
    assert f"{short}: 3 of 6 iterations are done" in out
    assert_same(short, finished[6])
    assert json.loads((short / "hyperparameters.json").read_text())["n_iters"] == 6


# Runs that break

def test_numbers_that_are_not_finite_stop_the_run_before_they_are_saved(short):
    """A critic whose prediction is near the largest float gives a loss that is not finite in the next iteration."""
    states = load(short)
    list(states["critic"].values())[-1].fill_(3e38)
    torch.save(states, short / "checkpoint.pt")
    before = contents(short)
    _, err = finish(start("--resume", short, "--n-iters", 5, *CPU), status=1)
    assert "iteration 3 " in last_line(err) and str(short) in last_line(err)
    after = contents(short)
    assert all(after[short / name] == before[short / name] for name in ("checkpoint.pt", "metrics.csv"))


def no_file_above_40_kb():
    """Called in the new process: from here on, writing past this size fails like writing to a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_a_full_disk_spares_the_last_checkpoint(short, finished):
    before = (short / "checkpoint.pt").read_bytes()
    assert len(before) > 40_000
    _, err = finish(start("--resume", short, "--n-iters", 6, *CPU, preexec_fn=no_file_above_40_kb), 1)
    assert "too large" in last_line(err) and f"--resume {short}" in last_line(err)
    assert (short / "checkpoint.pt").read_bytes() == before
    finish(start("--resume", short, "--n-iters", 6, *CPU))  # now there is room again
    assert_same(short, finished[6])


@pytest.mark.parametrize("num_cells, kept", [(32, 0), (8, 1)], ids=["checkpoint", "picture"])
def test_a_disk_that_fills_up_ends_a_new_run_in_one_line(tmp_path, num_cells, kept):
    """With 32 cells the first checkpoint is too large; with 8 cells all checkpoints fit and a picture is too large."""
    _, err = finish(start(*TINY, "--num-cells", num_cells, "--n-iters", 1, "--output-dir", tmp_path,
                          preexec_fn=no_file_above_40_kb), status=1)
    folder, = tmp_path.iterdir()
    assert "too large" in last_line(err)
    assert (f"--resume {folder}" if kept else "nothing was kept") in last_line(err)
    assert [len(load(path.parent)["metrics"]) for path in tmp_path.glob("*/checkpoint.pt")] == [1] * kept


def no_more_than_16_gb():
    """Called in the new process: from here on, it is refused more address space than this."""
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep this limit")
def test_networks_too_large_for_the_memory_end_the_run_in_one_line(tmp_path):
    _, err = finish(start(*TINY, "--num-cells", 10**9, "--output-dir", tmp_path, preexec_fn=no_more_than_16_gb), 1)
    assert "allocate" in last_line(err) and "nothing was kept" in last_line(err) and not [*tmp_path.iterdir()]


def test_runs_that_begin_in_the_same_second_get_a_folder_each(tmp_path):
    """All folders of the next minutes are taken, as if by other runs."""
    now = time.time()
    for second in range(LONGEST):
        (tmp_path / f"mappo-navigation-seed0-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now + second))}").mkdir()
    finish(start(*TINY, "--n-iters", 1, "--output-dir", tmp_path))
    [table] = tmp_path.glob("*/metrics.csv")
    assert table.parent.name.endswith("-2") and table.parent.with_name(table.parent.name[:-2]).exists()


# Bad input

REFUSE_ALL = """
import contextlib, io, json, runpy, sys

script, cases, answers = sys.argv[1:]
given, found = json.load(open(cases)), []
for options in given:
    sys.argv = [script, *options]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(script, run_name="__main__")
            status = "not refused"
        except BaseException as end:
            status = end.code if type(end) is SystemExit else repr(end)
    found.append([status, out.getvalue(), err.getvalue()])
json.dump(found, open(answers, "w"))
"""


def numbers():
    """The hyperparameters of the script that are numbers."""
    for statement in ast.parse(SCRIPT.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            if type(statement.value.value) in (int, float):
                yield statement.targets[0].id


MAY_BE_ZERO = {"seed", "evaluation_seed", "gamma", "lmbda", "entropy_eps"}
BAD_NUMBERS = [(f"--{name.replace('_', '-')}", value) for name in numbers() for value in
               ["-1", "nan", "inf", "text", *(["0"] if name not in MAY_BE_ZERO else [])]]
BAD_OPTIONS = [  # options, and what the one line must hold
    *((pair, pair) for pair in BAD_NUMBERS),
    (("--n-iters", "1.5"), ("--n-iters", "1.5")),
    (("--seed", str(2**64)), ("--seed", str(2**64))),
    (("--gamma", "1.01"), ("--gamma 1.01",)),
    (("--lmbda", "-0.01"), ("--lmbda -0.01",)),
    (("--minibatch-size", "1"), ("--minibatch-size 1",)),
    (("--minibatch-size", "70"), ("--minibatch-size 70", "600")),
    (("--frames-per-batch", "610"), ("--frames-per-batch 610", "max_steps", "20")),
    (("--scenario-name", "navigatoin"), ("--scenario-name navigatoin: give one of navigation,",)),
    (("--n-agents", "30"), ("--n-agents 30",)),
    (("--scenario-name", "give_way", "--n-agents", "5"), ("--n-agents 5: give 2",)),
    (("--device", "nonsense"), ("--device nonsense", "cpu")),
    (("--device", "cuda:99" if torch.cuda.is_available() else "cuda"), ("--device cuda", "cpu")),
    (("--output-dir", "{folder}/file"), ("--output-dir {folder}/file",)),
    (("--output-dir", "{folder}/file/below"), ("--output-dir {folder}/file/below",)),
    (("--n-itres", "3"), ("--n-itres", "the nearest is --n-iters")),
    (("--n-iter", "3"), ("--n-iter ", "the nearest is --n-iters")),
    (("--no-mapo",), ("--no-mapo", "the nearest is --no-mappo")),
    (("--mappo=yes",), ("--mappo", "yes")),
    (("--lr",), ("--lr",)),
    (("runs/mappo",), ("runs/mappo",)),
]
BAD_RESUMES = [(("--resume", "{folder}/" + name, *options), ("--resume {folder}/" + name, *words))
               for name, options, words in [
    ("nowhere", (), ()), ("empty", (), ()), ("file", (), ()),
]]
CONFLICTS = [(("--resume", "{folder}/good", *options), words) for options, words in [
    (("--lr", "0.1"), ("--lr 0.1", "0.0003")), (("--seed", "5"), ("--seed 5", "run has 0")),
    (("--no-mappo",), ("--mappo False", "run has True")), (("--num-cells", "64"), ("--num-cells 64", "32")),
]]


def shorten(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1]


STRANGERS = {  # what to do to the states in a good checkpoint so that it must be refused
    "policy of another shape": lambda states: shorten(states["policy"]),
    "critic of another shape": lambda states: shorten(states["critic"]),
    "moments of another shape": lambda states: states["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "moments missing": lambda states: states["optimizer"]["state"][0].pop("exp_avg"),
    "moments of no parameter": lambda states: states["optimizer"]["state"].clear(),
    "policy missing": lambda states: states.pop("policy"),
    "weights missing": lambda states: states["policy"].popitem(),
    "weights unknown": lambda states: states["policy"].update(unknown=torch.zeros(3)),
    "metrics missing": lambda states: states.pop("metrics"),
    "metrics empty": lambda states: states["metrics"].clear(),
    "metrics text": lambda states: states.update(metrics="text"),
    "column missing": lambda states: states["metrics"][0].popitem(),
    "column text": lambda states: states["metrics"][0].update(seconds="text"),
    "hyperparameters missing": lambda states: states.pop("hyperparameters"),
    "hyperparameter missing": lambda states: states["hyperparameters"].pop("depth"),
    "number as text": lambda states: states["hyperparameters"].update(depth="2"),
    "number as flag": lambda states: states["hyperparameters"].update(n_agents=True),
    "list for a flag": lambda states: states["hyperparameters"].update(mappo=[]),
    "another network": lambda states: states["hyperparameters"].update(num_cells=16),
}
TRAPS = {  # how a file that runs code when it is unpickled is written
    "trap in a zip": torch.save,
    "trap in an old file": lambda states, path: torch.save(states, path, _use_new_zipfile_serialization=False),
    "trap in a pickle": lambda states, path: path.write_bytes(pickle.dumps(states)),
}
DAMAGED = {  # what is done to the bytes of a good checkpoint
    "truncated": lambda whole: whole[:len(whole) // 2], "emptied": lambda whole: b"", "text": lambda whole: b"text\n"}
BAD_CHECKPOINTS = [(("--resume", "{folder}/" + name), ("--resume {folder}/" + name,))
                   for name in [*STRANGERS, *TRAPS, *DAMAGED, "foreign", "tensor"]]
REFUSALS = BAD_OPTIONS + BAD_RESUMES + CONFLICTS + BAD_CHECKPOINTS


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.victim))}",)


def in_full(options, folder):
    """The words of a command line in which only the options under test can be wrong."""
    words = [word.format(folder=folder) for word in options]
    if "--resume" in words:
        return [*words, *CPU]
    return [*TINY, "--n-iters", "1", "--output-dir", f"{folder}/runs", *words]


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A folder that holds one good run and all the bad ones."""
    folder = tmp_path_factory.mktemp("refusals")
    shutil.copytree(finished[3], folder / "good")
    whole = (folder / "good" / "checkpoint.pt").read_bytes()
    (folder / "file").write_text("not a folder")
    for name in ["empty", *STRANGERS, *TRAPS, *DAMAGED, "foreign", "tensor"]:
        (folder / name).mkdir()
    for name, change in STRANGERS.items():
        states = load(folder / "good")
        change(states)
        torch.save(states, folder / name / "checkpoint.pt")
    for name, save in TRAPS.items():
        save({"trap": Trap(folder / f"made by {name}")} | load(folder / "good"), folder / name / "checkpoint.pt")
    for name, damage in DAMAGED.items():
        (folder / name / "checkpoint.pt").write_bytes(damage(whole))
    torch.save({"model": torch.zeros(3)}, folder / "foreign" / "checkpoint.pt")
    torch.save(torch.zeros(3), folder / "tensor" / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def refusals(folder, tmp_path_factory):
    """For the options of each case: exit status, stdout and stderr, from one process; and that folder before it."""
    files, before = tmp_path_factory.mktemp("answers"), contents(folder)
    (files / "cases").write_text(json.dumps([in_full(options, folder) for options, _ in REFUSALS]))
    finish(start(SCRIPT, files / "cases", files / "answers", program=["-c", REFUSE_ALL]))
    answers = json.loads((files / "answers").read_text())
    return {options: answer for (options, _), answer in zip(REFUSALS, answers)}, before


def assert_refused(status, out, err, words, folder):
    assert (status, out) == (2, ""), err
    assert err.startswith("train_mappo.py: ") and err.endswith("\n") and len(err.splitlines()) == 1
    assert all(word.format(folder=folder) in err for word in words), err


@pytest.mark.parametrize("options, words", REFUSALS, ids=[" ".join(options) for options, _ in REFUSALS])
def test_bad_input_is_refused_in_one_line(refusals, folder, options, words):
    """The line names the option and its value; the exit status is 2 and nothing is printed as if it had worked."""
    assert_refused(*refusals[0][options], words, folder)


def test_refusals_leave_no_trace(refusals, folder):
    """No run folder was made, no file was changed, and no code from a stranger's checkpoint has run."""
    assert contents(folder) == refusals[1]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("name", TRAPS)
def test_the_traps_are_real(folder, refusals, name):
    """A script that loads any object would have run their code; else their refusal would show nothing."""
    victim = folder / f"made by {name}"
    assert not victim.exists()
    with suppress(Exception):
        torch.load(folder / name / "checkpoint.pt", weights_only=False)
    assert victim.exists()
    victim.unlink()


def test_neighbours_that_are_no_runs_do_not_spoil_the_learning_curve(folder, tmp_path):
    """The learning curve shows all runs beside this one; here these are all the bad ones. Asked for 0 iterations."""
    copies = shutil.copytree(folder, tmp_path / "runs")
    out = show_again(copies / "good", "--n-iters", 0)
    for name in [*TRAPS, *DAMAGED, "foreign"]:
        assert f"{copies / name / 'checkpoint.pt'} is damaged" in out
        assert not (folder / f"made by {name}").exists()


def test_bad_input_is_refused_in_one_line_by_a_process_of_its_own(folder):
    """The same as above, with all that a user's own process may add to stderr and to the exit status."""
    own = [("--lr", "text"), ("--n-itres", "3"), ("--resume", "{folder}/trap in a pickle")]
    cases = [case for case in REFUSALS if case[0] in own]
    processes = [start(*in_full(options, folder)) for options, _ in cases]
    assert len(processes) == 3
    for process, (_, words) in zip(processes, cases):
        assert_refused(2, *finish(process, status=2), words, folder)


# Many processes

LOOK_INTO_IT = """
import os, runpy, signal, sys
from pathlib import Path
import torch

folder = Path(sys.argv[1])
sys.argv = sys.argv[2:]
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
all_reduce, destroy_process_group = torch.distributed.all_reduce, torch.distributed.destroy_process_group

def die_once(*args, **kwargs):
    if rank == 1 and (folder / "die").exists() and [*folder.glob("runs/*/checkpoint.pt")]:  # an old one counts, too
        (folder / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return all_reduce(*args, **kwargs)

if rank == 1 and (folder / "die at once").exists():
    (folder / "die at once").unlink()
    os.kill(os.getpid(), signal.SIGKILL)

def look(script):
    networks = {name: script[name].state_dict() for name in ("policy", "critic")}
    torch.save(networks, folder / f"networks {rank} of {world_size}")
    if world_size == 1:
        frames = script["replay_buffer"].sample()
        frames = frames[frames[script["loss_module"].tensor_keys.advantage].sum(dim=(1, 2)).argsort()]
        torch.save([networks, frames], folder / "minibatch")
    if (folder / "minibatch").exists():
        networks, frames = torch.load(folder / "minibatch", weights_only=False)
        for name, state in networks.items():
            script[name].load_state_dict(state)
        losses = script["loss_module"](frames.chunk(world_size)[rank])
        script["optimizer"].zero_grad()
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        gradients = [parameter.grad for parameter in script["loss_module"].parameters()]
        torch.save(gradients, folder / f"gradients {rank} of {world_size}")

def look_and_leave():
    look(sys._getframe(1).f_globals)
    destroy_process_group()

torch.distributed.all_reduce, torch.distributed.destroy_process_group = die_once, look_and_leave
finished = runpy.run_path(sys.argv[0], run_name="__main__")
if world_size == 1:
    look(finished)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def in_processes(n, folder, *before):
    """Train in n processes, with `before` as options of torchrun; return the folder of the run, which must be one."""
    (folder / "look.py").write_text(LOOK_INTO_IT)
    old = {*folder.glob("runs/*/checkpoint.pt")}
    finish(start(folder, SCRIPT, *TINY, "--n-iters", 3, "--entropy-eps", 0, "--output-dir", folder / "runs",
                 program=[*(TORCHRUN if n > 1 else ()), *before, folder / "look.py"]))
    checkpoint, = {*folder.glob("runs/*/checkpoint.pt")} - old
    assert [row["iteration"] for row in rows(checkpoint.parent)] == ["0", "1", "2"]
    return checkpoint.parent


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What one process leaves, and what two processes leave after it, which get its networks and minibatch to learn."""
    folder = tmp_path_factory.mktemp("two")
    in_processes(1, folder)
    shutil.rmtree(folder / "runs")
    return folder, in_processes(2, folder)


def test_two_processes_train_one_policy(two):
    """Both processes end with the same networks, to the bit, and these are the ones that were saved, in one folder."""
    folder, run = two
    assert [*(folder / "runs").iterdir()] == [run]
    networks = [torch.load(folder / f"networks {rank} of 2") for rank in (0, 1)]
    torch.testing.assert_close(*networks, rtol=0, atol=0)
    torch.testing.assert_close(networks[0], {name: load(run)[name] for name in networks[0]}, rtol=0, atol=0)


def test_two_processes_compute_the_gradient_of_one(two):
    """On the same minibatch, which is sorted by advantage, so that each process's half has a mean of its own.

    The entropy bonus is off here, because the entropy of TanhNormal is estimated with random actions.
    """
    one, *both = [torch.load(two[0] / f"gradients {name}") for name in ("0 of 1", "0 of 2", "1 of 2")]
    assert sum(gradient.square().sum() for gradient in one).sqrt() > 1e-2
    for gradients in both:
        torch.testing.assert_close(gradients, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("death, older_run", [("die", False), ("die", True), ("die at once", True)])
def test_a_job_that_lost_a_process_is_started_again_by_torchrun(two, tmp_path, death, older_run):
    """A process dies as soon as there is a checkpoint. The job goes on from it; but not from another job's.

    With an older run in place, the process dies before the job has a checkpoint, or even a folder, of its own.
    """
    (tmp_path / death).touch()
    if older_run:
        older = shutil.copytree(two[1], tmp_path / "runs" / "mappo-navigation-seed0-20000101-000000")
        before = contents(older)
    run = in_processes(2, tmp_path, "--max-restarts", 1)
    assert not (tmp_path / death).exists()
    assert_same(run, two[1])
    if older_run:
        assert contents(older) == before
    else:
        assert [*(tmp_path / "runs").iterdir()] == [run]


def test_processes_that_cannot_share_a_minibatch_are_refused_in_one_line(tmp_path):
    _, err = finish(start(*TINY, "--minibatch-size", 25, "--output-dir", tmp_path / "runs",
                          program=[*TORCHRUN, SCRIPT]), status=1)
    line, = [line for line in err.splitlines() if line.startswith("train_mappo.py: ")]
    assert "--minibatch-size 25" in line and "2 process(es)" in line
    assert not (tmp_path / "runs").exists()


FAIL_IN_PROCESS_1 = """
import os, runpy, sys
import torch

def fail(*_):
    raise OSError("the disk is gone")

if os.environ["RANK"] == "1":
    torch.distributed.all_reduce = fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_process_that_fails_says_why_and_which_it_is(tmp_path):
    """Also if it is not the first, which prints everything else."""
    (tmp_path / "fail.py").write_text(FAIL_IN_PROCESS_1)
    _, err = finish(start(SCRIPT, *TINY, "--n-iters", 1, "--output-dir", tmp_path / "runs",
                          program=[*TORCHRUN, tmp_path / "fail.py"]), status=1)
    assert "train_mappo.py: the disk is gone; in process 1\n" in err
