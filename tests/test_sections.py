"""The sections as readers use them: in a notebook, with a cell left out, run once more."""

import json
import re

import jupytext
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from cells import PROBE, assigned_names, read_cells, with_values, without
from conftest import BAR, SCRIPT, TINY, assert_same, load, options, rows, run_inside


def kernel(folder):
    """Return an empty notebook whose kernel, once set up, works in that folder."""
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(
        nbformat.v4.new_notebook(), kernel_name="python3", resources=resources, timeout=600
    )


def run_cells(client, sources, **values):
    """Run cells in a kernel, Section 1's with other values; return all that they showed."""
    outputs = []
    for source in sources:
        if "mappo" in assigned_names(source):
            source = with_values(source, **{**TINY, **values})
        client.nb.cells.append(nbformat.v4.new_code_cell(source))
        cell = client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1)
        outputs += cell.outputs
    return outputs


def texts(outputs, stream):
    """Return what was written to "stdout" or "stderr"."""
    return "".join(output.text for output in outputs if output.get("name") == stream)


def pictures(outputs):
    """Return the pictures that were shown."""
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_the_method_runs_alone(tmp_path):
    """In a Jupyter kernel, without the engineering: a policy that moved and its evaluation."""
    client = kernel(tmp_path)
    with client.setup_kernel():
        shown = run_cells(client, without("engineering", defining=[PROBE]))
        check = "print(len(history), (policy.state_dict()['module.0.module.0.params.0.weight'] - "
        check += "untrained_policy.state_dict()['module.0.module.0.params.0.weight']).any().item())"
        assert texts(run_cells(client, [check]), "stdout") == "2 True\n"
    [folder] = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} - {"rollout.gif"} == {
        "policy.pt",
        "evaluation.json",
        "learning_curve.png",
        "learning_curves.png",
    }
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["trained"] != evaluation["untrained"]
    assert torch.load(folder / "policy.pt")["network"]["n_agents"] == 3
    assert "untrained     trained" in texts(shown, "stdout")
    err = texts(shown, "stderr")
    assert [line for line in re.split(r"[\r\n]", err) if line.strip() and not BAR.match(line)] == []
    assert len(pictures(shown)) >= 2  # the curves


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """Run the whole notebook, flip the flag and run all from Section 4 on, then train longer."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = jupytext.read(SCRIPT)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    section_1 = next(source for source in code if "mappo" in assigned_names(source))
    section_4 = [cell.part for cell in read_cells()].index("4")
    later = [source for source in code[section_4:] if PROBE not in assigned_names(source)]
    client = kernel(folder)
    with client.setup_kernel():
        outputs = [run_cells(client, code)]
        outputs.append(run_cells(client, [section_1, *later], mappo=False))
        loop = next(source for source in code if "before_training:" in source)
        outputs.append(run_cells(client, ["n_iters = 3", *code[code.index(loop) :]]))
    return folder, outputs


def test_a_notebook_shows_results_only(flipped):
    """No error, nothing on stderr but the progress bar, and the table once a run."""
    _, (first, second, longer) = flipped
    outputs = first + second
    assert all(output.output_type != "error" for output in outputs + longer)
    assert texts(outputs, "stdout").count("untrained     trained") == 2
    err = texts(outputs, "stderr")
    assert {found[1] for found in BAR.finditer(err)} == {"MAPPO", "IPPO"}
    assert [line for line in re.split(r"[\r\n]", err) if line.strip() and not BAR.match(line)] == []


def test_the_flipped_run_is_a_fresh_one(flipped, lean, tmp_path):
    """It begins in a folder of its own, with the untrained policy, and goes like `--no-mappo`.

    The loop's cell, run once more with a larger n_iters, makes it longer.
    """
    folder, _ = flipped
    names = sorted(path.name.split("-")[0] for path in (folder / "runs").iterdir())
    assert names == ["ippo", "mappo"]
    [ippo] = (folder / "runs").glob("ippo*")
    run_inside(*options(run_folder=tmp_path / "run"), "--no-mappo", path=lean)
    assert len(rows(ippo)) == 3
    assert rows(ippo)[:2] == rows(tmp_path / "run")


def test_a_notebook_resumes_a_stopped_run(lean, tmp_path):
    """With `run_folder` set to it, and the same values otherwise; as if it had not been stopped.

    The boxes and the probe are left out, which changes nothing.
    """
    for n_iters in (1, 2):
        words = options(n_iters=n_iters, run_folder=tmp_path / str(n_iters))
        run_inside(*words, path=lean)
    client = kernel(tmp_path)
    with client.setup_kernel():
        sources = without("9", "10", boxes=False, defining=[PROBE])
        shown = run_cells(client, sources, run_folder=str(tmp_path / "1"))
    assert "1 of 2 iterations are done" in texts(shown, "stdout")
    assert len(load(tmp_path / "1")["history"]) == 2
    assert_same(tmp_path / "1", tmp_path / "2")


def test_the_engineering_is_collapsed_in_a_notebook():
    """The only cell whose source is hidden is the one that readers are told to skip."""
    cells = jupytext.read(SCRIPT).cells
    hidden = [cell for cell in cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    [cell] = hidden
    assert "start_or_resume" in assigned_names(cell.source)
