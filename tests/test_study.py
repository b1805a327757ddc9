"""The study: its page comes from its rows, no run is lost, and variants change what they say."""

import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import jupytext
import pandas as pd
import pytest
import torch
from vmas import make_env

from cells import REPOSITORY, SCRIPT, read_cells, run_inside
from conftest import options, without_seconds

sys.path.insert(0, str(REPOSITORY / "study"))
import benchmark  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
import torchrl_tutorial  # noqa: E402
import transfer  # noqa: E402

TINY = {"max_steps": 5, "frames_per_batch": 20, "minibatch_size": 10, "num_epochs": 1}
TINY |= {"num_cells": 8, "evaluation_episodes": 3, "evaluation_interval": 1}
DEFAULTS = study.PLAN[0]


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Let the study read and write a folder of its own, with its README and without rows."""
    (tmp_path / "README.md").write_text(study.README.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(study, "STUDY", tmp_path)
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results.csv")
    return tmp_path


def rows_of(key, success=0.5, iterations=20):
    """Return the rows that a run leaves, as text."""
    columns = dict(zip(study.KEY, key, strict=True))
    columns |= {"script": "0", "iteration": [str(i) for i in range(iterations)]}
    measured = ["slope", "near_slope", "steep", "rho", "predicted_slope", "test_collisions"]
    columns |= dict.fromkeys([*measured, *tables.BAND, tables.REWARD, tables.STEPS], "1.5")
    return pd.DataFrame(columns | {tables.SUCCESS: f"{success}"})


# --------------------------------------------------------------------------------- rows and tables


def test_the_tables_are_those_of_the_rows():
    """`python study/study.py report` would change nothing in its README."""
    text = study.README.read_text("utf-8")
    assert text.count("<!-- table:") > 10
    results, archive = tables.read(study.RESULTS), tables.read(study.ARCHIVE)
    assert tables.with_tables(text, results, archive) == text


def test_each_run_is_a_planned_one_and_is_there_once_and_as_a_whole():
    rows = study.read_rows(study.RESULTS)
    planned = [key for experiment in study.PLAN for key in experiment.runs()]
    assert len(set(planned)) == len(planned)
    assert set(rows[study.KEY].itertuples(index=False, name=None)) <= set(planned)
    for key, run in rows.groupby(study.KEY):
        n_iters = int(key[1].split("--n-iters ")[1].split()[0]) if "--n-iters" in key[1] else 10
        assert [*map(int, run["iteration"])] == [*range(n_iters)]


def test_tables_show_experiments_that_are_planned():
    planned = {experiment.name for experiment in study.PLAN}
    for _, how in tables.NEW.values():
        assert planned.issuperset(how.get("labels", {"": how.get("experiment")}).values())


def test_a_report_without_rows_names_what_is_missing(place, capsys):
    study.report()
    said = capsys.readouterr().out
    assert all(f"{experiment.name}: " in said for experiment in study.PLAN)
    assert not list(place.glob("*.png"))
    assert "*Not run yet.*" in study.README.read_text("utf-8")


def test_a_report_with_a_part_of_the_rows_shows_that_part(place, capsys):
    """Two runs of one algorithm."""
    for key, success in zip(DEFAULTS.runs()[::2], (0.2, 0.6), strict=False):
        study.add_rows(rows_of(key, success), study.RESULTS)
    study.report()
    cell = "0.40 (worst 0.20)"
    text = study.README.read_text("utf-8")
    assert f"| the defaults | MAPPO | {cell} | {cell} | {cell} | {cell} | 2 |" in text
    assert "the defaults | IPPO" not in text
    assert "*`study.py run defaults`, train_mappo.py `0`.*" in text
    assert "defaults: 18 of 20 runs are missing" in capsys.readouterr().out
    assert {path.name for path in place.glob("*.png")} == {"slopes.png", "rho.png"}


def test_a_comparison_pairs_the_seeds():
    rows = pd.DataFrame(
        {
            "experiment": "a",
            "algorithm": ["MAPPO", "MAPPO", "IPPO", "IPPO", "IPPO"],
            "seed": [1, 0, 0, 1, 2],
            "last": True,
            tables.STEPS: [50.0, 60.0, 61.0, 49.0, 99.0],
        }
    )
    line = tables.versus(rows, {"A": "a"}, [tables.STEPS]).splitlines()[-1]
    assert line == "| A | 55.0 (worst 60.0) | 69.7 (worst 99.0) | 1 of 2 |"


def test_a_difference_between_pairs_has_an_interval():
    """Ten gaps of 0.1 or 0.3 have a standard error of 1/30; the last iteration is not averaged."""
    runs = [("a", seed, [0.5, 0.7, 0.0]) for seed in range(10)]
    runs += [("b", seed, [0.6 + seed % 2 * 0.2, 0.8 + seed % 2 * 0.2, 9.0]) for seed in range(10)]
    rows = pd.DataFrame(
        {"experiment": name, "algorithm": "MAPPO", "seed": seed, "after": after, "slope": value}
        for name, seed, values in runs
        for after, value in enumerate(values, 1)
    )
    line = tables.paired(rows, {"A": "a", "B": "b"}, {"slope": [1, 2]}).splitlines()[-1]
    assert line == "| B | +0.200 (+0.125 to +0.275), 10 of 10 |"


def test_ratios_of_times_are_those_of_a_turn():
    """The median of the ratios, not the ratio of the medians; an amount divides the seconds."""
    times = {"defaults": (3, [3.0, 6.0, 9.0]), "quick": (1, [2.0, 2.0, 6.0])}
    rows = pd.DataFrame(
        {"part": "x", "unit": "run", "name": name, "turn": turn, "amount": amount, "seconds": taken}
        for name, (amount, seconds) in times.items()
        for turn, taken in enumerate(seconds)
    )
    assert tables.speed(rows).splitlines()[-1] == "| x | quick | 2.0 s | 2.00 (1.00 to 2.00) |"


# ----------------------------------------------------------------------------- no run is lost


def test_a_kill_in_the_middle_of_a_write_loses_no_row(tmp_path):
    """A process dies when half of the new file is written; the old rows are there to go on with."""
    path = tmp_path / "rows.csv"
    study.add_rows(pd.DataFrame([{"seed": "0", "text": 'with "quotes", and\na new line'}]), path)
    before = path.read_bytes()
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(study.STUDY)!r})
        from pathlib import Path
        import pandas as pd, study

        def write_half(path, text, encoding):
            with open(path, "w") as file:
                file.write(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Path.write_text = write_half
        study.add_rows(pd.DataFrame([{{"seed": "1"}}]), Path({str(path)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the half file was written beside it
    assert path.read_bytes() == before
    study.add_rows(pd.DataFrame([{"seed": "2", "text": ""}]), path)
    assert study.read_rows(path)["seed"].tolist() == ["0", "2"]


def test_run_goes_on_with_what_is_missing(place, monkeypatch, capsys):
    """A run that fails is reported, and lacks its rows; the others are done once."""
    one, done = study.Experiment("a test", algorithms=["MAPPO"], seeds=range(4)), []

    def train(*key):
        done.append(key[-1])
        if key[-1] == "3" and done.count("3") == 1:
            raise RuntimeError("seed 3 has failed")
        return rows_of(key)

    monkeypatch.setattr(study, "PLAN", [one])
    monkeypatch.setattr(study, "train", train)
    study.add_rows(rows_of(one.runs()[1]), study.RESULTS)
    assert study.run_lacking(["a test"]) == 1
    assert "seed 3 has failed" in capsys.readouterr().err
    assert sorted(done) == ["0", "2", "3"]
    assert study.run_lacking(["a test"]) == 0
    assert sorted(set(study.read_rows(study.RESULTS)["seed"])) == ["0", "1", "2", "3"]
    assert len(done) == 4
    capsys.readouterr()
    assert study.run_lacking(["a test"]) == 0
    assert "Nothing is missing" in capsys.readouterr().out


def test_rows_come_from_what_a_run_leaves(monkeypatch, tmp_path):
    """With a stand-in for train_mappo.py; if it fails, its last line is the reason."""
    script, program = (
        tmp_path / "train_mappo.py",
        """
        import sys
        from pathlib import Path
        folder = Path(sys.argv[sys.argv.index("--run-folder") + 1])
        assert sys.argv[1:6] == ["--lr", "1", "--no-mappo", "--seed", "7"]
        folder.mkdir()
        text = "iteration,frames,terminated_rate,slope\\n0,6000,0.123456789,\\n1,12000,1,1.5\\n"
        (folder / "metrics.csv").write_text(text)
    """,
    )
    monkeypatch.setattr(study, "SCRIPT", script)
    monkeypatch.setattr(study, "with_variant", lambda source, variant: source)
    script.write_text(textwrap.dedent(program))
    rows = study.train("a test", "--lr 1", "", "IPPO", "7")
    blob = subprocess.run(["git", "hash-object", script], capture_output=True, text=True).stdout
    assert rows.to_dict("list") == {
        "experiment": ["a test"] * 2,
        "options": ["--lr 1"] * 2,
        "variant": [""] * 2,
        "algorithm": ["IPPO"] * 2,
        "seed": ["7"] * 2,
        "script": [blob[:12]] * 2,
        "iteration": ["0", "1"],
        "frames": ["6000", "12000"],
        "success_rate": ["0.12346", "1"],
        "slope": ["", "1.5"],
    }
    script.write_text("raise ValueError('no room')")
    with pytest.raises(RuntimeError, match="a test, MAPPO, seed 0: ValueError: no room"):
        study.train("a test", "", "", "MAPPO", "0")


# ---------------------------------------------------------------------------------------- variants


def variant_cell(name):
    """Return the source of the one cell of a variant."""
    cells = jupytext.read(study.VARIANTS, fmt="py:percent").cells
    [source] = [cell.source for cell in cells if cell.metadata.get("title") == name]
    return source


def run_variant(folder, variant, **settings):
    """Run the file with a variant in this process; return the names it leaves."""
    script = folder / "train_mappo.py"
    script.write_text(study.with_variant(SCRIPT.read_text("utf-8"), variant), "utf-8")
    return run_inside(*options(**TINY, **settings, run_folder=folder / "run"), path=script)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_variant(tmp_path_factory.mktemp("plain"), "")


def test_measuring_changes_no_training_and_measures_what_the_lesson_does(plain, tmp_path):
    names = run_variant(tmp_path, "slopes")
    new = ["slope", "near_slope", "steep", "rho", "predicted_slope"]
    measured = [{name: row.pop(name) for name in new} for row in names["history"]]
    assert without_seconds(names["history"]) == without_seconds(plain["history"])
    cells = jupytext.read(SCRIPT).cells
    [lesson] = [cell.source for cell in cells if cell.metadata.get("id") == "slope"]
    exec(lesson[: lesson.index("\n\n\nif ")], names)
    assert names["value_slope"]() == pytest.approx(measured[-1]["slope"], rel=1e-5)


def test_rho_and_the_slope_it_predicts(plain):
    """For distances a, b and a + b of independent numbers, summed: 2 (a + b)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1000, 50, generator=generator)
    seen = torch.zeros(1000, 50, 3, 18)
    seen[..., 4] = torch.stack([a, b, a + b], dim=-1)
    collector = SimpleNamespace(next=lambda: {("agents", "observation"): seen})
    names = plain | {"collector": collector, "critic_network": lambda seen: seen[..., :1]}
    exec(variant_cell("slopes").split("\n\n\nrun = ")[0], names)
    found = names["measure_slope"]()
    assert found["rho"] == pytest.approx((0 + 0.5**0.5 + 0.5**0.5) / 3, abs=0.01)
    assert found["predicted_slope"] == pytest.approx(2, abs=0.02)  # 2 for each of the three


@pytest.mark.parametrize("name", ["goals that move on", "equal distances", "taking turns"])
def test_scenarios_run_and_end_as_they_say(name, tmp_path):
    history = run_variant(tmp_path, f"{name} + slopes")["history"]
    rows = [{**row, "near_slope": 0} for row in history]  # no robot may have been near its goal
    assert all(torch.tensor([*row.values()]).isfinite().all() for row in rows)
    assert all("rho" in row and "test_terminated_rate" in row for row in history)


def scene_of(variant, **settings):
    """Return a VMAS environment of a variant's scenario."""
    names = {"torch": torch, "cfg": SimpleNamespace()}
    exec(variant_cell(variant), names)
    return make_env(names["cfg"].scenario_name(), num_envs=4, seed=0, n_agents=3, **settings)


def distances(scene):
    """Return how far the robots have to go, of shape (environments, n_agents)."""
    return torch.stack(
        [(agent.state.pos - agent.goal.state.pos).norm(dim=-1) for agent in scene.agents], dim=1
    )


def test_a_goal_that_is_reached_moves_on():
    scene = scene_of("goals that move on")
    scene.reset()
    robot = scene.agents[0]
    robot.set_pos(robot.goal.state.pos, batch_index=None)
    before, goal = distances(scene), robot.goal.state.pos.clone()
    others = scene.agents[1].goal.state.pos.clone()
    _, rewards, done, _ = scene.step([torch.zeros(4, 2)] * 3)
    assert (robot.goal.state.pos != goal).any(dim=-1).all() and not done.any()
    assert (scene.agents[1].goal.state.pos == others).all()
    _, rewards, _, _ = scene.step([torch.zeros(4, 2)] * 3)  # a new goal is no progress
    assert rewards[0].abs().max() < 0.5 and before[:, 0].max() == 0


def test_all_robots_have_equally_far_to_go():
    """After a reset of all environments or of one, which leaves the others alone."""
    scene = scene_of("equal distances")
    scene.reset()
    before = distances(scene)
    torch.testing.assert_close(before, before[:, :1].expand(4, 3))
    assert before[:, 0].unique().numel() == 4
    scene.reset_at(2)
    after = distances(scene)
    torch.testing.assert_close(after, after[:, :1].expand(4, 3))
    assert (after == before).all(dim=1).tolist() == [True, True, False, True]
    _, rewards, _, _ = scene.step([torch.zeros(4, 2)] * 3)
    assert rewards[0].abs().max() < 0.5  # standing still is no progress


def test_one_robot_drives_at_a_time_until_it_arrives():
    scene = scene_of("taking turns", collisions=False)
    scene.reset()
    scene.step([torch.ones(4, 2)] * 3)
    moved = torch.stack([agent.state.vel.norm(dim=-1) > 0 for agent in scene.agents], dim=1)
    assert (moved.sum(dim=1) == 1).all() and moved.any(dim=0).sum() > 1  # not always the same
    for index, agent in enumerate(scene.agents):  # those that drove arrive, in each environment
        place = torch.where(moved[:, index, None], agent.goal.state.pos, agent.state.pos)
        agent.set_pos(place, batch_index=None)
        agent.set_vel(torch.zeros(4, 2), batch_index=None)
    scene.step([torch.ones(4, 2)] * 3)
    now = torch.stack([agent.state.vel.norm(dim=-1) > 0 for agent in scene.agents], dim=1)
    assert (now.sum(dim=1) == 1).all() and not (now & moved).any()


def test_remedies_run_together_and_do_what_they_say(tmp_path):
    """The critic gets the others' distance, arrivals are hidden from the advantages only."""
    variant = "others' distance + arrivals bootstrapped + value_normalization + slopes"
    names = run_variant(tmp_path, variant, mappo=False)
    critic, observation = names["critic_network"], torch.zeros(4, 3, 18)
    observation[..., 4:6] = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    turned, moved = observation.clone(), observation.clone()
    turned[:, 1, 4:6] = torch.tensor([0.6, 0.8])  # robot 1 has as far to go as before
    moved[:, 1, 5] += 1
    with torch.no_grad():
        values, by_turning, by_moving = (critic(x)[:, [0, 2]] for x in (observation, turned, moved))
    torch.testing.assert_close(by_turning, values)
    assert (by_moving != values).all()
    hidden = []
    names["estimate_with_terminations"] = lambda b: hidden.append(b["next", "terminated"].clone())
    names["estimate_advantages"].__globals__.update(names)
    batch = {("next", "terminated"): torch.tensor([True, False])}
    names["estimate_advantages"](batch)
    assert hidden[0].tolist() == [False, False]
    assert batch["next", "terminated"].tolist() == [True, False]
    assert names["loss_module"].value_norm.count > 0  # it has seen value targets


def test_recipes_of_the_cookbook_take_the_place_of_cells(tmp_path):
    """The first one's place is theirs, the check is gone, and their critic's slope is measured."""
    cells = {"agent_ids": ["critic", "critic_check"], "value_normalization": ["loss", "loss_check"]}
    for recipe, replaced in cells.items():
        changed = study.with_variant(SCRIPT.read_text("utf-8"), f"{recipe} + slopes")
        found = {
            cell.metadata.get("id"): cell.source
            for cell in jupytext.reads(changed, fmt="py:percent").cells
        }
        assert found[replaced[0]] != read_cells()[replaced[0]]
        assert replaced[1] not in found and "gae" in found
    names = run_variant(tmp_path, "agent_ids + slopes")
    assert type(names["critic_network"]).__name__ == "AgentSpecificCritic"
    assert "slope" in names["history"][-1]


def test_a_variant_adds_its_cells_and_changes_no_other():
    source = SCRIPT.read_text("utf-8")
    end = [cell.metadata.get("id") for cell in jupytext.reads(source, fmt="py:percent").cells]
    before = [
        cell.source
        for cell in jupytext.reads(source, fmt="py:percent").cells[: end.index("loop") + 1]
        if cell.metadata.get("id") != "probe"
    ]
    variants = {"": 0, "slopes": 1, "goals that move on + slopes": 2}
    for variant, more in variants.items():
        changed = jupytext.reads(study.with_variant(source, variant), fmt="py:percent").cells
        sources = [cell.source for cell in changed]
        assert [one for one in sources if one in before] == before
        assert len(sources) == len(before) + more


def test_a_cell_that_is_not_there_is_refused():
    source = SCRIPT.read_text("utf-8")
    with pytest.raises(ValueError, match="no variant 'a test'"):
        study.with_variant(source, "a test")
    with pytest.raises(ValueError, match='no cell that begins with # %% id="gae"'):
        study.with_variant(source.replace('id="gae"', 'id="other"'), "others' distance")
    with pytest.raises(ValueError, match='id="loop"'):
        study.with_variant(source.replace('id="loop"', 'id="other"'), "")


# --------------------------------------------------------------- benchmark, transfer, tutorial


@pytest.mark.filterwarnings("ignore:Creating .*Updater:DeprecationWarning")
def test_the_benchmark_compares_with_the_same_gradients(plain):
    bare = benchmark.BareUpdate(plain)
    bare.check()
    bare.cfg = replace(plain["cfg"], critic_coeff=2.0)
    with pytest.raises(AssertionError):
        bare.check()


def test_a_run_in_this_process_leaves_it_as_it_was():
    """And one that is refused says why."""
    before = sys.argv, sys.excepthook, sys.stdout
    with pytest.raises(RuntimeError, match="num_epochs"):
        benchmark.run_script("--num-epochs", "0")
    assert (sys.argv, sys.excepthook, sys.stdout) == before


def test_a_saved_policy_is_evaluated_in_a_team(plain, tmp_path, monkeypatch):
    """As the policy itself is; rows that are there are kept, and not evaluated again."""
    weights = plain["policy"][0].module[0].state_dict()
    path = tmp_path / "policy.pt"
    torch.save({"state_dict": {name: value + 0.1 for name, value in weights.items()}}, path)
    (tmp_path / "hyperparameters.json").write_text(json.dumps({"seed": 4}))
    before = plain["evaluate"](plain["policy"])
    made = []
    monkeypatch.setattr(transfer, "TEAMS", [3])
    monkeypatch.setattr(transfer, "TRANSFER", tmp_path / "transfer.csv")
    monkeypatch.setattr(transfer, "make_team", lambda n_agents: made.append(n_agents) or plain)
    transfer.run_lacking([path])
    transfer.run_lacking([path])
    rows = study.read_rows(tmp_path / "transfer.csv")
    assert rows[["n_agents", "seed"]].values.tolist() == [["3", "4"]]
    after = plain["evaluate"](plain["policy"])
    assert float(rows["episode_reward"][0]) == pytest.approx(after["episode_reward"], abs=1e-4)
    assert after["episode_reward"] != before["episode_reward"]


def test_the_tutorial_is_changed_in_four_places_or_refused():
    source = "\nn_iters = 5  #\nmappo = True  #\ntorch.manual_seed(0)\n"
    source += "f(\n    scenario=scenario_name,\n)"
    changed = torchrl_tutorial.patched(source, "IPPO", 3)
    assert "n_iters = 25 " in changed and "mappo = False" in changed
    assert "manual_seed(3)" in changed and "seed=3," in changed
    with pytest.raises(ValueError, match="'n_iters = 5' once"):
        torchrl_tutorial.patched(source.replace("n_iters = 5", "n_iters = 6"), "IPPO", 3)


CHANGES = {  # rows of the table of changes in Section 10, and the experiments they come from
    "none": "defaults",
    "the critic also sees the sum of the others' distances": "one-number",
    "individual rewards": "individual",
    "gamma = 0.9, with c = 0.47": "gamma",
    "gamma = 0.9 and lmbda = 0, with c = 0.90": "gamma-lambda",
    "lmbda = 0.99, with c = 0.50": "lambda-0.99",
    "value normalization": "value-norm",
    "all goals equally far away": "equal",
    "a smaller arena without collisions": "close",
    "the same arena, but only one robot drives at a time": "turns",
}


@pytest.mark.parametrize("label", CHANGES)
def test_section_10_quotes_the_means_of_ten_seeds(label):
    """After 15 iterations: IPPO's slope and the success rates in tests."""
    lines = SCRIPT.read_text("utf-8").splitlines()
    found = [line for line in lines if line.startswith(f"# | {label} | ")]
    [line] = [line for line in found if line.count("|") == 6]  # another table has four
    slope, ippo, mappo = [cell.strip() for cell in line.split("|")[3:6]]
    rows = tables.read(tables.RESULTS)
    for algorithm, column, quoted in (
        ("IPPO", "slope", slope),
        ("IPPO", "test_success_rate", ippo),
        ("MAPPO", "test_success_rate", mappo),
    ):
        found = tables.choose(rows, CHANGES[label], algorithm, 15)[column]
        assert not quoted or (len(found) == 10 and f"{found.mean():.2f}" == quoted)


EXPERIMENTS = {  # rows of the table of experiments in README.md, and where their numbers come from
    "| (defaults) |": ("defaults", 10),
    "| `--n-iters 15` |": ("defaults", 15),
    '"shared_rew": false': ("individual", 15),
    "--gamma 0.9` |": ("gamma", 15),
    "--lmbda 1` |": ("lambda-1", 15),
    "--num-epochs 10` |": ("10-epochs", None),
    "| `--no-share-parameters-policy` |": ("separate-policies", 10),
    "--anneal-lr": ("quick", 11),
}


@pytest.mark.parametrize("options", EXPERIMENTS)
def test_readme_quotes_the_means_of_ten_seeds(options):
    """The success rates in tests, of MAPPO and IPPO."""
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    [line] = [line for line in readme.splitlines() if line.startswith("| ") and options in line]
    experiment, after = EXPERIMENTS[options]
    planned = experiment in [one.name for one in study.PLAN]
    rows = tables.read(tables.RESULTS if planned else tables.ARCHIVE)
    for algorithm, quoted in zip(("MAPPO", "IPPO"), line.split(" | ")[1:3], strict=True):
        found = tables.choose(rows, experiment, algorithm, after)[tables.SUCCESS]
        assert len(found) == 10 and f"{found.mean():.2f}" == quoted


ROLES = {  # rows of the table of roles in Section 10, and where their numbers come from
    "| local critic | local critic (IPPO) |": ("defaults", "IPPO"),
    "| local critic | centralized critic |": ("two-critics", "IPPO"),
    "| centralized critic | local critic |": ("two-critics", "MAPPO"),
    "| centralized critic | centralized critic (MAPPO) |": ("defaults", "MAPPO"),
}


@pytest.mark.parametrize("start", ROLES)
def test_section_10_parts_the_roles_of_a_critic(start):
    """The slope after 15 iterations, and success after 10 and 15."""
    lines = SCRIPT.read_text("utf-8").splitlines()
    [line] = [line for line in lines if line.startswith(f"# {start}")]
    rows, (experiment, algorithm) = tables.read(tables.RESULTS), ROLES[start]
    means = []
    for after, column in ((15, "slope"), (10, "test_success_rate"), (15, "test_success_rate")):
        found = tables.choose(rows, experiment, algorithm, after)[column]
        assert len(found) == 10
        means.append(f"{found.mean():.2f}")
    assert line == f"# {start} {' | '.join(means)} |"
