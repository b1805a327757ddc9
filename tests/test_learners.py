"""What learners do to Section 1 and to `after_iteration`, and what the run's files make of it."""

import json

import pytest

from cells import read_cells, with_values, without
from conftest import SCRIPT, TINY, finish, load, options, rows, run_inside, start


def changed(folder, *lines, **values):
    """A copy of the script with other values and with more lines at the end of Section 1's cell."""
    text = SCRIPT.read_text("utf-8")
    [cell] = [cell.source for cell in read_cells() if cell.source.startswith("mappo = ")]
    new = with_values(cell, **values).rstrip("\n") + "\n" + "\n".join(lines) + "\n\n"
    path = folder / "train_mappo.py"
    path.write_text(text.replace(cell, new), encoding="utf-8")
    return path


def recorded(folder):
    """The hyperparameters that a run has recorded."""
    return json.loads((folder / "hyperparameters.json").read_text("utf-8"))


def test_more_hyperparameters_are_options_and_recorded(tmp_path):
    lines = ["target_kl = None", "betas = (0.9, 0.999)", 'name = "mine"', 'how = "z"']
    script = changed(tmp_path, *lines, max_grad_norm=1)
    words = ["--betas", "[0.5, 0.9]", "--target-kl", "0.02", "--max-grad-norm", "0.5"]
    run = tmp_path / "run"
    finish(start(*options(run_folder=run), *words, program=(script,)))
    expected = {"betas": [0.5, 0.9], "target_kl": 0.02, "max_grad_norm": 0.5}
    assert recorded(run).items() >= {**expected, "name": "mine", "how": "z"}.items()
    out, _ = finish(start("--run-folder", run, "--n-iters", 3, program=(script,)))
    assert "Going on" in out
    assert recorded(run).items() >= {**expected, "n_iters": 3}.items()
    _, err = finish(start("--run-folder", run, "--betas", "[0.1, 0.9]", program=(script,)), 2)
    assert "betas is (0.1, 0.9), but must be (0.5, 0.9) as in the run" in err


def test_a_run_goes_on_where_a_number_was_written_without_a_point(tmp_path):
    run = tmp_path / "run"
    finish(start(*options(run_folder=run, max_grad_norm=1.0, n_iters=1)))
    script = changed(tmp_path, max_grad_norm=1)
    out, _ = finish(start("--run-folder", run, "--n-iters", 2, program=(script,)))
    assert "Going on" in out


def test_a_value_that_json_cannot_hold_is_refused_before_anything_is_trained(tmp_path):
    script = changed(tmp_path, "layers = [nn.Tanh]")
    _, err = finish(start(*options(run_folder=tmp_path / "run"), program=(script,)), 2)
    assert "layers is [<class 'torch.nn.modules.activation.Tanh'>], but must be what JSON" in err
    assert not (tmp_path / "run").exists()


MEASURE = """
import runpy, sys
from tqdm import tqdm
added = sys.argv.pop(1)
begin = tqdm.__iter__
def iterate(self):
    names = sys._getframe(1).f_globals
    names["after_iteration"].append(lambda row: exec(added, names, {"row": row}))
    return begin(self)
tqdm.__iter__ = iterate
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measured(added, folder, status=0):
    """A run in which `added` is what a function in `after_iteration` does; its stderr."""
    words = (added, SCRIPT, *options(run_folder=folder))
    return finish(start(*map(str, words), program=("-c", MEASURE)), status)[1]


def test_measurements_of_ones_own_are_columns_in_some_rows_or_in_all(tmp_path):
    run = tmp_path / "run"
    measured("row.update(twice=2.0 * row['iteration'])\nif row['iteration'] < 1: row['x'] = 7", run)
    assert [(row["twice"], row["x"]) for row in rows(run)] == [("0.0", "7"), ("2.0", "")]


@pytest.mark.parametrize("value", ["True", "'x'", "None", "torch.tensor(1.0)"])
def test_a_measurement_that_is_no_number_is_reported_before_it_is_saved(value, tmp_path):
    err = measured(f"row['mine'] = {value}", tmp_path / "run", status=1)
    assert err.strip().splitlines()[-1].startswith("TypeError: row['mine'] is ")
    assert err.strip().endswith("but must be an int or a float")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_an_evaluation_on_the_way_does_not_repeat_the_starts_of_training(tmp_path):
    """Also without cell B, which sets the random numbers of each iteration."""
    names = {"__name__": "a notebook"}
    starts = []
    for source in without("A", "B", "C"):
        if source.startswith("mappo = "):
            source = with_values(source, **{**TINY, "n_iters": 3, "run_folder": str(tmp_path)})
        if source.startswith("needed = "):
            names["after_iteration"].append(lambda row: names["evaluate"](names["policy"]))
            names["after_iteration"].append(
                lambda row: starts.append(names["batch"]["agents", "observation"][:, 0].clone())
            )
        exec(source, names)
    assert not starts[1].equal(starts[2])


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    """The second is refused while the first is training, and goes on with it afterwards."""
    run = tmp_path / "run"
    first = start(*options(run_folder=run, n_iters=1000), "--evaluation-episodes", 1)
    while not (run / "checkpoint.pt").exists():
        assert first.poll() is None
    _, err = finish(start("--run-folder", run), 2)
    assert f"run_folder is '{run}', but must be one in which no other process is training" in err
    (run / ("checkpoint.pt." + "0" * 32 + ".new")).write_text("left by a kill")
    first.kill()
    first.communicate()
    done = len(load(run)["history"])
    finish(start("--run-folder", run, "--n-iters", done + 1))
    assert [path.name for path in run.iterdir() if path.name.endswith(".new")] == []


def test_the_critic_starts_orthogonally_in_a_run(tmp_path):
    """Not only where the function that does it is called by a test."""
    script = run_inside(*options(run_folder=tmp_path / "run", n_iters=1, lr=1e-12))
    weights = dict(script["critic_network"].named_parameters())
    square = [value for value in weights.values() if value.shape == (32, 32)]
    [weight] = square
    product = weight @ weight.T
    assert (product - 2 * product.new_ones(32).diag()).abs().max() < 1e-4
