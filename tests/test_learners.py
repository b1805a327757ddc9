"""What learners do to the file: change and add values, add functions, run cells again."""

import json
import re

import pytest
import torch

from cells import cell_that_defines, read_cells, run_cells, with_values, without
from conftest import BAR, TINY, assert_same, finish, options, rows, run_inside, start

LOOP = "\n# %%\nfor function in before_training:"


@pytest.fixture
def changed(lean, tmp_path):
    """Return a function that makes a copy of the script with replaced and added lines."""

    def change(replace=(), added=(), before_the_loop=""):
        text = lean.read_text("utf-8")
        for old, new in dict(replace).items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        cell = cell_that_defines("mappo") if not replace else None
        if cell:
            text = text.replace(cell, "\n".join([cell, *added]))
        text = text.replace(LOOP, f"\n# %%\n{before_the_loop}\n{LOOP}")
        path = tmp_path / "train_mappo.py"
        path.write_text(text, encoding="utf-8")
        return path

    return change


def recorded(folder):
    """Return the hyperparameters that a run has recorded."""
    return json.loads((folder / "hyperparameters.json").read_text("utf-8"))


@pytest.mark.parametrize(
    "old, new",
    [
        ("lr = 3e-4  # Adam's learning rate\n", "lr: float = 1e-3\n"),  # annotated, no comment
        ("lr = 3e-4  # Adam's learning rate\n", "lr = 3e-4\nmomentum = 0.8\nlayers = [1, 2]\n"),
        ("lr = 3e-4  # Adam's learning rate\n", "\n# %%\nlr = 3e-4\nmomentum = 0.8\n\n# %%\n"),
        ("# ## 1. Hyperparameters\n", "#\n"),
    ],
    ids=["annotated", "added", "split and added", "heading deleted"],
)
def test_what_a_learner_does_to_the_hyperparameters_works(old, new, changed, tmp_path):
    """Each is still an option, and recorded."""
    more = ["--momentum", "0.7"] if "momentum" in new else []
    more += ["--layers", "[3]"] if "layers" in new else []
    words = [*options(n_iters=1, run_folder=tmp_path / "run"), "--lr", "1e-4", *more]
    run_inside(*words, path=changed({old: new}))
    found = recorded(tmp_path / "run")
    assert found["lr"] == 1e-4
    assert found.get("momentum") == (0.7 if "momentum" in new else None)
    assert found.get("layers") == ([3] if "layers" in new else None)


def test_hyperparameters_of_any_kind_are_kept_by_the_run(changed, tmp_path, capfd):
    lines = ["target_kl = None", "betas = (0.9, 0.999)", 'name = "mine"', 'how = "z"']
    script, run = changed(added=lines), tmp_path / "run"
    words = ["--betas", "[0.5, 0.9]", "--target-kl", "0.02", "--max-grad-norm", "1"]
    run_inside(*options(run_folder=run), *words, path=script)
    expected = {"betas": [0.5, 0.9], "target_kl": 0.02, "max_grad_norm": 1}
    assert recorded(run).items() >= {**expected, "name": "mine", "how": "z"}.items()
    run_inside("--run-folder", run, "--n-iters", 3, path=script)
    assert recorded(run).items() >= {**expected, "n_iters": 3}.items()
    words = ("--run-folder", run, "--betas", "[0.1, 0.9]")
    with pytest.raises(SystemExit):
        run_inside(*words, path=script)
    err = capfd.readouterr().err
    assert "betas is [0.1, 0.9], but must be [0.5, 0.9], as in the run" in err


def test_a_value_that_json_cannot_hold_is_refused(changed, tmp_path, capfd):
    script = changed(added=["layers = [nn.Tanh]"])
    with pytest.raises(SystemExit):
        run_inside(*options(run_folder=tmp_path / "run"), path=script)
    err = capfd.readouterr().err
    assert "layers is [<class 'torch.nn.modules.activation.Tanh'>], but must be JSON" in err
    assert not (tmp_path / "run").exists()


def test_measurements_of_ones_own_are_saved(changed, tmp_path):
    """As columns, also if only some rows have them; a tensor with one number will do."""
    own = "def own(row):\n"
    own += "    row['twice'] = torch.tensor(2.0 * row['iteration'])\n"
    own += "    if row['iteration'] < 1:\n        row['x'] = 7\n"
    script = changed(before_the_loop=own + "\n\nafter_iteration.insert(0, own)")
    run_inside(*options(run_folder=tmp_path / "run"), path=script)
    run_inside("--run-folder", tmp_path / "run", "--n-iters", 3, path=script)
    found = [(row["twice"], row["x"]) for row in rows(tmp_path / "run")]
    assert found == [("0.0", "7"), ("2.0", ""), ("4.0", "")]


def test_a_measurement_that_is_no_number_keeps_its_traceback_and_is_not_saved(changed, tmp_path):
    own = "after_iteration.insert(0, lambda row: row.update(mine='x'))"
    with pytest.raises(ValueError, match="could not convert string to float"):
        run_inside(*options(run_folder=tmp_path / "run"), path=changed(before_the_loop=own))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def engineering_cells():
    """Return the sources of the imports, of Section 1 and of the engineering."""
    cells = read_cells()
    last = [cell.part for cell in cells].index("engineering")
    return [cell.source for cell in cells[: last + 1]]


def test_a_kernel_that_holds_other_things_records_the_hyperparameters_only():
    """Whatever the kernel held before, also under the names of Section 1."""
    first = "results = {'mappo': [1, 2]}\nx = 3\nlr = 'old'\nn_iters = None"
    names = {"__name__": "notebook", "In": ["", first]}
    exec("results = {'mappo': [1, 2]}\nx = 3", names)
    top, section_1, seams, engineering = engineering_cells()
    for source in (top, with_values(section_1, **TINY), seams, engineering):
        names["In"].append(source)
        exec(source, names)
    added = set(names["hyperparameters"]) - {*TINY, *recorded_defaults(section_1)}
    assert added == {"results", "x"}  # they stood in a cell that sets hyperparameters


def recorded_defaults(section_1):
    """Return the names that Section 1's cell sets."""
    names = {"torch": torch}
    exec(section_1, names)
    return set(names) - {"torch", "__builtins__"}


def test_a_kernel_that_holds_other_cells_records_section_1_only():
    names = {"__name__": "notebook", "In": ["", "results = [1]\nx = 3", "%matplotlib inline"]}
    exec("results = [1]\nx = 3", names)
    top, section_1, seams, engineering = engineering_cells()
    for source in (top, section_1, seams, engineering):
        names["In"].append(source)
        exec(source, names)
    assert set(names["hyperparameters"]) == recorded_defaults(section_1)


def test_a_line_added_after_a_first_run_is_recorded(tmp_path):
    """In the same kernel, without running the engineering cell again."""
    names = {"__name__": "notebook", "In": []}
    for source in without(defining=["explained_variance_of"], boxes=False):
        if "mappo = True" in source:
            source = with_values(source, **TINY, run_folder=str(tmp_path / "one"))
        names["In"].append(source)
        exec(source, names)
    assert "momentum" not in recorded(tmp_path / "one")
    section_1 = with_values(cell_that_defines("mappo"), **TINY, run_folder=str(tmp_path / "two"))
    later = [cell.source for cell in read_cells() if cell.part in "45678"]
    for source in [section_1 + "\nmomentum = 0.8", *later]:
        if "explained_variance_of" not in source:
            names["In"].append(source)
            exec(source, names)
    assert recorded(tmp_path / "two")["momentum"] == 0.8


def lesson(**values):
    """Return the sources of all cells but the probe and the boxes, with values in Section 1."""
    sources = without(defining=["explained_variance_of"], boxes=False)
    section_1 = cell_that_defines("mappo")
    return [
        with_values(source, **{**TINY, **values}) if source == section_1 else source
        for source in sources
    ]


def test_cells_may_be_run_twice(lean, tmp_path):
    """Each cell up to the loop once more: the run is as ever, and nothing is registered twice."""
    sources = lesson(run_folder=str(tmp_path / "run"))
    loop = next(i for i, source in enumerate(sources) if "before_training:" in source)
    names = run_cells([one for source in sources[:loop] for one in (source, source)])
    assert len(names["before_training"]) == len(names["after_iteration"]) == 1
    exec(next(source for source in sources if "def start_or_resume" in source), names)
    assert len(names["before_training"]) == len(names["after_iteration"]) == 1
    exec(sources[loop], names)
    run_inside(*options(run_folder=tmp_path / "once"), path=lean)
    assert_same(tmp_path / "run", tmp_path / "once")


@pytest.mark.parametrize("engineering", [True, False])
def test_training_on_after_an_evaluation_is_as_if_it_had_not_stopped(engineering, tmp_path):
    """Two iterations, the evaluation, then n_iters = 4 and the loop's cell once more."""
    histories = []
    for n_iters in (2, 4):
        sources = lesson(n_iters=n_iters, run_folder=str(tmp_path / f"{n_iters}"))
        if not engineering:
            sources = [source for source in sources if "def start_or_resume" not in source]
        loop = next(source for source in sources if "before_training:" in source)
        names = run_cells(sources[: sources.index(loop) + 2])  # with the evaluation
        exec("n_iters = 4", names)
        exec(loop, names)
        assert len(names["history"]) == 4
        histories.append([{**row, "seconds": 0} for row in names["history"]])
    assert histories[0] == histories[1]


def test_an_interrupted_iteration_is_repeated_from_its_start(lean, tmp_path):
    """In a notebook: the loop's cell, interrupted in an update, is run once more."""
    sources = lesson(run_folder=str(tmp_path / "run"))
    loop = next(source for source in sources if "before_training:" in source)
    names = run_cells(sources[: sources.index(loop)])
    optimizer, step = names["optimizer"], names["optimizer"].step
    calls = []

    def stop_once(*args, **kwargs):
        calls.append(step(*args, **kwargs))
        if len(calls) == 17:  # in the middle of the second iteration
            raise KeyboardInterrupt

    optimizer.step = stop_once
    with pytest.raises(KeyboardInterrupt):
        exec(loop, names)
    optimizer.step = step
    exec(loop, names)
    run_inside(*options(run_folder=tmp_path / "once"), path=lean)
    assert_same(tmp_path / "run", tmp_path / "once")


@pytest.mark.parametrize("option", ["agent_collision_penalty", "collisions"])
def test_collisions_are_not_counted_where_they_have_no_price(option, lean, tmp_path):
    """There, VMAS does not say where they happen: no number is better than a wrong one."""
    value = json.dumps({option: 0 if "penalty" in option else False})
    words = options(n_iters=1, run_folder=tmp_path / "run", scenario_options=value)
    run_inside(*words, path=lean)
    assert "collisions" not in rows(tmp_path / "run")[0]


def test_one_iteration_draws_a_visible_curve(drawing, tmp_path):
    """A line of one point has no length, but it has a marker; a neighbor is drawn beside it."""
    import matplotlib.pyplot as plt

    run_inside(*options(n_iters=1, run_folder=tmp_path / "one"), path=drawing)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        axes = plt.Axes
        plot = axes.plot
        patch.setattr(axes, "plot", lambda *a, **k: drawn.extend(plot(*a, **k)) or drawn[-1:])
        run_inside(*options(n_iters=1, run_folder=tmp_path / "two"), path=drawing)
    assert all(line.get_marker() == "." for line in drawn)
    assert sorted({line.get_linewidth() for line in drawn}) == [1, 3]


def test_too_many_agents_for_the_world_are_said_in_one_sentence(changed, tmp_path):
    """Also where VMAS only finds out in the middle of training."""
    own = "import warnings\n\n\ndef full(*_):\n"
    own += "    warnings.warn('It is taking many iterations to spawn the entity')\n\n\n"
    script = changed(before_the_loop=own + "after_iteration.insert(0, full)")
    _, err = finish(start(*options(run_folder=tmp_path / "run"), program=[script]), 1)
    assert "Traceback" not in err
    said = "train_mappo.py: n_agents is 3, but must be smaller: VMAS found no room for all"
    assert err.splitlines()[-1] == said


SCENARIO = """
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario


class MyScenario(BaseScenario):
    def make_world(self, batch_dim, device, n_agents, speed=1.0):
        world = World(batch_dim, device)
        for i in range(n_agents):
            world.add_agent(Agent(name=f"robot_{i}"))
        return world

    def reset_world_at(self, env_index=None):
        for agent in self.world.agents:
            position = torch.rand_like(agent.state.pos[env_index]).squeeze(0)
            agent.set_pos(position, batch_index=env_index)

    def observation(self, agent):
        return torch.cat([agent.state.pos, agent.state.vel], dim=-1)

    def reward(self, agent):
        return agent.state.pos.sum(dim=-1)
"""


@pytest.mark.parametrize("engineering", [True, False])
def test_a_scenario_of_ones_own_is_trained(engineering, tmp_path, monkeypatch):
    """Defined in a notebook, with and without the engineering cell; its name names the folder."""
    monkeypatch.chdir(tmp_path)
    sources = lesson()
    if not engineering:
        sources = [source for source in sources if "def start_or_resume" not in source]
    section_1 = next(source for source in sources if source.startswith("mappo = "))
    own = section_1.replace('"navigation"', "MyScenario")
    sources = [SCENARIO + "\n" + own if source == section_1 else source for source in sources]
    names = run_cells(sources)
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mappo-MyScenario-seed0-")
    assert len(names["history"]) == 2 and "terminated_rate" in names["evaluation"]["trained"]
    if engineering:
        assert recorded(folder)["scenario_name"] == "MyScenario"


def test_a_scenario_of_ones_own_is_resumed(changed, tmp_path):
    """In a file, by its name."""
    class_ = {"mappo = True  #": SCENARIO.strip() + "\n\n\nmappo = True  #"}
    name = {'scenario_name = "navigation"': "scenario_name = MyScenario"}
    script, run = changed({**class_, **name}), tmp_path / "run"
    for n_iters in (1, 2):
        run_inside(*options(run_folder=run, n_iters=n_iters), path=script)
    assert [row["iteration"] for row in rows(run)] == ["0", "1"]


def test_the_critic_starts_orthogonally_in_a_run(lean, tmp_path):
    """Not only where the function that does it is called by a test."""
    script = run_inside(*options(run_folder=tmp_path / "run", n_iters=1, lr=1e-12), path=lean)
    [weight] = [w for w in script["critic_network"].parameters() if w.shape == (32, 32)]
    product = weight @ weight.T
    assert (product - 2 * product.new_ones(32).diag()).abs().max() < 1e-4


def read_tensorboard(folder):
    """Return {tag: [(step, value)]} of the event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder))
    log.Reload()
    tags = log.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}


def test_tensorboard_gets_every_measurement_of_every_iteration(lean, tmp_path, capfd):
    """A resumed run continues its log."""
    run = tmp_path / "run"
    words = options(run_folder=run)
    run_inside(*words, "--logger", "tensorboard", path=lean)
    err = capfd.readouterr().err
    assert [text for text in re.split(r"[\r\n]", err) if text.strip() and not BAR.match(text)] == []
    run_inside("--run-folder", run, "--n-iters", 3, path=lean)
    found = read_tensorboard(run / "log" / "run")
    table = rows(run)
    for name in table[0]:
        if name != "iteration":
            expected = [(i + 1, pytest.approx(float(row[name]))) for i, row in enumerate(table)]
            assert found[name] == expected, name


def test_a_csv_log_needs_no_package(lean, tmp_path):
    run_inside(*options(run_folder=tmp_path / "run"), "--logger", "csv", path=lean)
    [log] = (tmp_path / "run" / "log").rglob("episode_reward.csv")
    values = [float(line.split(",")[1]) for line in log.read_text().split()]
    assert values == [float(row["episode_reward"]) for row in rows(tmp_path / "run")]
