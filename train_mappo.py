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
"""Learn multi-agent PPO with TorchRL, in one file that you read from top to bottom.

Three robots learn to drive to their goals without colliding. They learn with MAPPO, or with IPPO if
you flip one flag. There are four ways to start:

    python train_mappo.py                         MAPPO with the hyperparameters from Section 1
    python train_mappo.py --no-mappo --seed 1     IPPO, another seed; --help lists all options
    python train_mappo.py --run-folder runs/mine  start a run there; the same command resumes it
    torchrun --nproc-per-node 2 train_mappo.py    one policy, trained by two processes

To use it as a notebook, open it with jupytext, VS Code or PyCharm, or paste its cells into a new
notebook.
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
from torchrl.objectives.value.functional import generalized_advantage_estimate
from tqdm import tqdm

logging.getLogger("torchrl").setLevel(logging.WARNING)  # at INFO level, it logs every buffer

# %% [markdown]
# # Multi-agent PPO, step by step
#
# You already know single-agent PPO. Here you train a team. Three robots start at random positions,
# each with its own goal, and share most of the reward. After a minute or two of training on two CPU
# cores, you get this:
#
# | 200 test episodes, seed 0 | untrained | trained with MAPPO |
# |---|---|---|
# | success rate | 0.00 | 0.94 |
# | steps per episode, at most 100 | 100 | 63 |
# | reward per robot per episode | -0.01 | 3.15 |
#
# PPO (Schulman et al. 2017, arXiv:1707.06347) is *on-policy*. It collects a batch of experience
# with the current policy, improves the policy on that batch for a few epochs, and throws the batch
# away. A *critic* predicts the return. Actions that turn out better than predicted become more
# likely.
#
# With several agents, the others are part of each agent's environment. They learn too, so a move
# that worked yesterday may fail today. To a single agent, the world is *non-stationary*. On-policy
# data limits the damage, because no batch is older than one iteration. Experience from a large
# replay buffer would reflect teammates that no longer exist.
#
# Two algorithms are popular, and they differ in what the critic sees:
#
# ```
#                 IPPO                               MAPPO
#
#     o_1 --> policy --> a_1              o_1 --> policy --> a_1
#     o_2 --> policy --> a_2              o_2 --> policy --> a_2      execution: each robot
#     o_3 --> policy --> a_3              o_3 --> policy --> a_3      sees only its own o_i
#    - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - -
#     o_1 --> critic --> V_1              o_1 --+             +--> V_1
#     o_2 --> critic --> V_2              o_2 --+--> critic --+--> V_2     training only
#     o_3 --> critic --> V_3              o_3 --+             +--> V_3
# ```
#
# - **IPPO**, independent PPO (de Witt et al. 2020, arXiv:2011.09533), has a *local* critic.
# - **MAPPO**, multi-agent PPO (Yu et al. 2022, arXiv:2103.01955), has a *centralized* critic.
#
# The critic can see more than the policy, because it is not used once training is over. This is
# called *centralized training with decentralized execution*, or CTDE. Seeing more is not always
# better. On many of the tasks in these two papers, IPPO does as well as MAPPO.
#
# These symbols and terms are used throughout. The index i runs over the agents. The sizes are
# those of the default run.
#
# | symbol | meaning | key in the data | size for each agent |
# |---|---|---|---|
# | o_i | observation of agent i | `("agents", "observation")` | 18 |
# | a_i | its action, a force along x and y | `("agents", "action")` | 2 |
# | r_i | its reward | `("next", "agents", "reward")` | 1 |
# | V_i | the critic's value before the step | `("agents", "state_value")` | 1 |
# | V_i' | the critic's value after the step | `("next", "agents", "state_value")` | 1 |
# | A_i | advantage, how much better than predicted | `"advantage"` | 1 |
#
# | term | meaning |
# |---|---|
# | frame | one step of one environment, in which all agents act |
# | episode | from a reset until all robots are at their goals, or time runs out |
# | success rate | fraction of episodes in which all robots reach their goals in time |
# | return | discounted sum of the rewards still to come |
# | bootstrapping | using the critic's value in place of rewards that were not collected |
#
# ## 1. Hyperparameters
# Change the defaults here, or override them on the command line, for example with `--n-iters 20`.

# %%
mappo = True  # True: centralized critic (MAPPO); False: local critic (IPPO)
seed = 0  # random seed for the networks, the simulator and sampling
device = "cuda" if torch.cuda.is_available() else "cpu"  # for simulation and training

scenario_name = "navigation"  # the name of a VMAS scenario, or your own scenario class
scenario_options = {}  # its keyword arguments, such as {"shared_rew": False}
n_agents = 3  # team size, if the scenario lets you choose it
max_steps = 100  # time limit of an episode

frames_per_batch = 6000  # frames collected per iteration
n_iters = 10  # iterations of collecting and learning

num_epochs = 30  # passes over each batch
minibatch_size = 400  # frames per gradient step; a frame includes all agents
lr = 3e-4  # Adam's learning rate
anneal_lr = False  # decrease the learning rate linearly to 0
max_grad_norm = 1.0  # larger gradients are scaled down to this norm
clip_epsilon = 0.2  # PPO's clipping range
gamma = 0.99  # discount factor
lmbda = 0.9  # lambda of generalized advantage estimation
entropy_eps = 1e-4  # weight of the entropy bonus
critic_coeff = 0.5  # weight of the value loss
normalize_advantage = True  # to mean 0 and standard deviation 1

share_parameters_policy = True  # one policy network for all agents; False: one each
share_parameters_critic = True  # one critic network for all agents; False: one each
depth = 2  # hidden layers per network
num_cells = 256  # units per hidden layer

evaluation_episodes = 200  # test episodes before and after training
evaluation_seed = 12345  # random seed for the test episodes
run_folder = ""  # where results go; empty: a new folder in runs/
logger = ""  # also log to "tensorboard", "wandb", "mlflow", "trackio" or "csv"

# %% [markdown]
# *Question 1. How many gradient steps does one iteration take?* (The answers are at the end.)

# %%
rank, world_size = 0, 1  # the index of this process, and the number of processes
before_training = []  # functions to call once, before the training loop
after_iteration = []  # functions to call after each iteration, with its metrics

# %% [markdown]
# ---
# ## Engineering (skip this cell and go on to Section 2)
# The next cell teaches you nothing about the method. It turns Section 1 into command-line options,
# rejects invalid values, saves checkpoints and resumes from them, writes and logs the metrics, and
# distributes the work under `torchrun`. Without it, everything else runs the same way, and training
# gives the same results.
#
# The next cell and the rest of the file interact in only a few places. The cell sets `rank` and
# `world_size`, and appends a function to each of the two lists above. The training loop in Section
# 8 calls these functions. They read variables defined in the rest of the file, such as the policy.
# Under `torchrun`, the cell also divides the work among the processes.

# %% jupyter={"source_hidden": true}
import argparse
import ast
import csv
import functools
import importlib.util
import io
import math
import os
import re
import shlex
import sys
import tempfile
import warnings
import zipfile

from torch import distributed as dist
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.record.loggers import get_logger

# VMAS warns about options that a scenario does not recognize. If it cannot find room for all
# agents, it warns and keeps searching. Both become errors here. Ignoring n_agents is harmless.
warnings.filterwarnings("error", "Scenario kwargs")
warnings.filterwarnings("ignore", r"Scenario kwargs: \{'n_agents': \d+\} passed but not used")
warnings.filterwarnings("error", "It is taking many iterations to spawn")


def is_number(x):
    """Return True for a finite int or float that is not negative; False for a bool."""
    return type(x) in (int, float) and 0 <= x < math.inf


FLAGS = ["mappo", "anneal_lr", "normalize_advantage"]
FLAGS += ["share_parameters_policy", "share_parameters_critic"]
COUNTS = ["n_agents", "max_steps", "frames_per_batch", "n_iters", "num_epochs", "minibatch_size"]
COUNTS += ["depth", "num_cells", "evaluation_episodes"]
SEEDS = ["seed", "evaluation_seed"]
SCALES = ["lr", "max_grad_norm", "critic_coeff"]
TEXTS = ["device", "run_folder", "logger"]
CHECKS = [  # names, the requirement in words, and the test for it
    (FLAGS, "True or False", lambda x: type(x) is bool),
    (COUNTS, "a whole number from 1 to a billion", lambda x: type(x) is int and 0 < x <= 10**9),
    (SEEDS, "a whole number from 0 to 2**32 - 1", lambda x: type(x) is int and 0 <= x < 2**32),
    (SCALES, "a number above 0", lambda x: is_number(x) and x > 0),
    (["gamma", "lmbda"], "a number from 0 to 1", lambda x: is_number(x) and x <= 1),
    (["clip_epsilon"], "a number between 0 and 1", lambda x: is_number(x) and 0 < x < 1),
    (["entropy_eps"], "a non-negative number", is_number),
    (TEXTS, "a string", lambda x: type(x) is str),
    (["scenario_options"], "a dictionary", lambda x: type(x) is dict),
    (["scenario_name"], "a string or a class", lambda x: isinstance(x, (str, type))),
]
MAY_CHANGE = ["run_folder", "logger", "device", "n_iters", "evaluation_episodes", "evaluation_seed"]
command_line, given = None, {}  # argparse's parser and the options given, if run as a script


def reject(sentence):
    """Exit a script with status 2 and this message; in a notebook, raise a ValueError."""
    sentence = " ".join(sentence.splitlines())
    if command_line is not None:
        command_line.error(sentence)
    raise ValueError(sentence)


def require(condition, name, expected):
    """Reject the value of a hyperparameter unless the condition holds."""
    if not condition:
        reject(f"{name} is {globals()[name]!r}, but must be {expected}")


def find_hyperparameters():
    """Return the names in Section 1, including those that the reader has added to its cells."""
    names = dict.fromkeys(name for group, _, _ in CHECKS for name in group)
    cells, added = globals().get("In", []), {}  # In: the cells that IPython has run
    if not cells and "__file__" in globals():
        cells = re.split(r"^# %%.*$", Path(__file__).read_text("utf-8"), flags=re.MULTILINE)
    for cell in cells:
        try:
            statements = ast.parse(cell).body
        except SyntaxError:  # an IPython command
            continue
        targets = [target for one in statements for target in getattr(one, "targets", [])]
        targets += [one.target for one in statements if isinstance(one, ast.AnnAssign)]
        assigned = [target.id for target in targets if isinstance(target, ast.Name)]
        if not names.keys().isdisjoint(assigned):
            added |= dict.fromkeys(name for name in assigned if name in globals())
    return [*(names | added)]


def as_json(name):
    """Return the value of a hyperparameter as it is stored in JSON; reject it if it cannot be."""
    value = globals()[name]
    if isinstance(value, type):
        return value.__name__  # the name of the reader's own scenario
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        reject(f"{name} is {value!r}, but must be JSON-serializable")


def check_hyperparameters():
    """Reject invalid values; set `n_agents` if the scenario fixes the size of the team."""
    global n_agents
    for names, expected, is_right in CHECKS:
        for name in names:
            require(is_right(globals()[name]), name, expected)
    for name in hyperparameters:
        as_json(name)
    fits = frames_per_batch % (max_steps * world_size) == 0
    require(fits, "frames_per_batch", f"a multiple of max_steps, {max_steps}, in each process")
    fits = frames_per_batch % minibatch_size == 0 and minibatch_size % world_size == 0
    shared = f", that {world_size} processes can share" if world_size > 1 else ""
    require(fits, "minibatch_size", f"a divisor of frames_per_batch, {frames_per_batch}{shared}")
    fits = minibatch_size >= 2 * world_size
    require(fits, "minibatch_size", "at least 2 per process, to have a standard deviation")

    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    devices = ["cpu", "cuda"] if gpus >= local else ["cpu"]
    devices += [f"cuda:{index}" for index in range(gpus) if world_size == 1]
    require(device in devices, "device", f"{' or '.join(devices)} (GPUs found: {gpus})")
    loggers = ["", "tensorboard", "wandb", "mlflow", "trackio", "csv"]
    require(logger in loggers, "logger", f"one of {loggers}")
    packages = {"": [], "csv": [], "mlflow": ["mlflow", "omegaconf"]}.get(logger, [logger])
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    require(not missing, "logger", "one that is installed: pip install " + " ".join(missing))

    own = isinstance(scenario_name, type)
    known = own or scenario_name in VmasEnv.available_envs
    require(known, "scenario_name", "one of " + ", ".join(VmasEnv.available_envs))
    fits = "n_agents" not in scenario_options
    require(fits, "scenario_options", "without n_agents, which has its own option")
    try:
        trial = VmasEnv(
            scenario_name() if own else scenario_name,
            num_envs=min(1000, max(evaluation_episodes, frames_per_batch // max_steps)),
            seed=evaluation_seed,
            device="cpu",
            scenario_kwargs={"n_agents": n_agents, **scenario_options},
        )
    except Exception as error:
        reject(
            f"{scenario_name} cannot be built: n_agents is {n_agents} and scenario_options is "
            f"{scenario_options}, but must be fewer agents or options that it accepts "
            f"({type(error).__name__}: {error})"
        )
    team = ", ".join(trial.agent_names)
    one_team = len(trial.group_map) == 1 and not trial.het_specs
    require(one_team, "scenario_name", f"one with a single team of homogeneous agents, not {team}")
    fits = trial.n_agents == n_agents or "n_agents" not in given
    require(fits, "n_agents", f"{trial.n_agents}, which is fixed by this scenario")
    n_agents = trial.n_agents


def read_run(place):
    """Return the hyperparameters and the history of the run in a folder; ({}, []) for a new one.

    Rejects a folder that contains something else, and a run whose files are damaged.
    """
    here = f"run_folder is {str(place)!r}, but must be"
    try:
        names = {path.name for path in place.iterdir()} if place.exists() else set()
    except OSError as error:
        reject(f"{here} a folder ({error})")
    saved = any(name.startswith("checkpoint-") for name in names)
    visible = {name for name in names if name[0] != "."} - {"hyperparameters.json"}
    if visible and not (saved and "hyperparameters.json" in names):
        reject(f"{here} new, empty or the folder of a run; it contains {min(visible)}, but no run")
    if "hyperparameters.json" not in names:
        return {}, []
    try:
        recorded, past = dict(json.loads((place / "hyperparameters.json").read_text("utf-8"))), []
        if saved:
            newest = CheckpointRotation(place, keep_last=2).latest()
            kinds = {Path(member).suffix for member in zipfile.ZipFile(newest).namelist()}
            if kinds - {".json", ".memmap"}:  # numbers and text; anything else could run code
                raise ValueError(f"it contains unexpected kinds of files, {kinds}")
            Checkpoint(history=past).load(newest)
            steps = range(int(newest.stem.removeprefix("checkpoint-")))
            if [row["iteration"] for row in past] != [*steps]:
                raise ValueError("its history is incomplete")
        if type(recorded["world_size"]) is not int:
            raise ValueError("its world_size is missing")
    except Exception as error:
        reject(f"{here} the folder of a run; its files are damaged or foreign ({error!r})")
    return recorded, past


def check_against(recorded, past):
    """Reject hyperparameters that conflict with those of the run being resumed."""
    for name in hyperparameters:
        same = name not in recorded or name in MAY_CHANGE or as_json(name) == recorded[name]
        require(same, name, f"{recorded.get(name)!r}, as in the run being resumed")
    fits = n_iters >= len(past)
    require(fits, "n_iters", f"at least {len(past)}, the number of iterations already done")


def number(text):
    """Parse the command-line value of a numeric hyperparameter."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_json(text):
    """Parse the command-line value of a hyperparameter that is a list, a dictionary or None."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from error


def make_parser():
    """Return a parser with an option for each hyperparameter, and Section 1 as its help."""
    section_1 = Path(__file__).read_text("utf-8").partition("\nmappo")[2].partition("\n# %%")[0]
    parser = argparse.ArgumentParser(
        prog="train_mappo.py" if world_size == 1 else f"train_mappo.py, process {rank}",
        usage="python train_mappo.py [--NAME VALUE] [--FLAG] [--no-FLAG] ...",
        description="Each name is an option, with - in place of _. Values are the defaults.",
        epilog=f"mappo{section_1}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name in hyperparameters:
        kind, how = type(globals()[name]), {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            how = {"type": {int: number, float: number, str: str, type: str}.get(kind, parse_json)}
        parser.add_argument("--" + name.replace("_", "-"), help=argparse.SUPPRESS, **how)
    return parser


def read_command_line():
    """Set the hyperparameters to the options given, or else to those of the run to be resumed."""
    global command_line, given
    command_line = make_parser()
    given = vars(command_line.parse_args())
    globals().update(given)
    recorded, past = read_run(Path(run_folder)) if run_folder else ({}, [])
    mine = {name for name in hyperparameters if name in recorded} - {"run_folder", *given}
    kept = {name: recorded[name] for name in mine if as_json(name) != recorded[name]}
    globals().update(kept)
    check_hyperparameters()
    check_against(recorded, past)
    try:
        if run_folder:
            Path(run_folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_folder).close()
    except OSError as error:
        require(False, "run_folder", f"a writable folder ({error})")
    if kept:
        print("Kept from the run:", ", ".join(f"{name} = {kept[name]!r}" for name in sorted(kept)))


def explain_the_end(kind, error, trace):
    """Instead of a traceback, say how to resume after Ctrl-C, or that there are too many agents."""
    place = globals().get("folder", Path(run_folder or "."))
    sentence = None
    if kind is KeyboardInterrupt:
        kept = any(place.glob("checkpoint-*"))
        how = "resume with: " + shlex.join(["python", sys.argv[0], "--run-folder", str(place)])
        sentence = f"stopped; {how if kept else 'nothing was saved'}"
    elif "many iterations to spawn" in str(error):
        sentence = f"n_agents is {n_agents}, but must be smaller: VMAS found no room for all"
    is_program = vars(sys.modules["__main__"]) is globals() and not hasattr(sys, "ps1")
    if sentence is None or not is_program:
        sys.__excepthook__(kind, error, trace)
    elif rank == 0:
        print(f"\ntrain_mappo.py: {sentence}", file=sys.stderr)


def write_tables():
    """Write hyperparameters.json and, once there are metrics, metrics.csv."""
    record = {name: as_json(name) for name in hyperparameters}
    record = json.dumps({**record, **the_job, "world_size": world_size}, indent=2)
    save_whole("hyperparameters.json", lambda path: path.write_text(record, "utf-8"))
    columns = sorted({name for row in history for name in row} - {"iteration", "frames"})
    table = io.StringIO()
    writer = csv.DictWriter(table, ["iteration", "frames", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    if history:
        save_whole("metrics.csv", lambda path: path.write_text(table.getvalue(), "utf-8"))


def start_or_resume():
    """Begin a new run in `folder`, or load the newest checkpoint of the run that is there."""
    global checkpoint, checkpoints, log, loss_module
    hyperparameters[:] = find_hyperparameters()
    recorded, past = read_run(folder)
    if world_size == 1:  # in a notebook, values may have changed
        check_hyperparameters()
        check_against(recorded, past)
    networks = {"untrained_policy": untrained_policy, "policy": policy, "critic": critic}
    checkpoint = Checkpoint(format="archive", history=history, optimizer=optimizer, **networks)
    checkpoints = CheckpointRotation(folder, keep_last=2)
    if checkpoints.latest():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # for pickles, which can run code
                checkpoints.load_latest(checkpoint, map_location=device)
        except Exception as error:
            reject(
                f"run_folder is {str(folder)!r}, but must be a run with these networks ({error})"
            )
        print(f"Resuming {folder}: {len(history)} of {n_iters} iterations are done")
        if recorded["world_size"] != world_size:
            print(f"It used {recorded['world_size']} process(es) and now uses {world_size}")
        if anneal_lr and recorded["n_iters"] < n_iters:
            last, now = optimizer.param_groups[0]["lr"], lr * (1 - len(history) / n_iters)
            print(f"The learning rate was {last:.2g}. It continues at {now:.2g} and falls to 0.")
    else:
        print(f"New run: {folder}")
    if world_size > 1:
        dist.barrier()  # every process must have read the folder before one writes
        loss_module = nn.parallel.DistributedDataParallel(loss_module, forward_sync_buffers=False)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_tables()
        if not checkpoints.latest():
            checkpoints.save(checkpoint, step=0)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # TorchRL lets it log to files
        where = {"logger_name": str(folder / "log"), "experiment_name": folder.name}
        where["wandb_kwargs"] = {"id": folder.name, "resume": "allow"}
        log = get_logger(logger, **where, trackio_kwargs={"resume": "allow"})
        if log is not None:
            log.log_hparams({name: str(as_json(name)) for name in hyperparameters})
    leave_after_the_last_iteration()


def save_iteration(row):
    """Average the metrics over the processes, then save a checkpoint, the tables and the log.

    It runs last in `after_iteration`, so that it also saves what others have put into `row`.
    """
    row.update({name: x if isinstance(x, int) else float(x) for name, x in row.items()})
    if world_size > 1:
        names = [name for name in row if isinstance(row[name], float)]
        values = torch.tensor([row[name] for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(values)
        row.update(zip(names, (values / world_size).tolist(), strict=True))
        row["frames"] *= world_size
    if rank == 0:
        checkpoints.save(checkpoint, step=len(history))
        write_tables()
        if log is not None:
            log.log_metrics({name: row[name] for name in row if name != "iteration"}, len(history))
    leave_after_the_last_iteration()


def leave_after_the_last_iteration():
    """End all processes but the first if there is nothing left to train."""
    if world_size > 1 and len(history) == n_iters:
        dist.destroy_process_group()
        if rank > 0:
            sys.exit()


if dist.is_torchelastic_launched():  # by torchrun
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if rank > 0:
    tqdm = functools.partial(tqdm, disable=True)

    def print(*values, **how):
        """Leave the printing to process 0."""


hyperparameters = find_hyperparameters()
program = Path(globals().get("__file__", "a notebook")).resolve()
if program == Path(sys.argv[0]).resolve() and "In" not in globals():
    plt.switch_backend("agg")  # write figures to files, open no window
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # folder names may contain anything
    sys.excepthook = explain_the_end
    read_command_line()
else:
    check_hyperparameters()
the_job = {}  # settings of the whole job, before they are divided among processes
if world_size > 1:
    the_job = {name: globals()[name] for name in ("frames_per_batch", "minibatch_size", "device")}
    store, _, _ = next(dist.rendezvous("env://"))
    # After a restart, the store still has the addresses of the processes from before.
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(store=store, rank=rank, world_size=world_size)
    frames_per_batch //= world_size
    minibatch_size //= world_size
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)  # before anything is built, or all would share GPU 0
for functions, mine in ((before_training, start_or_resume), (after_iteration, save_iteration)):
    others = [one for one in functions if getattr(one, "__name__", "") != mine.__name__]
    functions[:] = [*others, mine]  # not twice if this cell runs again

# %% [markdown]
# ---
# ## 2. Environment
# The simulator is VMAS (Bettini et al. 2022, arXiv:2207.03530), and the task is its *navigation*
# scenario. A robot acts by applying a force to itself. It observes 18 numbers:
#
# | index | what the robot observes |
# |---|---|
# | 0, 1 | its position |
# | 2, 3 | its velocity |
# | 4, 5 | its position minus its goal |
# | 6 to 17 | lidar readings in twelve directions, larger when another robot is closer |
#
# The reward for each step has three parts:
#
# | part | given to | amount |
# |---|---|---|
# | progress | the whole team | how much closer the robots got to their goals, in total |
# | contact | each robot that touches another | -1 for every robot it touches |
# | arrival | the whole team | 0.01 if all robots are within 0.05 of their goals |
#
# The episode ends as soon as all robots are within 0.10 of their goals, so the last part is hardly
# ever earned.
#
# VMAS simulates `num_vmas_envs` copies of this task as one batch of tensors on `device`. If that is
# a GPU, the data never leaves it.
#
# TorchRL components communicate through a TensorDict, a dictionary of tensors that share their
# leading dimensions, so that you can index and reshape all of them at once. It can be nested, and a
# tuple such as `("next", "done")` is a path in it. Per-agent data is stored under `"agents"`,
# and everything that a step returns under `"next"`.
#
# Running out of time does not end an episode the way a success does. After a *termination*,
# nothing more can be earned, so the value of what follows is 0. A *truncated* episode could have
# continued, so the critic's estimate of the rest still counts. By itself, VMAS reports both as
# terminated. Here, the `StepCounter` transform applies the time limit and keeps the two apart.


# %%
def seed_for(*purpose):
    """Derive a separate random seed from `seed` for each purpose."""
    return random.Random(f"{seed} {purpose}").getrandbits(32)


def make_env(num_envs, seed):
    """Build a batch of `num_envs` copies of the scenario; `seed` sets their initial states."""
    own_class = isinstance(scenario_name, type)
    simulator = VmasEnv(
        scenario_name() if own_class else scenario_name,
        num_envs=num_envs,
        seed=seed,
        device=device,
        group_map=MarlGroupMapType.ALL_IN_ONE_GROUP,  # stack the agents, under "agents"
        scenario_kwargs={"n_agents": n_agents, **scenario_options},
    )
    return simulator.append_transform(StepCounter(max_steps))


num_vmas_envs = frames_per_batch // max_steps  # so a batch has room for a full episode from each
env = make_env(num_vmas_envs, seed_for("environment"))
n_obs = env.observation_spec["agents", "observation"].shape[-1]
action_spec = env.full_action_spec_unbatched["agents", "action"]  # shape, type and bounds
n_actions = action_spec.shape[-1]

# There is no policy yet, so this rollout takes random actions.
rollout = env.rollout(max_steps, break_when_any_done=False)
for key in [("agents", "observation"), ("agents", "action"), ("next", "agents", "reward")]:
    print(key, tuple(rollout[key].shape))
for key in [("next", "terminated"), ("next", "truncated"), ("next", "done")]:
    print(key, tuple(rollout[key].shape))

# %% [markdown]
# ```
# ('agents', 'observation') (60, 100, 3, 18)
# ('agents', 'action') (60, 100, 3, 2)
# ('next', 'agents', 'reward') (60, 100, 3, 1)
# ('next', 'terminated') (60, 100, 1)
# ('next', 'truncated') (60, 100, 1)
# ('next', 'done') (60, 100, 1)
# ```
#
# Read the shapes as (environments, steps, agents, features). The three flags have no agent
# dimension, because an episode begins and ends for the whole team.
#
# *Question 2. Suppose that reaching the time limit counted as a termination. What value would the
# critic learn for the last step, and could it know that this step is the last?*
#
# ---
# ## 3. Policy
# The policy is *decentralized*. Each robot acts on its own observation alone, so it needs no
# communication at execution time. You build the policy in three steps:
#
# 1. `MultiAgentMLP` applies a network with tanh units to every agent and keeps the agent dimension.
# 2. `NormalParamExtractor` turns its outputs into a mean `loc` and a positive standard deviation
#    `scale`. `TensorDictModule` names the keys to read and to write.
# 3. `ProbabilisticActor` samples from a normal distribution, squashes the sample into the action
#    bounds with a tanh, and stores the action's log-probability, which PPO needs later.
#
# *Parameter sharing.* With `share_parameters_policy`, all agents use the same weights, and the
# network learns from every agent's experience. Sharing has a cost. Agents with identical
# observations behave alike, so a task that needs specialists needs agent IDs or separate networks.
#
# *Initialization.* Orthogonal weights preserve the scale of the signal from layer to layer. The
# last layer of the policy starts with small weights, so that at first all actions are spread widely
# around the center of their range, whatever a robot observes. Andrychowicz et al. (2021,
# arXiv:2006.05990) found these small weights to be among the choices that matter most.


# %%
def orthogonal_init(network, final_gain):
    """Set the weights of a MultiAgentMLP to random orthogonal matrices and its biases to 0.

    The gain is sqrt(2) in hidden layers and `final_gain` in the last. Where each agent has its own
    network, weights have the shape (n_agents, outputs, inputs) and each matrix is drawn separately.
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


torch.manual_seed(seed_for("policy"))
network_options = {
    "n_agents": env.n_agents,
    "n_agent_inputs": n_obs,
    "depth": depth,
    "num_cells": num_cells,
}
policy_network = MultiAgentMLP(
    **network_options,
    n_agent_outputs=2 * n_actions,  # a mean and a standard deviation per action dimension
    centralized=False,  # each agent's output depends on its own observation only
    share_params=share_parameters_policy,
    device=device,
)
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
means = untrained_policy(env.reset())["agents", "loc"]  # (num_vmas_envs, n_agents, n_actions)
print("mean actions in one environment, one row per robot:")
for row in means[0].tolist():
    print(*(f"{x:9.4f}" for x in row))

# %% [markdown]
# ```
# mean actions in one environment, one row per robot:
#   -0.0046    0.0022
#    0.0005   -0.0009
#   -0.0039    0.0013
# ```
#
# All means are close to 0. That is the effect of the small weights in the last layer.
#
# *Question 3. How many weights and biases does the policy have? How many without sharing?*
#
# ---
# ## 4. Critic
# MAPPO and IPPO differ in a single argument, `centralized`:
#
# | | what the critic of agent i receives | with three robots |
# |---|---|---|
# | IPPO | o_i | 18 numbers |
# | MAPPO | o_1, o_2, ..., o_n, concatenated | 54 numbers |
#
# Yu et al. give the critic a global state where the environment has one. Here the concatenated
# observations take its place.
#
# With `share_parameters_critic`, one network serves all agents. How many different values will the
# next cell print for three robots, with `mappo = True` and with `mappo = False`? Guess before you
# run it.

# %%
torch.manual_seed(seed_for("critic"))
critic_network = MultiAgentMLP(
    **network_options,
    n_agent_outputs=1,
    centralized=mappo,  # here, this is the whole difference between MAPPO and IPPO
    share_params=share_parameters_critic,
    device=device,
)
orthogonal_init(critic_network, final_gain=1.0)
critic = TensorDictModule(
    critic_network,
    in_keys=[("agents", "observation")],
    out_keys=[("agents", "state_value")],
)
values = critic(env.reset())["agents", "state_value"]  # (num_vmas_envs, n_agents, 1)
print("values in one environment:", *(f"{x:.4f}" for x in values[0, :, 0].tolist()))

# %% [markdown]
# With `mappo = True` (MAPPO):
# ```
# values in one environment: 0.1636 0.1636 0.1636
# ```
#
# With `mappo = False` (IPPO):
# ```
# values in one environment: -0.0983 -0.0102 -0.0248
# ```
#
# Under MAPPO, the agents share the network and its input, so they have *the same value*. Under
# IPPO, each robot has its own.
#
# Why is IPPO called *independent* if its agents share a network? The word refers to information. No
# agent's value or action depends on what another agent observes. Sharing weights is a separate
# choice.
#
# ### Open the black box
# What does `centralized` actually do? Here is the critic's forward pass, written out by hand. The
# last line compares it with the library's. You can skip any cell under an "Open the black box"
# heading, because no other cell uses its results.


# %%
def critic_by_hand(observation):
    """Return the values of observations of shape (environments, n_agents, n_obs)."""
    hidden = observation
    if mappo:  # concatenate the observations of all agents, and give the result to each of them
        hidden = observation.flatten(-2).unsqueeze(-2).expand(-1, env.n_agents, -1)
    parameters = [parameter.detach() for parameter in critic_network.parameters()]
    for layer in range(depth + 1):
        weight, bias = parameters[2 * layer : 2 * layer + 2]
        weight = weight.expand(env.n_agents, *weight.shape[-2:])  # (n_agents, outputs, inputs)
        hidden = torch.einsum("eai,aoi->eao", hidden, weight) + bias
        if layer < depth:  # no tanh after the last layer
            hidden = hidden.tanh()
    return hidden  # (environments, n_agents, 1)


with torch.no_grad():
    observation = env.reset()["agents", "observation"]
    torch.testing.assert_close(critic_by_hand(observation), critic_network(observation))

# %% [markdown]
# ### What can each critic predict?
# Before you train for minutes, train for seconds. Give every agent one random number. The critic
# has to predict either the sum of all numbers, which stands for a shared reward, or the agent's own
# number, which stands for an individual reward. The *explained variance* is 1 if it predicts the
# target perfectly, and 0 if it does no better than a constant. Before you run the cell, guess which
# combinations fail. The third critic is centralized as well, with a separate network per agent.


# %%
def explained_variance_of(centralized, share_params, make_target):
    """Fit a small critic to a target and return its explained variance on new data.

    `make_target` maps the agents' numbers, of shape (frames, 3, 1), to a target of that shape.
    """
    torch.manual_seed(seed_for("probe"))
    sizes = {"n_agents": 3, "n_agent_inputs": 1, "n_agent_outputs": 1, "depth": 1, "num_cells": 32}
    small_critic = MultiAgentMLP(**sizes, centralized=centralized, share_params=share_params)
    adam = torch.optim.Adam(small_critic.parameters(), lr=1e-2)
    for _ in range(200):
        numbers = torch.randn(1024, 3, 1)
        error = make_target(numbers) - small_critic(numbers)
        adam.zero_grad()
        error.square().mean().backward()
        adam.step()
    numbers = torch.randn(10_000, 3, 1)
    target = make_target(numbers)
    return 1 - ((target - small_critic(numbers)).var() / target.var()).item()


print("explained variance of            the sum   own number")
for label, centralized, share_params in [
    ("local critic (IPPO)", False, True),
    ("centralized critic (MAPPO)", True, True),
    ("centralized, separate networks", True, False),
]:
    shared = explained_variance_of(
        centralized, share_params, lambda x: x.sum(-2, keepdim=True).expand_as(x)
    )
    individual = explained_variance_of(centralized, share_params, lambda x: x)
    print(f"{label:<32}{shared:>8.2f}{individual:>13.2f}")

# %% [markdown]
# ```
# explained variance of            the sum   own number
# local critic (IPPO)                 0.33         1.00
# centralized critic (MAPPO)          1.00         0.33
# centralized, separate networks      1.00         1.00
# ```
#
# A local critic cannot see the other agents' numbers, so it explains only a third of the sum's
# variance. A shared value cannot tell the agents apart, so it explains only a third of the variance
# of each agent's own number. A separate centralized critic for each agent predicts both, but has
# three times as many weights to learn. Another remedy is to add the agent's ID, or a second
# copy of its own observation, to the input of a shared critic.
#
# This probe shows what a critic *can* know. What a wrong value does to the policy is a different
# question, which Section 10 takes up.
#
# What a centralized critic does not do:
#
# - It does not make the world stationary. The other agents' policies still change.
# - It does not assign credit. It sees no actions, so it says how well the team is doing, but not
#   who is responsible. COMA (Foerster et al. 2018, arXiv:1705.08926) does assign credit.
# - It does not always help. Its input grows with the team. With bootstrapped values, it can also
#   make gradients noisier (Lyu et al. 2021, arXiv:2102.04402).
#
# *Question 4. How many inputs does the critic have with 8 agents, under MAPPO and under IPPO?*
#
# ---
# ## 5. Collecting data
# `Collector`, which used to be called `SyncDataCollector`, steps the environment with the policy
# and returns batches of `frames_per_batch` frames. Each batch starts from a reset. The collector
# holds the same policy object that you optimize, so it always acts with the latest weights.
#
# The replay buffer holds a single batch and splits it into minibatches. It samples *without
# replacement*, so that every frame is used exactly once per epoch.

# %%
policy = copy.deepcopy(untrained_policy)  # this one learns; Section 9 compares the two
collector = Collector(
    env,
    policy,
    device=device,
    frames_per_batch=frames_per_batch,
    reset_at_each_iter=True,
    track_traj_ids=False,  # trajectory IDs are not needed here
    auto_register_policy_transforms=False,  # these are for recurrent policies
)
replay_buffer = ReplayBuffer(
    storage=LazyTensorStorage(frames_per_batch, device=device),
    sampler=SamplerWithoutReplacement(),
    batch_size=minibatch_size,
)

first_batch = collector.next()
print("batch:", tuple(first_batch.shape))
print("rewards for three steps, one column per robot:")
for rewards in first_batch["next", "agents", "reward"][0, :3, :, 0].tolist():
    print(*(f"{x:9.4f}" for x in rewards))

# %% [markdown]
# ```
# batch: (60, 100)
# rewards for three steps, one column per robot:
#    0.0015    0.0015    0.0015
#   -0.0018   -0.0018   -0.0018
#   -0.0041   -0.0041   -0.0041
# ```
#
# The three columns are equal, because progress is shared. They would differ in a step in which two
# robots touch.
#
# Each row of a batch belongs to one environment. Later in training, a row may look like this:
#
# ```
#     step   0                          46 47                                          99
#            |------ first episode ------| |-------------- second episode --------------|
#                              terminated                                       cut off
# ```
#
# The first episode ends in success, and the environment is reset. The second episode is cut off
# by the end of the batch, and is treated like one that ran out of time.
#
# ---
# ## 6. Advantages
# How much better than expected was an action? *Generalized advantage estimation* (Schulman et al.
# 2016, arXiv:1506.02438) sums the critic's prediction errors from that step on:
#
#     delta_i(t) = r_i(t) + gamma (1 - terminated(t)) V_i'(t) - V_i(t)
#     A_i(t)     = delta_i(t) + gamma lmbda (1 - done(t)) A_i(t+1)
#     target     = A_i(t) + V_i(t)
#
# V_i' is computed from the stored next observation, because the next step of the batch may already
# belong to another episode. `done` stops the sum, and only `terminated` sets the next value to 0.
#
# Note that the critic plays two roles. V_i is the *baseline*, and V_i' is the *bootstrap value*.
# Suppose that a robot can go left or right, and that one of the two values is wrong:
#
# | error | changes A_i(left) by | changes A_i(right) by | effect on the policy |
# |---|---|---|---|
# | V_i is too high by 1 before the robot moves | -1 | -1 | none, on average |
# | V_i' is too high by 1 after the robot goes left | gamma (1 - lmbda) | 0 | it learns to go left |
#
# The first error is the same for both actions, so it averages out. The second depends on where the
# action led, so it remains. The next step's delta cancels part of it, since V_i' is then the
# baseline. With lmbda = 1, the later deltas cancel all of it, but the advantages are noisy.
# Remember this second role for Section 10.
#
# `MultiAgentGAE` computes this for all agents, and broadcasts the team's flags to them.

# %%
estimate_advantages = MultiAgentGAE(gamma=gamma, lmbda=lmbda, value_network=critic, device=device)
estimate_advantages.set_keys(reward=("agents", "reward"), value=("agents", "state_value"))

# %% [markdown]
# ### Open the black box
# Here is the same computation, written as a loop over time from the last step back. An untrained
# policy hardly ever succeeds, so we pretend that the episode in the first environment succeeded
# halfway through, and that the one in the last environment ran out of time.


# %%
def gae_by_hand(data):
    """Return advantages and value targets, both of shape (environments, steps, n_agents, 1)."""
    with torch.no_grad():
        value = critic_network(data["agents", "observation"])
        next_value = critic_network(data["next", "agents", "observation"])
    terminated = data["next", "terminated"].float().unsqueeze(-2)  # (environments, steps, 1, 1)
    done = data["next", "done"].float().unsqueeze(-2)
    reward = data["next", "agents", "reward"]
    delta = reward + gamma * (1 - terminated) * next_value - value
    advantage = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for step in reversed(range(max_steps)):
        following = delta[:, step] + gamma * lmbda * (1 - done[:, step]) * following
        advantage[:, step] = following
    return advantage, advantage + value


box_batch = first_batch.clone()
box_batch["next", "terminated"][0, max_steps // 2] = True
box_batch["next", "truncated"][-1, max_steps // 3] = True
box_batch["next", "done"] = box_batch["next", "terminated"] | box_batch["next", "truncated"]
estimate_advantages(box_batch)  # adds "advantage" and "value_target"
advantage, target = gae_by_hand(box_batch)
torch.testing.assert_close(box_batch["advantage"], advantage, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(box_batch["value_target"], target, rtol=1e-4, atol=1e-5)
print("advantages of the first frame:", *(f"{x:.4f}" for x in advantage[0, 0, :, 0].tolist()))

# %% [markdown]
# MAPPO:
# ```
# advantages of the first frame: 0.0348 0.0348 0.0348
# ```
#
# IPPO:
# ```
# advantages of the first frame: 0.0542 0.0521 0.0522
# ```
#
# Under MAPPO, all robots have the same value and nearly the same reward, and hence nearly the same
# advantage. How does a robot learn what *it* did right? It needs many frames. Its own good actions
# raise the shared advantage. The others' actions raise or lower it mostly regardless of what this
# robot does, so their effects average out.
#
# *Question 5. With lmbda = 0, how many collected rewards go into each advantage?*
#
# ---
# ## 7. Loss
# Let theta be the policy's weights. Agent i has its own probability ratio in every frame:
#
#     ratio_i   = pi_theta(a_i | o_i) / pi_old(a_i | o_i)
#     objective = mean of min(ratio_i A_i, clip(ratio_i, 1 - clip_epsilon, 1 + clip_epsilon) A_i)
#
# *Clipping.* If an action was good, nothing is gained by making it more than 1 + clip_epsilon times
# as likely. If it was bad, nothing is gained by making it less than 1 - clip_epsilon times as
# likely. The min keeps the gradient where the ratio has moved in the wrong direction, for example
# where a good action has become less likely. Clipping does not force the ratios to stay near 1. It
# only removes the incentive to leave.
#
# *Several agents.* We clip each agent's ratio separately, even though all policies change at once.
# The joint ratio of the team is the product of the agents' ratios, and it strays further from 1 the
# more agents there are. That argues for a smaller clip_epsilon in large teams (Sun et al. 2022,
# arXiv:2202.00082).
#
# *Normalization.* Advantages are normalized to zero mean and unit standard deviation over the
# minibatch, for each agent separately, so that an agent with larger advantages does not drown out
# the others. The agent dimension, dimension -2, is excluded from the averaging.
#
# *The other two terms.* The value loss is the smooth L1 distance between V_i and its target. The
# entropy bonus (Williams and Peng 1991) keeps the policy from settling too early. The loss module
# returns the three terms, already weighted, and you minimize their sum.

# %%
loss_module = ClipPPOLoss(
    policy,
    critic,
    clip_epsilon=clip_epsilon,
    entropy_coeff=entropy_eps,
    critic_coeff=critic_coeff,
    normalize_advantage=normalize_advantage,
    normalize_advantage_exclude_dims=(-2,),
    loss_critic_type="smooth_l1",
    functional=False,  # use the networks themselves; stateless copies are slower
    log_explained_variance=False,  # Section 8 computes it, before the update
)
loss_module.set_keys(value=("agents", "state_value"))
optimizer = torch.optim.Adam(loss_module.parameters(), lr=lr, fused=True)

# %% [markdown]
# ### Open the black box
# Here is the loss computed by hand on one minibatch. Before the first update, every ratio is 1, and
# under MAPPO, all agents have nearly the same advantage. A mistake could go unnoticed. To expose
# it, we shift the stored log-probabilities and one agent's advantages by random amounts. The
# entropy of a squashed normal distribution has no closed form, so both versions estimate it from a
# single sample, drawn with the same seed.


# %%
def loss_by_hand(data):
    """Return the three weighted terms of the loss for a minibatch of shape (minibatch_size,)."""
    pi = policy.get_dist(data)  # the current distribution of each agent's action
    log_ratio = pi.log_prob(data["agents", "action"]) - data["agents", "action_log_prob"]
    ratio = log_ratio.exp().unsqueeze(-1)  # (minibatch_size, n_agents, 1)
    clipped_ratio = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    advantage = data["advantage"]
    if normalize_advantage:
        std = advantage.std(0).clamp_min(1e-6)  # (n_agents, 1)
        advantage = (advantage - advantage.mean(0)) / std
    objective = torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()
    error = (critic_network(data["agents", "observation"]) - data["value_target"]).abs()
    value_loss = torch.where(error < 1, error**2 / 2, error - 0.5).mean()  # smooth L1
    entropy = -pi.log_prob(pi.rsample()).mean()
    return {
        "loss_objective": -objective,
        "loss_critic": critic_coeff * value_loss,
        "loss_entropy": -entropy_eps * entropy,
    }


torch.manual_seed(seed_for("box"))
box_frames = first_batch.clone()
estimate_advantages(box_frames)
box_frames = box_frames.reshape(-1)[:minibatch_size]
noise = torch.randn(minibatch_size, env.n_agents, device=device)
box_frames["agents", "action_log_prob"] += 0.3 * noise
box_frames["advantage"][:, 0] += noise[:, :1]
torch.manual_seed(seed_for("entropy"))
by_library = loss_module(box_frames.clone())
torch.manual_seed(seed_for("entropy"))
for term, by_hand in loss_by_hand(box_frames).items():
    torch.testing.assert_close(by_library[term], by_hand, rtol=1e-4, atol=1e-5)
    print(f"{term:<15}{by_hand.item():>9.5f}")

# %% [markdown]
# MAPPO:
# ```
# loss_objective   0.12334
# loss_critic      0.01003
# loss_entropy    -0.00013
# ```
#
# With IPPO, the numbers differ a little, but the computation is the same. TorchRL also has classes
# named `MAPPOLoss` and `IPPOLoss`. Both compute the loss used here, but with multi-agent defaults.
# They normalize advantages for each agent and use `MultiAgentGAE`. They can also normalize the
# values.
#
# ---
# ## 8. Training loop
# You now have all the pieces. Each iteration does this:
#
# 1. collect a batch with the current policy
# 2. estimate the advantages once, with the critic as it is now
# 3. for `num_epochs` epochs, take a gradient step on each minibatch
# 4. measure what happened
# 5. throw the batch away
#
# Two cells set up what the loop needs. The first names the run's folder and starts its history. The
# second defines what is measured. Only the first episode of each environment counts, because a
# later one has less time left in the batch, so slow successes would be missed.

# %%
algorithm = "MAPPO" if mappo else "IPPO"
scenario = getattr(scenario_name, "__name__", scenario_name)
run_name = f"{algorithm.lower()}-{scenario}-seed{seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
folder = Path(run_folder or f"runs/{run_name}")
history = []  # a dictionary of metrics for each iteration


def save_whole(name, save):
    """Have `save` write to a temporary file, then rename it, so `name` is complete or absent."""
    unfinished = folder / f".unfinished-{name}"
    try:
        save(unfinished)
        unfinished.replace(folder / name)
    finally:
        unfinished.unlink(missing_ok=True)


# %%
navigation = scenario == "navigation"
success_key = "success_rate" if navigation else "terminated_rate"
penalty = {"collisions": True, "agent_collision_penalty": -1, **scenario_options}
counts_collisions = navigation and penalty["collisions"] and penalty["agent_collision_penalty"] != 0


def measure(data):
    """Return the mean reward, success rate, length and collisions of the first episodes in `data`.

    `data` is a TensorDict of shape (environments, steps). Rewards are summed over an episode and
    averaged over agents. A collision is a step in which an agent touches another agent, counted
    per agent.
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
    if counts_collisions:
        touches = data["next", "agents", "info", "agent_collisions"].squeeze(-1) != 0
        means["collisions"] = (touches.float().mean(-1) * first).sum(1).mean().item()
    return means


def evaluate(policy):
    """Play `evaluation_episodes` episodes with the deterministic policy and `measure` them."""
    test_env = make_env(evaluation_episodes, evaluation_seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return measure(test_env.rollout(max_steps, policy, break_when_all_done=True))


# %%
for function in before_training:
    function()
inputs = [("agents", "observation"), ("agents", "action"), ("agents", "action_log_prob")]
update_metrics = ["loss_objective", "loss_critic", "loss_entropy"]
update_metrics += ["entropy", "kl_approx", "clip_fraction"]
progress = tqdm(range(len(history), n_iters), desc=algorithm, total=n_iters, initial=len(history))
for iteration in progress:
    start = time.perf_counter()
    env.set_seed(seed_for("simulator", iteration, rank))  # so that each iteration is reproducible
    torch.manual_seed(seed_for("actions and minibatches", iteration, rank))
    if anneal_lr:
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / n_iters)

    batch = collector.next()  # (num_vmas_envs, max_steps)
    estimate_advantages(batch)  # adds "advantage" and "value_target"

    frames = batch.reshape(-1).select(*inputs, "advantage", "value_target")  # (frames_per_batch,)
    replay_buffer.empty()
    replay_buffer.extend(frames)
    minibatch_losses = []
    for _ in range(num_epochs):
        for minibatch in replay_buffer:  # (minibatch_size,)
            losses = loss_module(minibatch)
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(
                loss_module.parameters(), max_grad_norm, error_if_nonfinite=True
            )
            optimizer.step()
            minibatch_losses.append(losses.detach())

    losses = torch.stack(minibatch_losses).mean(dim=0)
    row = {"iteration": iteration, "frames": (iteration + 1) * frames_per_batch, **measure(batch)}
    row |= {name: losses[name].item() for name in update_metrics}
    unexplained = frames["advantage"].var() / frames["value_target"].var()
    row["explained_variance"] = 1 - unexplained.item()
    row["advantage_std"] = frames["advantage"].std().item()
    row["seconds"] = time.perf_counter() - start
    history.append(row)
    for function in after_iteration:
        function(row)
    progress.set_postfix({key: round(row[key], 2) for key in ("episode_reward", success_key)})

# %% [markdown]
# ### Read the metrics
# `history` has one row per iteration, which the engineering cell also writes to `metrics.csv`.
# These are the first and last rows of default MAPPO runs, given as ranges over ten seeds.
#
# | metric | meaning | first | last |
# |---|---|---|---|
# | `episode_reward` | reward per robot per episode | -0.87 to -0.25 | 2.79 to 3.10 |
# | `success_rate` | fraction of successful episodes | 0.00 | 0.58 to 0.80 |
# | `collisions` | steps in contact, per robot per episode | 0.17 to 0.81 | 0.00 to 0.10 |
# | `loss_critic` | weighted value loss | 0.0043 to 0.0174 | 0.0011 to 0.0026 |
# | `entropy` | randomness of the actions | 1.33 | 0.90 to 0.97 |
# | `kl_approx` | how far an update moves the policy | 0.008 to 0.014 | 0.006 to 0.009 |
# | `clip_fraction` | fraction of ratios that are clipped | 0.11 to 0.16 | 0.07 to 0.08 |
# | `explained_variance` | how well the critic predicts its targets | 0.17 to 0.66 | 0.89 to 0.93 |
# | `advantage_std` | standard deviation of the advantages | 0.16 to 0.36 | 0.13 to 0.17 |
#
# What to check if yours look different:
#
# | you see | check |
# |---|---|
# | reward does not improve | the reward key, `lr` |
# | high reward, no success | train longer; if the robots succeeded earlier, read Section 10 |
# | value loss grows | the scale of the rewards, `lr` |
# | entropy drops right away | `entropy_eps`, `lr` |
# | kl_approx above 0.05 or clip_fraction above 0.3 | `lr`, `num_epochs` |
# | explained variance stays below 0 | the value, done and terminated keys |
#
# `kl_approx` estimates the KL divergence between the old and new policies. It is the old
# log-probability minus the new one, averaged over the iteration's minibatches, and it can be
# negative. The explained variance of an untrained critic means little, because its targets contain
# its own estimates.
#
# *Question 6. What would an off-policy method do with the replay buffer that PPO must not do?*
#
# ---
# ## 9. Evaluation and results
# During training, actions are sampled. Here the untrained and trained policies act
# deterministically, and play the same episodes.


# %%
evaluation = {"iterations": len(history)}
evaluation |= {"untrained": evaluate(untrained_policy), "trained": evaluate(policy)}
print(f"\n{evaluation_episodes} episodes, deterministic policy    untrained     trained")
for key, value in evaluation["trained"].items():
    print(f"{key:<35}{evaluation['untrained'][key]:>12.3f}{value:>12.3f}")

# %% [markdown]
# With MAPPO and seed 0, on a CPU:
# ```
# 200 episodes, deterministic policy    untrained     trained
# episode_reward                           -0.007       3.148
# success_rate                              0.000       0.935
# episode_length                          100.000      63.020
# collisions                                0.000       0.003
# ```
#
# *Question 7. Why is the success rate higher here than in the last iteration of training?*
#
# The trained policy, the evaluation, two figures and a video are saved in the run's folder.
# `learning_curve.png` shows this run. `learning_curves.png` shows all runs of this scenario in the
# same parent folder, with this run as a thick line. `rollout.gif` is a video of one episode. The
# second of the next two cells only draws these pictures, so skip it if you are here for the method.

# %%
folder.mkdir(parents=True, exist_ok=True)
policy_options = {"n_agent_outputs": 2 * n_actions, "centralized": False}
policy_options["share_params"] = share_parameters_policy
saved_policy = {"network": {**network_options, **policy_options}, **action_bounds}
saved_policy["state_dict"] = policy[0].module[0].state_dict()
save_whole("policy.pt", lambda path: torch.save(saved_policy, path))
save_whole("evaluation.json", lambda path: path.write_text(json.dumps(evaluation, indent=2)))
print(f"The results are in {folder}")

# %%
import csv

from PIL import Image

drawn = ("frames", "episode_reward", success_key)
runs = {folder.name: (algorithm, history)}
for path in sorted(folder.resolve().parent.glob("*/metrics.csv")):
    try:
        settings = json.loads((path.parent / "hyperparameters.json").read_text("utf-8"))
        if settings["scenario_name"] == scenario and path.parent.name != folder.name:
            with open(path, newline="", encoding="utf-8") as table:
                rows = [{key: float(row[key]) for key in drawn} for row in csv.DictReader(table)]
            runs[path.parent.name] = ("MAPPO" if settings["mappo"] else "IPPO", rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path.parent} is left out of the learning curves ({type(error).__name__})")

for name, shown in {"learning_curve.png": [folder.name], "learning_curves.png": runs}.items():
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key in zip(panels, drawn[1:], strict=True):
        for run in shown:
            label, rows = runs[run]
            color, line = {"MAPPO": ("tab:blue", ".-"), "IPPO": ("tab:orange", ".--")}[label]
            points = [row["frames"] for row in rows], [row[key] for row in rows]
            width = 3 if run == folder.name else 1
            axes.plot(*points, line, color=color, linewidth=width, label=label)
        axes.set(title=f"{scenario}, during training", xlabel="frames", ylabel=key)
    panels[1].set_ylim(-0.05, 1.05)
    labels = {line.get_label(): line for line in panels[0].get_lines()}
    panels[0].legend(labels.values(), labels.keys(), title="thick line: this run")
    save_whole(name, lambda path, figure=figure: figure.savefig(path, format="png"))

scene, images = make_env(1, evaluation_seed), []
try:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        data = scene.reset()
        while not images or not data["done"].any():
            images.append(Image.fromarray(scene.render("rgb_array")).reduce(2))
            data = scene.step_mdp(scene.step(policy(data)))
        images.append(Image.fromarray(scene.render("rgb_array")).reduce(2))
except Exception as error:  # VMAS's renderer can raise many kinds of exceptions
    print(
        f"No rollout.gif, because VMAS could not render ({type(error).__name__}: {error}). "
        "If OpenGL is missing: apt-get install libgl1 libegl1 libglu1-mesa libgl1-mesa-dri"
    )
else:
    gif = {"format": "GIF", "save_all": True, "append_images": images[1:]}
    gif |= {"duration": 60, "loop": 0}
    save_whole("rollout.gif", lambda path: images[0].save(path, **gif))
    if "get_ipython" in globals():  # notebooks display figures automatically, but not videos
        from IPython.display import Image as Video
        from IPython.display import display

        display(Video(folder / "rollout.gif", format="png"))

# %% [markdown]
# ---
# ## 10. MAPPO vs. IPPO
# Now compare the two. First write down the success rates that you expect after 15 iterations. Then
# run both commands or, in a notebook, change `mappo` and `n_iters` in Section 1.
#
# ```
# python train_mappo.py --n-iters 15
# python train_mappo.py --no-mappo --n-iters 15
# ```
#
# `learning_curves.png` in the second run's folder shows the training curves of both runs. One seed
# proves little. Repeat the commands with `--seed 1` and so on to see the spread, or look at our
# results. These are mean success rates over ten seeds, in test episodes. You will find every run in
# study/README.md.
#
# | | 10 iterations | 15 | 20 | worst run after 10 | worst after 15 |
# |---|---|---|---|---|---|
# | MAPPO | 0.95 | 0.98 | 0.99 | 0.92 | 0.96 |
# | IPPO | 0.87 | 0.05 | 0.00 | 0.70 | 0.01 |
#
# IPPO learns the task and then forgets it. Its training reward falls as well, so it has not found
# anything better. Why does this happen?
#
# ### Success looks like a loss
# All robots drive to their goals at the same time, and a local critic sees only one of them. When
# that robot is near its goal, the others usually are as well, and there is little left for
# *anybody* to earn. So V_i drops when robot i moves closer, even if no other robot has moved.
#
# Take an extreme case without discounting. Suppose that all three robots are always equally far
# from their goals, at a distance d. The team has 3d left to earn, so a local critic learns that
# V_i = 3d. Now a single robot moves one unit closer:
#
# ```
#                             reward     value of what is left     advantage
#     centralized critic        +1                -1                    0
#     local critic              +1                -3                   -2
# ```
#
# As a prediction from what it sees, the local critic's value is right. As a judgment of one robot's
# move it is wrong, because the other robots got no closer. In effect, it teaches the robot to stay
# away.
#
# Call the drop in value per unit of progress the *slope*, s. If a critic sees every robot, its
# slope should be at most 1, so progress is never a loss. With discounting, the slope is gamma^T,
# since at constant speed the robot would have earned that unit at the end of its drive, in T steps.
# The slope of a local critic depends on how closely the robots move together.
#
# Now measure the slope of the critic that you have trained. The next cell edits the critic's input
# so that one robot is a little closer to its goal. Its velocity and lidar readings stay as they
# were, so the critic judges situations slightly different from those it has seen.
#
# The cell then uses TorchRL's GAE to compute what progress adds to the advantage. At the step in
# which the robot moves one unit closer, V_i' is lower by s, and delta changes by 1 - gamma s. At
# all later steps, both V_i and V_i' are lower by s, and delta changes by s - gamma s. Weighted by
# GAE, these changes add up to
#
#     1 - gamma s + (1 - gamma) s [gamma lmbda + (gamma lmbda)^2 + ...]  =  1 - 0.91 s
#
# The others' progress also adds to the advantage, but it does so regardless of what this robot
# does.


# %%
def value_slope(step=0.05):
    """Return how much V_i drops per unit of distance when only robot i moves closer to its goal.

    This is the mean over one new batch, for robots that are more than 0.1 away.
    """
    env.set_seed(seed_for("slope"))
    torch.manual_seed(seed_for("slope"))
    seen = collector.next()["agents", "observation"]  # (num_vmas_envs, max_steps, n_agents, n_obs)
    drops = []
    for robot in range(env.n_agents):
        from_goal = seen[..., robot, 4:6]  # its position minus its goal
        distance = from_goal.norm(dim=-1, keepdim=True)
        closer = seen.clone()
        closer[..., robot, 0:2] -= step * from_goal / distance  # its position
        closer[..., robot, 4:6] -= step * from_goal / distance
        with torch.no_grad():
            drop = (critic_network(seen) - critic_network(closer))[..., robot, 0]
        drops.append(drop[distance.squeeze(-1) > 0.1])
    return torch.cat(drops).mean().item() / step


def advantage_of_progress(slope):
    """Return the advantage of a step that earns 1 and lowers the value by `slope` from then on."""
    reward, value = torch.zeros(max_steps, 1), torch.zeros(max_steps + 1, 1)
    reward[0] = 1.0
    value[1:] = -slope
    done = torch.zeros(max_steps, 1, dtype=torch.bool)
    advantage, _ = generalized_advantage_estimate(gamma, lmbda, value[:-1], value[1:], reward, done)
    return advantage[0].item()


if navigation and not scenario_options.get("observe_all_goals"):
    slope, cost = value_slope(), 1 - advantage_of_progress(1.0)
    print(f"{algorithm}, {len(history)} iterations: slope of the value {slope:.2f}")
    print(f"advantage of a unit of progress: 1 - {cost:.2f} s = {advantage_of_progress(slope):.2f}")

# %% [markdown]
# MAPPO:
# ```
# MAPPO, 10 iterations: slope of the value 0.37
# advantage of a unit of progress: 1 - 0.91 s = 0.67
# ```
#
# IPPO:
# ```
# IPPO, 10 iterations: slope of the value 1.03
# advantage of a unit of progress: 1 - 0.91 s = 0.06
# ```
#
# Over ten seeds, the means are:
#
# | after | 10 iterations | 15 |
# |---|---|---|
# | slope, MAPPO | 0.35 | 0.60 |
# | slope, IPPO | 0.88 | 1.54 |
# | advantage of a unit of progress, MAPPO | 0.68 | 0.45 |
# | advantage of a unit of progress, IPPO | 0.20 | -0.40 |
# | explained variance, IPPO | 0.83 | 0.95 |
#
# Above a slope of 1.1, progress has a negative advantage, at least in this simple model, where the
# slope is the same everywhere and no episode ends. IPPO crosses that threshold somewhere between 10
# and 15 iterations. MAPPO's slope is not perfect either. In a drive of 60 steps, gamma^T rises from
# 0.55 at the start to 1 at the end, and after 10 iterations the slope is below that. But a slope
# that is too small makes progress look better than it is. Only one that is too large turns progress
# into a loss.
#
# How does this fit with the probe in Section 4? A critic can be right about the average situation
# and wrong about what *one* action changes. Nor does the explained variance give it away. In the
# last row, it rises while the policy falls apart, perhaps because a failing team is easy to
# predict.
#
# Is the slope the cause? On every seed, IPPO's success rate in training peaks within two iterations
# of the slope passing 1.1. And each of these changes, on its own, keeps IPPO from forgetting. The
# numbers are mean success rates after 15 iterations, over ten seeds.
#
# | change | IPPO |
# |---|---|
# | none | 0.05 |
# | the critic also receives the sum of the others' remaining distances | 0.99 |
# | individual rewards | 1.00 |
# | a shorter horizon, gamma = 0.9 | 1.00 |
# | successes bootstrapped like timeouts, which keeps the slope at 1.0 | 0.96 |
#
# The first change adds only the one thing that the local critic lacks: a single number. (You can
# try it yourself in exercise 12 in teaching/.) This is strong evidence, not proof, and it rests on
# a single task.
#
# Is this file to blame for the forgetting? TorchRL's own tutorial has the same hyperparameters, but
# keeps PyTorch's initialization, does not normalize advantages, weights the value loss twice as
# heavily and counts the time limit as a termination. It stops after 5 iterations. If you let it run
# longer, its IPPO forgets the task as well. This is its training reward, averaged over ten seeds:
#
# | TorchRL's tutorial after | 5 iterations | 12 | 25 |
# |---|---|---|---|
# | MAPPO | 1.74 | 2.90 | 3.02 |
# | IPPO | 1.70 | 2.86 | 1.65 |
#
# ### Try it
#
# Add `--no-mappo` to see IPPO. These are mean success rates over ten seeds.
#
# | experiment | options | MAPPO | IPPO |
# |---|---|---|---|
# | individual rewards | `--n-iters 15 --scenario-options '{"shared_rew": false}'` | 0.99 | 1.00 |
# | a shorter horizon | `--n-iters 15 --gamma 0.9` | 0.99 | 1.00 |
# | no bootstrapping | `--n-iters 15 --lmbda 1` | 0.43 | 0.15 |
# | fewer epochs | `--n-iters 50 --num-epochs 10` | 0.99 | 0.08 |
#
# Without bootstrapping, a wrong slope can do no harm. But the advantages are noisier, and neither
# algorithm has learned the task after 15 iterations. Fewer epochs delay the forgetting. They do not
# prevent it. README.md has more experiments.
#
# ### When does a centralized critic pay off?
# Our experiments suggest that it pays off when much of an agent's return depends on what the agent
# cannot observe, over a horizon long enough for that to matter. For contrast, try the
# *reverse_transport* scenario, where each robot sees the package that the team is rewarded for
# moving. There, IPPO learns as fast as MAPPO and does not forget. Two scenarios do not make a rule.
# Before you compare your numbers with those of the MAPPO paper, note what differs:
#
# | | this file | Yu et al. (2022) |
# |---|---|---|
# | tasks | navigation | StarCraft, Hanabi, football, particle worlds |
# | critic's input | concatenated observations | global state and agent features in StarCraft |
# | value normalization | no | running statistics of the returns |
# | value loss | smooth L1 | Huber loss with delta 10, clipped value updates |
# | epochs per batch | 30 | 5 to 15, fewer in harder tasks |
# | minibatches | 15 | mostly 1 |
#
# ---
# ## Answers
# 1. `6000 / 400 * 30 = 450`. An epoch has 15 minibatches, and there are 30 epochs.
# 2. Its target would be that step's reward alone. It could not know when to expect this, because
#    the observations do not include the time step. So it would undervalue states in which episodes
#    often run out of time.
# 3. `18*256 + 256 + 256*256 + 256 + 256*4 + 4 = 71684`, and three times as many without sharing.
# 4. `8 * 18 = 144` under MAPPO, and 18 under IPPO, for any team size.
# 5. One. The advantage is then r_i + gamma V_i' - V_i.
# 6. It would keep old frames and learn from them again. PPO must not, because its ratio corrects
#    only for the small step from the policy that collected the batch.
# 7. Two likely reasons are that actions are sampled during training, so robots jitter around their
#    goals, and that the last batch was collected before the last update.
