"""The method: what the prose and the hyperparameters promise, checked against plain PyTorch."""

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import smooth_l1_loss
from torchrl.envs import ExplorationType, set_exploration_type

from cells import cell_that_defines
from conftest import load, options, run_inside


def dependence(script, module, key):
    """How each agent's output (rows) depends on each agent's observation (columns)."""
    observation = script["batch"]["agents", "observation"].flatten(0, 1).clone().requires_grad_()
    data = TensorDict({"agents": {"observation": observation}}, observation.shape[:1])
    output = module(data)["agents", key]
    gradients = [
        torch.autograd.grad(output[:, agent].sum(), observation, retain_graph=True)[0]
        for agent in range(script["n_agents"])
    ]
    return torch.stack(gradients).abs().sum(dim=(1, 3))


def test_the_mappo_critic_sees_the_team_and_the_ippo_critic_one_agent(mappo, ippo):
    """This is the one difference between the two algorithms."""
    own = torch.eye(mappo["n_agents"], dtype=torch.bool)
    assert (dependence(mappo, mappo["critic"], "state_value") > 0).all()
    assert torch.equal(dependence(ippo, ippo["critic"], "state_value") > 0, own)


def test_no_policy_sees_other_agents(mappo, ippo):
    own = torch.eye(mappo["n_agents"], dtype=torch.bool)
    for script in (mappo, ippo):
        assert torch.equal(dependence(script, script["policy"], "loc") > 0, own)


def test_values_of_one_situation(mappo, ippo):
    """A shared centralized critic gives one number for all agents, a local one three."""
    for script, numbers in ((mappo, 1), (ippo, 3)):
        values = script["critic"](script["env"].reset())["agents", "state_value"][0]
        assert values.shape == (3, 1) and len(values.unique()) == numbers


def test_both_algorithms_start_alike(mappo, ippo):
    """With one seed they have the same untrained policy and learn from the same first batch."""
    checkpoints = [load(script["folder"]) for script in (mappo, ippo)]
    torch.testing.assert_close(
        *[found["untrained_policy"] for found in checkpoints], rtol=0, atol=0
    )
    first, second = [script["history"] for script in (mappo, ippo)]
    assert first[0]["episode_reward"] == second[0]["episode_reward"]
    assert first[1]["episode_reward"] != second[1]["episode_reward"]


@pytest.fixture(scope="module")
def unshared(tmp_path_factory, lean):
    """Every agent has networks of its own, and each robot is paid for itself.

    The learning rate is annealed, and gradients are clipped hard.
    """
    words = options(
        run_folder=tmp_path_factory.mktemp("unshared") / "run",
        scenario_options='{"shared_rew": false}',
        max_grad_norm=1e-3,
        lr=1e-3,
    )
    flags = "--no-share-parameters-policy --no-share-parameters-critic --anneal-lr"
    return run_inside(*words, *flags.split(), path=lean)


@pytest.mark.parametrize("name", ["untrained_policy", "critic"])
def test_networks_orthogonal_init(unshared, mappo, name):
    """Also where each agent has its own: each matrix for itself, and no two alike."""
    network = unshared[f"{name.removeprefix('untrained_')}_network"]
    unshared["orthogonal_init"](network, 0.01)
    weights = [value for key, value in network.named_parameters() if key.endswith("weight")]
    biases = [value for key, value in network.named_parameters() if key.endswith("bias")]
    assert len(weights) == len(biases) == 3 and all((bias == 0).all() for bias in biases)
    for weight, gain in zip(weights, (2**0.5, 2**0.5, 0.01), strict=True):
        assert weight.ndim == 3 and len(weight) == unshared["n_agents"]
        assert not torch.equal(weight[0], weight[1])
        for matrix in weight.detach():
            tall = matrix if len(matrix) >= len(matrix.T) else matrix.T
            unit = torch.eye(len(tall.T)) * gain**2
            torch.testing.assert_close(tall.T @ tall, unit, atol=1e-5, rtol=1e-4)


def test_the_untrained_policy_acts_nearly_alike_everywhere(mappo):
    with torch.no_grad():
        observations = mappo["batch"].select(("agents", "observation")).clone()
        agents = mappo["untrained_policy"].get_dist_params(observations)["agents"]
    assert agents["loc"].abs().max() < 0.1 and agents["scale"].std() < 0.1


def test_every_agent_can_have_networks_of_its_own(unshared):
    """They take n_agents times the weights, all of them learn, and MAPPO's values differ then."""
    script, own = unshared, torch.eye(unshared["n_agents"], dtype=torch.bool)
    for module, before in ((script["policy"], script["untrained_policy"]),):
        for after, start in zip(module.parameters(), before.parameters(), strict=True):
            assert len(after) == script["n_agents"]
            assert all((after[i] != start[i]).any() for i in range(script["n_agents"]))
    assert torch.equal(dependence(script, script["policy"], "loc") > 0, own)
    assert (dependence(script, script["critic"], "state_value") > 0).all()
    values = script["critic"](script["env"].reset())["agents", "state_value"][0]
    assert len(values.unique()) == script["n_agents"]


def test_the_learning_rate_is_annealed(unshared, mappo):
    """After the last of two iterations it is half the first one's: the next would have 0."""
    assert unshared["optimizer"].param_groups[0]["lr"] == pytest.approx(unshared["lr"] / 2)
    assert mappo["optimizer"].param_groups[0]["lr"] == mappo["lr"]


def test_gradients_are_clipped(unshared, mappo):
    """Those of the last minibatch are still there; all of them together have the norm allowed."""
    norms = [
        torch.cat([p.grad.flatten() for p in script["loss_module"].parameters()]).norm().item()
        for script in (unshared, mappo)
    ]
    assert norms[0] == pytest.approx(unshared["max_grad_norm"], rel=1e-3)
    assert 10 * unshared["max_grad_norm"] < norms[1] < mappo["max_grad_norm"]


def test_scenario_options_reach_the_scenario(unshared, mappo):
    """Paid for itself, each robot gets its own progress; without, all get the team's."""
    for script, alike in ((unshared, False), (mappo, True)):
        step = script["batch"]["next", "agents"]
        progress = step["info", "pos_rew"]
        assert torch.equal(progress[..., :1, :].expand_as(progress), progress) == alike


def gae(reward, value, next_value, done, terminated, gamma, lmbda):
    """Generalized advantage estimation of one agent's frames in one environment."""
    advantages, following = [], 0.0
    for t in reversed(range(len(reward))):
        error = reward[t] + (0.0 if terminated[t] else gamma * next_value[t]) - value[t]
        following = error + (0.0 if done[t] else gamma * lmbda * following)
        advantages.insert(0, following)
    return advantages


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_advantages_agree_with_plain_loops(algorithm, request):
    """GAE lends the team's flags to every agent, and tells truncated from terminated ends.

    A real batch is cut at two more places, as short runs seldom reach the goals: environment 1
    terminates at step 7, environment 2 is truncated at step 12.
    """
    script = request.getfixturevalue(algorithm)
    batch, gamma, critic = script["batch"].clone(), script["gamma"], script["critic_network"]
    batch["next", "terminated"][1, 7] = batch["next", "done"][1, 7] = True
    batch["next", "truncated"][2, 12] = batch["next", "done"][2, 12] = True
    done, terminated = (batch["next", key].squeeze(-1) for key in ("done", "terminated"))
    truncated = done & ~terminated
    assert terminated.any() and truncated[:, -1].any()  # also of the time limit itself
    with torch.no_grad():
        script["estimate_advantages"](batch)
        reward = batch["next", "agents", "reward"].squeeze(-1)
        value, next_value = (
            critic(part["agents", "observation"]).squeeze(-1) for part in (batch, batch["next"])
        )
    advantage = torch.empty_like(reward)
    for row, agent in itertools.product(range(len(batch)), range(script["n_agents"])):
        numbers = [tensor[row, :, agent].tolist() for tensor in (reward, value, next_value)]
        flags = done[row].tolist(), terminated[row].tolist()
        advantage[row, :, agent] = torch.tensor(gae(*numbers, *flags, gamma, script["lmbda"]))
    target = batch["value_target"].squeeze(-1)
    torch.testing.assert_close(batch["advantage"].squeeze(-1), advantage, atol=1e-4, rtol=0)
    torch.testing.assert_close(target, advantage + value, atol=1e-4, rtol=0)
    torch.testing.assert_close(target[terminated], reward[terminated], atol=1e-4, rtol=0)


def plain_loss(script, frames, normalize):
    """Objective and value loss of a minibatch in plain PyTorch, from network outputs alone."""
    observation, action = frames["agents", "observation"], frames["agents", "action"]
    loc, scale = script["policy"][0].module(observation)
    z = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))  # the bounds of navigation's actions
    log_normal = -((z - loc) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2
    log_prob = (log_normal - (1 - z.tanh() ** 2).log()).sum(dim=-1)
    advantage = frames["advantage"].squeeze(-1)
    if normalize:  # over the frames, for each agent separately
        advantage = (advantage - advantage.mean(dim=0)) / advantage.std(dim=0)
    ratio = (log_prob - frames["agents", "action_log_prob"]).exp()
    epsilon = script["clip_epsilon"]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
    value = script["critic_network"](observation)
    outside = ((ratio - 1).abs() > epsilon).float().mean()
    return (
        -gain.mean(),
        script["critic_coeff"] * smooth_l1_loss(value, frames["value_target"]),
        outside,
    )


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_that_of_plain_pytorch(algorithm, normalize, request):
    """Values to 1e-5, gradients to 1e-5, on frames with ratios on both sides of the clipping."""
    script = request.getfixturevalue(algorithm)
    module, parameters = script["loss_module"], [*script["loss_module"].parameters()]
    frames = script["frames"][:128].clone()
    noise = torch.Generator().manual_seed(0)
    old = frames["agents", "action_log_prob"]
    frames["agents", "action_log_prob"] = old + 0.3 * torch.randn(old.shape, generator=noise)
    module.normalize_advantage = normalize
    losses = module(frames)
    module.normalize_advantage = True
    objective, critic, outside = plain_loss(script, frames, normalize)
    assert 0.2 < outside < 0.8
    torch.testing.assert_close(losses["loss_objective"], objective, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["loss_critic"], critic, atol=1e-5, rtol=1e-5)
    entropy_term = -script["entropy_eps"] * losses["entropy"]
    torch.testing.assert_close(losses["loss_entropy"].detach(), entropy_term)
    ours = torch.autograd.grad(losses["loss_objective"] + losses["loss_critic"], parameters)
    plain = torch.autograd.grad(objective + critic, parameters)
    assert sum(gradient.square().sum() for gradient in plain) > 1e-4
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


def test_the_entropy_is_that_of_the_squashed_normal(mappo):
    """It is sampled: many samples of the loss agree with many samples made by hand."""
    frames = mappo["frames"]
    with torch.no_grad():
        sampled = torch.stack([mappo["loss_module"](frames)["entropy"] for _ in range(30)]).mean()
        loc, scale = mappo["policy"][0].module(frames["agents", "observation"])
        z = loc + scale * torch.randn(200, *loc.shape)
        log_normal = -((z - loc) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2
        entropy = -(log_normal - (1 - z.tanh() ** 2).clamp_min(1e-6).log()).sum(dim=-1).mean()
    assert sampled.item() == pytest.approx(entropy.item(), abs=0.05)


def test_an_epoch_uses_every_frame_once(mappo):
    """The buffer deals out the whole batch in every epoch, each time in another order."""
    frames, buffer = mappo["frames"].clone(), mappo["replay_buffer"]
    tags = torch.arange(len(frames))
    frames["advantage"][:, 0, 0] = tags.float()
    buffer.empty()
    buffer.extend(frames)
    orders = [
        torch.cat([minibatch["advantage"][:, 0, 0] for minibatch in buffer]).long()
        for _ in range(2)
    ]
    assert all(torch.equal(order.sort().values, tags) for order in orders)
    assert not torch.equal(*orders)


def test_the_collector_acts_with_the_weights_that_learn(mappo):
    held = {parameter.data_ptr() for parameter in mappo["collector"].policy.parameters()}
    assert held == {parameter.data_ptr() for parameter in mappo["policy"].parameters()}
    assert held.isdisjoint(p.data_ptr() for p in mappo["untrained_policy"].parameters())


def test_measures_count_first_episodes_only(mappo):
    """Three environments, worked out by hand: a success, a time-out, two successes in a row."""
    done = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 1]], dtype=torch.bool)
    terminated = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    reward = torch.tensor([[1.0, 1, 1, 9], [2, 2, 2, 2], [5, 5, 9, 9]])
    touching = torch.tensor([[-1.0, 0, 0, -1], [0, 0, 0, 0], [0, -2, -1, -1]])
    agents = {
        "reward": torch.stack([reward, 3 * reward], dim=2).unsqueeze(-1),  # two agents
        "info": {"agent_collisions": torch.stack([touching, 0 * touching], dim=2).unsqueeze(-1)},
    }
    flags = {"done": done.unsqueeze(-1), "terminated": terminated.unsqueeze(-1)}
    measured = mappo["measure"](TensorDict({"next": {"agents": agents, **flags}}, [3, 4]))
    assert measured == {
        "episode_reward": pytest.approx(2 * (3 + 8 + 10) / 3),
        "success_rate": pytest.approx(2 / 3),
        "episode_length": pytest.approx((3 + 4 + 2) / 3),
        "collisions": pytest.approx((1 + 0 + 1) / 2 / 3),
    }


def test_the_evaluation_is_deterministic_play_from_its_seed(mappo):
    """Episodes of a stubborn length are added up step by step, without TorchRL's rollout."""
    env = mappo["make_env"](10, mappo["evaluation_seed"])
    now, reward, running = env.reset(), torch.zeros(10), torch.ones(10, dtype=torch.bool)
    length = torch.zeros(10)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(mappo["max_steps"]):
            now = env.step(mappo["policy"](now))
            reward += now["next", "agents", "reward"].squeeze(-1).mean(dim=1) * running
            length += running
            running &= ~now["next", "done"].squeeze(-1)
            now = env.step_mdp(now)
    trained = mappo["evaluation"]["trained"]
    assert trained["episode_reward"] == pytest.approx(reward.mean().item(), abs=1e-4)
    assert trained["episode_length"] == length.mean().item()
    assert mappo["evaluate"](mappo["policy"]) == trained


def test_measurements_of_an_update(mappo, ippo):
    """Before it: what the critic explained; from it: the loss's terms, means over minibatches."""
    for script in (mappo, ippo):
        row, frames = script["history"][-1], script["frames"]
        advantage, target = (frames[name].flatten() for name in ("advantage", "value_target"))
        explained = 1 - advantage.var() / target.var()
        assert row["explained_variance"] == pytest.approx(explained.item(), abs=1e-5)
        assert row["advantage_std"] == pytest.approx(advantage.std().item(), abs=1e-6)
        losses = script["minibatch_losses"]
        assert len(losses) == script["num_epochs"] * 600 // script["minibatch_size"]
        terms = ("loss_objective", "loss_critic", "loss_entropy")
        for name in (*terms, "entropy", "kl_approx", "clip_fraction"):
            mean = sum(one[name].item() for one in losses) / len(losses)
            assert row[name] == pytest.approx(mean, abs=1e-6), name


def test_the_learning_curves_show_the_measurements(mappo):
    """A line for this run in each panel, of the reward and of the success rate."""
    for panel, key in zip(mappo["panels"], ("episode_reward", "success_rate"), strict=True):
        [line] = panel.lines
        assert [*line.get_xdata()] == [row["frames"] for row in mappo["history"]]
        assert [*line.get_ydata()] == [row[key] for row in mappo["history"]]


def test_the_slope_of_a_critic_that_counts_the_distance_is_known(mappo, ippo, monkeypatch):
    """A critic whose value is twice the robot's own distance, or the sum of all distances."""

    def twice_its_own(seen):
        return 2 * seen[..., 4:6].norm(dim=-1, keepdim=True)

    def sum_of_all(seen):
        distances = seen[..., 4:6].norm(dim=-1, keepdim=True)
        return distances.sum(dim=-2, keepdim=True).expand_as(distances)

    def goal(seen):
        return seen[..., 0:1] - seen[..., 4:5]  # it has not moved

    for script in (mappo, ippo):
        space = script["value_slope"].__globals__
        for critic, slope in ((twice_its_own, 2), (sum_of_all, 1), (goal, 0)):
            monkeypatch.setitem(space, "critic_network", critic)
            assert script["value_slope"]() == pytest.approx(slope, abs=1e-3)


@pytest.mark.parametrize("gamma, lmbda", [(0.99, 0.9), (0.99, 0.0), (0.9, 0.9), (0.95, 0.5)])
def test_the_advantage_of_progress_is_the_sum_of_gae(mappo, monkeypatch, gamma, lmbda):
    """The reward, the lower next value, and what later steps give back (the geometric series)."""
    space = mappo["advantage_of_progress"].__globals__
    for name, value in {"gamma": gamma, "lmbda": lmbda, "max_steps": 400}.items():
        monkeypatch.setitem(space, name, value)
    cost = gamma - (1 - gamma) * gamma * lmbda / (1 - gamma * lmbda)
    for slope in (0.0, 0.4, 1.5):
        found = mappo["advantage_of_progress"](slope)
        assert found == pytest.approx(1 - cost * slope, abs=1e-4)


def test_progress_has_an_advantage_without_discount(mappo, monkeypatch):
    """The geometric series diverges there; what it is multiplied by is 0."""
    space = mappo["advantage_of_progress"].__globals__
    monkeypatch.setitem(space, "gamma", 1.0)
    monkeypatch.setitem(space, "lmbda", 1.0)
    assert mappo["advantage_of_progress"](0.4) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "change", [{}, {"navigation": False}, {"scenario_options": {"observe_all_goals": True}}]
)
def test_there_is_a_slope_only_where_numbers_4_and_5_are_the_goal(mappo, capfd, change):
    exec(cell_that_defines("value_slope"), {**mappo, **change})
    assert ("slope of the value" in capfd.readouterr().out) == (change == {})


def test_training_beats_the_untrained_policy(lean, tmp_path):
    """A tenth of the default work already earns far more; a policy that learns nothing gains 0."""
    given = {"max_steps": 100, "frames_per_batch": 6000, "minibatch_size": 600, "num_epochs": 8}
    words = options(
        **given,
        n_iters=3,
        evaluation_episodes=50,
        num_cells=64,
        lr=2e-3,
        run_folder=tmp_path / "run",
    )
    evaluation = run_inside(*words, path=lean)["evaluation"]
    gain = evaluation["trained"]["episode_reward"] - evaluation["untrained"]["episode_reward"]
    assert gain > 1.0


def test_the_critic_learns_its_targets_and_entropy_is_rewarded(lean, tmp_path):
    """The loop descends on all three terms of the loss, each in the right direction.

    A squashed normal has the less entropy, the farther its middle is from that of the bounds.
    """
    distances = {}
    for entropy_eps in (0.0, 1.0):
        given = {"n_iters": 1, "num_epochs": 20, "lr": 3e-3, "entropy_eps": entropy_eps}
        words = options(run_folder=tmp_path / f"{entropy_eps}", **given)
        script = run_inside(*words, path=lean)
        batch = script["batch"]
        before = smooth_l1_loss(batch["agents", "state_value"], batch["value_target"])
        with torch.no_grad():
            value = script["critic"](batch.clone())["agents", "state_value"]
            distances[entropy_eps] = script["policy"](batch.clone())["agents", "loc"].abs().mean()
        assert smooth_l1_loss(value, batch["value_target"]) < before / 2
    assert distances[1.0] < 0.8 * distances[0.0]
