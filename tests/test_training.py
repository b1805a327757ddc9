"""The script trains: its files and its output, and the parts of the method that prose and hyperparameters promise."""

import ast
import io
import itertools
import json
import re
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import BAR, TEXT, TINY, measurements, run_inside, start
from PIL import Image
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type
from vmas.simulator.environment import Environment

COLUMNS = ("iteration,frames,seconds,episode_reward_mean,success_rate,loss_objective,loss_critic,loss_entropy,"
           "entropy,kl_approx,clip_fraction,explained_variance")


def folder_of(process):
    """The folder in which a run says that its results are."""
    return Path(re.search(r"^The results of this run are in (.+)$", process.stdout, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs in one output folder, two at a time, and what the first two left before the others came."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:
        mappo, ippo = pool.map(start, [folder] * 2, ["--mappo", "--no-mappo"])
        files = {path: path.read_bytes() for path in folder.rglob("*.*")}
        again, other_seed = pool.map(start, [folder] * 2, ["--seed=0", "--seed=1"])
    return {"mappo": mappo, "ippo": ippo, "again": again, "other seed": other_seed, "files": files}


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_a_run_leaves_its_files(runs, algorithm):
    """A run succeeds and leaves in a folder of its own what Section 8 and the record keeping promise."""
    assert runs[algorithm].returncode == 0, runs[algorithm].stderr
    folder = folder_of(runs[algorithm])
    assert re.fullmatch(rf"{algorithm}-navigation-seed0-\d{{8}}-\d{{6}}", folder.name)
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    assert header == COLUMNS
    assert [row.split(",")[:2] for row in rows] == [["0", "600"], ["1", "1200"]]
    expected = {"metrics.csv", "hyperparameters.json", "checkpoint.pt", "policy.pt", "learning_curve.png"}
    names = {path.name for path in folder.iterdir()}
    assert names - {"rollout.gif"} == expected
    assert json.loads((folder / "hyperparameters.json").read_text()).items() >= TINY.items()
    with Image.open(folder / "learning_curve.png") as picture:
        assert picture.format == "PNG"
    if "rollout.gif" in names:
        with Image.open(folder / "rollout.gif") as film:
            assert film.format == "GIF" and film.n_frames > 1
    else:
        assert len(re.findall(r"^No rollout.gif, as OpenGL is missing .*$", runs[algorithm].stdout, re.MULTILINE)) == 1


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_a_run_prints_the_evaluation_and_nothing_alarming(runs, algorithm):
    """Users see the progress bar and the table; no warning or log line of a library tells them to worry."""
    process = runs[algorithm]
    assert re.search(rf"^{TINY['evaluation_episodes']} episodes, .*untrained +trained$", process.stdout, re.MULTILINE)
    for name in ("episode reward per agent", "success rate", "episode length in steps"):
        assert re.search(rf"^{name}( +-?\d+\.\d{{3}}){{2}}$", process.stdout, re.MULTILINE)
    assert BAR.search(process.stderr)
    assert [line for line in process.stderr.splitlines() if line.strip() and not BAR.match(line)] == []
    printed = process.stdout.replace(str(folder_of(process)), "") + process.stderr
    assert not re.search(r"warn|\b(DEBUG|INFO|ERROR|CRITICAL)\b", printed, re.IGNORECASE)


def test_a_later_run_leaves_earlier_ones_alone(runs):
    """Runs share an output folder, but none writes into the folder of another."""
    assert folder_of(runs["again"]) != folder_of(runs["mappo"])
    assert len(runs["files"]) >= 10
    assert {path: path.read_bytes() for path in runs["files"]} == runs["files"]


def test_the_seed_decides_everything(runs):
    """The same seed gives the same numbers to the last digit, another seed gives other ones."""
    first = measurements(folder_of(runs["mappo"]))
    assert measurements(folder_of(runs["again"])) == first
    assert measurements(folder_of(runs["other seed"])) != first


def test_training_beats_the_untrained_policy(tmp_path):
    """A tenth of the default work already earns far more than the untrained policy.

    Seeds 0, 1 and 2 gained 2.4, 2.7 and 5.1. A policy that learns nothing gains 0, one that climbs in the wrong
    direction loses.
    """
    process = start(tmp_path, "--n-iters=3", "--num-epochs=10", "--frames-per-batch=6000", "--minibatch-size=400",
                    "--evaluation-episodes=50")
    untrained, trained = re.search(r"^episode reward per agent +(\S+) +(\S+)$", process.stdout, re.MULTILINE).groups()
    assert float(trained) > float(untrained) + 1.5


def dependence(script, module, key):
    """How strongly each agent's output (rows) depends on each agent's observation (columns), by gradients."""
    observation = script["batch"]["agents", "observation"].flatten(0, 1).clone().requires_grad_()
    output = module(TensorDict({"agents": {"observation": observation}}, observation.shape[:1]))["agents", key]
    gradients = [torch.autograd.grad(output[:, agent].sum(), observation, retain_graph=True)[0]
                 for agent in range(script["n_agents"])]
    return torch.stack(gradients).abs().sum(dim=(1, 3))


def test_the_mappo_critic_sees_the_team_and_the_ippo_critic_one_agent(mappo, ippo):
    """This is the one difference between the two algorithms."""
    own = torch.eye(mappo["n_agents"], dtype=torch.bool)
    assert (dependence(mappo, mappo["critic"], "state_value") > 0).all()
    assert torch.equal(dependence(ippo, ippo["critic"], "state_value") > 0, own)


def test_no_policy_sees_other_agents(mappo, ippo):
    """Execution is decentralised in both algorithms: an agent acts on its own observation."""
    own = torch.eye(mappo["n_agents"], dtype=torch.bool)
    for script in (mappo, ippo):
        assert torch.equal(dependence(script, script["policy"], "loc") > 0, own)


def test_training_counts_the_first_episode_of_each_environment(tmp_path, monkeypatch):
    """Of the later ones, only those that succeed soon would end before the batch does, which would flatter the policy.

    Here episodes end at random, and every environment ends several in the batch.
    """
    build = Environment.__init__

    def build_with_random_ends(self, scenario, *args, **kwargs):
        scenario.done = lambda: (self.steps > 0) & (torch.rand(len(self.steps)) < 0.1)
        build(self, scenario, *args, **kwargs)

    monkeypatch.setattr(Environment, "__init__", build_with_random_ends)
    script = run_inside(tmp_path, "--n-iters=1", "--no-mappo")
    reached, rewards = [], []
    for episodes in script["batch"]["next"]:
        end = episodes["done"].flatten().tolist().index(True)
        assert episodes["done"][end + 1:].any()
        reached.append(episodes["terminated"][end].item())
        rewards.append(episodes["agents", "reward"][:end + 1].sum(dim=0).mean())
    [row] = script["metrics"]
    assert row["success_rate"] == pytest.approx(sum(reached) / len(reached), abs=1e-6)
    assert row["episode_reward_mean"] == pytest.approx(torch.stack(rewards).mean().item(), abs=1e-5)


def test_an_evaluation_episode_counts_up_to_its_first_done(mappo, monkeypatch):
    """Environment i reaches its goals after 20 + 10 i steps, so of ten, one is cut off; the rest is added up by hand."""
    names, make_env = mappo["evaluate"].__globals__, mappo["make_env"]
    ends = 20 + 10 * torch.arange(10)

    def make_env_that_ends(num_envs, seed):
        env = make_env(num_envs, seed)
        simulator = env.base_env._env
        simulator.scenario.done = lambda: simulator.steps == ends
        return env

    monkeypatch.setitem(names, "make_env", make_env_that_ends)
    results = mappo["evaluate"](mappo["policy"])
    assert results["success rate"] == pytest.approx(0.9)
    assert results["episode length in steps"] == pytest.approx(ends.clamp_max(100).float().mean().item())

    env, rewards, collisions = make_env(10, mappo["evaluation_seed"]), 0, 0
    now = env.reset()
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        for step in range(100):
            now = env.step(mappo["policy"](now))
            running = (step < ends).float()
            agents = now["next", "agents"]
            rewards += (agents["reward"].squeeze(-1).mean(dim=1) * running).mean().item()
            collisions -= (agents["info", "agent_collisions"].squeeze(-1).mean(dim=1) * running).mean().item()
            now = env.step_mdp(now)
    assert results["episode reward per agent"] == pytest.approx(rewards, abs=1e-4)
    assert results["collisions per episode and agent"] == pytest.approx(collisions, abs=1e-6) and collisions > 0


def gae(reward, value, next_value, done, terminated, gamma, lmbda):
    """Generalised advantage estimation of one agent's frames in one environment, step by step from the last one."""
    advantages, following = [], 0.0
    for t in reversed(range(len(reward))):
        error = reward[t] + (0.0 if terminated[t] else gamma * next_value[t]) - value[t]
        following = error + (0.0 if done[t] else gamma * lmbda * following)
        advantages.insert(0, following)
    return advantages


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_advantages_agree_with_plain_loops(algorithm, request):
    """GAE lends the team's flags to every agent, goes on after a truncated end and stops after a terminated one.

    A real batch is cut at two more places, as short runs seldom reach the goals: environment 1 terminates at step 40,
    environment 2 is truncated at step 50.
    """
    script = request.getfixturevalue(algorithm)
    batch, gamma, critic = script["batch"].clone(), script["gamma"], script["critic_network"]
    batch["next", "terminated"][1, 40] = batch["next", "done"][1, 40] = True
    batch["next", "truncated"][2, 50] = batch["next", "done"][2, 50] = True
    done, terminated = batch["next", "done"].squeeze(-1), batch["next", "terminated"].squeeze(-1)
    truncated = done & ~terminated
    assert terminated.any() and truncated[:, -1].any()  # also of the time limit itself
    with torch.no_grad():
        script["estimate_advantages"](batch)
        reward = batch["next", "agents", "reward"].squeeze(-1)
        value, next_value = (critic(part["agents", "observation"]).squeeze(-1) for part in (batch, batch["next"]))

    advantage = torch.empty_like(reward)
    for row, agent in itertools.product(range(len(batch)), range(script["n_agents"])):
        arguments = [tensor[row, :, agent].tolist() for tensor in (reward, value, next_value)]
        flags = done[row].tolist(), terminated[row].tolist()
        advantage[row, :, agent] = torch.tensor(gae(*arguments, *flags, gamma, script["lmbda"]))
    target = batch["value_target"].squeeze(-1)
    torch.testing.assert_close(batch["advantage"].squeeze(-1), advantage, atol=1e-4, rtol=0)
    torch.testing.assert_close(target, advantage + value, atol=1e-4, rtol=0)
    torch.testing.assert_close(target[terminated], reward[terminated], atol=1e-4, rtol=0)
    torch.testing.assert_close(target[truncated], (reward + gamma * next_value)[truncated], atol=1e-4, rtol=0)


def test_an_epoch_uses_every_frame_once(mappo):
    """The buffer deals out the whole batch in every epoch, each time in another order."""
    frames = mappo["batch"].reshape(-1).clone()
    tags = torch.arange(len(frames))
    frames["next", "agents", "reward"][:, 0, 0] = tags.float()
    buffer = mappo["replay_buffer"]
    buffer.empty()
    buffer.extend(frames)
    orders = [torch.cat([minibatch["next", "agents", "reward"][:, 0, 0] for minibatch in buffer]).long()
              for _ in range(2)]
    assert all(torch.equal(order.sort().values, tags) for order in orders)
    assert not torch.equal(*orders)


def stated_shapes(text, sizes):
    """Each shape in the text whose parts are names in `sizes` or numbers, as (the words before it, its parts)."""
    text = re.sub(r"\n# ", " ", text)
    for found in re.finditer(r"\((\w+(?:, \w+)+|\w+,)\)", text):
        parts = found[1].strip(",").split(", ")
        if all(part in sizes or part.isdigit() for part in parts):
            yield text[:found.start()].rstrip(" #:,"), parts


def test_stated_shapes_are_the_real_ones(mappo):
    """Every shape stated in Sections 2 to 7, in prose, in the table or behind code, is that of the real tensor.

    A shape that is added to the text needs an entry here: the words before it and the tensor that it speaks of.
    """
    batch = mappo["batch"]
    with torch.no_grad():
        step = mappo["env"].step(mappo["policy"](mappo["env"].reset()))
        mappo["critic"](step)
    sizes = {name: mappo[name] for name in ("num_vmas_envs", "n_agents", "n_obs", "max_steps", "frames_per_batch",
                                            "minibatch_size")}
    sizes["n_actions"] = mappo["action_spec"].shape[-1]
    assert len({*sizes.values()}) == len(sizes)
    tensors = {
        "bounded": [mappo["action_spec"]],
        "observations": [step["agents", "observation"]],
        "standard deviation": [step["agents", "loc"], step["agents", "scale"]],
        "PPO will need it": [step["agents", "action_log_prob"]],
        "gives a value for each agent": [step["agents", "state_value"]],
        "batches of shape": [batch],
        "batch = collector.next()": [batch],
        '"advantage" and "value_target"': [batch["advantage"], batch["value_target"]],
        "replay_buffer.extend(batch.reshape(-1).select(": [mappo["replay_buffer"][:]],
        "for minibatch in replay_buffer": [mappo["minibatch"]],
        'done = batch["next", "done"].squeeze(-1)': [mappo["done"], mappo["first"]]}
    rows, used = [], set()
    sections = [section for section in TEXT.split("\n# ## ") if section[0] in "234567"]
    for before, parts in stated_shapes("".join(sections), sizes):
        if parts[0].isdigit():
            continue  # the numbers of the next test
        if before.endswith("` |"):
            rows.append(ast.literal_eval(before.split("`")[-2]))
            meant = [step[rows[-1]]]
        else:
            [words] = [words for words in tensors if before.endswith(words)] or [before[-100:]]
            used.add(words)
            meant = tensors[words]
        expected = tuple(sizes[part] if part in sizes else int(part) for part in parts)
        assert {tuple(tensor.shape) for tensor in meant} == {expected}, before[-100:]
    assert used == {*tensors}
    assert len(rows) == 6 and torch.equal(step[rows[5]], step[rows[3]] | step[rows[4]])


def test_stated_numbers_are_those_of_the_defaults(mappo):
    """With the defaults of Section 1 the shapes of the table, and the critic's inputs, are the numbers in the prose."""
    section_1 = ast.parse(TEXT.split("\n# ## 1. ")[1].split("# %%")[1])
    default = {line.targets[0].id: line.value.value for line in section_1.body if type(line.value) is ast.Constant}
    assert default["n_agents"] == mappo["n_agents"] and default["scenario_name"] == mappo["scenario_name"]
    sizes = {"num_vmas_envs": default["frames_per_batch"] // default["max_steps"], "n_agents": default["n_agents"],
             "n_obs": mappo["n_obs"], "n_actions": mappo["action_spec"].shape[-1]}
    section_2, section_4 = (TEXT.split(f"\n# ## {number}. ")[1].split("\n# %%")[0] for number in (2, 4))
    shapes = [(before, tuple(sizes.get(part) or int(part) for part in parts))
              for before, parts in stated_shapes(section_2, sizes)]
    table = [shape for before, shape in shapes if before.endswith("` |")]
    stated = [shape for before, shape in shapes if not before.endswith("` |")]
    assert len(table) == 6 and stated == table[:4] and "and three times (" in section_2
    assert table[3] == table[4] == table[5]
    assert f"({sizes['n_agents'] * sizes['n_obs']} with the defaults)" in section_4
    assert f"n_obs numbers ({sizes['n_obs']})" in section_4


def test_the_script_stays_short():
    """At most 300 lines of code; blank lines, prose (comments and docstrings) and "Many processes" do not count."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = {line for token in tokenize.generate_tokens(io.StringIO(TEXT).readline) if token.type not in layout
            for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(TEXT)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            code -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    aside = {line for line, section in enumerate_sections() if section.startswith("Many processes")}
    assert len(aside & code) <= 25 and len(code - aside) <= 300


def enumerate_sections():
    """Each line's number and the heading of the section that it stands in."""
    heading = ""
    for number, line in enumerate(TEXT.splitlines(), start=1):
        heading = line[5:] if line.startswith("# ## ") else heading
        yield number, heading
