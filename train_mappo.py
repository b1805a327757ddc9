"""Multi-agent PPO with TorchRL, to be read from top to bottom.

Three robots must each drive to a goal of their own without touching one another: the scenario "navigation" of the
VMAS simulator. They learn it with MAPPO or, when one flag is flipped, with IPPO. Every way to start this file:

    python train_mappo.py                              MAPPO with the hyperparameters of Section 1
    python train_mappo.py --no-mappo --seed 1          IPPO, with another seed; --help lists all options
    python train_mappo.py --scenario-name balance      another scenario, if its agents are one team and all of a kind
    python train_mappo.py --resume runs/FOLDER         go on with a stopped run, or show a finished one again
    torchrun --nproc-per-node 2 train_mappo.py         one policy, trained by two processes
    in a notebook: open this file with jupytext, VS Code or PyCharm, or paste its sections one after the other
"""

import argparse
import copy
import difflib
import json
import logging
import os
import random
import shlex
import sys
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image  # Pillow comes with matplotlib
from tensordict.nn import TensorDictModule
from torch import distributed as dist, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import ExplorationType, MarlGroupMapType, RewardSum, StepCounter, VmasEnv, set_exploration_type
from torchrl.modules import MultiAgentMLP, NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss, ValueEstimators
from tqdm import tqdm

# %% [markdown]
# # Multi-agent PPO, step by step
#
# PPO (Schulman et al. 2017, arXiv:1707.06347) learns *on-policy*: the current policy collects a batch of experience,
# a few epochs of gradient steps improve the policy on that batch, and the batch is thrown away, because the improved
# policy would no longer have collected it. A *critic*, a network that predicts the return, tells which actions did
# better than expected; it is needed for learning only.
#
# With several agents one thing changes. Each agent's environment contains the other agents, and they learn too: what
# was a good move yesterday may be a bad one today. To a single agent the world is *non-stationary*. Here on-policy
# learning helps: old experience would tell of teammates that no longer exist.
#
# Two ways to set up the critic are compared here. IPPO ("independent", de Witt et al. 2020, arXiv:2011.09533) treats
# the others as part of the world: the critic predicts an agent's return from what that agent sees. MAPPO (Yu et al.
# 2022, arXiv:2103.01955) shows the critic the observations of the whole team, so that less of the return looks like
# chance. In both, each *policy* sees only its own agent's observation. MAPPO is therefore said to train centrally and
# to act decentrally. One flag, the first below, switches between the two.
#
# ## 1. Hyperparameters
# A *frame* is one step of one environment, in which all agents act at once.

# %%
mappo = True  # the critic sees the whole team (MAPPO); False trains IPPO, whose critic sees one agent
seed = 0  # random seed of the networks, the simulator and the sampling
device = "cuda" if torch.cuda.is_available() else "cpu"  # where simulation and training both run

scenario_name = "navigation"  # the VMAS scenario
n_agents = 3  # number of agents, where the scenario leaves it open
max_steps = 100  # steps after which an episode is cut off

frames_per_batch = 6000  # frames collected in an iteration
n_iters = 10  # iterations of collecting a batch and learning from it

num_epochs = 30  # passes over each batch
minibatch_size = 400  # frames in a gradient step
lr = 3e-4  # learning rate of Adam
anneal_lr = False  # let the learning rate fall linearly, to reach 0 after the last iteration
max_grad_norm = 1.0  # a gradient with a larger norm is scaled down to this one
clip_epsilon = 0.2  # PPO clips the ratio of new to old action probability to 1 plus or minus this
gamma = 0.99  # discount factor of the return
lmbda = 0.9  # lambda of GAE, from 0 (one reward, then the critic) to 1 (all rewards of the episode)
entropy_eps = 1e-4  # weight of the entropy bonus
critic_coeff = 0.5  # weight of the value loss
normalize_advantage = True  # give each agent's advantages in a minibatch mean 0 and standard deviation 1

share_parameters_policy = True  # one policy network for all agents; False gives each its own
share_parameters_critic = True  # one critic network for all agents; False gives each its own
depth = 2  # hidden layers of each network
num_cells = 256  # units of a hidden layer

evaluation_episodes = 200  # episodes of the evaluation before and after training
evaluation_seed = 12345  # random seed of the evaluation episodes, the same for every run
output_dir = "runs"  # folder in which each run makes a folder of its own

# %% [markdown]
# *Question 1. How many gradient steps does one iteration take, and how often is each frame used in them?*
#
# ---
# ## Command line and checks (skip this on a first reading)
# Every name above is an option: `n_iters` is `--n-iters`, `mappo` is `--mappo` or `--no-mappo`, and the comment beside
# it is what `--help` says. In a notebook the arguments belong to the kernel, not to this file, and are left alone. A
# wrong option is refused in one line before anything is trained; Ctrl-C, a full disk or a number that is not finite end
# a run in one line, too.

# %%
hyperparameters = globals().get("hyperparameters") or {  # as they are, when a notebook runs this cell once more
    name: value for name, value in globals().items() if name[0] != "_" and type(value) in (bool, int, float, str)}
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
# What torchrun's processes tell each other goes through this store, which outlives a restart of the job.
job = next(dist.rendezvous("env://"))[0] if "TORCHELASTIC_RESTART_COUNT" in os.environ else None
logging.getLogger("torchrl").setLevel(logging.WARNING)  # at level INFO, TorchRL reports each storage it allocates
# Some scenarios take no n_agents; a checkpoint of a strange format is refused in one line of our own.
warnings.filterwarnings("ignore", "Scenario kwargs|Detected pickle protocol")
warnings.filterwarnings("error", "It is taking many iterations to spawn")  # VMAS would look for a free place for ever
resume = checkpoint = None


def require(is_right, message, status=2):
    """Unless `is_right`, end with the exit status after one line on stderr; what all processes find, only 0 prints."""
    if not is_right:
        sys.stderr.write(f"train_mappo.py: {message}\n" if rank == 0 or status == 1 else "")
        sys.exit(status)


def end_in_one_line(kind, error, trace):
    """As sys.excepthook: spare users the traceback of what they caused or can mend, and say what was kept."""
    no_memory = "ried to allocate" in str(error)  # "Tried" on a GPU; on the CPU a RuntimeError like any other
    if not (no_memory or issubclass(kind, (KeyboardInterrupt, FloatingPointError, OSError, UserWarning))):
        return sys.__excepthook__(kind, error, trace)
    kept = "nothing was kept" if rank == 0 else f"in process {rank}"
    if globals().get("metrics") and rank == 0:
        kept = f"go on with {'torchrun …' if job else 'python'} train_mappo.py --resume {shlex.quote(str(run_folder))}"
    cause = f"--n-agents {n_agents}: no room for that many" if kind is UserWarning else str(error) or "stopped"
    require(False, f"{cause}; {kept}", {KeyboardInterrupt: 130, UserWarning: 2}.get(kind, 1))


if Path(sys.argv[0]).resolve() == Path(globals().get("__file__", "notebook")).resolve():  # not in a notebook
    sys.excepthook = end_in_one_line
    plt.switch_backend("agg")  # pictures go to files, no window is opened
    source = Path(__file__).read_text(encoding="utf-8")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: require(False, message)
    parser.add_argument("--resume", metavar="FOLDER", help="folder of the run to go on with, or to show again")
    option = {name: "--" + name.replace("_", "-") for name in hyperparameters}
    for name, value in hyperparameters.items():
        kind = {"action": argparse.BooleanOptionalAction} if type(value) is bool else {"type": type(value)}
        meaning = source.split(f"\n{name} = ")[1].split("  # ")[1].splitlines()[0] + f" (default: {value})"
        parser.add_argument(option[name], help=meaning, **kind)
    given, unknown = parser.parse_known_args()
    known = parser.format_usage().replace("[", " ").replace("]", " ").split()
    nearest = difflib.get_close_matches((unknown or [""])[0].split("=")[0], known, 1, 0)[0]
    require(not unknown, f"{' '.join(unknown)}: there is no such option; the nearest is {nearest}, --help lists all")
    given = {name: value for name, value in vars(given).items() if value is not None}
    globals().update(given)  # "resume", too
    if resume is None and job is not None and job.check(["run_folder"]):  # the job died and was started again
        resume = job.get("run_folder").decode()
    if resume is not None:
        try:
            checkpoint = dict(torch.load(Path(resume, "checkpoint.pt"), map_location="cpu", weights_only=True))
            saved = {name: checkpoint["hyperparameters"][name] for name in hyperparameters if name != "device"}
            assert checkpoint["metrics"][0] and all(type(saved[n]) is type(hyperparameters[n]) for n in saved)
        except Exception as error:
            require(False, f"--resume {resume}: this is no folder of a run, or damaged ({type(error).__name__})")
        for name in given.keys() & saved.keys() - {"n_iters"}:
            require(given[name] == saved[name], f"{option[name]} {given[name]}: this run has {saved[name]}, drop it")
        globals().update(saved | given)
        n_iters = max(n_iters, len(checkpoint["metrics"]))

    ranges = {"max_steps frames_per_batch n_iters num_epochs num_cells evaluation_episodes": (1, 10**9),
              "n_agents depth": (1, 1000), "minibatch_size": (2, 10**9), "seed evaluation_seed": (0, 2**32 - 1),
              "lr max_grad_norm critic_coeff": (1e-9, 1e9), "clip_epsilon": (1e-9, 1), "gamma lmbda": (0, 1),
              "entropy_eps": (0, 1e9)}
    for name, (low, high) in [(name, bounds) for names, bounds in ranges.items() for name in names.split()]:
        require(low <= globals()[name] <= high, f"{option[name]} {globals()[name]}: give a number from {low} to {high}")
    require(frames_per_batch % (max_steps * world_size) == 0, f"--frames-per-batch {frames_per_batch}: give a multiple "
            f"of max_steps, {max_steps}, for each of {world_size} process(es)")
    require(frames_per_batch % minibatch_size == 0 == minibatch_size % world_size, f"--minibatch-size {minibatch_size}:"
            f" give a divisor of frames_per_batch, {frames_per_batch}, that {world_size} process(es) can share")
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # those of this machine
    devices = ["cpu", *["cuda"] * (gpus >= processes), *(f"cuda:{i}" for i in range(gpus) if world_size == 1)]
    require(device in devices, f"--device {device}: give one of {', '.join(devices)}")
    scenarios = difflib.get_close_matches(scenario_name, VmasEnv.available_envs, n=99, cutoff=0)
    require(scenario_name in scenarios, f"--scenario-name {scenario_name}: give one of {', '.join(scenarios)}")
    try:
        probe = VmasEnv(scenario_name, num_envs=8, seed=seed, device=device, n_agents=n_agents)
    except Exception as error:
        require(False, f"--n-agents {n_agents}: give fewer, or a number that {scenario_name} accepts ({error})")
    require(len(probe.group_map) == 1 and not probe.het_specs, f"--scenario-name {scenario_name}: give a scenario with "
            f"one team of alike agents; this one has {', '.join(probe.agent_names)}")
    require(probe.n_agents == n_agents or "n_agents" not in given, f"--n-agents {n_agents}: give {probe.n_agents}")

# %% [markdown]
# ---
# ## Many processes (skip this on a first reading)
# Started by torchrun, N processes train one policy: each simulates its share of the environments and averages its
# gradients with the others'. The hyperparameters speak of the whole job, so each process takes an Nth of a batch and
# of a minibatch. A job of one process passes through here unchanged.

# %%
frames_per_batch, minibatch_size = frames_per_batch // world_size, minibatch_size // world_size
device = f"cuda:{os.environ['LOCAL_RANK']}" if "cuda" in device and world_size > 1 else device

# %% [markdown]
# ---
# ## 2. Environment
# VMAS simulates `num_vmas_envs` copies of the scenario at once, as one batch of tensors on `device`. The policy runs
# there, too, so on a GPU the data never leaves it. There are enough copies for one full episode each in a batch; where
# an episode ends early, another begins, and the end of the batch cuts it off.
#
# The parts of TorchRL hand one TensorDict to each other: a dictionary of tensors that share their first dimensions, its
# batch shape, and can be indexed and reshaped together along them. Dictionaries lie within it: what a step led to is
# under `"next"`, and `td["next", "done"]` reads `"done"` there. Each part names the entries that it reads and those
# that it writes. Some entries are the team's, one per environment; those that each agent has of its own lie under
# `"agents"`:
#
# | key | shape | whose |
# |---|---|---|
# | `("agents", "observation")` | (num_vmas_envs, n_agents, n_obs) | each agent's: position, velocity, goal, lidar |
# | `("agents", "action")` | (num_vmas_envs, n_agents, n_actions) | each agent's: a force along x and y |
# | `("next", "agents", "reward")` | (num_vmas_envs, n_agents, 1) | the team's progress, less one's own collisions |
# | `("next", "terminated")` | (num_vmas_envs, 1) | the team's: every agent has reached its goal |
# | `("next", "truncated")` | (num_vmas_envs, 1) | the team's: the time is up |
# | `("next", "done")` | (num_vmas_envs, 1) | the team's: one or the other |
#
# With the defaults that is (60, 3, 18), (60, 3, 2), (60, 3, 1) and three times (60, 1).
#
# A time limit is not a termination. After a termination nothing more can be earned, so the value of what follows is
# zero; when time runs out, the robots could have gone on, and the critic's estimate of what they would have earned
# still counts. VMAS, given `max_steps`, would report both as "terminated"; `StepCounter` keeps them apart.
# `RewardSum` adds up each agent's rewards since the episode began, as `("next", "agents", "episode_reward")`.


# %%
def make_env(num_envs, seed):
    """Build the scenario as `num_envs` environments that step together, their random numbers drawn from `seed`."""
    simulator = VmasEnv(scenario_name, num_envs=num_envs, n_agents=n_agents, seed=seed, device=device,
                        group_map=MarlGroupMapType.ALL_IN_ONE_GROUP)  # one team, under the key "agents"
    return simulator.append_transform(StepCounter(max_steps)).append_transform(RewardSum())


num_vmas_envs = frames_per_batch // max_steps
env = make_env(num_vmas_envs, seed)
n_obs = env.observation_spec["agents", "observation"].shape[-1]
action_spec = env.full_action_spec_unbatched["agents", "action"]  # bounded: (n_agents, n_actions)

# %% [markdown]
# *Question 2. If the time limit were a termination, what return would the critic be taught for an episode's last step,
# and can it see that it is the last?*
#
# ---
# ## 3. Policy
# The policy is *decentralised*: an agent's action depends on its own observation alone, so that each robot can be sent
# out with a copy of the network and no radio. `MultiAgentMLP` applies a network to every agent and keeps the agent
# dimension: observations (num_vmas_envs, n_agents, n_obs) in, 2 × n_actions numbers for each agent out.
# `NormalParamExtractor` makes them a mean and a positive standard deviation, (num_vmas_envs, n_agents, n_actions) each,
# and `TanhNormal` is a normal distribution squashed into the bounds of the action. The log-probability of the action
# taken is kept, as PPO will need it: (num_vmas_envs, n_agents).
#
# With `share_parameters_policy` all agents use the same weights. One network then learns from the experience of the
# whole team, n_agents times as much. The price: agents that observe the same choose alike, so a task that needs
# specialists needs observations that tell the agents apart, or networks of their own.

# %%
torch.manual_seed(seed)
network = {"n_agents": env.n_agents, "n_agent_inputs": n_obs, "n_agent_outputs": 2 * action_spec.shape[-1],
           "depth": depth, "num_cells": num_cells, "centralized": False, "share_params": share_parameters_policy}
policy_network = MultiAgentMLP(**network, activation_class=nn.Tanh, device=device)
policy_module = TensorDictModule(nn.Sequential(policy_network, NormalParamExtractor()),
                                 in_keys=[("agents", "observation")], out_keys=[("agents", "loc"), ("agents", "scale")])
bounds = {"low": action_spec.space.low, "high": action_spec.space.high}
policy = ProbabilisticActor(
    policy_module, in_keys=policy_module.out_keys, out_keys=[("agents", "action")], distribution_class=TanhNormal,
    distribution_kwargs=bounds, return_log_prob=True, spec=env.full_action_spec_unbatched)
untrained_policy = copy.deepcopy(policy)  # Section 7 compares the two

# %% [markdown]
# *Question 3. How many weights and biases does the policy have, and how many with `--no-share-parameters-policy`?*
#
# ---
# ## 4. Critic
# This is where MAPPO and IPPO part, in the one argument `centralized`.
#
# - MAPPO: the observations of all agents, joined to one vector of n_agents × n_obs numbers (54 with the defaults), go
#   in. Where the others are, and how far from their goals, no longer looks like chance, so the return is easier to
#   predict and advantages are less noisy. But the input grows with the team, and much may not matter to one agent.
# - IPPO: each agent's value comes from its own n_obs numbers (18), however large the team.
#
# Neither makes the world stationary, for the other agents' policies still change; MAPPO only shows the critic more.
#
# Either way the critic gives a value for each agent, (num_vmas_envs, n_agents, 1). With `share_parameters_critic` one
# network serves them all. For MAPPO that means one input and one network, hence *the same value for every agent*, a
# value of the team's situation; this fits when rewards are mostly shared, as here. For IPPO the inputs differ, so the
# values do.

# %%
torch.manual_seed(seed + 1)  # this line and the next are for notebooks: flip mappo, run again from here on,
policy.load_state_dict(untrained_policy.state_dict())  # and both start from the same untrained policy
critic_network = MultiAgentMLP(
    n_agents=env.n_agents, n_agent_inputs=n_obs, n_agent_outputs=1, centralized=mappo,
    share_params=share_parameters_critic, depth=depth, num_cells=num_cells, activation_class=nn.Tanh, device=device)
critic = TensorDictModule(critic_network, in_keys=[("agents", "observation")], out_keys=[("agents", "state_value")])

# %% [markdown]
# *Question 4. How many inputs does the critic have with 8 agents, and how many under IPPO?*
#
# ---
# ## 5. Collection, replay buffer, loss and optimizer
# `Collector` (formerly SyncDataCollector) steps the environment with the policy and yields batches of shape
# (num_vmas_envs, max_steps), with a fresh reset before each batch. The replay buffer, usually a memory for off-policy
# learning, holds one batch only: sampling *without replacement*, it deals the batch out in minibatches, in which each
# frame occurs exactly once an epoch.
#
# PPO's objective for one agent stays as it is; with several, every agent has a probability ratio and an advantage of
# its own in each frame, and the loss is the mean over frames and agents. (TorchRL's `MAPPOLoss` and `IPPOLoss` are this
# `ClipPPOLoss` with MAGAE and the excluded dimension set for you, and value normalisation as an option.)
#
# *Generalised advantage estimation* (Schulman et al. 2016, arXiv:1506.02438) mixes all n-step returns, weighted by
# lmbda, into one estimate of how much better an action was than the critic expected. The multi-agent form, `MAGAE`,
# copies the team's "done" to every agent: a "done" stops the sum, and a "terminated" also sets the next value to zero.
#
# *Clipping*: the objective is the ratio of new to old probability of an action, times its advantage. Once the ratio
# has moved by clip_epsilon in the direction that pays, its gradient is zero: nothing is gained by leaving the policy
# that collected the batch further behind, which is what allows several epochs on it.
#
# The *entropy bonus* (Williams and Peng 1991) rewards the policy for staying random, so that it does not settle on one
# action before it has tried others. A squashed normal has no formula for its entropy, so the loss samples it.
#
# Advantages are normalised, so that the size of a step does not depend on the scale of the rewards. Each agent has a
# mean and a standard deviation of its own: the agent dimension, -2, is excluded from them. The value loss is the smooth
# L1 distance between value and advantage + old value.

# %%
# The last two options turn off what only recurrent policies and episodes that span batches need.
collector = Collector(env, policy, device=device, frames_per_batch=frames_per_batch, reset_at_each_iter=True,
                      track_traj_ids=False, auto_register_policy_transforms=False)
replay_buffer = ReplayBuffer(storage=LazyTensorStorage(frames_per_batch, device=device),
                             sampler=SamplerWithoutReplacement(), batch_size=minibatch_size)
loss_module = ClipPPOLoss(  # not functional: it uses the networks themselves, not stateless copies, which is faster
    policy, critic, clip_epsilon=clip_epsilon, entropy_coeff=entropy_eps, critic_coeff=critic_coeff, functional=False,
    normalize_advantage=normalize_advantage, normalize_advantage_exclude_dims=(-2,))
loss_module.set_keys(reward=("agents", "reward"), value=("agents", "state_value"))  # it finds the others by itself
loss_module.make_value_estimator(ValueEstimators.MAGAE, gamma=gamma, lmbda=lmbda)
estimate_advantages = loss_module.value_estimator  # GAE, with the critic
parameters = list(loss_module.parameters())
optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)

# %% [markdown]
# *Question 5. With lmbda = 0, how many of the collected rewards enter the advantage of one action?*
#
# ---
# ## Many processes, continued (skip this on a first reading)
# DistributedDataParallel averages the gradients of all processes during each backward pass. The mean and the standard
# deviation that normalise the advantages are taken over all processes, too, as if over one large minibatch.

# %%
if world_size > 1:
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], job)  # not the addresses before a restart
    dist.init_process_group("nccl" if "cuda" in device else "gloo", store=store, rank=rank, world_size=world_size)
    sys.excepthook = end_in_one_line  # once more, as PyTorch has put its own in front

    def normalize_over_the_job(_, inputs):
        everyone = [torch.empty_like(inputs[0]["advantage"]) for _ in range(world_size)]
        dist.all_gather(everyone, inputs[0]["advantage"].contiguous())
        std, mean = torch.std_mean(torch.cat(everyone), dim=0)  # (n_agents, 1)
        inputs[0]["advantage"] = (inputs[0]["advantage"] - mean) / std.clamp_min(1e-6)

    if normalize_advantage:
        loss_module.normalize_advantage = False
        loss_module.register_forward_pre_hook(normalize_over_the_job)
    loss_module = nn.parallel.DistributedDataParallel(loss_module, forward_sync_buffers=False)

# %% [markdown]
# ---
# ## Record keeping (skip this on a first reading)
# A run has a folder of its own. After each iteration it holds a checkpoint and a table of measurements, each written
# beside the old one and put in its place when it is whole: a run can be killed at any moment and resumed. The losses
# are means over the iteration's minibatches. `kl_approx` says how far the policy has moved from the one that collected
# the batch, `clip_fraction` what share of the ratios lay outside 1 ± clip_epsilon, and `explained_variance` how much of
# the returns' variance the critic predicts (1: all; 0: no more than their mean would).

# %%
columns = ["iteration", "frames", "seconds", "episode_reward_mean", "success_rate", "loss_objective", "loss_critic",
           "loss_entropy", "entropy", "kl_approx", "clip_fraction", "explained_variance"]
reached_is = "success rate" if scenario_name == "navigation" else "share that ended before max_steps"
metrics = [] if checkpoint is None else checkpoint["metrics"]  # for each iteration a dictionary of these columns
algorithm, started = "mappo" if mappo else "ippo", time.strftime("%Y%m%d-%H%M%S")
run_folder = Path(resume or Path(output_dir, f"{algorithm}-{scenario_name}-seed{seed}-{started}"))
hyperparameters = {name: globals()[name] for name in hyperparameters} | {
    "frames_per_batch": frames_per_batch * world_size, "minibatch_size": minibatch_size * world_size,
    "n_agents": env.n_agents, "world_size": world_size}
if checkpoint is not None:
    try:
        for name, part in (("policy", policy), ("critic", critic)):
            assert checkpoint[name].keys() == part.state_dict().keys()
            part.load_state_dict(checkpoint[name])
        optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
        assert all({key: value.shape for key, value in optimizer.state[parameter].items()} == {
            "step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape} for parameter in parameters)
        assert all(list(row) == columns and {*map(type, row.values())} <= {int, float} for row in metrics)
    except Exception as error:
        require(False, f"--resume {resume}: its checkpoint.pt does not fit these networks ({type(error).__name__})")


def write(name, save):
    """Let `save` fill a file, then put it into the run's folder as `name`: a reader finds the old or the new, whole."""
    with open(run_folder / f"{name}.new", "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, run_folder / name)


def record(means, seconds):
    """Add the `means` of an iteration, a TensorDict, to the metrics, and save; a FloatingPointError if not finite."""
    values = torch.stack([means[column].mean() for column in columns[3:]]) / world_size
    if world_size > 1:
        dist.all_reduce(values)
    if not torch.stack([*values, *(p.detach().abs().sum() for p in parameters)]).isfinite().all():
        raise FloatingPointError(f"iteration {len(metrics)} gave a loss or a parameter that is not finite")
    frames = hyperparameters["frames_per_batch"]
    row = dict(zip(columns, [len(metrics), (len(metrics) + 1) * frames, seconds, *values.tolist()]))
    if rank == 0:
        table = "\n".join(",".join(map(str, line)) for line in [columns, *map(dict.values, metrics), row.values()])
        write("metrics.csv", lambda file: file.write(f"{table}\n".encode()))
        states = {"policy": policy.state_dict(), "critic": critic.state_dict(), "optimizer": optimizer.state_dict(),
                  "hyperparameters": hyperparameters, "metrics": [*metrics, row]}
        write("checkpoint.pt", lambda file: torch.save(states, file))
        if job is not None:
            job.set("run_folder", str(run_folder))
    metrics.append(row)
    progress.set_postfix_str(f"reward {values[0]:.2f}, {reached_is} {values[1]:.2f}, {frames / seconds:.0f} frames/s")


if rank == 0:
    try:
        while checkpoint is None and run_folder.exists():  # another run began in the same second
            run_folder = Path(f"{run_folder}-2")
        run_folder.mkdir(parents=True, exist_ok=checkpoint is not None)
        write("hyperparameters.json", lambda file: file.write(json.dumps(hyperparameters, indent=2).encode()))
    except OSError as error:
        require(False, f"--output-dir {output_dir}: give a folder that can be written ({error})")
    if checkpoint is not None:
        print(f"{run_folder}: {len(metrics)} of {n_iters} iterations are done")

# %% [markdown]
# ---
# ## 6. Training loop
# Each iteration collects a batch, estimates its advantages once, with the critic as it is now, and goes through the
# batch num_epochs times. The three terms of the loss share one backward pass and one optimizer. While it learns, this
# code reads no number back from the device, or a GPU would wait for Python at every step: what is to be reported stays
# there and is read once, at the end.
#
# The random numbers of an iteration depend on `seed` and `iteration` alone, so that a run that was stopped and resumed
# continues like one that was not.

# %%
progress = tqdm(range(len(metrics), n_iters), algorithm.upper(), n_iters, initial=len(metrics), disable=rank > 0)
for iteration in progress:
    start = time.perf_counter()
    iteration_seed = random.Random(f"{seed} {iteration} {rank}").getrandbits(32)
    torch.manual_seed(iteration_seed)
    env.set_seed(iteration_seed)  # VMAS has random numbers of its own
    optimizer.param_groups[0]["lr"] = lr * (1 - iteration / n_iters) if anneal_lr else lr

    batch = collector.next()  # (num_vmas_envs, max_steps)
    estimate_advantages(batch)  # adds "advantage" and "value_target", (num_vmas_envs, max_steps, n_agents, 1)

    replay_buffer.empty()
    replay_buffer.extend(batch.reshape(-1).select(  # (frames_per_batch,), with what the loss reads and no more
        ("agents", "observation"), ("agents", "action"), ("agents", "action_log_prob"), "advantage", "value_target"))
    all_losses = []
    for epoch in range(num_epochs):
        for minibatch in replay_buffer:  # (minibatch_size,)
            losses = loss_module(minibatch)
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            all_losses.append(losses.detach())
    collector.update_policy_weights_()  # hands new weights to a collector that has its own copy; ours shares them

    done = batch["next", "done"].squeeze(-1)  # (num_vmas_envs, max_steps)
    first = done & (done.cumsum(dim=1) == 1)  # a later episode is cut off by the batch unless it succeeds soon
    means = torch.stack(all_losses).mean(dim=0)
    means["episode_reward_mean"] = batch["next", "agents", "episode_reward"][first].mean()
    means["success_rate"] = batch["next", "terminated"][first].float().mean()
    record(means, time.perf_counter() - start)

# %% [markdown]
# *Question 6. What would an off-policy method do differently with the replay buffer, and why not PPO?*
#
# ---
# ## Many processes, the end (skip this on a first reading)
# The policy is now the same in all processes; the first of them goes on alone.

# %%
if world_size > 1:
    dist.destroy_process_group()
    if rank > 0:
        sys.exit()

# %% [markdown]
# ---
# ## 7. Evaluation
# While it learns, the policy draws its actions at random; here it takes the squashed mean of its normal distribution.
# The untrained and the trained policy play the same `evaluation_episodes` fresh episodes, each counted from its reset
# to its first "done". In navigation an episode terminates only when every agent is at its goal, so the *success rate*
# is the share of episodes in which that happened before the time limit. In each step, every other agent that an agent
# touches counts as a collision. Other scenarios have the entries of their "info" printed instead.

# %%
def evaluate(policy):
    """Play the evaluation episodes with the deterministic `policy` and return a dictionary of means over them."""
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        episodes = make_env(evaluation_episodes, evaluation_seed).rollout(max_steps, policy, break_when_all_done=True)
    counted = episodes["next", "done"].squeeze(-1).cumsum(dim=1).cumsum(dim=1) <= 1  # also the first done itself
    reached = (episodes["next", "terminated"].squeeze(-1) & counted).any(dim=1).float().mean().item()

    def total(key):  # summed over an episode, averaged over agents and episodes
        return (episodes["next", "agents", key].flatten(2).mean(dim=2) * counted).sum(dim=1).mean().item()

    infos = [] if "info" not in episodes["next", "agents"].keys() else episodes["next", "agents", "info"].keys()
    results = {"episode reward per agent": total("reward"), reached_is: reached,
               "episode length in steps": counted.sum(dim=1).float().mean().item()}
    return results | ({"collisions per episode and agent": abs(total(("info", "agent_collisions")))}
                      if "agent_collisions" in infos else {f"{key}, summed": total(("info", key)) for key in infos})


before, after = evaluate(untrained_policy), evaluate(policy)
print(f"\n{evaluation_episodes} episodes, deterministic policy{'untrained':>16}{'trained':>12}")
for name in after:
    print(f"{name:<36}{before[name]:>16.3f}{after[name]:>12.3f}")

# %% [markdown]
# *Question 7. Why does the success rate during training stay below that of the evaluation?*
#
# ---
# ## 8. Results
# A run leaves its trained policy, which other programs can load, its hyperparameters and measurements, a picture of how
# it learned and a film of one episode. The picture shows the runs of MAPPO and IPPO side by side. So flip `mappo`, run
# again, and compare; then give both several seeds, as one run says little.

# %%
how_to_use = {"network": network, **bounds, "state_dict": policy_network.state_dict()}
write("policy.pt", lambda file: torch.save(how_to_use, file))

# %% [markdown]
# ---
# ## Pictures (skip this on a first reading)
# Thin curves are all runs of this scenario in the same folder. A thick one is the mean over finished runs that differ
# in nothing but seed, flag, device and folder, with its 95% bootstrap interval.

# %%
runs = []
for path in sorted(run_folder.resolve().parent.glob("*/checkpoint.pt")):
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        runs.append((dict(run["hyperparameters"]), {c: [float(row[c]) for row in run["metrics"]] for c in columns}))
    except Exception:
        print(f"{path} is damaged, so the learning curve leaves it out")
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for axis, column, name in zip(axes, columns[3:5], after):
    axis.set(title=scenario_name, xlabel="frames", ylabel=f"{name}, in training")
    for label, style in (("MAPPO", {"color": "tab:blue"}), ("IPPO", {"color": "tab:orange", "linestyle": "--"})):
        alike = {}
        for theirs, curve in runs:
            if (theirs.get("scenario_name"), theirs.get("mappo")) == (scenario_name, label == "MAPPO"):
                axis.plot(curve["frames"], curve[column], **style, linewidth=0.7, alpha=0.5)
                differences = {key for key, value in hyperparameters.items() if theirs.get(key) != value}
                if differences <= {"mappo", "seed", "device", "output_dir"} and len(curve[column]) == n_iters:
                    alike[str(theirs.get("seed"))] = curve[column]
        if alike:
            curves, frames = torch.tensor(list(alike.values())), [row["frames"] for row in metrics]  # (runs, n_iters)
            draws = torch.randint(len(curves), (1000, len(curves)), generator=torch.Generator().manual_seed(0))
            low, high = curves[draws].mean(dim=1).quantile(torch.tensor([0.025, 0.975]), dim=0)
            axis.fill_between(frames, low, high, color=style["color"], alpha=0.2, linewidth=0)
            axis.plot(frames, curves.mean(dim=0), **style, linewidth=2.5, label=f"{label} (mean, runs: {len(curves)})")
axes[0].legend()
write("learning_curve.png", lambda file: figure.savefig(file, dpi=120))

film, scene = [], make_env(1, evaluation_seed)
try:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        scene.rollout(max_steps, policy, callback=lambda *_: film.append(scene.render("rgb_array")))
    film = [Image.fromarray(frame).reduce(2) for frame in [*film, scene.render("rgb_array")]]  # the last step, too
except Exception as error:  # without OpenGL, or with a broken one, many kinds of errors are possible
    print(f"No rollout.gif, as OpenGL is missing ({type(error).__name__}): apt-get install libgl1 libegl1 libglu1-mesa")
else:
    write("rollout.gif", lambda gif: film[0].save(gif, "GIF", append_images=film[1:], save_all=1, duration=60, loop=0))
    if "get_ipython" in globals():  # a notebook shows the figure by itself, but not the film
        from IPython.display import Image as Film
        display(Film(run_folder / "rollout.gif", format="png"))  # under this label, every notebook page shows it
print(f"\nThe results of this run are in {run_folder}")
