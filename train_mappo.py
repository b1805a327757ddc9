# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "torchrl==0.14.1",
#     "tensordict==0.14.3",
#     "vmas==1.5.2",
#     "tqdm==4.70.1",
#     "matplotlib==3.10.8",
#     "pillow==12.3.0",
# ]
# ///
"""Multi-agent PPO with TorchRL, to be read from top to bottom.

Three robots must each drive to a goal of their own without touching one another: the scenario
"navigation" of the VMAS simulator. They learn it with MAPPO or, when one flag is flipped, with
IPPO. Every way to start this file:

    python train_mappo.py                         MAPPO with the hyperparameters of Section 1
    python train_mappo.py --no-mappo --seed 1     IPPO, another seed; --help shows all options
    python train_mappo.py --run-folder runs/mine  begin a run there; the same again goes on with it
    torchrun --nproc-per-node 2 train_mappo.py    one policy, trained by two processes
    in a notebook: open this file with jupytext, VS Code or PyCharm, or paste its sections

Sections 1 to 8 are the method and stand on their own. The cells A, B and C put a command line, runs
that can be stopped, many processes and pictures around it: skip them on a first reading.
"""

import copy
import json
import logging
import random
import time
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
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

logging.getLogger("torchrl").setLevel(logging.WARNING)  # at INFO, it reports each storage

# %% [markdown]
# # Multi-agent PPO, step by step
#
# PPO (Schulman et al. 2017, arXiv:1707.06347) learns *on-policy*: the current policy collects a
# batch of experience, a few epochs of gradient steps improve the policy on that batch, and the
# batch is thrown away, because the improved policy would have collected another one. A *critic* is
# a network that predicts the return. The actual return is compared with its prediction: actions
# that did better than predicted become more likely. The critic is needed only while learning; the
# robots drive without it.
#
# With several agents one thing changes. Each agent's environment contains the other agents, and
# they learn too: what was a good move yesterday may be a bad one today. To a single agent the world
# is *non-stationary*. On-policy learning is less exposed to this than learning from a large memory:
# its data are fresh, where old experience would tell of teammates that no longer exist. (Formally,
# agents that share a task and each observe a part of the world face a *decentralised partially
# observable Markov decision process*, or Dec-POMDP.)
#
# Two algorithms are compared here. They differ in what the critic sees:
#
# - **IPPO**, independent PPO (de Witt et al. 2020, arXiv:2011.09533): the critic predicts an
#   agent's return from that agent's own observation, as if the others were part of the world.
# - **MAPPO**, multi-agent PPO (Yu et al. 2022, arXiv:2103.01955): the critic predicts it from the
#   observations of the whole team.
#
# In both, the *policy* sees its own agent's observation only. A critic may be given more than the
# policy has, because it is not there when the robots drive: *centralised training, decentralised
# execution*, CTDE for short. One flag, the first of the hyperparameters, switches between the two.
#
# ## 1. Hyperparameters
# A *frame* is one step of one environment, in which all agents act at once. What the other words
# mean is said where they are used.

# %%
mappo = True  # the critic sees what all agents observe (MAPPO); False: what one does (IPPO)
seed = 0  # random seed of the networks, the simulator and the sampling
device = "cuda" if torch.cuda.is_available() else "cpu"  # simulation and training run there

scenario_name = "navigation"  # the VMAS scenario
scenario_options = {}  # its keyword arguments, such as {"shared_rew": False}
n_agents = 3  # number of agents, where the scenario leaves it open
max_steps = 100  # steps after which an episode is cut off

frames_per_batch = 6000  # frames collected in an iteration
n_iters = 10  # iterations of collecting a batch and learning from it

num_epochs = 30  # passes over each batch
minibatch_size = 400  # frames in a gradient step, each with what every agent did
lr = 3e-4  # learning rate of Adam
anneal_lr = False  # let the learning rate fall linearly, to reach 0 after the last iteration
max_grad_norm = 1.0  # a gradient with a larger norm is scaled down to this one
clip_epsilon = 0.2  # PPO's clipping range
gamma = 0.99  # discount factor of the return
lmbda = 0.9  # lambda of generalised advantage estimation
entropy_eps = 1e-4  # weight of the entropy bonus
critic_coeff = 0.5  # weight of the value loss
normalize_advantage = True  # give advantages mean 0 and standard deviation 1

share_parameters_policy = True  # one policy network for all agents; False: one for each
share_parameters_critic = True  # one critic network for all agents; False: one for each
depth = 2  # hidden layers of each network
num_cells = 256  # units of a hidden layer

evaluation_episodes = 200  # episodes of the evaluation before and after training
evaluation_seed = 12345  # random seed of these episodes, the same for every run
run_folder = ""  # where the results go; empty: a new folder below runs/

# %% [markdown]
# *Question 1. How many gradient steps does one iteration take, and how often is each frame used in
# them? (Answers to all questions stand at the end of this file.)*
#
# *The next cell is of no interest to the method: run it, no need to read it. It notes the names
# above for the cells A and B, which put a command line, lasting runs and many processes around the
# method, and that this is process 0 of 1.*

# %%
kinds = {bool, int, float, str, list, tuple, dict, type(None)}
names = [name for name, value in globals().items() if type(value) in kinds and name[0].islower()]
if "hyperparameters" not in globals():  # when this runs once more, there are other names, too
    hyperparameters = names
rank, world_size = 0, 1

# %% [markdown]
# ---
# ## A. From a shell (skip this on a first reading: go on at Section 2)
# Every name of Section 1 is an option: `n_iters` is `--n-iters`, `mappo` is `--mappo` or
# `--no-mappo`, and lists, dictionaries and what stands in place of a None are written as JSON.
# Values that cannot work are refused before anything is trained, in a notebook by a ValueError. If
# `run_folder` holds a run, it is resumed, and options that are not given keep that run's values.
#
# Started by torchrun, several processes train one policy together. The hyperparameters speak of the
# whole job, so each process takes its share of the frames and of a minibatch, and, if there are
# GPUs, one of them (with fewer GPUs than processes: `--device cpu`). Process 0 speaks for all; only
# errors are printed by every process. (This needs cell B, too, which averages the gradients.)

# %%
import argparse
import functools
import math
import os
import shlex
import signal
import sys
import warnings

from torch import distributed as dist

# VMAS only warns of keywords that a scenario does not know. Some scenarios set the number of agents
# themselves and warn of ours, which is then left alone; of two filters the later one counts.
warnings.filterwarnings("error", "Scenario kwargs")
warnings.filterwarnings("ignore", r"Scenario kwargs: \{'n_agents': \d+\} passed but not used")
# Where agents do not fit into their world, VMAS warns and looks for a free place for ever.
warnings.filterwarnings("error", "It is taking many iterations to spawn")


# These may be written without a point, too: 1 for 1.0.
numbers = ["lr", "max_grad_norm", "critic_coeff", "clip_epsilon", "gamma", "lmbda", "entropy_eps"]


def require(is_right, name, what_is_right):
    """Raise a ValueError that names a hyperparameter, its value and what would be right."""
    if not is_right:
        raise ValueError(f"{name} is {globals()[name]!r}, but must be {what_is_right}")


def check_hyperparameters(given=()):
    """Raise a ValueError if the hyperparameters, as they are now, cannot work.

    `given` holds the names that the user chose, as far as that is known: a number of agents that
    the scenario will not have is refused only if somebody asked for it. Returns the number of
    agents that it has.
    """
    whole_numbers = ["max_steps", "frames_per_batch", "n_iters", "num_epochs", "num_cells"]
    whole_numbers += ["n_agents", "depth", "evaluation_episodes", "seed", "evaluation_seed"]
    flags = ["mappo", "anneal_lr", "normalize_advantage"]
    for name in [*flags, "share_parameters_policy", "share_parameters_critic"]:
        require(type(globals()[name]) is bool, name, "True or False")
    for name in numbers:
        require(type(globals()[name]) in (int, float), name, "a number")
    for name in [*whole_numbers, "minibatch_size"]:
        require(type(globals()[name]) is int, name, "a whole number")
        require(globals()[name] <= 10**9 or "seed" in name, name, "at most a billion")
    for name in ("seed", "evaluation_seed"):
        require(0 <= globals()[name] < 2**32, name, "from 0 to 2**32 - 1")
    for name in [name for name in whole_numbers if "seed" not in name]:
        require(globals()[name] >= 1, name, "at least 1")
    require(minibatch_size >= 2, "minibatch_size", "at least 2, so that it has a deviation")
    for name in ("lr", "max_grad_norm", "critic_coeff"):
        require(0 < globals()[name] < math.inf, name, "a number above 0")
    require(0 < clip_epsilon < 1, "clip_epsilon", "between 0 and 1")
    require(0 <= gamma <= 1, "gamma", "from 0 to 1")
    require(0 <= lmbda <= 1, "lmbda", "from 0 to 1")
    require(0 <= entropy_eps < math.inf, "entropy_eps", "0 or a number above it")

    shared = f" that {world_size} processes can share" if world_size > 1 else ""
    fits = frames_per_batch % (max_steps * world_size) == 0
    require(fits, "frames_per_batch", f"a multiple of max_steps, {max_steps}{shared}")
    fits = frames_per_batch % minibatch_size == 0 and minibatch_size % world_size == 0
    require(fits, "minibatch_size", f"a divisor of frames_per_batch, {frames_per_batch}{shared}")
    fits = minibatch_size // world_size >= 2
    require(fits, "minibatch_size", f"at least 2 for each of {world_size} processes")

    gpus, here = torch.cuda.device_count(), 1
    if world_size > 1:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
    devices = ["cpu", "cuda"] if gpus >= here else ["cpu"]
    if world_size == 1:
        devices += [f"cuda:{index}" for index in range(gpus)]
    known = " or ".join(devices)
    require(device in devices, "device", f"{known}: GPUs here: {gpus}, for processes: {here}")

    known = VmasEnv.available_envs
    require(scenario_name in known, "scenario_name", "one of " + ", ".join(known))
    require(type(scenario_options) is dict, "scenario_options", "a dictionary")
    require("n_agents" not in scenario_options, "scenario_options", "without n_agents, set above")
    options = {"n_agents": n_agents, **scenario_options}
    try:
        trial = VmasEnv(scenario_name, num_envs=100, seed=0, device="cpu", scenario_kwargs=options)
    except Exception as error:
        raise ValueError(
            f"n_agents is {n_agents} and scenario_options is {scenario_options}, but must be "
            f"fewer agents or options that {scenario_name} accepts; it says: {error}"
        ) from error
    one_team = len(trial.group_map) == 1 and not trial.het_specs
    team = ", ".join(trial.agent_names)
    require(one_team, "scenario_name", f"a scenario with one team of alike agents, not {team}")
    fits = trial.n_agents == n_agents or "n_agents" not in given
    require(fits, "n_agents", f"{trial.n_agents}, which this scenario sets itself")
    return trial.n_agents


def json_value(text, kind):
    """Turn an option's text into a value of this kind, or any for None; argparse reports others."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not written as JSON") from error
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if kind is not type(None) and type(value) is not kind:
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} written as JSON")
    return value


def make_parser():
    """Return a parser with an option for each name of Section 1."""
    text = Path(__file__).read_text("utf-8").partition("# ## 1. Hyperparameters")[2]
    parser = argparse.ArgumentParser(
        prog="train_mappo.py" if world_size == 1 else f"train_mappo.py, process {rank}",
        usage="python train_mappo.py [--NAME VALUE] [--FLAG] [--no-FLAG] ...",
        description="Each name is an option, with - in place of _; its value is the default.",
        epilog=text.partition("# %%")[2].partition("# %%")[0],  # the cell with the names
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name in hyperparameters:
        kind = type(globals()[name])
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif name in numbers:
            how = {"type": float}
        elif kind in (int, float, str):
            how = {"type": kind}
        else:
            how = {"type": functools.partial(json_value, kind=kind)}
        parser.add_argument("--" + name.replace("_", "-"), help=argparse.SUPPRESS, **how)
    return parser


def options_of_the_run(given):
    """Return the hyperparameters of the run in `run_folder`, less those `given`; none if it is new.

    Raises a ValueError if its checkpoint is damaged.
    """
    path = Path(run_folder, "checkpoint.pt")
    found = [{}]
    if rank == 0 and path.is_file():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of strange formats, which are refused
                checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
            found = [dict(checkpoint["hyperparameters"])]
        except Exception as error:
            found = [type(error).__name__]
    if world_size > 1:
        dist.broadcast_object_list(found)  # the others may not see the first one's folder
    [theirs] = found
    readable = type(theirs) is dict
    require(readable, "run_folder", f"a run's; its checkpoint.pt is damaged or foreign ({theirs})")
    settings = {name: theirs[name] for name in hyperparameters if name in theirs}
    for name, value in settings.items():
        kinds_of_both = {type(value), type(globals()[name])}
        alike = len(kinds_of_both) == 1 or type(None) in kinds_of_both or name in numbers
        require(alike, "run_folder", f"a run's; its checkpoint.pt has {value!r} as its {name}")
    return {name: settings[name] for name in settings if name not in {*given, "run_folder"}}


def stop(signal_number, frame):
    """On Ctrl-C, say in one line what was kept and how to go on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    place = globals().get("folder", run_folder)
    kept = "nothing was kept"
    if place and Path(place, "checkpoint.pt").exists():
        here = shlex.quote(str(place))
        kept = f"go on with the same torchrun command and --run-folder {here}"
        if world_size == 1:
            kept = f"go on with: {shlex.join([sys.executable, *sys.argv])}"
            if not run_folder:
                kept += f" --run-folder {here}"
    if "progress" in globals():
        progress.close()  # or its last state would follow our line
    if rank == 0:
        print(f"train_mappo.py: stopped; {kept}", file=sys.stderr)
    sys.exit(130)


if dist.is_torchelastic_launched():  # by torchrun
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if world_size > 1 and not dist.is_initialized():
    store, _, _ = next(dist.rendezvous("env://"))
    # After a restart of the job, the addresses of the processes before it are still in there.
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(store=store, rank=rank, world_size=world_size)
if rank > 0:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open until the process ends
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)

given = {}
try:
    if Path(sys.argv[0]).resolve() == Path(globals().get("__file__", "a notebook")).resolve():
        signal.signal(signal.SIGINT, stop)
        plt.switch_backend("agg")  # pictures go to files, no window is opened
        command_line = make_parser()
        given = vars(command_line.parse_args())
        globals().update(given)
        if run_folder:
            globals().update(options_of_the_run(given))
    n_agents = check_hyperparameters(given)
except (OSError, ValueError) as error:
    if "command_line" not in globals():
        raise
    command_line.error(str(error))

if world_size > 1:
    the_job = {"frames_per_batch": frames_per_batch, "minibatch_size": minibatch_size}
    the_job["device"] = device
    frames_per_batch //= world_size
    minibatch_size //= world_size
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)  # before anything is built, or all would share GPU 0

# %% [markdown]
# ---
# ## 2. Environment
# Three robots start at random places of a square, each with a goal of its own. In *navigation*, a
# robot observes 18 numbers: its position (2) and velocity (2), the way to its goal (2), and how
# near other robots are in 12 directions (its lidar). Its action is a force along x and y. Most of a
# step's reward is shared: the sum over the *team* of the distance by which each came nearer to its
# goal; a robot that touches others gets -1 for each of them, for itself alone. The episode ends
# when all robots are within 0.10 of their goals at the same time: a *success*, if it happens within
# `max_steps`. The rest of the way, up to 0.10 a robot, is then never paid. (The scenario also pays
# 0.01 while all are within 0.05; as the episode is over before, that is hardly ever earned.)
#
# VMAS simulates `num_vmas_envs` copies of this at once, as one batch of tensors on `device`. The
# policy runs there, too, so on a GPU the data never leaves it. With frames_per_batch / max_steps
# copies, each has room for one episode of full length in a batch; where an episode ends early,
# another begins, and the end of the batch cuts that one off.
#
# The parts of TorchRL hand one TensorDict to each other: a dictionary of tensors that share their
# first dimensions, its *batch shape*, and can be indexed and reshaped along them together. There
# are dictionaries in it: what a step led to is under `"next"`, and `td["next", "done"]` reads the
# `"done"` there. Each part names the entries that it reads and those that it writes. Some entries
# are the team's, one for each environment; those that each agent has of its own lie under
# `"agents"`. After `max_steps` steps, with `n_obs` = 18 numbers in an observation and `n_actions` =
# 2 in an action:
#
# | key | shape | whose |
# |---|---|---|
# | `("agents", "observation")` | (num_vmas_envs, max_steps, n_agents, n_obs) | each agent's |
# | `("agents", "action")` | (num_vmas_envs, max_steps, n_agents, n_actions) | each agent's |
# | `("next", "agents", "reward")` | (num_vmas_envs, max_steps, n_agents, 1) | each agent's |
# | `("next", "terminated")` | (num_vmas_envs, max_steps, 1) | the team's: all are at their goals |
# | `("next", "truncated")` | (num_vmas_envs, max_steps, 1) | the team's: the time is up |
# | `("next", "done")` | (num_vmas_envs, max_steps, 1) | the team's: one or the other |
#
# A time limit is not a termination. After a termination nothing more can be earned, so the value of
# what follows is zero; when time runs out, the robots could have gone on, and the critic's estimate
# of what they would have earned still counts. VMAS, given `max_steps`, would report both as
# "terminated"; TorchRL's `StepCounter` keeps them apart.


# %%
def seed_for(*purpose):
    """Derive from `seed` a random seed for each purpose, so that no two share their numbers."""
    return random.Random(f"{seed} {purpose}").getrandbits(32)


def make_env(num_envs, seed):
    """Build the scenario as `num_envs` environments that step together, placed by `seed`."""
    one_team = MarlGroupMapType.ALL_IN_ONE_GROUP  # what agents have is stacked, under "agents"
    how = {"num_envs": num_envs, "seed": seed, "device": device, "group_map": one_team}
    options = {"n_agents": n_agents, **scenario_options}
    simulator = VmasEnv(scenario_name, scenario_kwargs=options, **how)
    # A transform is a part between the simulator and its user; this one truncates episodes.
    return simulator.append_transform(StepCounter(max_steps))


num_vmas_envs = frames_per_batch // max_steps
env = make_env(num_vmas_envs, seed_for("environment"))
# A spec says which shape, type and bounds an entry has; "unbatched" is that of one environment.
n_obs = env.observation_spec["agents", "observation"].shape[-1]
action_spec = env.full_action_spec_unbatched["agents", "action"]  # (n_agents, n_actions), bounded
n_actions = action_spec.shape[-1]

# %%
# There is no policy yet, so actions are random. A rollout would end as soon as one environment is
# done; with False, that one is reset and all play on, as in a batch of the collector.
played = env.rollout(max_steps, break_when_any_done=False)
{key: tuple(value.shape) for key, value in played["agents"].items() if key != "info"}

# %% [markdown]
# *Question 2. If the time limit were a termination, what return would the critic be taught for an
# episode's last step, and can it see that it is the last?*
#
# ---
# ## 3. Policy
# The policy is *decentralised*: an agent's action depends on its own observation alone, so that
# each robot can be sent out with a copy of the network and no radio. It is built in three steps:
#
# 1. `MultiAgentMLP` applies a network, `depth` hidden layers with tanh, to every agent and keeps
#    the agent dimension: observations (num_vmas_envs, n_agents, n_obs) in, 2 × n_actions numbers
#    for each agent out.
# 2. `NormalParamExtractor` makes of these a mean and a positive standard deviation.
#    `TensorDictModule` names the entries that are read and written: `"loc"` and `"scale"`,
#    (num_vmas_envs, n_agents, n_actions) each.
# 3. `ProbabilisticActor` draws the action from a normal distribution with this mean and deviation,
#    squashed by a tanh into the bounds of the action (`TanhNormal`), and keeps the logarithm of the
#    action's probability density under `"action_log_prob"`, (num_vmas_envs, n_agents), which PPO
#    will need.
#
# With `share_parameters_policy` all agents use the same weights. One network then learns from the
# experience of the whole team, n_agents times as much. The price: agents that observe the same draw
# their actions from the same distribution, so a task that needs specialists needs observations that
# tell the agents apart, or networks of their own.
#
# How the weights start matters to PPO. Orthogonal matrices keep the scale of signals and gradients
# from layer to layer. The policy's last layer starts 100 times smaller, which
# Andrychowicz et al. (2021, arXiv:2006.05990) found to be among what matters most: at first every
# observation then gives nearly the same distribution of actions, centred and wide, and no accident
# of the start has to be unlearned.


# %%
def start_orthogonally(network, gain_of_last_layer):
    """Set a MultiAgentMLP's weights to random orthogonal matrices, and its biases to 0.

    The gain is sqrt(2) in hidden layers (customary for PPO, used here with tanh, too) and
    `gain_of_last_layer` in the last. Where each agent has a network of its own, a weight has the
    shape (n_agents, outputs, inputs), and each agent's matrix is drawn for itself.
    """
    weights = [value for name, value in network.named_parameters() if name.endswith("weight")]
    biases = [value for name, value in network.named_parameters() if name.endswith("bias")]
    with torch.no_grad():
        for weight in weights:
            gain = gain_of_last_layer if weight is weights[-1] else 2**0.5
            for matrix in weight.view(-1, *weight.shape[-2:]):
                nn.init.orthogonal_(matrix, gain)
        for bias in biases:
            bias.zero_()


torch.manual_seed(seed_for("policy"))
network = {
    "n_agents": env.n_agents,
    "n_agent_inputs": n_obs,
    "depth": depth,
    "num_cells": num_cells,
}
policy_network = MultiAgentMLP(
    **network,
    n_agent_outputs=2 * n_actions,
    centralized=False,  # an agent's output depends on its own observation only
    share_params=share_parameters_policy,
    device=device,
)
start_orthogonally(policy_network, gain_of_last_layer=0.01)
policy_module = TensorDictModule(
    nn.Sequential(policy_network, NormalParamExtractor()),
    in_keys=[("agents", "observation")],
    out_keys=[("agents", "loc"), ("agents", "scale")],
)
bounds = {"low": action_spec.space.low, "high": action_spec.space.high}
untrained_policy = ProbabilisticActor(
    policy_module,
    in_keys=[("agents", "loc"), ("agents", "scale")],
    out_keys=[("agents", "action")],
    spec=env.full_action_spec_unbatched,
    distribution_class=TanhNormal,
    distribution_kwargs=bounds,
    return_log_prob=True,
    default_interaction_type=ExplorationType.RANDOM,  # the default is to draw in a collector only
)
untrained_policy(env.reset())["agents", "action"][0].tolist()  # one environment, a row a robot

# %% [markdown]
# *Question 3. How many weights and biases does the policy have, and how many if
# `share_parameters_policy` is False?*
#
# ---
# ## 4. Critic
# This is where MAPPO and IPPO part, in the one argument `centralized`. Write o_i for the
# observation of agent i:
#
#     IPPO     V_i = V(o_i)                    n_obs numbers (18), however large the team
#     MAPPO    V_i = V(o_1, o_2, ..., o_n)     n_agents × n_obs numbers (54), one input for all i
#
# May a critic see what the policy does not? It may. It is not there when the robots drive; and what
# is subtracted from a return, a *baseline*, leaves the expected policy gradient as it is, whatever
# it depends on, as long as the action that is judged cannot influence it.
#
# What can a wider view be good for? Most of the reward here is the progress of the whole team.
# IPPO's critic cannot see what the *others* are about to earn; it has to guess that from what its
# own robot observes. MAPPO's critic sees where all robots are and how far from their goals. So a
# wider view should help as far as an agent's return depends on what that agent cannot see, and no
# further. One keyword of the scenario tests this: with `"shared_rew": False` each robot is paid for
# its *own* progress. Eight robots, ten seeds, 60,000 frames, evaluated as in Section 7, all else
# the same (README.md, experiments 2 and 3, has the commands; a failed episode counts as 100
# *steps*):
#
# | what each robot is paid for | success: MAPPO | IPPO | steps: MAPPO | IPPO |
# |---|---|---|---|---|
# | the team's progress | 1.00 (worst run 1.00) | 0.88 (worst 0.13) | 64.2 | 74.9 |
# | its own progress | 1.00 (worst run 1.00) | 1.00 (worst 1.00) | 53.7 | 53.0 |
#
# Paid as a team, all ten runs are faster with MAPPO, and one of IPPO's all but fails (ten other
# seeds: 0.97 and 0.86, in 66.1 and 77.3 steps); paid apart, they gain nothing by it. Note that the
# reward did more than a wider critic: it cut IPPO's 75 steps to 53, MAPPO's critic to 64.
#
# Nor need the view be wide. Give a local critic *one* number more, how far the other robots still
# have to go in all: success is 1.00 in each of ten runs, in 58.6 steps, better than MAPPO's critic
# with all 48 numbers (here a robot observes 6, as without collisions it needs no lidar). So ask of
# a task which part of an agent's return depends on what *this* agent cannot see, and show its
# critic that. Section 5 explains what happens otherwise, once it has the formula of the advantage.
#
# What a centralised critic does not do:
#
# - It does not make the world stationary: the others' policies still change.
# - It assigns no credit. It sees observations and no actions, so it says how well the team stands,
#   not who made it so. (Other methods do: COMA, Foerster et al. 2018, arXiv:1705.08926, compares
#   with what the agent's other actions would have brought.)
# - It does not always pay. Its input grows with the team, and much of it may not matter to an
#   agent: see above. And with bootstrapped values (Section 5) it can make the policy gradient
#   *noisier*: it passes on what the others happen to observe, which a local critic averages out, at
#   a price (Lyu et al. 2021, arXiv:2102.04402).
#
# With `share_parameters_critic` one network serves all agents. For MAPPO that means one input and
# one network, hence *the same value for every agent*: a value of the team's situation. That fits a
# reward that is mostly shared. It cannot fit the rest: a collision costs only the robots that
# touch, and a single value can only predict the team's average. With False, each agent gets a
# centralised critic of its own, which can tell who is about to be hit. Under IPPO the inputs
# differ, so the values do, whether the network is shared or not. (So the algorithms differ in more
# than the view: a shared critic learns from n_agents inputs a frame under IPPO, from one under
# MAPPO.)
#
# Why is IPPO called *independent* if its agents share a network, a loss and an optimizer? The name
# speaks of information: no agent's action or value depends on what another agent observes. Sharing
# weights is a second choice, apart from the first; IPPO is used with and without it.

# %%
torch.manual_seed(seed_for("critic"))
critic_network = MultiAgentMLP(
    **network,
    n_agent_outputs=1,
    centralized=mappo,  # the whole difference between MAPPO and IPPO
    share_params=share_parameters_critic,
    device=device,
)
start_orthogonally(critic_network, gain_of_last_layer=1.0)
critic = TensorDictModule(
    critic_network,
    in_keys=[("agents", "observation")],
    out_keys=[("agents", "state_value")],  # (num_vmas_envs, n_agents, 1)
)
# One situation, a value for each robot: MAPPO gives three equal ones, IPPO three different ones.
critic(env.reset())["agents", "state_value"][0].tolist()

# %% [markdown]
# *Question 4. How many inputs does the critic have with 8 agents, and how many under IPPO?*
#
# ---
# ## 5. Collection, advantages, loss
# ### Collection
# `Collector` (formerly SyncDataCollector) steps the environment with the policy and yields batches
# of frames_per_batch frames, (num_vmas_envs, max_steps), each from a fresh reset. It holds the same
# policy object that the optimizer updates, so it always acts with the newest weights. (A collector
# with processes of its own has copies of the weights, and has to be told of new ones:
# `collector.update_policy_weights_()`.)
#
# The replay buffer, usually a large memory for off-policy learning, holds one batch only. Sampling
# *without replacement*, it deals the batch out in minibatches: in one pass, an *epoch*, every frame
# occurs exactly once.

# %%
policy = copy.deepcopy(untrained_policy)  # this one learns; Section 7 compares the two
collector = Collector(
    env,
    policy,
    device=device,
    frames_per_batch=frames_per_batch,
    reset_at_each_iter=True,
    track_traj_ids=False,  # episodes need no numbers here
    auto_register_policy_transforms=False,  # these are for policies that remember earlier steps
)
storage = LazyTensorStorage(frames_per_batch, device=device)
replay_buffer = ReplayBuffer(
    storage=storage, sampler=SamplerWithoutReplacement(), batch_size=minibatch_size
)

# %% [markdown]
# ### Advantages
# How much better than expected was agent i's action at step t? *Generalised advantage estimation*
# (Schulman et al. 2016, arXiv:1506.02438) adds up the critic's errors of prediction from there on,
# with V_i(t) for the value before step t and V_i(t+1) for the value after it, read from `"next"`,
# as the next row may belong to another episode:
#
#     delta_i(t) = r_i(t) + gamma (1 - terminated(t)) V_i(t+1) - V_i(t)
#     A_i(t)     = delta_i(t) + gamma lmbda (1 - done(t)) A_i(t+1)
#     target     = A_i(t) + V_i(t)                            what the critic is to learn
#
# With lmbda = 0 one reward counts, and V_i(t+1) stands in for all that come later (*bootstrapping*:
# little variance, but all of the critic's bias); with 1 all collected rewards do (much variance,
# bias only where an episode is cut off). The flags are the team's and the values each agent's.
# `MultiAgentGAE` lends the flags to every agent; ordinary GAE would ask for the same shapes. A
# "done" stops the sum. Only a "terminated" also sets the next value to zero, see Section 2. An
# episode that the end of the batch cuts off is treated like one whose time is up: the sum stops,
# and the critic's value stands for what was not seen.
#
# With MAPPO's shared critic all robots have one value, and here nearly one reward, so in a frame
# their advantages are nearly one number. How does a robot learn what *it* did right? Only over many
# frames: what it did well tends to raise that number, what the others did raises or lowers it
# regardless, and over thousands of frames their part averages out.

# %%
estimate_advantages = MultiAgentGAE(gamma=gamma, lmbda=lmbda, value_network=critic, device=device)
estimate_advantages.set_keys(reward=("agents", "reward"), value=("agents", "state_value"))

# %% [markdown]
# *Question 5. With lmbda = 0, how many of the collected rewards enter the advantage of one action?*
#
# ### What the critic's view does to the advantage
# The formula uses the critic twice. V_i(t) is a *baseline*: its errors are the same for every
# action, and cancel in the mean. V_i(t+1) is *bootstrapped*: it depends on where the action led, so
# its errors are credited or charged to the action, and do not cancel.
#
# What errors can they be? All robots drive home at the same time. So to a critic that sees one of
# them, a robot nearer its goal means a team nearer its goals, and it expects less from *all*. That
# is right on average over all situations in which a robot stands there, but not for the one that
# *this* action led to: the others have not moved because this robot did. How large the error gets
# was measured by moving one robot alone in what the critic sees, in a run's last batch. By how much
# does its value fall, for each unit of way that the robot is nearer? (The eight robots of Section
# 4, ten more runs of each kind.)
#
# | paid | what the critic of a robot sees | value falls by | success | steps |
# |---|---|---|---|---|
# | for itself | its observation (IPPO) | 0.64 | 1.00 | 53.1 |
# | as a team | all observations (MAPPO) | 0.10 | 1.00 | 64.2 |
# | as a team | its own, and how far the others have to go | 0.24 | 1.00 | 58.6 |
# | as a team | its own (IPPO) | 1.01 | 0.89 | 74.6 |
# | as a team | its own, and how far its robot has to go | 2.16 | 0.00 | 100.0 |
#
# What does that do to a step home? A unit of way pays 1 at once. If the value then is lower by s,
# for good, the sum of all deltas gives that a weight of gamma (1 - lmbda) / (1 - gamma lmbda) =
# 0.91. So the advantage of a unit is 1 - 0.91 s: 0.42 in the first row, where the critic sees all
# it needs; next to nothing, 0.09, for IPPO with the team's reward; and -0.96 in the last row, where
# the critic is even given its own robot's way as a number. There going home *looks like a loss*,
# and all ten runs fail. (MAPPO's value falls by too little. That is wrong, too, but it errs on the
# side of going.)
#
# With Section 1's three robots the fall grows from iteration to iteration (study/README.md, "Is one
# number enough?"). With MAPPO it is 0.37 after ten. With IPPO it is 0.88 after ten, when the robots
# have learned the task, and 1.48 after 15, when they have unlearned it, with every one of ten
# seeds. Success rates, each line the same ten runs, evaluated on their way:
#
# | after | 10 iterations | 15 | 20 | 50 |
# |---|---|---|---|---|
# | MAPPO | 0.95 | 0.98 | 0.99 | 0.98 |
# | IPPO | 0.87 | 0.05 | 0.00 | 0.01 |
# | a local critic, told how far the others have to go | 0.98 | 0.99 | 0.99 | |
#
# (It is not that IPPO found something better paid than success: its reward falls, too, from 3.12 to
# 2.75 to 1.52 after 20 iterations.)
#
# The end of an episode is the sharpest case: what follows it is worth 0. In the last batch of ten
# default runs, IPPO's critic expected 0.59 on average just before the last robot arrived, as the
# others usually still have some way to go when a robot is there; 0.01 came. (MAPPO's expected 0.28,
# too much as well.)
#
#     it arrives               delta = 0.01 + 0           - 0.59 = -0.58
#     it stops short of it     delta = 0    + 0.99 × 0.59 - 0.59 = -0.01
#
# *Success looks like a loss.* If arrivals are bootstrapped like time limits, the fall stays at 1.01
# after 15 iterations, and IPPO still has a success rate of 0.96. (1 - 0.91 s turns negative at
# 1.1.) Other cures, where the critic cannot be shown more: it has 1.00 if each robot is paid for
# itself, and 1.00 with gamma = 0.9, where a value reaches only some ten steps ahead and little of
# the others' progress is in it. And lmbda = 1? Then a critic is a baseline, little more, and
# advantages are so noisy that eight robots learn too slowly (success 0.08 with MAPPO, 0.10 with
# IPPO). As far as such runs can tell, the wider view gains nothing as a baseline: what MAPPO has of
# it, it has through what is bootstrapped.
#
# ### Loss and optimizer
# With theta for the policy's weights, agent i has a probability ratio of its own in each frame, and
# the objective is the mean over frames and agents of the smaller of two terms:
#
#     ratio_i   = pi_theta(a_i | o_i) / pi_old(a_i | o_i)
#     objective = mean of min(ratio_i A_i, clip(ratio_i, 1 - clip_epsilon, 1 + clip_epsilon) A_i)
#
# *Clipping*: where an action was good (A_i > 0), making it more than 1 + clip_epsilon times as
# likely gains nothing more; where it was bad, neither does making it less than 1 - clip_epsilon
# times as likely. The `min` takes this limit away on the other side: a ratio that has moved in the
# wrong direction can always be brought back. So the new policy has little to gain from going far
# from the one that collected the batch, which is what allows several epochs on it.
#
# Is it sound to clip each agent apart while all of them change at once? What was measured is each
# action's advantage among the *old* teammates, and the team's joint ratio is the product of the
# agents' ratios. If each is near 1, so is the product, but less so the larger the team (Sun et al.
# 2022, arXiv:2202.00082), which speaks for a smaller clip_epsilon there. Clipping does not *force*
# the ratios to stay near 1; it only removes the incentive to leave.
#
# *Normalised advantages*: the size of a step should not depend on the scale of the rewards. Mean
# and standard deviation are taken over a minibatch, for each agent apart (so the agent dimension,
# -2, is left out of the averaging), so that an agent whose return varies more does not drown the
# others.
#
# *Value loss*: the smooth L1 distance of V_i from its target above, which is built from the
# advantage before normalisation.
#
# *Entropy bonus* (Williams and Peng 1991): staying random is worth a little, so that the policy
# does not settle on one action before it has tried others. The squashed normal has no formula for
# its entropy, so the loss estimates it from one sample.
#
# The loss hands back three terms to be minimised, already weighted: minus the objective,
# critic_coeff times the value loss, and minus entropy_eps times the entropy.
#
# TorchRL has classes named `MAPPOLoss` and `IPPOLoss`. They are this `ClipPPOLoss`, with the
# excluded dimension and `MultiAgentGAE` set for you, other weights as defaults (0.01 for the
# entropy) and value normalisation as an option. What they set is worth seeing once.

# %%
loss_module = ClipPPOLoss(
    policy,
    critic,
    clip_epsilon=clip_epsilon,
    entropy_coeff=entropy_eps,
    critic_coeff=critic_coeff,
    normalize_advantage=normalize_advantage,
    normalize_advantage_exclude_dims=(-2,),
    functional=False,  # it uses the networks themselves; stateless copies would be slower
    loss_critic_type="smooth_l1",
    log_explained_variance=False,  # Section 6 computes it, from before the update
)
loss_module.set_keys(value=("agents", "state_value"))  # it finds the policy's keys by itself
optimizer = torch.optim.Adam(loss_module.parameters(), lr=lr, fused=True)

# %% [markdown]
# ### What a run keeps
# The results of a run go to a folder. Each iteration will add a row of measurements to `history`,
# and call the functions in `after_iteration` with it: whatever is to happen between iterations, a
# plot or an evaluation, say, goes there (Section 6 has an example), and the loop stays as it is.

# %%
algorithm = "MAPPO" if mappo else "IPPO"
name_of_run = f"{algorithm.lower()}-{scenario_name}-seed{seed}"
folder = Path(run_folder or f"runs/{name_of_run}-{datetime.now():%Y%m%d-%H%M%S-%f}")
history = []  # a dictionary of measurements for each finished iteration
after_iteration = []  # functions that are called with the newest of them

# %% [markdown]
# ---
# ## B. Runs that last (skip this on a first reading: go on at Section 6)
# The first of the functions in `after_iteration`, and so the last to be called, is this cell's. It
# leaves in the run's folder a checkpoint, a table of measurements and the hyperparameters. Each
# file is written beside the old one and put in its place when it is whole, so a run can be killed
# at any moment. If `run_folder` names a folder with a checkpoint, the run in it is resumed, unless
# another process is training in it; any other folder must be new or empty.
#
# The random numbers of an iteration depend on `seed`, its number and this process's, and on nothing
# that happened before: so a run that was stopped ends with the same numbers as one that was not (on
# a CPU with as many threads, bit for bit; with anneal_lr only for the same n_iters), and MAPPO and
# IPPO with the same seed start from the same first batch.
#
# Of several processes the first one reads and writes. `DistributedDataParallel` averages their
# gradients in each backward pass, and the mean and the deviation that normalise the advantages are
# those of the whole minibatch, too. After the last iteration the first process goes on alone.

# %%
import csv
import fcntl
import io
import os
import sys
import tempfile
import uuid
import warnings

from torch import distributed as dist

settings = {name: globals()[name] for name in hyperparameters}
if world_size > 1:
    settings |= the_job  # not this process's share of it
held = globals().get("held")  # the lock on the folder, if this cell runs once more
may_differ = {"run_folder", "device", "n_iters", "evaluation_episodes", "evaluation_seed"}


def write(name, save):
    """Let `save` fill a file, then put it into `folder` as `name`, whole, whatever stood there."""
    new = folder / f"{name}.{uuid.uuid4().hex}.new"
    try:
        with open(new, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / name)
    finally:
        new.unlink(missing_ok=True)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)  # or the new name might not outlive a power cut
    os.close(directory)


def write_tables():
    """Write the hyperparameters and the measurements so far in formats that anyone can read."""
    record = json.dumps({**settings, "world_size": world_size}, indent=2)
    write("hyperparameters.json", lambda file: file.write(record.encode()))
    table = io.StringIO()
    columns = dict.fromkeys(name for row in history for name in row)
    writer = csv.DictWriter(table, columns, restval="")
    writer.writeheader()
    writer.writerows(history)
    write("metrics.csv", lambda file: file.write(table.getvalue().encode()))


def save_checkpoint():
    """Write all that is needed to go on after this iteration."""
    checkpoint = {
        "hyperparameters": settings,
        "world_size": world_size,
        "history": history,
        "untrained_policy": untrained_policy.state_dict(),
        "policy": policy.state_dict(),
        "critic": critic.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write("checkpoint.pt", lambda file: torch.save(checkpoint, file))


def check_that_json_can_hold(values):
    """Raise a ValueError for a hyperparameter that hyperparameters.json could not hold."""
    for name, value in values.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(f"{name} is {value!r}, but must be what JSON can hold") from error


def is_a_table(rows):
    """Whether `rows` are measurements of the iterations 0, 1, ..., at least one of them."""
    numbers = all(type(value) in (int, float) for row in rows for value in row.values())
    return len(rows) > 0 and numbers and [row["iteration"] for row in rows] == [*range(len(rows))]


def read_checkpoint():
    """Return the checkpoint in `run_folder`, or None where a run is to begin.

    Raises a ValueError if the folder holds something else or cannot be used, or if the run in it
    is not the one that the hyperparameters describe. Loading runs no code from the file.
    """
    if not run_folder:
        return None
    try:
        inside = [path.name for path in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        raise ValueError(f"run_folder is {run_folder!r}, but must be a folder ({error})") from error
    if "checkpoint.pt" not in inside:
        for name in inside:
            if not name.endswith(".new"):  # what a kill in the middle of writing leaves
                raise ValueError(
                    f"run_folder is {run_folder!r}, but must be new, empty or the folder of a run; "
                    f"it holds {name} and no checkpoint.pt"
                )
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange formats, which are refused below
            path = folder / "checkpoint.pt"
            checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        theirs = dict(checkpoint["hyperparameters"])
        readable = is_a_table(checkpoint["history"]) and type(checkpoint["world_size"]) is int
    except Exception as error:
        raise ValueError(
            f"run_folder is {run_folder!r}, but its checkpoint.pt is damaged or of another program "
            f"({type(error).__name__})"
        ) from error
    if not readable:
        raise ValueError(f"run_folder is {run_folder!r}, but its checkpoint.pt has no measurements")
    for name in settings:
        if name in theirs and name not in may_differ and theirs[name] != settings[name]:
            raise ValueError(
                f"{name} is {settings[name]!r}, but must be {theirs[name]!r} as in the run in "
                f"{run_folder}, or run_folder another one"
            )
    done = len(checkpoint["history"])
    if done > n_iters:
        raise ValueError(f"n_iters is {n_iters}, but must be at least {done}, which are done")
    return checkpoint


def restore(checkpoint):
    """Set networks, optimizer and history to those of a checkpoint; a ValueError if they differ."""
    try:
        networks = {"untrained_policy": untrained_policy, "policy": policy, "critic": critic}
        for name, network in networks.items():
            if checkpoint[name].keys() != network.state_dict().keys():
                raise ValueError(f"the {name} has other weights")
            network.load_state_dict(checkpoint[name])
        groups = optimizer.state_dict()["param_groups"]  # the learning rate is this run's own
        state = checkpoint["optimizer"]["state"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter in loss_module.parameters():
            shapes = {key: value.shape for key, value in optimizer.state[parameter].items()}
            moments = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            if shapes != {"step": torch.Size([]), **moments}:
                raise ValueError("the optimizer's state has other shapes")
    except Exception as error:
        raise ValueError(
            f"run_folder is {run_folder!r}, but its checkpoint.pt does not fit these networks "
            f"({type(error).__name__})"
        ) from error
    history[:] = checkpoint["history"]


def make_folder():
    """Make `folder`, if it is not there; a ValueError if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"run_folder is {run_folder or str(folder)!r}, but must be one that can be written "
            f"({error})"
        ) from error


def release_folder():
    """Let other processes have `folder`."""
    global held
    if held is not None:
        os.close(held)
        held = None


def hold_folder():
    """Lock `folder` until the last iteration is done; a ValueError if another process has it.

    Then nobody else can be writing to it, so what a kill in the middle of writing left is removed.
    """
    global held
    release_folder()
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"run_folder is {run_folder!r}, but must be one in which no other process is training"
        ) from error
    except OSError:
        return  # a file system that knows no locks
    for left in folder.glob("*." + 32 * "[0-9a-f]" + ".new"):
        left.unlink()


def begin_or_go_on():
    """Make the folder of a new run, or go on with the run in it, and say which it is."""
    found = [None]
    if rank == 0:
        try:
            check_that_json_can_hold(settings)
            found = [read_checkpoint()]
            make_folder()
            hold_folder()
        except ValueError as error:
            found = [error]
    if world_size > 1:
        dist.broadcast_object_list(found)  # so that all processes end, or start, alike
    [checkpoint] = found
    if isinstance(checkpoint, ValueError):
        raise checkpoint
    if checkpoint is None:
        print(f"A new run in {folder}")
        return
    restore(checkpoint)
    print(f"Going on in {folder}: {len(history)} of {n_iters} iterations are done")
    before = checkpoint["world_size"]
    if before != world_size:
        print(f"They were done by {before} process(es), the others will be by {world_size}")
    if rank == 0:
        write_tables()


def seed_iteration(iteration):
    """Make the random numbers of an iteration depend on nothing but `seed`, its number and rank."""
    env.set_seed(seed_for("simulator", iteration, rank))  # on a CPU, VMAS has its own generator
    torch.manual_seed(seed_for("actions and minibatches", iteration, rank))


def finish_iteration(row):
    """Average `row` over the processes, save, and prepare the next iteration.

    (The mean over processes of a variance or a share of it is that of the whole only nearly.)
    Raises a FloatingPointError, before anything is saved, if a loss or a weight is not finite, and
    a TypeError if a measurement is no number, which could not be read back.
    """
    for name, value in row.items():
        if type(value) not in (int, float):
            raise TypeError(f"row[{name!r}] is {value!r}, but must be an int or a float")
    if world_size > 1:
        names = [name for name in row if name not in ("iteration", "frames")]
        values = torch.tensor([row[name] for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(values)
        row.update(zip(names, (values / world_size).tolist(), strict=True))
        row["frames"] = (row["iteration"] + 1) * settings["frames_per_batch"]
    losses = torch.tensor([value for name, value in row.items() if name.startswith("loss_")])
    weights = [parameter.detach().isfinite().all() for parameter in loss_module.parameters()]
    if not (losses.isfinite().all() and torch.stack(weights).all()):
        raise FloatingPointError(
            f"iteration {row['iteration']} gave a loss or a weight that is not finite; "
            f"it was not saved, and {folder} is as it was before"
        )
    settings["n_iters"] = max(n_iters, len(history))  # in a notebook it may have grown
    if rank == 0:
        save_checkpoint()
        write_tables()
    leave_after_the_last_iteration()
    seed_iteration(row["iteration"] + 1)


def leave_after_the_last_iteration():
    """Let go of the folder and end the processes beyond the first, if there is no more to train."""
    if len(history) < n_iters:
        return
    release_folder()
    if world_size > 1:
        dist.destroy_process_group()
    if rank > 0:
        sys.exit()


def normalize_over_all_processes(module, inputs):
    """Before the loss, give the advantages of the whole minibatch mean 0 and deviation 1."""
    [minibatch] = inputs
    everyone = [torch.empty_like(minibatch["advantage"]) for _ in range(world_size)]
    dist.all_gather(everyone, minibatch["advantage"].contiguous())
    deviation, mean = torch.std_mean(torch.cat(everyone), dim=0)  # (n_agents, 1)
    minibatch["advantage"] = (minibatch["advantage"] - mean) / deviation.clamp_min(1e-6)


try:
    begin_or_go_on()
except ValueError as error:
    if "command_line" not in globals():
        raise
    command_line.error(str(error))
if world_size > 1:
    if normalize_advantage:
        loss_module.normalize_advantage = False
        loss_module.register_forward_pre_hook(normalize_over_all_processes)
    loss_module = nn.parallel.DistributedDataParallel(loss_module, forward_sync_buffers=False)
# The first of the list, and only once, however often this cell runs.
others = [one for one in after_iteration if getattr(one, "__name__", "") != "finish_iteration"]
after_iteration[:] = [finish_iteration, *others]
leave_after_the_last_iteration()
seed_iteration(len(history))

# %% [markdown]
# ---
# ## 6. Training loop
# *What to expect.* Each iteration collects a batch, estimates its advantages once, with the critic
# as it is now, and goes through the batch num_epochs times. The robots first learn to drive roughly
# towards their goals, within a few iterations, and then to stop there: while the reward soon
# changes little, the success rate is what still rises. With ten seeds, the evaluation of Section 7
# gave success rates of 0.95 for MAPPO (worst run 0.92) and 0.87 for IPPO (worst run 0.70); the
# success rate that the progress bar shows is lower, see Question 7. MAPPO and IPPO with the same
# seed start from the same policy, and cell B sees to it that they learn from the same first batch.
# A run takes one or two minutes on two CPU cores.
#
# The hyperparameters are those of TorchRL's own tutorial for this task, which makes the results
# comparable. They are no optimum: study/README.md explains two recipes, value by value; with MAPPO
# one reaches 0.98 in a fifth of the training time, the other 0.99 in a third.
#
# *What is measured.* `measure` looks at the first episode of each environment only, from its start
# to its first "done". A later one has only the rest of the batch, too short for a slow success, so
# among the later ones only quick successes would be seen. `evaluate` is for Section 7; to call it
# on the way as well, add a function of your own to `after_iteration` before the loop, such as
# `lambda row: row.update(test_success=evaluate(policy)[share])`. `measure_update` says what the
# learning did:
#
# - The losses and the entropy are means over the iteration's minibatches.
# - `kl_approx` says how far the update took the policy from the one that collected the batch: the
#   mean of ratio - 1 - log ratio, an estimate of the Kullback-Leibler divergence that cannot be
#   negative. `clip_fraction` is the share of ratios that lie outside 1 ± clip_epsilon by then.
# - `explained_variance` says how much of the value targets' variance the critic predicted *before*
#   it learned from them: 1 - Var(A) / Var(target), at most 1, and 0 for a critic that always
#   predicts the same number. The targets hold the critic's own estimates, so an untrained critic
#   can score high: compare it over iterations, not between networks. `advantage_std` is the
#   advantages' standard deviation before they are normalised.


# %%
share = "success_rate" if scenario_name == "navigation" else "terminated_rate"


def measure(episodes):
    """Return means over the first episode of each environment, as a dictionary of numbers.

    `episodes` is a TensorDict of the shape (num_envs, steps), as a batch or a rollout has it.
    "episode_reward" is summed over the steps and averaged over the agents; "success_rate", in other
    scenarios "terminated_rate", is the share of episodes that ended before the time was up;
    "collisions" is the number of steps in which an agent touches another, averaged over the agents.
    """
    done = episodes["next", "done"].squeeze(-1)  # (num_envs, steps)
    dones_before = done.cumsum(dim=1) - done.int()
    counted = dones_before == 0  # also the step of the first done itself
    terminated = episodes["next", "terminated"].squeeze(-1) & counted
    reward = episodes["next", "agents", "reward"].squeeze(-1).mean(dim=2)
    means = {
        "episode_reward": (reward * counted).sum(dim=1).mean().item(),
        share: terminated.any(dim=1).float().mean().item(),
        "episode_length": counted.sum(dim=1).float().mean().item(),
    }
    if scenario_name == "navigation":
        # What VMAS calls "agent_collisions" is the penalty paid for them.
        penalty = episodes["next", "agents", "info", "agent_collisions"].squeeze(-1)
        touching = (penalty != 0).float().mean(dim=2)
        means["collisions"] = (touching * counted).sum(dim=1).mean().item()
    return means


def measure_update(frames, minibatch_losses):
    """Return what an update did, as a dictionary of numbers.

    `frames` is the batch as the loss read it, `minibatch_losses` a list of the loss's TensorDicts.
    """
    losses = torch.stack(minibatch_losses).mean(dim=0)
    kept = ("loss_objective", "loss_critic", "loss_entropy", "entropy")
    with torch.no_grad():
        log_prob = policy.get_dist(frames).log_prob(frames["agents", "action"])
    log_ratio = log_prob - frames["agents", "action_log_prob"]  # (frames_per_batch, n_agents)
    ratio = log_ratio.exp()
    advantage, value_target = frames["advantage"], frames["value_target"]
    return {
        **{name: losses[name].item() for name in kept},
        "kl_approx": (ratio - 1 - log_ratio).mean().item(),
        "clip_fraction": ((ratio - 1).abs() > clip_epsilon).float().mean().item(),
        "explained_variance": 1 - (advantage.var() / value_target.var()).item(),
        "advantage_std": advantage.std().item(),
    }


def evaluate(policy):
    """Play the episodes of Section 7 with the deterministic policy; return what `measure` does."""
    test_env = make_env(evaluation_episodes, evaluation_seed)
    # Until each environment has finished its first episode, which is all that counts here.
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        played = test_env.rollout(max_steps, policy, break_when_all_done=True)
    # All of VMAS's environments draw from one generator: training must not go on from this seed.
    env.set_seed(seed_for("after an evaluation", len(history)))
    return measure(played)


# %% [markdown]
# *The loop.* The three terms of the loss share one backward pass and one optimizer. One gradient
# norm is limited for both networks together: a huge gradient of the critic would scale the policy's
# down as well.

# %%
needed = [("agents", "observation"), ("agents", "action"), ("agents", "action_log_prob")]
progress = tqdm(range(len(history), n_iters), desc=algorithm, total=n_iters, initial=len(history))
for iteration in progress:
    start = time.perf_counter()
    if anneal_lr:
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / n_iters)

    batch = collector.next()  # (num_vmas_envs, max_steps)
    estimate_advantages(batch)  # adds "advantage" and "value_target", (..., n_agents, 1)

    frames = batch.reshape(-1).select(*needed, "advantage", "value_target")  # (frames_per_batch,)
    replay_buffer.empty()
    replay_buffer.extend(frames)
    minibatch_losses = []
    for _ in range(num_epochs):
        for minibatch in replay_buffer:  # (minibatch_size,), until the batch is used up
            losses = loss_module(minibatch)
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), max_grad_norm)
            optimizer.step()
            minibatch_losses.append(losses.detach())

    row = {"iteration": iteration, "frames": (iteration + 1) * frames_per_batch}
    row |= measure(batch) | measure_update(frames, minibatch_losses)
    row["seconds"] = time.perf_counter() - start
    history.append(row)
    # The last one added comes first: cell B, which saves the row, then sees what yours put into it.
    for function in reversed(after_iteration):
        function(row)
    progress.set_postfix({key: round(row[key], 2) for key in ("episode_reward", share)})

# %% [markdown]
# *Does success look like a loss?* (Section 5.) After the loop, `batch` is the last batch. What did
# the critic expect just before the step in which the last robot arrived, what came with that step,
# and how large was its advantage, in standard deviations? Ask in a notebook, or after `python -i
# train_mappo.py`, and compare `mappo = True` and `False` (ten runs of each gave -1.7 and -3.2):
#
#     ended = batch["next", "terminated"].squeeze(-1)
#     print(batch["agents", "state_value"][ended].mean())
#     print(batch["next", "agents", "reward"][ended].mean())
#     print(batch["advantage"][ended].mean() / batch["advantage"].std())
#
# *Question 6. What would an off-policy method do differently with the replay buffer, and why not
# PPO?*
#
# ---
# ## 7. Evaluation
# While it learns, the policy draws its actions from its distribution; here it takes the median, the
# normal's mean squashed by the tanh. The untrained and the trained policy play the same
# `evaluation_episodes` fresh episodes. On a CPU and on a GPU those are different ones.

# %%
evaluation = {"iterations": len(history)}
evaluation |= {"untrained": evaluate(untrained_policy), "trained": evaluate(policy)}
print(f"\n{evaluation_episodes} episodes, deterministic policy    untrained     trained")
for key, value in evaluation["trained"].items():
    print(f"{key:<35}{evaluation['untrained'][key]:>12.3f}{value:>12.3f}")

# %% [markdown]
# *Question 7. Why does the success rate during training stay below that of the evaluation?*
#
# ### This file against the papers
# The core is theirs: a centralised critic for MAPPO and a local one for IPPO, shared weights, GAE,
# clipping, several epochs on each batch, normalised advantages. Among other things, Yu et al.
# (2022) do the following differently, which matters to anyone who repeats their experiments:
#
# - *What the critic sees.* In StarCraft they feed a global state of the environment to which each
#   agent's own features are added, so that values differ between agents. Joined observations, as
#   here and in their particle worlds, are the simple form; they grow with the team, and hold only
#   what some agent observes.
# - *Value normalisation.* They let the critic predict returns scaled by running statistics, which
#   matters when rewards are large. Here returns are of order 1. They also clip the value's change,
#   and use a Huber loss with delta 10 where this file has smooth L1, its form with delta 1.
# - *Epochs and minibatches.* They use 5 to 15 epochs, fewer for harder tasks, because much learning
#   from one batch makes the world change faster for the teammates, and mostly one minibatch, the
#   whole batch. Here it is 30 epochs of 15 minibatches, on an easy task, with few frames.
#
# Does a centralised critic help? In their experiments and in those of de Witt et al. (2020) IPPO is
# often as good. Sections 4 and 5 suggest when: where each agent sees what its return depends on,
# the end of the episode included, a wider view has nothing to add. In the scenario
# *reverse_transport* it is so: four robots push a package whose goal each of them sees, and are
# paid as one. As predicted before the runs, IPPO learned as fast as MAPPO there (0.85 each after 5
# iterations, 1.00 after 10) and lasted (1.00 after 40; study/README.md, "Another scenario").
# Whether this is what sets the tasks of those papers apart was not tested.
#
# ---
# ## 8. Results
# A run leaves its trained policy, which other programs can load, the evaluation and a picture of
# how it learned. Now flip `mappo` in Section 1, run again (in a notebook: that cell, then from
# Section 4 on), and compare. Then give both several seeds, as one run says little (another seed
# needs everything from Section 2 on). README.md shows how another program uses policy.pt.

# %%
folder.mkdir(parents=True, exist_ok=True)
arguments = {**network, "n_agent_outputs": 2 * n_actions, "centralized": False}
arguments["share_params"] = share_parameters_policy
state = policy[0].module[0].state_dict()  # of its MultiAgentMLP; policy_network is untrained
torch.save({"network": arguments, **bounds, "state_dict": state}, folder / "policy.pt")
(folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2), encoding="utf-8")

figure, axes = plt.subplots(layout="constrained")
axes.plot([row["frames"] for row in history], [row[share] for row in history], marker=".")
axes.set(title=f"{algorithm}, {scenario_name}", xlabel="frames", ylabel=f"{share}, actions drawn")
figure.savefig(folder / "learning_curve.png")
print(f"The results of this run are in {folder}")

# %% [markdown]
# ---
# ## C. Pictures (skip this on a first reading: what is left are the answers)
# learning_curves.png: all runs of this scenario beside this one, MAPPO against IPPO. Thin lines are
# single runs, in which actions are drawn from the policy; a thick one is the mean over finished
# runs that differ from this one in seed and flag only. Dots at the end are the deterministic
# policies of the same runs, evaluated after training, which do better. rollout.gif: a film of one
# episode.

# %%
import csv

from PIL import Image


def read_run(place, recorded):
    """Return what a run's folder holds: its settings, its table as lists, and its evaluation."""
    with open(place / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = {column: [float(row[column]) for row in rows] for column in ("frames", *drawn)}
    result = place / "evaluation.json"
    evaluated = json.loads(result.read_text("utf-8")) if result.exists() else {"iterations": 0}
    trained = evaluated["trained"] if evaluated["iterations"] == len(rows) else {}  # not of before
    return {"mappo": recorded["mappo"], "settings": recorded, "table": table, "trained": trained}


def differ_in_seed_only(run, other):
    """Whether two runs are as long and have the same settings, but for seed, flag and place."""
    ours, theirs = run["settings"], other["settings"]
    changed = {key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}
    as_long = len(run["table"]["frames"]) == len(other["table"]["frames"])
    return as_long and changed <= {"mappo", "seed", "device", "run_folder", "world_size"}


drawn = ("episode_reward", share)
runs = {}
for place in sorted(path.parent for path in folder.resolve().parent.glob("*/metrics.csv")):
    try:
        recorded = json.loads((place / "hyperparameters.json").read_text("utf-8"))
        if recorded["scenario_name"] == scenario_name:
            runs[place] = read_run(place, recorded)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{place} is left out of the learning curves: {type(error).__name__} {error}")
if folder.resolve() in runs:  # not where cell B was left out
    this_run = runs[folder.resolve()]
    curves, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, column in zip(panels, drawn, strict=True):
        panel.set(title=f"{scenario_name}, actions drawn", xlabel="frames", ylabel=column)
        for flag, color, line in ((True, "tab:blue", "-"), (False, "tab:orange", "--")):
            alike = []
            for run in runs.values():
                if run["mappo"] != flag:
                    continue
                steps, values = run["table"]["frames"], run["table"][column]
                panel.plot(steps, values, line, color=color, linewidth=0.7, alpha=0.6)
                if column in run["trained"]:
                    panel.plot(steps[-1], run["trained"][column], "o", color=color, alpha=0.6)
                if differ_in_seed_only(run, this_run):
                    alike.append(values)
            if alike:
                label = "MAPPO" if flag else "IPPO"
                label += f", mean of {len(alike)} runs" if len(alike) > 1 else ", 1 run"
                mean, steps = torch.tensor(alike).mean(dim=0), this_run["table"]["frames"]
                panel.plot(steps, mean, line, color=color, linewidth=2.5, label=label)
    panels[0].plot([], [], "o", color="gray", label="deterministic, after training")
    panels[0].legend()
    curves.savefig(folder / "learning_curves.png", dpi=120)

scene = make_env(1, evaluation_seed)
first = scene.reset()
try:
    pictures = [scene.render("rgb_array")]
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        scene.rollout(
            max_steps,
            policy,
            callback=lambda *_: pictures.append(scene.render("rgb_array")),
            auto_reset=False,
            tensordict=first,
        )
    pictures.append(scene.render("rgb_array"))  # the last step, too
except Exception as error:  # many kinds are possible, most often OpenGL is missing
    print(
        f"No rollout.gif, as VMAS could not draw ({type(error).__name__}: {error}). "
        "Where OpenGL is missing: apt-get install libgl1 libegl1 libglu1-mesa libgl1-mesa-dri"
    )
else:
    film = [Image.fromarray(picture).reduce(2) for picture in pictures]
    film[0].save(folder / "rollout.gif", save_all=True, append_images=film[1:], duration=60, loop=0)
    if "get_ipython" in globals():  # a notebook shows figures by itself, but no film
        from IPython.display import Image as Film
        from IPython.display import display

        display(Film(folder / "rollout.gif", format="png"))  # so labelled, every page shows it

# %% [markdown]
# ---
# ## Answers
# 1. 30 epochs of 6000 / 400 = 15 minibatches are 450 gradient steps; each frame is used 30 times.
# 2. Only that step's reward. The critic cannot tell: no observation contains the time. So it would
#    learn a mixture, and undervalue the situations in which episodes tend to run out.
# 3. 71,684 = 18 × 256 + 256 + 256 × 256 + 256 + 256 × 4 + 4; without sharing three times as many,
#    215,052.
# 4. 8 × 18 = 144 (without collisions, and so without lidar, 8 × 6 = 48); under IPPO 18 (or 6), as
#    with any number of agents.
# 5. One: the advantage is then that reward, plus gamma times the next value, less the value.
# 6. It would keep a much larger buffer and never empty it. PPO throws the frames away because they
#    were collected by another policy, and its clipped ratio only covers the small step from the
#    policy that collected the batch.
# 7. In training, actions are drawn at random, so robots jitter around their goals, and the batch
#    was collected before the policy learned from it.
