"""Each recipe of cookbook/, pasted into the lesson where it says, does what it says."""

import ast
import csv
import json
import math
import re
import runpy
import shutil
import sys

import jupytext
import pytest
import torch

from cells import REPOSITORY, SCRIPT, SLOW, read_cells, run_cells, run_inside, write_copy
from conftest import TINY, assert_same, load, options, without_seconds

COOKBOOK = REPOSITORY / "cookbook"
paste = runpy.run_path(str(COOKBOOK / "paste.py"))["paste"]
RECIPES = sorted({path.stem for path in COOKBOOK.glob("*.py")} - {"paste"})
PROGRAMS = ["play_policy", "several_seeds", "use_policy"]  # the others are cells
CELLS = [name for name in RECIPES if name not in PROGRAMS]


def places(recipe):
    """Return the cells of a recipe as a list of (how, ids of cells of the lesson, cell)."""
    found = []
    for cell in jupytext.read(COOKBOOK / f"{recipe}.py").cells:
        for how in cell.metadata.keys() & {"replaces", "before", "after"}:
            found.append((how, cell.metadata[how].split(", "), cell))
    return found


def paste_into(path, *recipes, edits=()):
    """Paste recipes into the file at `path` as readers do, pieces of them replaced: {old: new}."""
    text = path.read_text("utf-8")
    for recipe in recipes:
        changed = (COOKBOOK / f"{recipe}.py").read_text("utf-8")
        for old, new in dict(edits).items():
            assert old in changed
            changed = changed.replace(old, new)
        text = paste(text, changed)
    path.write_text(text, "utf-8")


@pytest.fixture
def cook(tmp_path):
    """Return a function that runs the lesson with recipes in it and returns its global names."""

    def run(*recipes, edits=(), folder="run", **values):
        path = write_copy(tmp_path / "train_mappo.py", *SLOW)
        paste_into(path, *recipes, edits=edits)
        return run_inside(*options(run_folder=tmp_path / folder, **values), path=path)

    return run


def weights(names, policy):
    """Return the weights of a policy of the lesson."""
    return names[policy][0].module[0].state_dict()


def has_learned(names):
    """Return whether the policy is another one than before the training."""
    before, after = weights(names, "untrained_policy"), weights(names, "policy")
    return any((before[key] != after[key]).any() for key in before)


def run_program(name, *words):
    """Run a program of the cookbook in this process and return its global names."""
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [name, *map(str, words)], [str(COOKBOOK)]
    try:
        return runpy.run_path(str(COOKBOOK / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


def use_policy(path):
    """Return the Policy of the cookbook with the weights of a file."""
    return runpy.run_path(str(COOKBOOK / "use_policy.py"))["Policy"](path)


# ------------------------------------------------------------------------------- cells to paste


def row_of(recipe):
    """Return the row of a recipe in the table of the cookbook's README."""
    text = (COOKBOOK / "README.md").read_text("utf-8")
    [row] = [
        line for line in text.splitlines() if line.startswith("|") and f"({recipe}.py)" in line
    ]
    return row


@pytest.mark.parametrize("recipe", CELLS)
def test_the_text_says_where_the_cells_go(recipe):
    """The docstring and the README name each cell that a recipe replaces, follows or precedes."""
    text = (COOKBOOK / f"{recipe}.py").read_text("utf-8").split('"""')[1]
    found = places(recipe)
    assert found
    for how, names, _ in found:
        assert {*names} <= {*read_cells()}
        for place in (text, row_of(recipe)):
            assert how in place and all(f"`{name}`" in place for name in names)


@pytest.mark.parametrize("recipe", PROGRAMS)
def test_the_text_says_what_is_a_program(recipe):
    """So do they for what is run beside the lesson."""
    assert "is a" in (COOKBOOK / f"{recipe}.py").read_text("utf-8").split('"""')[1]
    assert "| a program |" in row_of(recipe)


def lines_of_code(source):
    """Return the lines of a source that are neither empty nor comments nor docstrings."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_short(recipe):
    """It has at most forty lines of code that the lesson does not have, as many as README says.

    Lines that only close brackets do not count.
    """
    lesson = {*SCRIPT.read_text("utf-8").splitlines()}
    code = lines_of_code((COOKBOOK / f"{recipe}.py").read_text("utf-8"))
    new = len([line for line in code if line not in lesson and line.strip(" ()[]{},")])
    assert new <= 40 and row_of(recipe).endswith(f"| {new} |")


def test_paste():
    """Cells go before, after or in place of others; all the rest stays as it is."""
    one, two, three, four = (f'# %% id="{name}"\n{name}\n\n' for name in ("a", "ab", "b", "c"))
    recipe = '"""Text."""\n# %% replaces="ab, b"\nnew\n# %% before="a"\n1\n# %% after="a"\n2\n'
    expected = ['head\n# %% before="a"\n1\n', one, '# %% after="a"\n2\n', '# %% id="ab"\nnew\n']
    assert paste("head\n" + one + two + three + four, recipe) == "".join([*expected, four])
    with pytest.raises(ValueError):
        paste(one + four, recipe)


def test_paste_writes_a_new_file(tmp_path, capsys):
    """The program pastes several recipes, refuses programs, and overwrites nothing."""
    run_program("paste", tmp_path / "mine.py", "own_scenario", "fine_tune")
    cells = {cell.source for cell in jupytext.read(tmp_path / "mine.py").cells}
    for recipe in ("own_scenario", "fine_tune"):
        assert {cell.source for _, _, cell in places(recipe)} < cells
    for file, recipe in (("mine.py", "gpu"), ("other.py", "use_policy")):
        with pytest.raises(SystemExit, match="2"):
            run_program("paste", tmp_path / file, recipe)
    assert "exists already" in capsys.readouterr().err and not (tmp_path / "other.py").exists()


def test_discrete_actions(cook, capsys):
    """Nine actions, at first nearly uniform, an entropy that the library confirms; it plays."""
    names = cook("discrete_actions")
    actions = names["rollout"]["agents", "action"]
    assert actions.dtype == torch.int64 and {*actions.unique().tolist()} == {*range(9)}
    assert names["history"][0]["entropy"] == pytest.approx(math.log(9), rel=0.01)
    pi = torch.distributions.Categorical(logits=torch.tensor([[0.3, -1.0, 2.0], [0.0, 5.0, 1.0]]))
    torch.testing.assert_close(names["entropy_by_hand"](pi), pi.entropy().mean())
    assert has_learned(names)
    policy = use_policy(names["folder"] / "policy.pt")
    data = names["policy"](names["env"].reset())
    chosen = policy(data["agents", "observation"])
    assert chosen.tolist() == data["agents", "logits"].argmax(-1).tolist()
    run_program("play_policy", names["folder"] / "policy.pt")
    assert "of 200 episodes ended in time" in capsys.readouterr().out


def test_own_scenario(cook):
    """An episode ends once all robots are close to each other; contacts cost, and are counted."""
    names = cook("own_scenario")
    assert names["folder"].exists() and has_learned(names)
    assert {"test_terminated_rate", "test_collisions"} <= names["history"][-1].keys()
    env = names["make_env"](4, seed=0)
    for agent, x in zip(env.agents, (-0.06, 0.0, 0.5), strict=True):  # the first two touch
        agent.set_pos(torch.tensor([x, 0.0]), batch_index=None)
    together = torch.tensor([[-0.15, 0.0], [0.0, 0.0], [0.15, 0.0]])
    for agent, place in zip(env.agents, together, strict=True):
        agent.set_pos(place, batch_index=3)
    scenario = env.scenario
    touched = torch.stack([scenario.touched(agent) for agent in env.agents], dim=-1)
    assert touched.tolist() == 3 * [[1, 1, 0]] + [[0, 0, 0]]
    assert scenario.done().tolist() == [False, False, False, True]
    rewards = [scenario.reward(agent)[0].item() for agent in env.agents]
    assert rewards[0] == rewards[1] == pytest.approx(rewards[2] - 1)


def test_discrete_actions_in_an_own_scenario(cook):
    """Two recipes fit together."""
    names = cook("own_scenario", "discrete_actions", n_iters=1)
    assert names["scenario"] == "Meet" and names["action_spec"].space.n == 9
    assert has_learned(names)


def test_agent_ids(cook):
    """Agents that observe the same have values of their own, from one network."""
    names = cook("agent_ids")
    network, n_obs = names["critic_network"], names["n_obs"]
    assert [*network.parameters()][0].shape == (TINY["num_cells"], n_obs + 3 * n_obs + 3)
    same = torch.zeros(5, 3, n_obs)
    assert network(same).shape == (5, 3, 1) and len(network(same)[0].unique()) == 3
    other = same.clone()
    other[:, 1, 2] = 1.0  # seen by all, through the team's observations
    assert (network(other) != network(same)).all()
    assert has_learned(names)


def test_value_normalization(cook, tmp_path):
    """The value loss is that of normalized numbers; a resumed run has the same statistics."""
    names = cook("value_normalization", folder="whole")
    cook("value_normalization", folder="parts", n_iters=1)
    cook("value_normalization", folder="parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")
    saved = [load(tmp_path / name)["value_norm"] for name in ("whole", "parts")]
    torch.testing.assert_close(*saved, rtol=0, atol=0)
    assert saved[0]["count"] == 2 * 2 * 600 * 3  # iterations, epochs, frames, agents
    loss_module, norm = names["loss_module"], names["value_norm"]
    data = names["frames"][:100]
    loss = loss_module(data.clone())["loss_critic"]
    with torch.no_grad():
        value = norm.normalize(names["critic_network"](data["agents", "observation"]))
    error = (value - norm.normalize(data["value_target"])).abs()
    by_hand = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    torch.testing.assert_close(loss.detach(), names["cfg"].critic_coeff * by_hand)


def steps_taken(names):
    """Return how many gradient steps the optimizer has taken."""
    [steps] = {int(state["step"]) for state in names["optimizer"].state.values()}
    return steps


def test_stop_by_kl(cook, mappo):
    """A large limit changes nothing at all; a small one ends each iteration after one epoch."""
    edit = "target_kl = 0.01"
    free = cook("stop_by_kl", edits={edit: "target_kl = 1e6"}, folder="free")
    assert without_seconds(free["history"]) == without_seconds(mappo["history"])
    strict = cook("stop_by_kl", edits={edit: "target_kl = 1e-6"}, folder="strict", lr=1e-3)
    assert steps_taken(free) == 2 * 2 * 6 and steps_taken(strict) == 2 * 6


def test_fine_tune(cook, mappo):
    """The run starts with the weights of the other one, policy and critic."""
    old = load(mappo["folder"])
    names = cook("fine_tune", edits={"runs/FOLDER": str(mappo["folder"])}, n_iters=1, lr=1e-12)
    torch.testing.assert_close(
        names["untrained_policy"].state_dict(), old["best_policy"], rtol=0, atol=0
    )
    torch.testing.assert_close(names["critic"].state_dict(), old["critic"])


def test_another_simulator(cook, capsys):
    """The lesson's loop trains in PettingZoo, with episodes that are cut off, not ended."""
    pytest.importorskip("mpe2", reason="needs pettingzoo and mpe2")
    small = {"max_steps": 10, "frames_per_batch": 60, "minibatch_size": 20}
    names = cook("another_simulator", **small, evaluation_episodes=2)
    assert names["rollout"]["next", "agents", "reward"].shape == (6, 10, 3, 1)
    assert names["rollout"]["next", "truncated"][:, -1].all()
    assert not names["rollout"]["next", "terminated"].any()
    assert "episode_reward with random actions: -" in capsys.readouterr().out
    assert has_learned(names)


def test_gpu(cook):
    """The settings fit together, and the command line still overrides them."""
    names = cook("gpu")
    assert names["cfg"].lr == 1e-3 and names["cfg"].frames_per_batch == TINY["frames_per_batch"]
    [(_, _, cell)] = places("gpu")
    lesson = read_cells()
    cfg = run_cells([lesson["imports"], lesson["config"], cell.source])["cfg"]
    assert cfg.num_vmas_envs == 6000 and cfg.frames_per_batch % cfg.minibatch_size == 0


# -------------------------------------------------------------------------------------- programs


def acts_alike(names):
    """Return the module with the weights of a run's policy, compared with the policy itself."""
    policy, data = use_policy(names["folder"] / "policy.pt"), names["env"].reset()
    with torch.no_grad():
        expected = names["policy"].get_dist(data).deterministic_sample
        torch.testing.assert_close(policy(data["agents", "observation"]), expected)
    return policy


def test_the_policy_elsewhere(mappo, tmp_path):
    """The module acts like the lesson's policy, moves as a whole, and can be exported."""
    policy = acts_alike(mappo)
    observation = torch.rand(5, mappo["n_obs"])
    assert policy(observation[0]).shape == (2,)  # one robot
    path = shutil.copy(mappo["folder"] / "policy.pt", tmp_path)
    run_program("use_policy", path)
    exported = torch.export.load(tmp_path / "policy.pt2").module()
    for robots in (2, 5):
        torch.testing.assert_close(exported(observation[:robots]), policy(observation[:robots]))
    with pytest.raises(SystemExit, match="2"):
        run_program("use_policy", path)  # nothing is overwritten
    assert {value.device.type for value in policy.to("meta").state_dict().values()} == {"meta"}


def test_onnx(trained):
    """ONNX Runtime computes what PyTorch computes, for a team of any size."""
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    policy = run_program("use_policy", trained)["policy"]
    session = runtime.InferenceSession(str(trained.with_suffix(".onnx")))
    for robots in (1, 2, 7):
        observation = torch.rand(robots, policy.n_obs)
        [action] = session.run(None, {"observation": observation.numpy()})
        torch.testing.assert_close(torch.from_numpy(action), policy(observation).detach())


def test_separate_policies_elsewhere(cook):
    """Each robot has its own weights in the module, too."""
    acts_alike(cook(share_parameters_policy=False, n_iters=1))


@pytest.fixture
def trained(tmp_path):
    """Return a policy that has learned the task, in a folder like a run's."""
    weights = torch.load(REPOSITORY / "teaching/trained/mappo-15.pt", weights_only=True)["policy"]
    network = {"n_agents": 3, "n_agent_inputs": 18}
    bounds = {"low": -torch.ones(3, 2), "high": torch.ones(3, 2)}
    torch.save({"network": network, "state_dict": weights, **bounds}, tmp_path / "policy.pt")
    settings = {"scenario_name": "navigation", "scenario_options": {}, "n_agents": 3}
    record = json.dumps({**settings, "max_steps": 100})
    (tmp_path / "hyperparameters.json").write_text(record)
    return tmp_path / "policy.pt"


def test_play(trained, capsys):
    """A good policy succeeds in plain VMAS, too."""
    run_program("play_policy", trained)
    fraction = re.fullmatch(
        r"(0\.\d+|1\.000) of 200 episodes ended in time\n", capsys.readouterr().out
    )
    assert float(fraction[1]) > 0.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.pt"], "policy is 'none.pt', but there is no file"),
        (["policy.pt", "--video", "film.mp4"], "video is 'film.mp4', but must be a new file"),
        (["own.pt"], "scenario_name is 'Meet', not one of VMAS"),
        (["separate.pt", "--n-agents", "4"], "n_agents is 4, but must be 3 for this policy"),
    ],
)
def test_play_refuses(trained, capsys, monkeypatch, words, message):
    """One sentence, and status 2."""
    monkeypatch.chdir(trained.parent)
    saved = torch.load(trained, weights_only=True)
    weights = {key: torch.stack(3 * [value]) for key, value in saved["state_dict"].items()}
    torch.save({**saved, "state_dict": weights}, "separate.pt")
    if words == ["own.pt"]:
        trained.rename("own.pt")
        record = trained.with_name("hyperparameters.json")
        record.write_text(record.read_text().replace("navigation", "Meet"))
    with pytest.raises(SystemExit, match="2"):
        run_program("play_policy", *words)
    assert message in capsys.readouterr().err


def test_several_seeds(tmp_path, capsys):
    """Mean and interval of each algorithm, over the frames that all its runs have reached."""
    for name, mappo, values in (
        ("a", True, "0.2 0.4"),
        ("b", True, "0.4 0.8 1.0"),
        ("c", False, "0"),
    ):
        folder = tmp_path / "seeds" / name
        folder.mkdir(parents=True)
        (folder / "hyperparameters.json").write_text(json.dumps({"mappo": mappo}))
        rows = [f"{100 * n},,\n{100 * n + 50},{x},\n" for n, x in enumerate(values.split(), 1)]
        table = "frames,test_success_rate,other\n" + "".join(rows)
        (folder / "metrics.csv").write_text(table)
    names = run_program("several_seeds", tmp_path / "seeds")
    first, second, mean, _, mean_of_one = names["axes"].get_lines()
    assert "MAPPO, mean of 2 runs" in mean.get_label() and "IPPO" in mean_of_one.get_label()
    assert [*mean.get_xdata()] == [150, 250]
    assert [*mean.get_ydata()] == pytest.approx([0.3, 0.6])
    assert [len(line.get_xdata()) for line in (first, second)] == [2, 3]  # each run to its end
    assert [*mean_of_one.get_ydata()] == [0]
    assert (tmp_path / "seeds.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="2"):
        run_program("several_seeds", tmp_path / "seeds")  # the picture is not overwritten
    assert "seeds.png exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_program("several_seeds", tmp_path / "seeds", "--metric", "no_such")
    assert "must contain runs with no_such" in capsys.readouterr().err
    run_program("several_seeds", tmp_path / "seeds", "--metric", "test_success_rate")
    assert (tmp_path / "seeds-test_success_rate.png").exists()


def test_a_single_test_of_each_seed_can_be_seen(tmp_path):
    """With one test a run there is no line to draw, so each point is marked."""
    for seed in "01":
        (tmp_path / "seeds" / seed).mkdir(parents=True)
        (tmp_path / "seeds" / seed / "hyperparameters.json").write_text('{"mappo": true}')
        (tmp_path / "seeds" / seed / "metrics.csv").write_text(
            "frames,test_success_rate\n100,1.0\n"
        )
    axes = run_program("several_seeds", tmp_path / "seeds")["axes"]
    assert [line.get_marker() for line in axes.get_lines()] == [".", ".", "o"]
    assert axes.get_ylim() == (-0.05, 1.05)


# --------------------------------------------------------------------------------------- results


def test_results_have_a_command_each():
    """A row of results.csv says what was run and what came out."""
    with open(COOKBOOK / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["recipe", "algorithm", "seed", "iterations", "measure", "value", "command"]
    assert rows and list(rows[0]) == columns
    for row in rows:
        assert {*row["recipe"].split(" + ")} <= {*RECIPES} and row["command"].startswith("python ")
        assert float(row["value"]) == float(row["value"])
