# ruff: noqa: E402, F401, F811
# The lesson's code up to the training loop, with one mistake in it. It runs.


# %%
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.14.1",
#     "torchrl==0.14.1",
#     "tensordict==0.14.3",
#     "vmas==1.5.2",
#     "tqdm==4.70.1",
#     "matplotlib==3.11.2;python_version>='3.11'",
#     "matplotlib==3.10.8;python_version<'3.11'",
#     "pillow==13.0.0;python_version>='3.11'",
#     "pillow==12.3.0;python_version<'3.11'",
# ]
# ///
"""Learn multi-agent PPO with TorchRL, in one file that you read from top to bottom.

Three robots learn to drive to their goals without colliding. They are trained with MAPPO, or with
IPPO if you flip one flag. There are four ways to start:

    python train_mappo.py                         MAPPO with the hyperparameters from Section 1
    python train_mappo.py --no-mappo --seed 1     IPPO, another seed; --help lists all options
    python train_mappo.py --run-folder runs/mine  start a run there; the same command resumes it
    torchrun --nproc-per-node 2 train_mappo.py    one policy, trained by two processes

To use this file as a notebook, open it with jupytext, VS Code or PyCharm, or paste its cells into a
new notebook.
"""

import copy
import json
import logging
import os
import random
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import MarlGroupMapType, StepCounter, VmasEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP, NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import MultiAgentGAE
from tqdm import tqdm

logging.getLogger("torchrl").setLevel(logging.WARNING)  # at INFO level, it logs every buffer
# Scenarios with a fixed team size ignore n_agents, and VMAS warns about it.
warnings.filterwarnings("ignore", r"Scenario kwargs: \{'n_agents': \d+\} passed but not used")


# %%
@dataclass(slots=True)  # with slots, a misspelled name is an error
class Config:
    mappo: bool = True  # True: centralized critic (MAPPO); False: local critic (IPPO)
    seed: int = 0  # random seed for the networks, the simulator and sampling
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # for simulation and training

    scenario_name: str | type = "navigation"  # a VMAS scenario, or your own scenario class
    scenario_options: dict = field(default_factory=dict)  # such as {"shared_rew": False}
    n_agents: int = 3  # team size; fixed in some scenarios
    max_steps: int = 100  # time limit of an episode

    frames_per_batch: int = 6000  # frames collected per iteration
    n_iters: int = 10  # iterations of collecting and learning

    num_epochs: int = 30  # passes over each batch
    minibatch_size: int = 400  # frames per gradient step; a frame includes all agents
    lr: float = 3e-4  # Adam's learning rate
    anneal_lr: bool = False  # decrease the learning rate linearly to 0
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm
    clip_epsilon: float = 0.2  # PPO's clipping range
    gamma: float = 0.99  # discount factor
    lmbda: float = 0.9  # lambda of generalized advantage estimation
    entropy_eps: float = 1e-4  # coefficient of the entropy bonus
    critic_coeff: float = 0.5  # coefficient of the value loss
    normalize_advantage: bool = True  # to mean 0 and standard deviation 1

    share_parameters_policy: bool = True  # one policy network for all agents; False: one each
    share_parameters_critic: bool = True  # one critic network for all agents; False: one each
    depth: int = 2  # hidden layers per network
    num_cells: int = 256  # units per hidden layer

    evaluation_interval: int = 5  # iterations between tests of the policy
    evaluation_episodes: int = 200  # test episodes
    evaluation_seed: int = 12345  # random seed for the test episodes
    run_folder: str = ""  # where results go; empty: a new folder in runs/
    logger: str = ""  # also log to "tensorboard", "wandb", "mlflow", "trackio" or "csv"

    @property
    def num_vmas_envs(self):
        return self.frames_per_batch // self.max_steps  # each runs for max_steps per batch


cfg = Config()

# %%
rank, world_size = 0, 1  # the index of this process, and how many there are
# These settings do not affect learning, except n_iters when the learning rate is annealed.
BOOKKEEPING = {"run_folder", "logger", "device", "n_iters"}
BOOKKEEPING |= {"evaluation_interval", "evaluation_episodes", "evaluation_seed"}


class Run:
    """A placeholder with the methods that the training loop calls. It saves nothing."""

    def distribute(self, loss_module):
        return loss_module

    def resume(self, cfg, folder, history, learner):
        pass

    def save(self, history, learner):
        pass

    def finish(self):
        pass


run = Run()


def save_whole(path, write):
    """Write a file atomically. `write` receives a binary file; only process 0 writes."""
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".unfinished-{path.name}")
        try:
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


# %%
def seed_for(*purpose):
    """Derive a separate random seed from `cfg.seed` for each purpose."""
    return random.Random(f"{cfg.seed} {purpose}").getrandbits(32)


def make_env(num_envs, seed):
    """Build a batch of `num_envs` copies of the scenario; `seed` sets their initial states."""
    own_class = isinstance(cfg.scenario_name, type)
    simulator = VmasEnv(
        cfg.scenario_name() if own_class else cfg.scenario_name,
        num_envs=num_envs,
        seed=seed,
        device=cfg.device,
        group_map=MarlGroupMapType.ALL_IN_ONE_GROUP,  # stack the agents under "agents"
        scenario_kwargs={"n_agents": cfg.n_agents, **cfg.scenario_options},
    )
    return simulator.append_transform(StepCounter(cfg.max_steps))


# %%
# Under torchrun, each process gets its share of the environments and of each batch. Otherwise,
# these are simply the numbers from Section 1.
num_envs = cfg.num_vmas_envs // world_size
batch_frames = cfg.frames_per_batch // world_size
minibatch_frames = cfg.minibatch_size // world_size

env = make_env(num_envs, seed_for("environment"))
n_agents, n_obs = env.observation_spec["agents", "observation"].shape[-2:]
action_spec = env.full_action_spec_unbatched["agents", "action"]  # shape, type and bounds
n_actions = action_spec.shape[-1]

# There is no policy yet, so this rollout takes random actions.
torch.manual_seed(seed_for("rollout"))
rollout = env.rollout(cfg.max_steps, break_when_any_done=False)
for key in [("agents", "observation"), ("agents", "action"), ("next", "agents", "reward")]:
    print(key, tuple(rollout[key].shape))
for key in [("next", "terminated"), ("next", "truncated"), ("next", "done")]:
    print(key, tuple(rollout[key].shape))
first_step = rollout[:, 0].select(("agents", "observation"))  # to try out the networks on


# %%
def orthogonal_init(network, final_gain):
    """Set the weights of a MultiAgentMLP to random orthogonal matrices and its biases to 0.

    The gain is sqrt(2) in hidden layers and `final_gain` in the last. If each agent has its own
    network, the weights have the shape (n_agents, outputs, inputs), and each matrix is drawn
    separately.
    """
    parameters = dict(network.named_parameters())
    weights = [value for name, value in parameters.items() if name.endswith("weight")]
    with torch.no_grad():
        for weight in weights:
            gain = final_gain if weight is weights[-1] else 2**0.5
            for matrix in weight.view(-1, *weight.shape[-2:]):
                nn.init.orthogonal_(matrix, gain)
        for name, value in parameters.items():
            if name.endswith("bias"):
                value.zero_()


# %%
torch.manual_seed(seed_for("policy"))
network_options = {
    "n_agents": n_agents,
    "n_agent_inputs": n_obs,
    "depth": cfg.depth,
    "num_cells": cfg.num_cells,
}
policy_options = {
    **network_options,
    "n_agent_outputs": 2 * n_actions,  # a mean and a standard deviation per action dimension
    "centralized": False,  # each agent's output depends on its own observation only
    "share_params": cfg.share_parameters_policy,
}
policy_network = MultiAgentMLP(**policy_options, device=cfg.device)
orthogonal_init(policy_network, final_gain=0.01)
policy_module = TensorDictModule(
    nn.Sequential(policy_network, NormalParamExtractor()),
    in_keys=[("agents", "observation")],
    out_keys=[("agents", "loc"), ("agents", "scale")],
)
action_bounds = {"low": action_spec.space.low, "high": action_spec.space.high}
untrained_policy = ProbabilisticActor(
    policy_module,
    in_keys=[("agents", "loc"), ("agents", "scale")],
    out_keys=[("agents", "action")],
    spec=env.full_action_spec_unbatched,
    distribution_class=TanhNormal,
    distribution_kwargs=action_bounds,
    return_log_prob=True,
    default_interaction_type=ExplorationType.RANDOM,  # sample, unless told otherwise
)
means = untrained_policy(first_step.clone())["agents", "loc"]  # (num_envs, n_agents, n_actions)
print("means before the tanh in one environment, one row per robot:")
for row in means[0].tolist():
    print(*(f"{x:9.4f}" for x in row))

# %%
torch.manual_seed(seed_for("critic"))
critic_network = MultiAgentMLP(
    **network_options,
    n_agent_outputs=1,
    centralized=cfg.mappo,  # here, this is the whole difference between MAPPO and IPPO
    share_params=cfg.share_parameters_critic,
    device=cfg.device,
)
orthogonal_init(critic_network, final_gain=1.0)
critic = TensorDictModule(
    critic_network,
    in_keys=[("agents", "observation")],
    out_keys=[("agents", "state_value")],
)
values = critic(first_step.clone())["agents", "state_value"]  # (num_envs, n_agents, 1)
print("values in one environment:", *(f"{x:.4f}" for x in values[0, :, 0].tolist()))

# %%
policy = copy.deepcopy(untrained_policy)  # this one learns; Section 9 compares the two
collector = Collector(
    env,
    policy,
    device=cfg.device,
    frames_per_batch=batch_frames,
    reset_at_each_iter=True,
    track_traj_ids=False,  # trajectory IDs are not needed here
    auto_register_policy_transforms=False,  # these are for recurrent policies
)
replay_buffer = ReplayBuffer(
    storage=LazyTensorStorage(batch_frames, device=cfg.device),
    sampler=SamplerWithoutReplacement(),
    batch_size=minibatch_frames,
)

env.set_seed(seed_for("first batch"))
torch.manual_seed(seed_for("first batch"))
first_batch = collector.next()
print("batch:", tuple(first_batch.shape))
print("rewards for three steps, one column per robot:")
for rewards in first_batch["next", "agents", "reward"][0, :3, :, 0].tolist():
    print(*(f"{x:9.4f}" for x in rewards))

# %%
estimate_advantages = MultiAgentGAE(
    gamma=cfg.gamma, lmbda=cfg.lmbda, value_network=critic, device=cfg.device
)
estimate_advantages.set_keys(reward=("agents", "reward"), value=("agents", "state_value"))

# %%
loss_module = ClipPPOLoss(
    policy,
    critic,
    clip_epsilon=cfg.clip_epsilon,
    entropy_coeff=cfg.entropy_eps,
    critic_coeff=cfg.critic_coeff,
    normalize_advantage=cfg.normalize_advantage,
    normalize_advantage_exclude_dims=(-2,),
    loss_critic_type="smooth_l1",
    functional=False,  # use the networks themselves; stateless copies are slower
    log_explained_variance=False,  # Section 8 computes it, before the update
)
loss_module.set_keys(value=("agents", "state_value"))
optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.lr, fused=True)

# %%
algorithm = "MAPPO" if cfg.mappo else "IPPO"
scenario = getattr(cfg.scenario_name, "__name__", cfg.scenario_name)
run_name = f"{algorithm.lower()}-{scenario}-seed{cfg.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
folder = Path(os.path.expanduser(cfg.run_folder or f"runs/{run_name}"))
history = []  # a dictionary of metrics for each iteration
best_policy = copy.deepcopy(policy)
learner = {"policy": policy, "critic": critic, "optimizer": optimizer, "best_policy": best_policy}

# %%
navigation = scenario == "navigation"
success_key = "success_rate" if navigation else "terminated_rate"
test_key = f"test_{success_key}"
best_key = test_key if navigation else "test_episode_reward"  # chooses the best policy


def measure(data):
    """Return the mean reward, success rate, length and collisions of the first episodes in `data`.

    `data` is a TensorDict of shape (environments, steps). Rewards are summed over an episode and
    averaged over agents. A collision is a step in which an agent touches another agent, counted
    per agent. Navigation reports collisions only if they are penalized.
    """
    done = data["next", "done"].squeeze(-1)  # (environments, steps)
    first = done.cumsum(1) - done.int() == 0  # True up to the first done
    reward = data["next", "agents", "reward"].squeeze(-1).mean(-1)
    success = (data["next", "terminated"].squeeze(-1) & first).any(1)
    means = {
        "episode_reward": (reward * first).sum(1).mean().item(),
        success_key: success.float().mean().item(),
        "episode_length": first.sum(1).float().mean().item(),
    }
    penalty = {"collisions": True, "agent_collision_penalty": -1, **cfg.scenario_options}
    unknown = navigation and not (penalty["collisions"] and penalty["agent_collision_penalty"])
    contact = ("next", "agents", "info", "agent_collisions")
    if contact in data.keys(include_nested=True) and not unknown:
        touches = data[contact].squeeze(-1) != 0
        means["collisions"] = (touches.float().mean(-1) * first).sum(1).mean().item()
    return means


def evaluate(policy):
    """Play `evaluation_episodes` episodes with the deterministic policy and `measure` them."""
    test_env = make_env(cfg.evaluation_episodes, cfg.evaluation_seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return measure(test_env.rollout(cfg.max_steps, policy, break_when_all_done=True))


# %%
run.resume(cfg, folder, history, learner)  # without the engineering cell, `run` does nothing
loss_module = run.distribute(loss_module)
inputs = [("agents", "observation"), ("agents", "action"), ("agents", "action_log_prob")]
update_metrics = ["loss_objective", "loss_critic", "loss_entropy"]
update_metrics += ["entropy", "kl_approx", "clip_fraction"]
todo = range(len(history), cfg.n_iters)
progress = tqdm(todo, algorithm, total=cfg.n_iters, initial=len(history), disable=rank > 0)
for iteration in progress:
    start = time.perf_counter()
    env.set_seed(seed_for("simulator", iteration, rank))  # so that each iteration is reproducible
    torch.manual_seed(seed_for("actions and minibatches", iteration, rank))
    if cfg.anneal_lr:
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - iteration / cfg.n_iters)

    batch = collector.next()  # (num_envs, max_steps)
    estimate_advantages(batch)  # adds "advantage" and "value_target"

    frames = batch.reshape(-1).select(*inputs, "advantage", "value_target")  # (batch_frames,)
    replay_buffer.empty()
    replay_buffer.extend(frames)
    minibatch_losses = []
    for _ in range(cfg.num_epochs):
        for minibatch in replay_buffer:  # (minibatch_frames,)
            losses = loss_module(minibatch)
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), cfg.max_grad_norm)
            optimizer.step()
            minibatch_losses.append(losses.detach())

    losses = torch.stack(minibatch_losses).mean(dim=0)
    row = {"iteration": iteration, "frames": (iteration + 1) * cfg.frames_per_batch}
    row |= measure(batch)
    row |= {name: losses[name].item() for name in update_metrics}
    unexplained = frames["advantage"].var() / frames["value_target"].var()
    row["explained_variance"] = 1 - unexplained.item()  # an advantage is a target minus a value
    row["advantage_std"] = frames["advantage"].std().item()
    row["seconds"] = time.perf_counter() - start
    if (iteration + 1) % cfg.evaluation_interval == 0:
        row |= {f"test_{key}": value for key, value in evaluate(policy).items()}
        if all(row[best_key] >= old.get(best_key, row[best_key]) for old in history):
            best_policy.load_state_dict(policy.state_dict())
    history.append(row)
    run.save(history, learner)
    progress.set_postfix({key: round(row[key], 2) for key in ("episode_reward", success_key)})
run.finish()
