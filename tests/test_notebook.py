"""The script as a notebook: it runs cell by cell, and flipping `mappo` and going on from Section 4 trains IPPO."""

import re

import jupytext
import pytest
from conftest import BAR, SCRIPT, TINY, measurements, start
from nbclient import NotebookClient

SCENARIO = "multi_give_way"


def set_values(cell, **values):
    """Write other values into the assignments of the hyperparameter cell, as a reader of the notebook would."""
    for name, value in values.items():
        cell.source, count = re.subn(rf"^{name} = .*?(?=  #)", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert count == 1, name


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """Run the notebook, then flip the flag and run the hyperparameters and all from Section 4 on, in the same kernel.

    The kernel's own arguments would end the run if they were read as options of the script. The scenario is one that
    sets the number of agents itself, to one more than the hyperparameters say.
    """
    folder = tmp_path_factory.mktemp("notebook")
    notebook = jupytext.read(SCRIPT)
    sources = [cell.source for cell in notebook.cells]
    [first] = [index for index, source in enumerate(sources) if source.startswith("mappo = ")]
    [section_4] = [index for index, source in enumerate(sources) if re.search("^## 4", source, re.MULTILINE)]
    set_values(notebook.cells[first], **TINY, output_dir=str(folder), scenario_name=SCENARIO)
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    outputs = []

    def execute(indices):
        for index in indices:
            if notebook.cells[index].cell_type == "code":
                outputs.extend(client.execute_cell(notebook.cells[index], index).outputs)

    with client.setup_kernel():
        execute(range(len(sources)))
        set_values(notebook.cells[first], mappo=False)
        execute([first, *range(section_4, len(sources))])
    return folder, outputs


def test_both_runs_leave_their_results(notebooks):
    """Nothing else than the two runs, each with its table of measurements and its policy."""
    folder, _ = notebooks
    names = sorted(path.name.rsplit("-", 2)[0] for path in folder.iterdir())
    assert names == [f"ippo-{SCENARIO}-seed0", f"mappo-{SCENARIO}-seed0"]
    assert len([*folder.glob("*/metrics.csv")]) == len([*folder.glob("*/policy.pt")]) == 2


def test_outputs_show_results_only(notebooks):
    """No error, nothing on stderr other than the progress bar, and the table of the evaluation once a run."""
    _, outputs = notebooks
    texts = {name: "".join(output.text for output in outputs if output.get("name") == name)
             for name in ("stdout", "stderr")}
    assert all(output.output_type != "error" for output in outputs)
    assert len(re.findall("untrained +trained", texts["stdout"])) == 2
    assert {found[1] for found in BAR.finditer(texts["stderr"])} == {"MAPPO", "IPPO"}
    assert [line for line in re.split(r"[\r\n]", texts["stderr"]) if line.strip() and not BAR.match(line)] == []


def test_the_flipped_run_starts_from_the_untrained_policy(notebooks, tmp_path):
    """It ends with the numbers of a fresh IPPO run, so that comparing the two algorithms is fair."""
    folder, _ = notebooks
    assert start(tmp_path, "--no-mappo", f"--scenario-name={SCENARIO}").returncode == 0
    [flipped], [fresh] = (list(where.glob("ippo-*")) for where in (folder, tmp_path))
    assert measurements(flipped) == measurements(fresh)
