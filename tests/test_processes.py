"""Many processes under torchrun: one policy, the gradients of one process, restarts, errors."""

import json
import re
import shutil

import pytest
import torch

from conftest import PROGRAMS, assert_same, finish, load, options, rows, run_inside, start

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def in_processes(n, script, folder, *more, before=(), status=0):
    """Train in n processes, `before` being options of torchrun; return stdout and stderr.

    The entropy bonus is off, because it is sampled. So is the normalization of advantages, because
    each process normalizes its own share. One process and two then have the same gradients.
    """
    words = options(n_iters=3, entropy_eps=0, run_folder=folder / "run")
    words += ["--no-normalize-advantage"]
    launcher = (*TORCHRUN, *before) if n > 1 else ()
    program = [*launcher, PROGRAMS / "look.py"]
    return finish(start(folder, script, *words, *more, program=program), status)


@pytest.fixture(scope="module")
def two(tmp_path_factory, lean):
    """What one process leaves, then two, which get its networks and minibatch to learn from."""
    folder = tmp_path_factory.mktemp("two")
    in_processes(1, lean, folder)
    shutil.move(folder / "run", folder / "run of one")
    out, err = in_processes(2, lean, folder)
    return folder, out, err


def test_two_processes_train_one_policy(two):
    """Both end with the same networks, to the bit, and these are the ones that were saved."""
    folder, _, _ = two
    networks = [torch.load(folder / f"networks {rank} of 2") for rank in (0, 1)]
    torch.testing.assert_close(*networks, rtol=0, atol=0)
    saved = {name: load(folder / "run")[name] for name in networks[0]}
    torch.testing.assert_close(networks[0], saved, rtol=0, atol=0)
    assert [row["frames"] for row in rows(folder / "run")] == ["600", "1200", "1800"]
    settings = json.loads((folder / "run" / "hyperparameters.json").read_text())
    assert (settings["frames_per_batch"], settings["minibatch_size"]) == (600, 100)


def test_two_processes_compute_the_gradient_of_one(two):
    """On the same minibatch, of which each takes a half."""
    one, *both = [
        torch.load(two[0] / f"gradients {name}") for name in ("0 of 1", "0 of 2", "1 of 2")
    ]
    assert sum(gradient.square().sum() for gradient in one).sqrt() > 1e-2
    for gradients in both:
        torch.testing.assert_close(gradients, one, rtol=0, atol=1e-6)


def test_one_process_speaks_for_all(two):
    _, out, err = two
    assert out.count("New run: ") == out.count("The results are in") == 1
    assert out.count("episode_reward ") == 1
    assert err.count("MAPPO: 100%") >= 1 and err.count("0/3 [00:00<?, ?it/s]") == 1
    assert "Warning" not in err


def test_a_job_that_lost_a_process_goes_on_by_itself(two, lean, tmp_path):
    """Killed after its first iteration, it ends as if it had not been."""
    (tmp_path / "die").touch()
    out, _ = in_processes(2, lean, tmp_path, before=("--max-restarts", 1))
    assert not (tmp_path / "die").exists()
    assert out.count("New run: ") == 1 and "1 of 3 iterations are done" in out
    assert_same(tmp_path / "run", two[0] / "run")


@pytest.mark.parametrize("before, now", [(2, 1), (1, 2)])
def test_going_on_with_another_number_of_processes_is_said(two, lean, tmp_path, before, now):
    shutil.copytree(two[0] / ("run" if before == 2 else "run of one"), tmp_path / "run")
    out, _ = in_processes(now, lean, tmp_path, "--n-iters", 4)
    assert "3 of 4 iterations are done" in out
    assert f"It used {before} process(es) and now uses {now}" in out
    assert len(load(tmp_path / "run")["history"]) == 4
    settings = json.loads((tmp_path / "run" / "hyperparameters.json").read_text())
    assert settings["world_size"] == now


def test_a_finished_job_is_shown_again(two, lean, tmp_path):
    shutil.copytree(two[0] / "run", tmp_path / "run")
    out, _ = in_processes(2, lean, tmp_path)
    assert "3 of 3 iterations are done" in out and "episode_reward" in out
    assert_same(tmp_path / "run", two[0] / "run")


def test_a_job_that_is_refused_says_why(two, lean, tmp_path):
    """With the rank of the process that says it; all of them end, and the run is as it was."""
    shutil.copytree(two[0] / "run", tmp_path / "run")
    _, err = in_processes(2, lean, tmp_path, "--num-cells", 64, status=1)
    sentence = (
        r"train_mappo.py, process [01]: error: num_cells is 64, but must be 32, as in the run"
    )
    assert re.search(sentence, err)
    assert_same(tmp_path / "run", two[0] / "run")


def test_a_process_that_fails_says_why_and_which_it_is(lean, tmp_path):
    (tmp_path / "fail").touch()
    _, err = in_processes(2, lean, tmp_path, status=1)
    assert "[rank1]: OSError: the disk is gone" in err


def test_variables_of_another_launcher_do_no_harm(lean, tmp_path, monkeypatch, capfd):
    """RANK and WORLD_SIZE alone, as some schedulers set them, do not make a job of many."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_inside(*options(n_iters=1, run_folder=tmp_path / "run"), path=lean)
    assert "New run: " in capfd.readouterr().out
