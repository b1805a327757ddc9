"""Two processes under torchrun: one policy, the gradient of one process, restarts, errors."""

import json
import os
import re
import shutil

import pytest
import torch

from cells import SLOW, finish, read_cells, run_cells, run_inside, start, write_copy
from conftest import assert_same, load, options, rows

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
# Lines for the copy under test. HERE is a folder; a file in it asks for something to happen.
HERE = "HERE = Path(os.environ['HERE'])\n"
DIE = """            if rank == 1 and len(history) == 1 and (HERE / "die").exists():
                (HERE / "die").unlink()
                os.kill(os.getpid(), 9)
"""
OWN = """    row |= {"a": 1.0 + rank, "b": 10.0} if rank == 0 else {"b": 20.0, "alone": 7, "a": 2.0}
    if rank == 1 and (HERE / "fail").exists():
        raise OSError("the disk is gone")
"""
LOOK = """
networks = {name: learner[name].state_dict() for name in ("policy", "critic")}
torch.save(networks, HERE / f"networks {rank} of {world_size}")
if not (HERE / "given").exists():
    torch.save([networks, frames[:100].clone()], HERE / "given")
given, minibatch = torch.load(HERE / "given", weights_only=False)
for name, state in given.items():
    learner[name].load_state_dict(state)
losses = loss_module(minibatch.chunk(world_size)[rank])
optimizer.zero_grad()
(losses["loss_objective"] + losses["loss_critic"]).backward()
gradients = [parameter.grad for parameter in learner["optimizer"].param_groups[0]["params"]]
torch.save(gradients, HERE / f"gradients {rank} of {world_size}")
run.finish()
"""
UPDATE, APPEND, FINISH = (
    "            optimizer.step()\n",
    "    history.append(row)\n",
    "\nrun.finish()\n",
)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return a copy of the file that leaves its networks and gradients, or does what HERE asks."""
    edits = {UPDATE: DIE + UPDATE, APPEND: OWN + APPEND, FINISH: LOOK}
    edits["history = []  #"] = HERE + "history = []  #"
    write = "                write(file)"
    edits[write + "\n"] = write + ", (HERE / f'{rank} has written').touch()\n"
    return write_copy(tmp_path_factory.mktemp("two") / "train_mappo.py", *SLOW, edits=edits)


def job(script, folder, *more, before=(), status=0):
    """Train in two processes, `before` being options of torchrun; return stdout and stderr.

    The entropy bonus is off, because it is sampled. So is the normalization of advantages, because
    each process normalizes its own share. One process and two then have the same gradients.
    """
    words = ["--run-folder", folder / "run", *more]
    environment = os.environ | {"HERE": str(folder)}
    program = [*TORCHRUN, *before, script]
    return finish(start(*words, program=program, env=environment), status)


WORDS = options(n_iters=3, entropy_eps=0, normalize_advantage=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory, script):
    """What one process leaves, then two, which get its networks and minibatch for a gradient."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERE", str(folder))
        run_inside(*WORDS, "--run-folder", folder / "one", path=script)
    return folder, *job(script, folder, *WORDS)


def test_two_processes_train_one_policy(two):
    """Both end with the same networks, to the bit, and these are the ones that were saved."""
    folder, _, _ = two
    networks = [torch.load(folder / f"networks {rank} of 2") for rank in (0, 1)]
    torch.testing.assert_close(*networks, rtol=0, atol=0)
    saved = {name: load(folder / "run")[name] for name in networks[0]}
    torch.testing.assert_close(networks[0], saved, rtol=0, atol=0)
    assert [row["frames"] for row in rows(folder / "run")] == ["600", "1200", "1800"]
    settings = json.loads((folder / "run" / "hyperparameters.json").read_text())
    assert (settings["frames_per_batch"], settings["world_size"]) == (600, 2)


def test_two_processes_compute_the_gradient_of_one(two):
    """On the same minibatch, of which each takes a half."""
    one, *both = [
        torch.load(two[0] / f"gradients {name}") for name in ("0 of 1", "0 of 2", "1 of 2")
    ]
    assert sum(gradient.square().sum() for gradient in one).sqrt() > 1e-2
    for gradients in both:
        torch.testing.assert_close(gradients, one, rtol=0, atol=1e-6)


def test_metrics_are_averaged_by_name(two):
    """Whatever their order, and also one that a single process has."""
    for row in rows(two[0] / "run"):
        assert (float(row["a"]), float(row["b"]), float(row["alone"])) == (1.5, 15, 7)


def test_one_process_speaks_and_writes_for_all(two, script):
    folder, out, err = two
    assert [path.name for path in folder.glob("* has written")] == ["0 has written"]
    assert out.count("New run: ") == out.count("The results are in") == 1
    assert out.count("untrained     trained") == 1
    resume = f"torchrun --nproc-per-node 2 {script} --run-folder {folder / 'run'}"
    assert out.count(f"To resume it after an interruption: {resume}\n") == 1
    assert err.count("0/3 [00:00<?, ?it/s]") == 1 and "Warning" not in err


def test_a_job_that_lost_a_process_goes_on_by_itself(two, script, tmp_path):
    """Killed in its second iteration, it ends as if it had not been."""
    shutil.copy(two[0] / "given", tmp_path)
    (tmp_path / "die").touch()
    out, _ = job(script, tmp_path, *WORDS, before=("--max-restarts", 1))
    assert not (tmp_path / "die").exists()
    assert out.count("New run: ") == 1 and "1 of 3 iterations are done" in out
    assert_same(tmp_path / "run", two[0] / "run")


def test_another_number_of_processes_is_said_and_so_is_an_error(two, script, tmp_path, capfd):
    """First two after one, of which the second fails and says why; then one again."""
    shutil.copytree(two[0] / "one", tmp_path / "run")
    shutil.copy(two[0] / "given", tmp_path)
    (tmp_path / "fail").touch()
    out, err = job(script, tmp_path, "--n-iters", 4, status=1)
    assert "3 of 4 iterations are done" in out and "processes: 1 before, 2 now" in out
    assert "OSError: the disk is gone" in err and re.search(r"rank +: 1 ", err)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERE", str(tmp_path))
        run_inside("--run-folder", tmp_path / "run", "--n-iters", 4, path=script)
    assert "processes: 2 before, 1 now" in capfd.readouterr().out
    assert len(load(tmp_path / "run")["history"]) == 4


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--frames-per-batch", "620"], "frames_per_batch is 620, but must be a multiple of"),
        (["--minibatch-size", "75"], "minibatch_size is 75, but must be"),
        (["--minibatch-size", "2"], "minibatch_size is 2, but must be"),
        (["--device", "cuda:0"], "device is 'cuda:0', but must be cpu"),
        (["--run-folder", ""], "run_folder is '', but must be given if torchrun may restart"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(words, sentence, lean, tmp_path, capfd, monkeypatch):
    """By a process that names itself, before the processes meet. torchrun sets the variables."""
    variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}
    variables["TORCHELASTIC_MAX_RESTARTS"] = "1"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        run_inside(*options(run_folder=tmp_path / "run"), *words, path=lean)
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    assert f"train_mappo.py, process 0: error: {sentence}" in capfd.readouterr().err


def test_variables_of_another_launcher_do_no_harm(lean, tmp_path, monkeypatch, capfd):
    """RANK and WORLD_SIZE alone, as some schedulers set them, do not make a job of many."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_inside(*options(n_iters=1, run_folder=tmp_path / "run"), path=lean)
    assert "New run: " in capfd.readouterr().out


def test_only_the_first_process_makes_files_and_folders(tmp_path):
    """Each process names a folder of its own if no run folder is given."""
    cells = read_cells()
    names = run_cells([cells["imports"], cells["config"], cells["placeholders"]])
    for rank in (1, 0):
        names["rank"] = rank
        names["save_whole"](tmp_path / f"run of {rank}" / "file", lambda file: file.write(b"text"))
    assert [path.name for path in tmp_path.iterdir()] == ["run of 0"]
