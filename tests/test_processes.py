"""Many processes under torchrun: one policy, the gradients of one process, restarts, errors."""

import shutil

import pytest
import torch

from conftest import SCRIPT, assert_same, finish, load, options, rows, start

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
# Runs the script and looks into each process at its end, or ends one of them before.
LOOK = """
import os, runpy, signal, sys
from pathlib import Path
import torch

folder = Path(sys.argv[1])
sys.argv = sys.argv[2:]
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
destroy_process_group, all_reduce = (
    torch.distributed.destroy_process_group, torch.distributed.all_reduce)
calls = 0

def die_once(*args, **kwargs):
    global calls
    calls += 1
    if rank == 1 and calls == 2 and (folder / "die").exists():
        (folder / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and (folder / "fail").exists():
        raise OSError("the disk is gone")
    return all_reduce(*args, **kwargs)

def look(script):
    networks = {name: script[name].state_dict() for name in ("policy", "critic")}
    torch.save(networks, folder / f"networks {rank} of {world_size}")
    if world_size == 1:
        frames = script["replay_buffer"].sample()
        frames = frames[frames["advantage"].sum(dim=(1, 2)).argsort()]
        torch.save([networks, frames], folder / "minibatch")
    if (folder / "minibatch").exists():
        networks, frames = torch.load(folder / "minibatch", weights_only=False)
        for name, state in networks.items():
            script[name].load_state_dict(state)
        losses = script["loss_module"](frames.chunk(world_size)[rank])
        script["optimizer"].zero_grad()
        sum(losses[name] for name in ("loss_objective", "loss_critic", "loss_entropy")).backward()
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


def in_processes(n, folder, *more, before=(), status=0):
    """Train in n processes, `before` being options of torchrun; return stdout and stderr.

    The entropy bonus is off: it is sampled, so one process and two would have other gradients.
    """
    (folder / "look.py").write_text(LOOK)
    words = options(n_iters=3, entropy_eps=0, run_folder=folder / "run")
    launcher = (*TORCHRUN, *before) if n > 1 else ()
    return finish(
        start(folder, SCRIPT, *words, *more, program=[*launcher, folder / "look.py"]), status
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What one process leaves, then two, which get its networks and minibatch to learn from."""
    folder = tmp_path_factory.mktemp("two")
    in_processes(1, folder)
    shutil.move(folder / "run", folder / "run of one")
    out, err = in_processes(2, folder)
    return folder, out, err


def test_two_processes_train_one_policy(two):
    """Both end with the same networks, to the bit, and these are the ones that were saved."""
    folder, _, _ = two
    networks = [torch.load(folder / f"networks {rank} of 2") for rank in (0, 1)]
    torch.testing.assert_close(*networks, rtol=0, atol=0)
    saved = {name: load(folder / "run")[name] for name in networks[0]}
    torch.testing.assert_close(networks[0], saved, rtol=0, atol=0)
    assert [row["frames"] for row in rows(folder / "run")] == ["600", "1200", "1800"]
    settings = load(folder / "run")["hyperparameters"]
    assert (settings["frames_per_batch"], settings["minibatch_size"]) == (600, 100)


def test_two_processes_compute_the_gradient_of_one(two):
    """On the same minibatch, sorted by advantage, so that each half has a mean of its own."""
    one, *both = [
        torch.load(two[0] / f"gradients {name}") for name in ("0 of 1", "0 of 2", "1 of 2")
    ]
    assert sum(gradient.square().sum() for gradient in one).sqrt() > 1e-2
    for gradients in both:
        torch.testing.assert_close(gradients, one, rtol=0, atol=1e-6)


def test_one_process_speaks_for_all(two):
    _, out, err = two
    assert out.count("A new run in") == out.count("The results of this run") == 1
    assert out.count("episode_reward ") == 1
    assert err.count("MAPPO: 100%") >= 1 and err.count("0/3 [00:00<?, ?it/s]") == 1
    assert "Warning" not in err


def test_a_job_that_lost_a_process_goes_on_by_itself(two, tmp_path):
    """Killed after its first iteration, it ends as if it had not been."""
    (tmp_path / "die").touch()
    out, _ = in_processes(2, tmp_path, before=("--max-restarts", 1))
    assert not (tmp_path / "die").exists()
    assert out.count("A new run in") == 1 and "1 of 3 iterations are done" in out
    assert_same(tmp_path / "run", two[0] / "run")


@pytest.mark.parametrize("before, now", [(2, 1), (1, 2)])
def test_going_on_with_another_number_of_processes_is_said(two, tmp_path, before, now):
    shutil.copytree(two[0] / ("run" if before == 2 else "run of one"), tmp_path / "run")
    out, _ = in_processes(now, tmp_path, "--n-iters", 4)
    assert "3 of 4 iterations are done" in out
    assert f"done by {before} process(es), the others will be by {now}" in out
    checkpoint = load(tmp_path / "run")
    assert (len(checkpoint["history"]), checkpoint["world_size"]) == (4, now)


def test_a_finished_job_is_shown_again(two, tmp_path):
    shutil.copytree(two[0] / "run", tmp_path / "run")
    out, _ = in_processes(2, tmp_path)
    assert "3 of 3 iterations are done" in out and "episode_reward" in out
    assert_same(tmp_path / "run", two[0] / "run")


@pytest.mark.parametrize(
    "more, sentence",
    [
        (("--minibatch-size", 25), "minibatch_size is 25, but must be"),
        (("--lr", "text"), "argument --lr: invalid float value: 'text'"),
        (("--num-cells", 64), "num_cells is 64, but must be 32"),
    ],
)
def test_every_process_says_why_it_refuses(two, tmp_path, more, sentence):
    """With its rank; and all of them end, whichever reads the checkpoint."""
    shutil.copytree(two[0] / "run", tmp_path / "run")
    _, err = in_processes(2, tmp_path, *more, status=1)
    for rank in (0, 1):
        if rank == 0 or "num_cells" not in sentence:  # torchrun may be quicker than the others
            assert f"train_mappo.py, process {rank}: error: {sentence}" in err
    assert_same(tmp_path / "run", two[0] / "run")


def test_a_process_that_fails_says_why_and_which_it_is(tmp_path):
    (tmp_path / "fail").touch()
    _, err = in_processes(2, tmp_path, status=1)
    assert "[rank1]: OSError: the disk is gone" in err


def test_variables_of_another_launcher_do_no_harm(tmp_path, monkeypatch):
    """RANK and WORLD_SIZE alone, as some schedulers set them, do not make a job of many."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out, _ = finish(start(*options(n_iters=1, run_folder=tmp_path / "run")))
    assert "A new run in" in out
