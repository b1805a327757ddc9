"""The method: what the prose and the hyperparameters promise, checked against plain PyTorch."""

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import smooth_l1_loss
from torchrl.envs import ExplorationType, set_exploration_type

from cells import SLOW, read_cells, run_cells, run_inside, sources
from conftest import TINY, options

BOTH = pytest.mark.parametrize("algorithm", ["mappo", "ippo"])


def before(cell, **values):
    """Run the cells above one, without the engineering and what takes long; return the names."""
    names = [name for name in read_cells() if name not in ("engineering", *SLOW)]
    return run_cells(sources("engineering", *SLOW, **TINY | values)[: names.index(cell)])


def dependence(space, module, key):
    """Return whether each agent's output (rows) depends on each agent's observation (columns)."""
    observation = space["first_batch"]["agents", "observation"].flatten(0, 1).clone()
    observation.requires_grad_()
    data = TensorDict({"agents": {"observation": observation}}, observation.shape[:1])
    output = module(data)["agents", key]
    gradients = [
        torch.autograd.grad(output[:, agent].sum(), observation, retain_graph=True)[0]
        for agent in range(3)
    ]
    return torch.stack(gradients).abs().sum(dim=(1, 3)) > 0


@pytest.fixture(scope="module")
def unshared(tmp_path_factory, lean):
    """Return the names of a run in which every agent has its own networks and its own reward."""
    values = {"share_parameters_policy": False, "share_parameters_critic": False}
    values |= {"scenario_options": '{"shared_rew": false}', "max_grad_norm": 1e-3, "lr": 1e-3}
    folder = tmp_path_factory.mktemp("unshared") / "run"
    return run_inside(*options(run_folder=folder, anneal_lr=True, **values), path=lean)


def test_only_the_mappo_critic_sees_the_team_and_no_policy_does(mappo, ippo, unshared):
    own = torch.eye(3, dtype=torch.bool)
    assert dependence(mappo, mappo["critic"], "state_value").all()
    assert dependence(unshared, unshared["critic"], "state_value").all()
    assert torch.equal(dependence(ippo, ippo["critic"], "state_value"), own)
    for space in (mappo, ippo, unshared):
        assert torch.equal(dependence(space, space["policy"], "loc"), own)


def test_both_algorithms_start_with_the_same_policy_and_batch(mappo, ippo):
    first, second = [space["untrained_policy"].state_dict() for space in (mappo, ippo)]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    one, two = [[row["episode_reward"] for row in space["history"]] for space in (mappo, ippo)]
    assert one[0] == two[0] and one[1] != two[1]


@pytest.mark.parametrize("shared", [True, False])
def test_networks_start_with_orthogonal_matrices(shared):
    """Also where each agent has its own: each matrix for itself, and no two alike."""
    space = before("critic_check", share_parameters_policy=shared, share_parameters_critic=shared)
    for name, last in (("policy_network", 0.01), ("critic_network", 1.0)):
        parameters = dict(space[name].named_parameters())
        weights = [value.detach() for key, value in parameters.items() if key.endswith("weight")]
        biases = [value for key, value in parameters.items() if key.endswith("bias")]
        assert len(weights) == len(biases) == 3 and all((bias == 0).all() for bias in biases)
        for weight, gain in zip(weights, (2**0.5, 2**0.5, last), strict=True):
            assert shared or (len(weight) == 3 and not torch.equal(weight[0], weight[1]))
            for matrix in weight.view(-1, *weight.shape[-2:]):
                tall = matrix if len(matrix) >= len(matrix.T) else matrix.T
                unit = torch.eye(len(tall.T)) * gain**2
                torch.testing.assert_close(tall.T @ tall, unit, atol=1e-5, rtol=1e-4)


def test_unshared_networks_annealing_clipping_and_scenario_options_have_an_effect(unshared, mappo):
    networks = [unshared[name].parameters() for name in ("policy", "untrained_policy")]
    for after, start in zip(*networks, strict=True):
        assert len(after) == 3 and all((after[i] != start[i]).any() for i in range(3))
    rates = [space["optimizer"].param_groups[0]["lr"] for space in (unshared, mappo)]
    assert rates == pytest.approx([1e-3 / 2, 3e-4])  # in the last of two iterations
    gradients = [parameter.grad.flatten() for parameter in unshared["loss_module"].parameters()]
    assert torch.cat(gradients).norm().item() == pytest.approx(1e-3, rel=1e-3)
    for space, alike in ((unshared, False), (mappo, True)):
        progress = space["first_batch"]["next", "agents", "info", "pos_rew"]
        assert torch.equal(progress[..., :1, :].expand_as(progress), progress) == alike


def gae(reward, value, next_value, done, terminated, gamma, lmbda):
    """Return the advantages of one agent's frames in one environment."""
    advantages, following = [], 0.0
    for t in reversed(range(len(reward))):
        error = reward[t] + (0.0 if terminated[t] else gamma * next_value[t]) - value[t]
        following = error + (0.0 if done[t] else gamma * lmbda * following)
        advantages.insert(0, following)
    return advantages


@BOTH
def test_advantages_agree_with_plain_loops(algorithm, request):
    """In a real batch that is cut at two more places: terminated at one, truncated at the other."""
    space = request.getfixturevalue(algorithm)
    batch, cfg, critic = space["first_batch"].clone(), space["cfg"], space["critic_network"]
    batch["next", "terminated"][1, 7] = batch["next", "done"][1, 7] = True
    batch["next", "truncated"][2, 12] = batch["next", "done"][2, 12] = True
    done, terminated = (batch["next", key].squeeze(-1) for key in ("done", "terminated"))
    assert (done & ~terminated)[:, -1].all()  # the time limit is a truncation
    with torch.no_grad():
        space["estimate_advantages"](batch)
        reward = batch["next", "agents", "reward"].squeeze(-1)
        value, next_value = (
            critic(part["agents", "observation"]).squeeze(-1) for part in (batch, batch["next"])
        )
    advantage = torch.empty_like(reward)
    for row, agent in itertools.product(range(len(batch)), range(3)):
        numbers = [tensor[row, :, agent].tolist() for tensor in (reward, value, next_value)]
        flags = done[row].tolist(), terminated[row].tolist()
        advantage[row, :, agent] = torch.tensor(gae(*numbers, *flags, cfg.gamma, cfg.lmbda))
    target = batch["value_target"].squeeze(-1)
    torch.testing.assert_close(batch["advantage"].squeeze(-1), advantage, atol=1e-4, rtol=0)
    torch.testing.assert_close(target, advantage + value, atol=1e-4, rtol=0)
    torch.testing.assert_close(target[terminated], reward[terminated], atol=1e-4, rtol=0)


def plain_loss(space, frames):
    """Return objective, value loss and the ratios of a minibatch, from network outputs alone."""
    observation, action, cfg = (
        frames["agents", "observation"],
        frames["agents", "action"],
        space["cfg"],
    )
    loc, scale = space["policy"][0].module(observation)
    z = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))  # the bounds of navigation's actions
    log_normal = -((z - loc) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2
    log_prob = (log_normal - (1 - z.tanh() ** 2).log()).sum(dim=-1)
    advantage = frames["advantage"].squeeze(-1)
    if cfg.normalize_advantage:  # over the frames, for each agent separately
        advantage = (advantage - advantage.mean(dim=0)) / advantage.std(dim=0)
    ratio, epsilon = (log_prob - frames["agents", "action_log_prob"]).exp(), cfg.clip_epsilon
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
    value_loss = smooth_l1_loss(space["critic_network"](observation), frames["value_target"])
    return -gain.mean(), cfg.critic_coeff * value_loss, ratio


@BOTH
@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_and_its_gradient_are_those_of_plain_pytorch(algorithm, normalize):
    """On frames with ratios on both sides of the clipping range."""
    space = before("loss_check", mappo=algorithm == "mappo", normalize_advantage=normalize)
    frames = space["estimate_advantages"](space["first_batch"]).reshape(-1)[:128].clone()
    torch.manual_seed(0)
    frames["agents", "action_log_prob"] += 0.3 * torch.randn(128, 3)
    losses, (objective, value_loss, ratio) = space["loss_module"](frames), plain_loss(space, frames)
    assert 0.2 < ((ratio - 1).abs() > space["cfg"].clip_epsilon).float().mean() < 0.8
    torch.testing.assert_close(losses["loss_objective"], objective, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["loss_critic"], value_loss, atol=1e-5, rtol=1e-5)
    parameters = [*space["loss_module"].parameters()]
    ours = torch.autograd.grad(losses["loss_objective"] + losses["loss_critic"], parameters)
    plain = torch.autograd.grad(objective + value_loss, parameters)
    assert sum(gradient.square().sum() for gradient in plain) > 1e-4
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


@BOTH
def test_a_gradient_step_of_the_loop_is_that_of_plain_pytorch(algorithm):
    """One epoch of one minibatch: the sum of the terms, clipped, then a step of Adam."""
    values = {"mappo": algorithm == "mappo", "n_iters": 1, "num_epochs": 1, "entropy_eps": 0.0}
    space = before("loop", **values, minibatch_size=600, max_grad_norm=0.05)
    parameters = [*space["loss_module"].parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    run_cells([read_cells()["loop"]], space)
    found = [(parameter.grad.clone(), parameter.detach().clone()) for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    objective, value_loss, _ = plain_loss(space, space["frames"])
    plain = torch.autograd.grad(objective + value_loss, parameters)
    norm = torch.cat([gradient.flatten() for gradient in plain]).norm()
    assert norm > 0.05
    for (gradient, after), wanted, value in zip(found, plain, start, strict=True):
        torch.testing.assert_close(gradient, wanted * 0.05 / norm, atol=1e-5, rtol=1e-3)
        sure, step = gradient.abs() > 1e-4, -space["cfg"].lr * gradient.sign()  # Adam's first step
        torch.testing.assert_close((after - value)[sure], step[sure], atol=1e-7, rtol=1e-3)


def test_entropy_is_rewarded():
    """A squashed normal has the less entropy, the farther its middle is from that of the bounds."""
    distances = []
    for entropy_eps in (1.0, 0.0):
        values = {"n_iters": 1, "num_epochs": 20, "lr": 3e-3, "entropy_eps": entropy_eps}
        space = run_cells([read_cells()["loop"]], before("loop", **values))
        with torch.no_grad():
            distances.append(space["policy"](space["batch"].clone())["agents", "loc"].abs().mean())
    assert distances[0] < 0.8 * distances[1]


def test_training_beats_the_untrained_policy():
    """A little of the default work already earns far more; a policy that learns nothing gains 0."""
    values = {"max_steps": 100, "frames_per_batch": 3000, "minibatch_size": 300, "num_epochs": 8}
    values |= {"n_iters": 3, "evaluation_episodes": 30, "num_cells": 64, "lr": 2e-3}
    space = run_cells([read_cells()["loop"]], before("loop", **values))
    rewards = [space["evaluate"](space[name]) for name in ("policy", "untrained_policy")]
    gain = rewards[0]["episode_reward"] - rewards[1]["episode_reward"]
    assert gain > 1.0


def test_an_epoch_uses_every_frame_once_each_time_in_another_order():
    tags, buffer = torch.arange(600), before("loop")["replay_buffer"]
    buffer.extend(TensorDict({"tag": tags}, [600]))
    orders = [torch.cat([minibatch["tag"] for minibatch in buffer]) for _ in range(2)]
    assert all(torch.equal(order.sort().values, tags) for order in orders)
    assert not torch.equal(*orders)


def test_the_collector_acts_with_the_weights_that_learn(mappo):
    held = {parameter.data_ptr() for parameter in mappo["collector"].policy.parameters()}
    assert held == {parameter.data_ptr() for parameter in mappo["policy"].parameters()}
    for other in ("untrained_policy", "best_policy"):
        assert held.isdisjoint(p.data_ptr() for p in mappo[other].parameters())


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
    expected = {"episode_reward": 2 * (3 + 8 + 10) / 3, "success_rate": 2 / 3}
    expected |= {"episode_length": (3 + 4 + 2) / 3, "collisions": (1 + 0 + 1) / 2 / 3}
    assert measured == pytest.approx(expected)


def test_the_evaluation_is_deterministic_play_from_its_seed(mappo):
    """Its episodes are added up step by step here, without TorchRL's rollout."""
    env = mappo["make_env"](10, mappo["cfg"].evaluation_seed)
    now, reward, running = env.reset(), torch.zeros(10), torch.ones(10, dtype=torch.bool)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(mappo["cfg"].max_steps):
            now = env.step(mappo["policy"](now))
            reward += now["next", "agents", "reward"].squeeze(-1).mean(dim=1) * running
            running &= ~now["next", "done"].squeeze(-1)
            now = env.step_mdp(now)
    trained = mappo["evaluation"]["trained"]
    assert trained["episode_reward"] == pytest.approx(reward.mean().item(), abs=1e-4)
    assert mappo["evaluate"](mappo["policy"]) == trained


@BOTH
def test_measurements_of_an_update(algorithm):
    """Before it: what the critic explained; from it: the loss's terms, means over minibatches."""
    space = run_cells([read_cells()["loop"]], before("loop", mappo=algorithm == "mappo"))
    row, frames, losses = space["history"][-1], space["frames"], space["minibatch_losses"]
    advantage, target = (frames[name].flatten() for name in ("advantage", "value_target"))
    expected = {"explained_variance": 1 - advantage.var() / target.var()}
    expected |= {"advantage_std": advantage.std(), "frames": 1200, "iteration": 1}
    for name in ("loss_objective", "loss_critic", "loss_entropy", "kl_approx", "clip_fraction"):
        expected[name] = sum(one[name].item() for one in losses) / 12
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(value), abs=1e-5), name


CHOICES = {"navigation": "success_rate", "balance": "episode_reward"}  # of the best policy


@pytest.mark.parametrize("scenario, chosen_by", CHOICES.items())
def test_the_best_policy_is_that_of_the_best_tested_iteration(scenario, chosen_by, tmp_path):
    """Also after the run was resumed. It is shown and saved only if it is better than the last."""
    cells, weights, scores = read_cells(), [], iter([-0.8, 0.7, 0.6, 0.1, 0.6, 0.9, 0.8])
    other = dict.fromkeys(["success_rate", "terminated_rate", "episode_reward"], 0.0)

    def scripted(policy):
        weights.append({name: value.clone() for name, value in policy.state_dict().items()})
        return {**other, chosen_by: next(scores)}

    for n_iters, best in ((3, 2), (5, 2), (6, 6), (7, 6)):
        values = {**TINY, "scenario_name": scenario, "evaluation_interval": 1, "n_iters": n_iters}
        chosen = sources(*SLOW, **values, run_folder=str(tmp_path / "run"))
        space = run_cells(chosen[: chosen.index(cells["loop"])])
        space["evaluate"] = scripted
        run_cells([cells["loop"]], space)
        found = dict(space["best_policy"].state_dict())
        torch.testing.assert_close(found, weights[best - 1], rtol=0, atol=0)
    for score in (0.9, 0.8):
        space["evaluate"] = lambda policy, score=score: {
            chosen_by: score if policy is space["best_policy"] else 0.8
        }
        run_cells([cells["evaluation"], cells["files"]], space)
        assert ("best" in space["evaluation"]) == (score == 0.9)
        saved = torch.load(tmp_path / "run" / "best_policy.pt")["state_dict"]
        expected = space["best_policy" if score == 0.9 else "policy"][0].module[0].state_dict()
        torch.testing.assert_close(dict(saved), dict(expected), rtol=0, atol=0)


def test_the_slope_and_the_arrows_of_a_known_critic(mappo, monkeypatch):
    """Its value is twice a robot's own distance, or the sum of all distances; c is 0.91."""
    space = mappo["value_slope"].__globals__
    for slope, away in ((2, 1), (1, 0)):

        def known(seen, slope=slope):
            distances = seen[..., 4:6].norm(dim=-1, keepdim=True)
            total = distances.sum(dim=-2, keepdim=True).expand_as(distances)
            return 2 * distances if slope == 2 else total

        monkeypatch.setitem(space, "critic_network", known)
        assert mappo["value_slope"]() == pytest.approx(slope, abs=1e-3)
        assert mappo["draw_arrow_map"]()[1] == pytest.approx(away, abs=0.02)


@pytest.mark.parametrize("observe_all", [False, True])
def test_there_is_a_slope_only_where_numbers_4_and_5_are_the_goal(observe_all, tmp_path, capfd):
    values = {"scenario_options": {"observe_all_goals": observe_all}, "n_iters": 1}
    space = run_cells([read_cells()["loop"]], before("loop", **values, run_folder=str(tmp_path)))
    run_cells([read_cells()["arrow_map"], read_cells()["slope"]], space)
    assert ("the value has slope s = " in capfd.readouterr().out) == (not observe_all)
