"""The sections as readers use them: in a notebook, with cells left out, changed, run once more."""

import dataclasses

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from cells import BY_HAND, SCRIPT, SLOW, read_cells, run_cells, run_inside, sources, write_copy
from conftest import (
    BAR,
    TINY,
    assert_same,
    load,
    options,
    rows,
    strange_lines,
    without_seconds,
)


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_the_method_alone_gives_the_same_numbers(algorithm, tmp_path, request, monkeypatch):
    """Without the engineering cell and with every other cell; nothing is saved in training."""
    monkeypatch.chdir(tmp_path)
    whole = request.getfixturevalue(algorithm)
    alone = run_cells(sources("engineering", "probe", "video", **TINY, mappo=algorithm == "mappo"))
    assert without_seconds(alone["history"]) == without_seconds(whole["history"])
    assert alone["evaluation"] == whole["evaluation"]
    [folder] = (tmp_path / "runs").iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".pt", ".png", ".json"}
    assert not (folder / "checkpoint.pt").exists() and (folder / "policy.pt").exists()


@pytest.mark.parametrize("left_out", [BY_HAND, BY_HAND[:2], BY_HAND[1::2]])
def test_cells_that_show_something_can_be_left_out(left_out, mappo, tmp_path):
    """All of them, the probe as well; one with its check; the checks alone."""
    found = run_cells(sources("engineering", *SLOW, *left_out, **TINY, run_folder=str(tmp_path)))
    assert without_seconds(found["history"]) == without_seconds(mappo["history"])


CHANGES = [  # how the file does something, a mistake there, and the check that must notice
    ("gamma=cfg.gamma, lmbda", "gamma=0.9, lmbda", "gae_check"),
    ("clip_epsilon=cfg.clip_epsilon", "clip_epsilon=0.1", "loss_check"),
    ("critic_coeff=cfg.critic_coeff", "critic_coeff=1.0", "loss_check"),
    ("entropy_coeff=cfg.entropy_eps", "entropy_coeff=-cfg.entropy_eps", "loss_check"),
    ("exclude_dims=(-2,)", "exclude_dims=()", "loss_check"),
    ('"smooth_l1"', '"l2"', "loss_check"),
    ("centralized=cfg.mappo,  #", "centralized=not cfg.mappo,  #", "critic_check"),
    ("gamma * (1 - terminated)", "gamma * (1 - done)", "gae_check"),
    ("(1 - done[:, step])", "(1 - terminated[:, step])", "gae_check"),
    ("return advantage, advantage + value", "return advantage, value", "gae_check"),
    ("torch.minimum(ratio", "torch.maximum(ratio", "loss_check"),
    ('"loss_objective": -objective', '"loss_objective": objective', "loss_check"),
    ("std = advantage.std(0)", "std = advantage.std()", "loss_check"),
    ("log_ratio.exp()", "(1 + log_ratio)", "loss_check"),
    ("if weight is not layers[-1][0]:", "if True:", "critic_check"),
]


@pytest.fixture(scope="module")
def begun():
    """Return the names that the cells before Section 4 define."""
    before = sources("engineering", **TINY)
    return run_cells(before[: before.index(read_cells()["critic_by_hand"])])


@pytest.mark.parametrize("old, new, check", CHANGES)
def test_each_check_notices_a_mistake(old, new, check, begun):
    """In the library's part or by hand: the notebook ends at the check, and not before."""
    cells = read_cells()
    assert sum(source.count(old) for source in cells.values()) == 1, old
    cells = {name: source.replace(old, new) for name, source in cells.items() if name != "probe"}
    between = [*cells][[*cells].index("critic_by_hand") : [*cells].index(check)]
    space = run_cells([cells[name] for name in between], {**begun})
    with pytest.raises((AssertionError, RuntimeError)):
        exec(cells[check], space)


@pytest.mark.parametrize("mappo", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_checks_agree_in_every_case(mappo, shared, capsys):
    values = {"mappo": mappo, "normalize_advantage": shared, "n_agents": 4, "depth": 3}
    values |= {"share_parameters_policy": shared, "share_parameters_critic": shared}
    cells = sources("engineering", *SLOW, **TINY | values)
    run_cells(cells[: cells.index(read_cells()["setup"])])
    assert "loss_entropy" in capsys.readouterr().out


@pytest.mark.parametrize("engineering", [True, False])
def test_flipped_from_section_4_on_it_is_the_other_algorithm(engineering, ippo, lean, tmp_path):
    """A run in a folder of its own that goes like `--no-mappo`; then one more iteration."""
    left_out = SLOW if engineering else (*SLOW, "engineering")
    space = run_cells(sources(*left_out, **TINY, run_folder=str(tmp_path / "first")))
    space["cfg"].mappo, space["cfg"].run_folder = False, str(tmp_path / "flipped")
    run_cells(sources(*left_out, begin="critic_by_hand"), space)
    assert without_seconds(space["history"]) == without_seconds(ippo["history"])
    if engineering:
        space["cfg"].n_iters = 3
        run_cells([read_cells()["setup"], read_cells()["loop"]], space)
        run_inside(*options(n_iters=3, mappo=False, run_folder=tmp_path / "3"), path=lean)
        assert_same(tmp_path / "flipped", tmp_path / "3")
        assert load(tmp_path / "first")["config"]["mappo"]


def test_an_interrupted_iteration_is_repeated_from_its_start(mappo, tmp_path):
    """The cells of Section 8 are run once more after an interrupt in the middle of an update."""
    cells, loop = sources(*SLOW, **TINY, run_folder=str(tmp_path / "run")), read_cells()["loop"]
    old = "            optimizer.step()\n"
    stop = f"{old}            if len(history) == 1 and minibatch_losses: raise KeyboardInterrupt\n"
    assert loop.count(old) == 1
    space = run_cells(cells[: cells.index(loop)])
    with pytest.raises(KeyboardInterrupt):
        run_cells([loop.replace(old, stop)], space)
    run_cells([read_cells()["setup"], loop], space)
    assert_same(tmp_path / "run", mappo["folder"])


def test_trained_networks_do_not_begin_a_new_run(tmp_path, monkeypatch):
    """Section 8 alone, run again without a run folder, would go on with them in a new history."""
    monkeypatch.chdir(tmp_path)
    space = run_cells(sources(*SLOW, **TINY))
    with pytest.raises(ValueError, match="already been trained.*Section 4"):
        run_cells([read_cells()["setup"], read_cells()["loop"]], space)
    assert len([*(tmp_path / "runs").iterdir()]) == 1


def test_every_cell_may_be_run_twice(mappo, tmp_path):
    cells = sources(*SLOW, **TINY, run_folder=str(tmp_path / "run"))
    run_cells(one for source in cells for one in (source, source))
    assert_same(tmp_path / "run", mappo["folder"])


EARLY = {"seed": 7, "num_cells": 16, "depth": 1, "share_parameters_policy": False, "max_steps": 10}
EARLY |= {"mappo": "False", "n_agents": 2, "frames_per_batch": 300}
EARLY |= {"scenario_options": {"lidar_range": 0.2}}


@pytest.mark.parametrize("name", EARLY)
def test_a_value_that_is_changed_too_late_is_refused(name, mappo, tmp_path):
    """Run from Section 4 on, the networks or the environment would be those of before."""
    cfg = dataclasses.replace(mappo["cfg"], run_folder=str(tmp_path), **{name: EARLY[name]})
    with pytest.raises(ValueError, match=f"^{name} is .*, but must be .*"):
        run_cells([read_cells()[name] for name in ("setup", "loop")], {**mappo, "cfg": cfg})
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_notebook_resumes_a_stopped_run(lean, mappo, tmp_path, capsys):
    """With `run_folder` set to it, and the same values otherwise."""
    run_inside(*options(n_iters=1, run_folder=tmp_path / "run"), path=lean)
    run_cells(sources(*SLOW, *BY_HAND, **TINY, run_folder=str(tmp_path / "run")))
    assert "1 of 2 iterations are done" in capsys.readouterr().out
    assert_same(tmp_path / "run", mappo["folder"])


def test_the_whole_file_in_one_cell_of_a_notebook_that_holds_other_things(mappo, tmp_path):
    """As after `%load`. Names of the reader's own are no hyperparameters."""
    path = write_copy(tmp_path / "x.py", *SLOW, **TINY, run_folder=str(tmp_path / "run"))
    own = "x = 3; lr = 0.1; rng = object(); run_folder = None; fields = ['mine']"
    run_cells([own, path.read_text("utf-8")])
    assert_same(tmp_path / "run", mappo["folder"])
    assert load(tmp_path / "run")["config"].keys() == load(mappo["folder"])["config"].keys()


def test_a_jupyter_notebook_shows_results_only(ippo, tmp_path):
    """In a real kernel: no error, pictures, only the progress bar on stderr; flipped as well."""
    notebook = jupytext.reads(SCRIPT.read_text("utf-8"), fmt="py:percent")
    hidden = [one for one in notebook.cells if one.metadata.get("jupyter", {}).get("source_hidden")]
    assert [one.metadata["id"] for one in hidden] == ["engineering"]
    first = sources("probe", "video", **TINY)
    code = [*first, "cfg.mappo = False", *sources(*SLOW, begin="critic_by_hand")]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in code]
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", resources=where, timeout=600).execute()
    outputs = [output for one in notebook.cells for output in one.outputs]
    out, err = (
        "".join(output.text for output in outputs if output.get("name") == stream)
        for stream in ("stdout", "stderr")
    )
    assert strange_lines(err) == []
    assert {found[1] for found in BAR.finditer(err)} == {"MAPPO", "IPPO"}
    assert out.count("untrained     trained") == 2 and "To resume it" not in out
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 2
    [flipped] = (tmp_path / "runs").glob("ippo-*")
    assert rows(flipped) == rows(ippo["folder"]) and len([*(tmp_path / "runs").iterdir()]) == 2
