"""The sections as readers use them: alone, with a cell left out, run again in a notebook."""

import json
import re

import jupytext
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from cells import read_cells, with_values, without
from conftest import BAR, SCRIPT, TINY, assert_same, finish, load, options, rows, start


def kernel(folder):
    """An empty notebook whose kernel, once set up, works in that folder."""
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(
        nbformat.v4.new_notebook(), kernel_name="python3", resources=resources, timeout=600
    )


def run_cells(client, sources, **values):
    """Run cells in a kernel, Section 1's with other values; return all that they showed."""
    outputs = []
    for source in sources:
        if source.startswith("mappo = "):
            source = with_values(source, **{**TINY, **values})
        client.nb.cells.append(nbformat.v4.new_code_cell(source))
        cell = client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1)
        outputs += cell.outputs
    return outputs


def texts(outputs, stream):
    """What was written to "stdout" or "stderr"."""
    return "".join(output.text for output in outputs if output.get("name") == stream)


def results(outputs):
    """The bare expressions that were shown."""
    shown = [output for output in outputs if output.output_type == "execute_result"]
    return [output["data"]["text/plain"] for output in shown]


def test_the_method_runs_alone(tmp_path):
    """Without A, B and C, in a Jupyter kernel: a policy that moved, its evaluation, its curve."""
    client = kernel(tmp_path)
    with client.setup_kernel():
        shown = run_cells(client, without("A", "B", "C"))
        check = "len(history), (policy.state_dict()['module.0.module.0.params.0.weight'] - "
        check += "untrained_policy.state_dict()['module.0.module.0.params.0.weight']).any().item()"
        assert results(run_cells(client, [check])) == ["(2, True)"]
        look = SCRIPT.read_text("utf-8").partition("*Does success look like a loss?*")[2]
        look = re.findall(r"^#     (.*)", look.partition("*Question 6")[0], re.MULTILINE)
        arrival = "batch['next', 'terminated'][0, -1] = True"  # two iterations bring nobody home
        seen = texts(run_cells(client, ["\n".join([arrival, *look])]), "stdout")
        assert len(re.findall(r"^tensor\(-?\d+\.\d+\)$", seen, re.MULTILINE)) == 3
    [folder] = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "policy.pt",
        "evaluation.json",
        "learning_curve.png",
    }
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["trained"] != evaluation["untrained"]
    assert torch.load(folder / "policy.pt")["network"]["n_agents"] == 3
    assert "untrained     trained" in texts(shown, "stdout")
    err = texts(shown, "stderr")
    assert [line for line in re.split(r"[\r\n]", err) if line.strip() and not BAR.match(line)] == []
    assert any("image/png" in output.get("data", {}) for output in shown)  # the curve
    shapes, actions, values = results(shown)
    assert "(30, 20, 3, 18)" in shapes and len(json.loads(actions)) == 3
    assert len({str(value) for value in json.loads(values)}) == 1  # MAPPO


@pytest.mark.parametrize("left_out", ["A", "B", "C"])
def test_each_engineering_cell_can_be_left_out(left_out, tmp_path):
    """As a script: what the others do is still there."""
    sources = without(left_out)
    if left_out == "A":  # there are no options then
        sources = [sources[0], with_values(sources[1], **TINY), *sources[2:]]
    (tmp_path / "script.py").write_text("\n".join(sources), encoding="utf-8")
    words = [] if left_out == "A" else options(run_folder=tmp_path / "runs" / "run")
    finish(start(*words, program=[tmp_path / "script.py"], cwd=tmp_path))
    [folder] = (tmp_path / "runs").iterdir()
    left = {path.name for path in folder.iterdir()} - {"rollout.gif"}
    of_b = {"checkpoint.pt", "metrics.csv", "hyperparameters.json"}
    of_c = {"learning_curves.png"}
    of_the_method = {"policy.pt", "evaluation.json", "learning_curve.png"}
    expected = {"A": of_the_method | of_b | of_c, "B": of_the_method, "C": of_the_method | of_b}
    assert left == expected[left_out]


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """The whole notebook; then the flag flipped and all from Section 4 on, in the same kernel."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = jupytext.read(SCRIPT)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert [source.strip() for source in code] == [cell.source.strip() for cell in read_cells()]
    section_1 = next(source for source in code if source.startswith("mappo = "))
    [section_4] = [i for i, cell in enumerate(read_cells()) if cell.part == "4"]
    client = kernel(folder)
    with client.setup_kernel():
        outputs = [run_cells(client, code)]
        outputs.append(run_cells(client, [section_1, *code[section_4:]], mappo=False))
        later = [cell.source for cell in read_cells() if cell.part in ("6", "7", "8")]
        outputs.append(run_cells(client, ["n_iters = 3", *later]))  # Section 6 on, made longer
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


def test_one_situation_has_one_value_for_mappo_and_three_for_ippo(flipped):
    """The lesson in one line: what the cell of Section 4 shows, before and after the flip."""
    _, (first, second, _) = flipped
    for outputs, numbers in ((first, 1), (second, 3)):
        values = json.loads(results(outputs)[-1])
        assert len(values) == 3 and len({str(value) for value in values}) == numbers


def test_the_flipped_run_is_a_fresh_one(flipped, tmp_path):
    """It begins in a folder of its own, with the untrained policy, and goes like `--no-mappo`.

    Section 6, run once more with a larger n_iters, makes it longer.
    """
    folder, _ = flipped
    names = sorted(path.name.split("-")[0] for path in (folder / "runs").iterdir())
    assert names == ["ippo", "mappo"]
    [ippo] = (folder / "runs").glob("ippo*")
    finish(start(*options(run_folder=tmp_path / "run"), "--no-mappo"))
    assert len(rows(ippo)) == 3
    assert rows(ippo)[:2] == rows(tmp_path / "run")


def test_a_notebook_goes_on_with_a_stopped_run(tmp_path):
    """With `run_folder` set to it, and the same values otherwise; as if it had not been stopped."""
    words = [options(n_iters=n, run_folder=tmp_path / str(n)) for n in (1, 2)]
    for process in [start(*given) for given in words]:
        finish(process)
    client = kernel(tmp_path)
    with client.setup_kernel():
        shown = run_cells(client, without("C"), run_folder=str(tmp_path / "1"))
    assert "1 of 2 iterations are done" in texts(shown, "stdout")
    assert len(load(tmp_path / "1")["history"]) == 2
    assert_same(tmp_path / "1", tmp_path / "2")


def test_cells_may_be_run_twice(tmp_path):
    """Each cell of Sections 1 to 5, and A and B, once more before going on: the run is as ever."""
    sources = without("C")
    twice = [source for source in sources[:-4] for _ in range(2)]
    client = kernel(tmp_path)
    with client.setup_kernel():
        run_cells(client, [*twice, *sources[-4:]], run_folder=str(tmp_path / "run"))
    finish(start(*options(run_folder=tmp_path / "once")))
    assert_same(tmp_path / "run", tmp_path / "once")
