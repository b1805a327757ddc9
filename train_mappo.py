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

# %% [markdown]
# # Multi-agent PPO, step by step
#
# You already know single-agent PPO. Here you train a team. Three robots start at random positions,
# each with its own goal, and share most of the reward. You train them with two algorithms that
# differ in a single argument. After ten iterations, both algorithms get the robots to their goals
# in most episodes. Five iterations later, one of them has improved further, while the other hardly
# ever succeeds.
#
# **Which one fails, and why?** Write down your guess. Section 10 shows you the answer, in a picture
# of what your own critic has learned.
#
# With several agents, each agent's environment includes all the other agents. They learn too, so to
# each agent the world looks *non-stationary*. PPO (Schulman et al. 2017, arXiv:1707.06347) limits
# the damage, because it is *on-policy*. It discards each batch before the teammate behavior
# recorded in it is badly out of date, and its clipping keeps each update small.
#
# The two algorithms differ in what the critic sees:
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
# The critic may see more than the policy, because it is not used once training is over. This is
# called *centralized training with decentralized execution*, or CTDE.
#
# The index i runs over the agents, and the sizes are those of the default run.
#
# | symbol | meaning | key in the data | size for each agent |
# |---|---|---|---|
# | o_i | observation of agent i | `("agents", "observation")` | 18 |
# | a_i | its action, a force along x and y | `("agents", "action")` | 2 |
# | r_i | its reward | `("next", "agents", "reward")` | 1 |
# | V_i | the critic's value before the step | `("agents", "state_value")` | 1 |
# | V_i' | the critic's value after the step | `("next", "agents", "state_value")` | 1 |
# | A_i | advantage, how much better the outcome was than predicted | `"advantage"` | 1 |
#
# | term | meaning |
# |---|---|
# | frame | one step of one environment, in which all agents act |
# | episode | the steps from a reset until all robots are at their goals or time runs out |
# | success rate | fraction of episodes that end with all robots at their goals |
# | return | discounted sum of the rewards still to come |
# | bootstrapping | using the critic's value in place of the rewards that follow |
#
# ## 1. Hyperparameters
# Every setting is a field of `Config`. Change the defaults here, or override them on the command
# line, for example with `--n-iters 20`. To add a setting of your own, add a line with its name,
# type and default.


# %% id="config"
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

# %% [markdown]
# *Question 1. How many gradient steps does one iteration take?* (The answers are at the end.)
#
# In a notebook, rerun everything below after you change a setting. If you changed only `mappo`, you
# can start from Section 4. The next cell defines placeholders, which the engineering cell after it
# replaces. You can ignore both until Section 8, but always run them together.


# %% id="placeholders"
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


# %% [markdown]
# ---
# ## Engineering (run this cell, but skip reading it, and go on to Section 2)
# The next cell has nothing to do with the method. It handles the command line, invalid settings,
# checkpoints, metrics and `torchrun`. Of everything defined above, it replaces only `cfg`, `rank`,
# `world_size` and `run`, so training gives the same numbers without it.

# %% id="engineering" jupyter={"source_hidden": true}
import argparse
import csv
import importlib.util
import inspect
import io
import math
import shlex
import sys
from contextlib import suppress
from dataclasses import fields, replace

import vmas
from torch import distributed as dist
from torchrl.record.loggers import get_logger

COUNTS = ["n_agents", "max_steps", "frames_per_batch", "n_iters", "num_epochs", "minibatch_size"]
COUNTS += ["depth", "num_cells", "evaluation_interval", "evaluation_episodes"]
RANGES = [  # settings, what each must be, and a test for it
    (COUNTS, "a whole number from 1 to a billion", lambda x: 1 <= x <= 10**9),
    (["seed", "evaluation_seed"], "a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    (["lr", "max_grad_norm", "critic_coeff"], "a number above 0", lambda x: 0 < x < math.inf),
    (["gamma", "lmbda"], "a number from 0 to 1", lambda x: 0 <= x <= 1),
    (["clip_epsilon"], "a number above 0 and below 1", lambda x: 0 < x < 1),
    (["entropy_eps"], "0 or a positive number", lambda x: 0 <= x < math.inf),
]
# The loggers, and the packages that each of them needs.
LOGGERS = {"": [], "csv": [], "mlflow": ["mlflow", "omegaconf"], "tensorboard": ["tensorboard"]}
LOGGERS |= {"trackio": ["trackio"], "wandb": ["wandb"]}
KINDS = {bool: bool, int: int, float: float | int, str: str, dict: dict, str | type: str | type}


class BadInput(ValueError):
    """An invalid setting. The message gives its name, its value and what would be valid."""


def require(cfg, name, condition, expected):
    """Raise BadInput unless the condition holds."""
    if not condition:
        raise BadInput(f"{name} is {getattr(cfg, name)!r}, but must be {expected}")


def record_of(cfg):
    """Return the settings as JSON stores them, with each class or function replaced by its name."""
    record = {}
    for name in [setting.name for setting in fields(cfg)]:
        value = getattr(cfg, name)
        try:
            text = json.dumps(value, allow_nan=False, default=lambda x: x.__name__)
        except (AttributeError, TypeError, ValueError) as error:
            raise BadInput(f"{name} is {value!r}, but must be JSON-serializable") from error
        record[name] = json.loads(text)
    return record


def require_equal(cfg, then, exempt, reason):
    """Raise BadInput if a setting differs from its value in `then`, unless it is exempt."""
    for name, value in record_of(cfg).items():
        if name in then and name not in exempt:
            require(cfg, name, value == then[name], f"{then[name]!r}, {reason}")


def check_values(cfg):
    """Check that each setting has the right type, is in its range, and can be recorded."""
    ranges = {name: (words, fits) for names, words, fits in RANGES for name in names}
    for setting in fields(cfg):
        name, value = setting.name, getattr(cfg, setting.name)
        kind = KINDS.get(setting.type, object)
        right = isinstance(value, kind) and (kind in (bool, object) or type(value) is not bool)
        words = f"of type {getattr(setting.type, '__name__', setting.type)}"
        words, fits = ranges.get(name, (words, lambda x: True))
        require(cfg, name, right and fits(value), words)
    require(cfg, "logger", cfg.logger in LOGGERS, f"one of {[*LOGGERS]}")
    missing = [name for name in LOGGERS[cfg.logger] if importlib.util.find_spec(name) is None]
    words = f"one whose packages are installed: pip install {' '.join(missing)}"
    require(cfg, "logger", not missing, words)
    record_of(cfg)


def check_scenario(cfg):
    """Check that VMAS can build as many copies of the scenario as the run needs."""
    name, options, known = cfg.scenario_name, cfg.scenario_options, VmasEnv.available_envs
    own = isinstance(name, type)
    require(cfg, "scenario_name", own or name in known, "one of " + ", ".join(known))
    taken = {"n_agents", *inspect.signature(vmas.make_env).parameters} & options.keys()
    words = f"a dictionary without keys that are set elsewhere: {', '.join(taken)}"
    require(cfg, "scenario_options", not taken, words)
    with warnings.catch_warnings():  # warnings about options or too little room become errors
        warnings.filterwarnings("error", "Scenario kwargs|It is taking many iterations to spawn")
        warnings.filterwarnings("ignore", r"Scenario kwargs: \{'n_agents': \d+\} passed")
        try:
            trial = VmasEnv(
                name() if own else name,
                num_envs=min(1000, max(cfg.evaluation_episodes, cfg.num_vmas_envs // world_size)),
                seed=cfg.evaluation_seed,
                scenario_kwargs={"n_agents": cfg.n_agents, **options},
            )
        except Exception as error:
            if own and not isinstance(error, UserWarning):
                raise  # a mistake in your own class keeps its traceback
            raise BadInput(
                f"scenario_name is {name!r}, but VMAS cannot build it with n_agents = "
                f"{cfg.n_agents} and scenario_options = {options}. {error}"
            ) from error
    one_team = len(trial.group_map) == 1 and not trial.het_specs
    names = ", ".join(trial.agent_names)
    words = f"a scenario with a single team of identical agents. This one has {names}"
    require(cfg, "scenario_name", one_team, words)
    fits = trial.n_agents == cfg.n_agents
    require(cfg, "n_agents", fits, f"{trial.n_agents}, the size of this scenario's team")


def check(cfg):
    """Check that the settings are compatible with each other, the scenario and this machine."""
    check_values(cfg)
    frames, minibatch, steps = cfg.frames_per_batch, cfg.minibatch_size, cfg.max_steps * world_size
    words = f"a multiple of {steps}, which is max_steps times the number of processes"
    require(cfg, "frames_per_batch", frames % steps == 0, words)
    fits = frames % minibatch == 0 and minibatch % world_size == 0 and minibatch >= 2 * world_size
    words = f"a divisor of {frames} that gives each process the same number of frames, at least 2"
    require(cfg, "minibatch_size", fits, words)
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    devices = ["cpu", "cuda"] if gpus >= local else ["cpu"]
    devices += [f"cuda:{index}" for index in range(gpus) if world_size == 1]
    words = f"{' or '.join(devices)} (GPUs found: {gpus})"
    require(cfg, "device", cfg.device in devices, words)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    words = "given if torchrun may restart processes, so that they can find their run"
    require(cfg, "run_folder", cfg.run_folder or not restarts, words)
    check_scenario(cfg)


def read_run(folder):
    """Return the checkpoint of the run in a folder, or None if the folder is new or empty."""
    path, here = folder / "checkpoint.pt", f"run_folder is '{folder}', but must be"
    try:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
        saved = torch.load(path, "cpu", weights_only=True) if path.name in names else None
        if saved:
            steps = [row["iteration"] for row in saved["history"]]
            whole = saved.keys() >= {"world_size", "policy", "critic", "optimizer", "best_policy"}
            if not whole or steps != [*range(len(steps))] or not dict(saved["config"]):
                raise ValueError("a part is missing")
    except OSError as error:
        raise BadInput(f"{here} a folder that can be read ({error.strerror})") from error
    except Exception as error:  # a damaged file can raise nearly anything
        words = f"{here} the folder of a run. Its {path.name} is damaged or from another version"
        raise BadInput(words) from error
    other = [name for name in names if not name.startswith(".")]
    if other and not saved:
        raise BadInput(f"{here} new, empty, or the folder of a run. It contains {other[0]}")
    return saved


def prepare_folder(cfg, folder, saved):
    """Make the folder. Check that a run can begin there, or that the saved one can be resumed."""
    if saved:
        require_equal(cfg, saved["config"], BOOKKEEPING, "as in the run you are resuming")
        done = len(saved["history"])
        require(cfg, "n_iters", cfg.n_iters >= done, f"at least {done}, the number already done")
    if rank == 0:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise BadInput(f"run_folder is '{folder}', but must be a folder that can be written to")


def number_or_json(text):
    """Return the value that a command-line argument stands for."""
    for read in (int, float, json.loads):
        with suppress(ValueError):
            return read(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor JSON")


def make_parser():
    """Return a parser with an option for each field of Config."""
    program = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog=program if world_size == 1 else f"{program}, process {rank}",
        usage=f"python {program} [--NAME VALUE] [--FLAG] [--no-FLAG] ...",
        description="Each field of Config is an option, written with - in place of _:",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    with suppress(OSError, TypeError):  # there is no source if the file comes from standard input
        parser.epilog = inspect.getsource(Config)
    for name, default in asdict(Config()).items():
        options = {"type": str if isinstance(default, (str, type)) else number_or_json}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + name.replace("_", "-"), help=argparse.SUPPRESS, **options)
    return parser


def read_command_line(cfg):
    """Return the settings. Options on the command line override those saved with a run."""
    parser = make_parser()
    given = vars(parser.parse_args())
    try:
        cfg = replace(cfg, **given)
        check_values(cfg)
        folder = Path(os.path.expanduser(cfg.run_folder or "runs"))
        saved = read_run(folder) if cfg.run_folder else None
        now, then = record_of(cfg), saved["config"] if saved else {}
        names = (now.keys() & then.keys()) - given.keys() - {"run_folder"}
        names -= set() if torch.cuda.is_available() else {"device"}  # the run may have used a GPU
        scenarios = {x["scenario_name"] for x in (now, then) if x}
        if not scenarios <= {*VmasEnv.available_envs}:
            names.discard("scenario_name")  # a record holds only the name of your own class
        kept = {name: then[name] for name in sorted(names) if then[name] != now[name]}
        cfg = replace(cfg, **kept)
        check(cfg)
        prepare_folder(cfg, folder, saved)
    except BadInput as error:
        parser.error(" ".join(str(error).split()))
    if kept:
        print("Kept from the saved run:", ", ".join(f"{name} = {x!r}" for name, x in kept.items()))
    return cfg


class SavedRun(Run):
    """A run that process 0 saves to a folder after each iteration, and that can be resumed."""

    def __init__(self, cfg, is_program):
        self.built_with, self.is_program, self.log = record_of(cfg), is_program, None

    def distribute(self, loss_module):
        """Make each backward pass average the gradients across processes."""
        if world_size == 1:
            return loss_module
        return nn.parallel.DistributedDataParallel(loss_module, forward_sync_buffers=False)

    def resume(self, cfg, folder, history, learner):
        """Load the run in the folder into `history` and `learner`, or begin a new one there."""
        self.cfg, self.folder, saved = cfg, folder, read_run(folder)
        check_values(cfg)  # in a notebook, settings may have changed since
        reason = "unless you run everything below Section 1 again"
        require_equal(cfg, self.built_with, {"mappo", *BOOKKEEPING}, reason)
        if learner["optimizer"].state and not saved:
            raise BadInput(
                "The networks have already been trained. For a new run, start from Section 4"
            )
        prepare_folder(cfg, folder, saved)
        launcher = ["python"]
        if world_size > 1:
            launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
        self.command = shlex.join([*launcher, sys.argv[0], "--run-folder", str(folder)])
        if saved:
            self.load(saved, history, learner)
        else:
            print(f"New run: {folder}")
        if self.is_program:
            print(f"To resume it after an interruption: {self.command}")
            sys.excepthook = self.explain_interrupt
        if world_size > 1:
            dist.barrier()  # no process may write before all have read the folder
        self.write(history, learner)
        self.open_log()
        self.write_log(history)

    def load(self, saved, history, learner):
        """Load what was saved, and say what is different now."""
        cfg = self.cfg
        history[:] = saved["history"]
        try:
            for name, part in learner.items():
                part.load_state_dict(saved[name])
        except (RuntimeError, ValueError) as error:
            words = "must be new, or the folder of a run with networks like the current ones"
            raise BadInput(f"run_folder is '{self.folder}', but {words}") from error
        print(f"Resuming {self.folder}: {len(history)} of {cfg.n_iters} iterations are done")
        if saved["world_size"] != world_size:
            print(f"Number of processes: {saved['world_size']} before, {world_size} now")
        if cfg.anneal_lr and saved["config"]["n_iters"] != cfg.n_iters > len(history):
            last = learner["optimizer"].param_groups[0]["lr"]
            next_lr = cfg.lr * (1 - len(history) / cfg.n_iters)
            print(f"The learning rate was {last:.2g}. Training continues at {next_lr:.2g}.")

    def open_log(self):
        """Open a new log each time the run starts or resumes. Each log contains the whole run."""
        if self.cfg.logger and rank == 0:
            name = f"{self.folder.resolve().name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow logs to files here
            self.log = get_logger(self.cfg.logger, str(self.folder / "log"), name)
            options = str(self.cfg.scenario_options)  # some loggers take no dictionaries
            self.log.log_hparams({**record_of(self.cfg), "scenario_options": options})

    def save(self, history, learner):
        """Average the last row of the history over the processes, then save everything."""
        row = history[-1]
        row.update({key: x if isinstance(x, int) else float(x) for key, x in row.items()})
        if world_size > 1:
            rows = [None] * world_size
            dist.all_gather_object(rows, row)
            for key in {key for one in rows for key in one} - {"iteration", "frames"}:
                values = [one[key] for one in rows if key in one]
                row[key] = sum(values) / len(values)
        weights = learner["optimizer"].param_groups[0]["params"]
        if not all(weight.isfinite().all() for weight in weights):
            raise FloatingPointError("A weight is infinite or NaN. The checkpoint is unchanged.")
        self.write(history, learner)
        self.write_log([row])

    def write(self, history, learner):
        """Write the checkpoint, then hyperparameters.json and metrics.csv."""
        state = {"config": record_of(self.cfg), "world_size": world_size}
        state |= {name: part.state_dict() for name, part in learner.items()}
        state["history"] = history
        save_whole(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))
        table = io.StringIO()
        columns = dict.fromkeys(key for row in history for key in row)
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        record = json.dumps({**state["config"], "world_size": world_size}, indent=2)
        for name, text in (("hyperparameters.json", record), ("metrics.csv", table.getvalue())):
            try:
                save_whole(self.folder / name, lambda file, text=text: file.write(text.encode()))
            except OSError as error:  # for example, if another program has locked the file
                print(f"{name} could not be written ({error})", file=sys.stderr)

    def write_log(self, rows):
        """Log rows of the history, each under its iteration number."""
        try:
            if self.log:
                for row in rows:
                    self.log.log_metrics(row, row["iteration"])
        except Exception as error:  # a logging failure must not stop the training
            print(f"The {self.cfg.logger} log could not be written ({error!r})", file=sys.stderr)

    def finish(self):
        """Release what only training needs."""
        sys.excepthook = sys.__excepthook__
        if world_size > 1:
            dist.destroy_process_group()

    def explain_interrupt(self, kind, error, trace):
        """After Ctrl-C, say how to resume. Show any other exception as usual."""
        if kind is not KeyboardInterrupt:
            sys.__excepthook__(kind, error, trace)
        elif rank == 0:
            print("\nStopped. To resume:", self.command, file=sys.stderr)


if __name__ != "__main__":
    raise ImportError("train_mappo.py cannot be imported. Run it, or copy its cells.")
try:  # is this a program with a command line of its own? A notebook cell has no __file__.
    is_program = sys.argv[0] == "-" or Path(sys.argv[0]).resolve() == Path(__file__).resolve()
except NameError:
    is_program = False
if dist.is_torchelastic_launched():  # by torchrun
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if rank > 0:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  process 0 speaks for all
if is_program:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # folder names may contain anything
    cfg = read_command_line(cfg)
else:
    check(cfg)
if world_size > 1:
    if cfg.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # the GPU that "cuda" stands for
    store, _, _ = next(dist.rendezvous("env://"))
    # After a restart, the store still has the addresses of the earlier processes.
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(store=store, rank=rank, world_size=world_size)
run = SavedRun(cfg, is_program)

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
# ever earned. As a result, each robot is rewarded mostly for progress, both its own and everybody
# else's.
#
# VMAS simulates `num_vmas_envs` copies of this task as one batch of tensors on `device`. If that is
# a GPU, the training data never leaves it.
#
# TorchRL components communicate through a TensorDict, a dictionary of tensors that share their
# leading dimensions, so that you can index and reshape all of them at once. It can be nested, and a
# tuple such as `("next", "done")` is a path in it. What each agent observes, does and earns is
# stored under `"agents"`, and everything that a step returns is stored under `"next"`.
#
# Running out of time is not the same as succeeding. After a *termination*, nothing more can be
# earned, so the value of what follows is 0. A *truncated* episode could have continued, so the
# critic's estimate of the rest still counts. `VmasEnv` would report both as terminations. Here, the
# `StepCounter` transform applies the time limit and keeps the two apart.


# %% id="make_env"
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


# %% id="environment"
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
# 2. `NormalParamExtractor` turns the network's outputs into a mean `loc` and a positive standard
#    deviation `scale`. `TensorDictModule` names the keys to read and to write.
# 3. `ProbabilisticActor` samples from a normal distribution, squashes the sample into the action
#    bounds with a tanh, and stores the action's log-probability, which PPO needs later.
#
# *Parameter sharing.* With `share_parameters_policy`, all agents use the same weights, and the
# network learns from every agent's experience. The cost is that agents with identical observations
# behave alike, so a task that needs specialists may need agent IDs or separate networks.
#
# *Initialization.* The weight matrices are orthogonal. In the policy's last layer, the weights are
# small, so at first the distribution of actions is the same no matter what a robot observes.
# Andrychowicz et al. (2021, arXiv:2006.05990) found this to be among the choices that matter most.


# %% id="initialization"
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


# %% id="policy"
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

# %% [markdown]
# ```
# means before the tanh in one environment, one row per robot:
#   -0.0017    0.0000
#    0.0003    0.0000
#    0.0024    0.0010
# ```
#
# *Question 3. How many weights and biases does the policy have? How many without sharing?*
#
# ---
# ## 4. Critic
# MAPPO and IPPO differ in what the critic of agent i receives:
#
# | | input | with three robots |
# |---|---|---|
# | IPPO | o_i | 18 numbers |
# | MAPPO | o_1, o_2, ..., o_n, concatenated (or a global state, if there is one) | 54 numbers |
#
# ### By hand
# The next cell is the whole forward pass in plain PyTorch. Sections 4, 6 and 7 each write a step
# out by hand, build it from TorchRL's parts, and compare the two. Nothing else depends on the
# hand-written versions, so you may leave them out.


# %% id="critic_by_hand"
def critic_by_hand(observation, layers, centralized):
    """Return the values V_i, of shape (..., n_agents, 1).

    `observation` has the shape (..., n_agents, n_obs). `layers` is a list of (weight, bias)
    pairs of shapes (outputs, inputs) and (outputs,), both with a leading n_agents if critics are
    not shared.
    """
    hidden = observation
    if centralized:  # concatenate the observations of all agents, and give the result to each
        n_agents = observation.shape[-2]
        hidden = observation.flatten(-2).unsqueeze(-2).expand(*observation.shape[:-2], n_agents, -1)
    for weight, bias in layers:
        hidden = (weight @ hidden.unsqueeze(-1)).squeeze(-1) + bias
        if weight is not layers[-1][0]:  # no tanh after the last layer
            hidden = hidden.tanh()
    return hidden


# %% [markdown]
# ### With TorchRL
# One argument, `centralized`, makes the difference. How many *different* values will the next cell
# print for three robots, with `mappo = True` and with `mappo = False`? Guess before you run it.

# %% id="critic"
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

# %% id="critic_check"
with torch.no_grad():
    observation = first_step["agents", "observation"]
    parameters = [*critic_network.parameters()]
    layers = [*zip(parameters[::2], parameters[1::2], strict=True)]  # (weight, bias) of each layer
    by_hand = critic_by_hand(observation, layers, centralized=cfg.mappo)
    torch.testing.assert_close(by_hand, critic_network(observation))

# %% [markdown]
# With `mappo = True` (MAPPO):
# ```
# values in one environment: -0.1283 -0.1283 -0.1283
# ```
#
# With `mappo = False` (IPPO):
# ```
# values in one environment: -0.0886 0.1146 -0.0525
# ```
#
# Under MAPPO, the agents share the network and its input, so they have *the same value*. Under
# IPPO, each robot has its own value, even though all robots share the network. *Independent* means
# that each agent's value comes from its own observations, as if the others were part of the world.
#
# ### What can each critic know?
# Give every agent a random number x_i such that any two of these numbers have correlation `rho`.
# The critic has to predict either the sum of all the numbers, which stands for a shared reward, or
# the agent's own number, which stands for an individual reward. The next cell measures two things:
#
# - the *explained variance*, which is 1 for a perfect prediction and 0 for a constant one
# - the *slope*, which is how much V_i changes per unit of x_i when the other numbers stay the same
#
# The true slope is 1 for both targets. Before you run the cell, write down which critics you expect
# to recover this slope, for each target and each rho (0 and 0.9).


# %% id="probe"
def probe(centralized, own_target, rho):
    """Fit a small shared critic to random numbers; return its explained variance and its slope."""
    torch.manual_seed(seed_for("probe"))
    sizes = {"n_agents": 3, "n_agent_inputs": 1, "n_agent_outputs": 1, "depth": 1, "num_cells": 32}
    small_critic = MultiAgentMLP(**sizes, centralized=centralized, share_params=True)
    adam = torch.optim.Adam(small_critic.parameters(), lr=1e-2)

    def draw(frames):  # any two of the numbers have correlation rho
        common, own = torch.randn(frames, 1, 1), torch.randn(frames, 3, 1)
        x = rho**0.5 * common + (1 - rho) ** 0.5 * own  # (frames, 3, 1)
        return x, x if own_target else x.sum(dim=1, keepdim=True).expand_as(x)

    for _ in range(200):
        x, target = draw(1024)
        adam.zero_grad()
        (target - small_critic(x)).square().mean().backward()
        adam.step()
    with torch.no_grad():
        x, target = draw(10_000)
        explained = 1 - (target - small_critic(x)).var() / target.var()
        raised = x.clone()
        raised[:, 0] += 0.1  # agent 0's number and nothing else
        slope = (small_critic(raised) - small_critic(x))[:, 0].mean() / 0.1
    return explained.item(), slope.item()


print(f"{'':<24}{'local critic (IPPO)':>24}{'centralized (MAPPO)':>24}")
print(f"{'target':<17}{'rho':>7}" + 2 * f"{'explained':>15}{'slope':>9}")
for own_target in (False, True):
    for rho in (0.0, 0.9):
        found = [*probe(False, own_target, rho), *probe(True, own_target, rho)]
        print(f"{'own number' if own_target else 'the sum':<17}{rho:>7}", end="")
        print("".join(f"{x:>{width}.2f}" for x, width in zip(found, (15, 9, 15, 9), strict=True)))

# %% [markdown]
# ```
#                              local critic (IPPO)     centralized (MAPPO)
# target               rho      explained    slope      explained    slope
# the sum              0.0           0.32     1.00           1.00     0.99
# the sum              0.9           0.93     2.78           1.00     0.99
# own number           0.0           1.00     1.00           0.33     0.33
# own number           0.9           1.00     1.00           0.93     0.34
# ```
#
# - *The sum, rho 0.* The local critic misses most of the variance, yet its slope is right, because
#   what it cannot see is only noise.
# - *The sum, rho 0.9.* Now the local critic predicts well, but its slope is nearly three. It has
#   learned that the others' numbers are large when x_i is large. When x_i alone changes, it expects
#   a change in the others that never comes.
# - *Own number.* A shared centralized critic gives all agents the same value, so the best it can do
#   is predict the average of their numbers, and its slope is a third of the true one.
#
# In theory, a local critic that predicts the sum for three agents has a slope of 1 + 2 rho, because
# it expects the other two numbers to rise by rho each. It explains (1 + 2 rho) / 3 of the variance.
# Remember this for Section 10: **the better a local critic predicts from correlation, the more it
# misleads an agent about that agent's own contribution.** The explained variance cannot warn you.
# At rho 0.9, a slope of nearly three and a slope of one third come with the same explained
# variance.
#
# This centralized critic sees no actions, so it can tell how well the team is doing, but not who is
# responsible. The critic of COMA (Foerster et al. 2018, arXiv:1705.08926) also sees the actions.
#
# *Question 4. How many inputs does the critic have with 8 agents, under MAPPO and under IPPO?*
#
# ---
# ## 5. Collecting data
# `Collector` steps the environment with the policy and returns batches of `batch_frames` frames.
# Each batch starts from a reset. The collector holds the same policy object that you optimize, so
# it always acts with the latest weights. The replay buffer holds a single batch and splits it into
# minibatches, *without replacement*, so that every frame is used exactly once per epoch.

# %% id="collector"
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

# %% [markdown]
# ```
# batch: (60, 100)
# rewards for three steps, one column per robot:
#   -0.0055   -0.0055   -0.0055
#   -0.0174   -0.0174   -0.0174
#   -0.0013   -0.0013   -0.0013
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
# The first episode ends in success, and the environment is reset. The second episode is cut off by
# the end of the batch, and is treated like one that ran out of time.
#
# ---
# ## 6. Advantages
# *Generalized advantage estimation* (Schulman et al. 2016, arXiv:1506.02438) adds up the critic's
# prediction errors from the step of an action onward, with weights that shrink by a factor of gamma
# lmbda at each step. The larger `lmbda` is, the more the collected rewards count and the less the
# critic's values count, which lowers the bias and raises the variance.
#
#     delta_i(t) = r_i(t) + gamma (1 - terminated(t)) V_i'(t) - V_i(t)
#     A_i(t)     = delta_i(t) + gamma lmbda (1 - done(t)) A_i(t+1)
#     target     = A_i(t) + V_i(t)
#
# V_i' is computed from the stored next observation, because the next step of the batch may already
# belong to another episode. `done` stops the sum, but only `terminated` sets the next value to 0.
#
# ### By hand
# Every agent uses the same flags.


# %% id="gae_by_hand"
def gae_by_hand(reward, value, next_value, done, terminated, gamma, lmbda):
    """Return advantages and value targets, both of shape (environments, steps, n_agents, 1).

    `reward`, `value` and `next_value` have that shape, too. The flags `done` and `terminated` have
    the shape (environments, steps, 1).
    """
    done, terminated = done.float().unsqueeze(-2), terminated.float().unsqueeze(-2)
    delta = reward + gamma * (1 - terminated) * next_value - value
    advantage = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])  # the next step's advantage
    for step in reversed(range(delta.shape[1])):
        following = delta[:, step] + gamma * lmbda * (1 - done[:, step]) * following
        advantage[:, step] = following
    return advantage, advantage + value


# %% [markdown]
# ### With TorchRL
# `MultiAgentGAE` does all of this, and also calls the critic.

# %% id="gae"
estimate_advantages = MultiAgentGAE(
    gamma=cfg.gamma, lmbda=cfg.lmbda, value_network=critic, device=cfg.device
)
estimate_advantages.set_keys(reward=("agents", "reward"), value=("agents", "state_value"))

# %% [markdown]
# An untrained policy hardly ever succeeds. To cover all cases, the check pretends that the episode
# in the first environment succeeded halfway through, and that the one in the last environment ran
# out of time.

# %% id="gae_check"
checked = first_batch.clone()
checked["next", "terminated"][0, cfg.max_steps // 2] = True
checked["next", "truncated"][-1, cfg.max_steps // 3] = True
checked["next", "done"] = checked["next", "terminated"] | checked["next", "truncated"]
estimate_advantages(checked)  # adds "advantage" and "value_target"
with torch.no_grad():
    advantage, target = gae_by_hand(
        checked["next", "agents", "reward"],
        critic_network(checked["agents", "observation"]),
        critic_network(checked["next", "agents", "observation"]),
        checked["next", "done"],
        checked["next", "terminated"],
        cfg.gamma,
        cfg.lmbda,
    )
torch.testing.assert_close(checked["advantage"], advantage, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(checked["value_target"], target, rtol=1e-4, atol=1e-5)
print("advantages of the first frame:", *(f"{x:.4f}" for x in advantage[0, 0, :, 0].tolist()))

# %% [markdown]
# MAPPO:
# ```
# advantages of the first frame: 0.0150 0.0150 0.0150
# ```
#
# IPPO:
# ```
# advantages of the first frame: 0.0244 0.0182 0.0234
# ```
#
# Under MAPPO, all robots have the same value and nearly the same reward, so their advantages are
# nearly the same, too. How does a robot learn what *it* did right? By averaging over many frames.
# Its own good actions raise the shared advantage, while the others' actions raise or lower it
# mostly regardless of what this robot does.
#
# *The critic plays two roles.* V_i is the *baseline*, and V_i' is the *bootstrap value*. An error
# in the baseline shifts the advantages of all actions in that step equally, so it averages out in
# expectation. An error in the bootstrap value may depend on where the action led, so it does not
# average out, and the policy learns from it.
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
# *Several agents.* Each agent's ratio is clipped separately, even though all policies change at
# once. The product of the ratios, which is the team's joint ratio, tends to stray further from 1 in
# large teams, which argues for a smaller clip_epsilon there (Sun et al. 2022, arXiv:2202.00082).
#
# *Normalization.* Advantages are normalized to zero mean and unit standard deviation over the
# minibatch, for each agent separately, so that an agent with larger advantages does not drown out
# the others.
#
# *Value and entropy.* The other two terms are the smooth L1 distance between V_i and its target,
# and the entropy bonus (Williams and Peng 1991), which keeps the policy from settling too early.
#
# ### By hand
# The entropy of a squashed normal distribution has no closed form, so it is estimated from a single
# sample for each action.


# %% id="loss_by_hand"
def entropy_by_hand(pi):
    """Estimate the mean entropy of a distribution from one sample for each action."""
    return -pi.log_prob(pi.rsample()).mean()


def loss_by_hand(pi, value, data, cfg):
    """Return the three weighted terms of the loss for a minibatch.

    `pi` is the current distribution of each agent's action, and `value` the critic's current
    prediction, of shape (minibatch_frames, n_agents, 1). `data` is the minibatch, with its
    advantages and value targets.
    """
    log_ratio = pi.log_prob(data["agents", "action"]) - data["agents", "action_log_prob"]
    ratio = log_ratio.exp().unsqueeze(-1)  # (minibatch_frames, n_agents, 1)
    clipped_ratio = ratio.clamp(1 - cfg.clip_epsilon, 1 + cfg.clip_epsilon)
    advantage = data["advantage"]
    if cfg.normalize_advantage:
        std = advantage.std(0).clamp_min(1e-6)  # (n_agents, 1)
        advantage = (advantage - advantage.mean(0)) / std
    objective = torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()
    error = (value - data["value_target"]).abs()
    value_loss = torch.where(error < 1, error**2 / 2, error - 0.5).mean()  # smooth L1
    return {
        "loss_objective": -objective,
        "loss_critic": cfg.critic_coeff * value_loss,
        "loss_entropy": -cfg.entropy_eps * entropy_by_hand(pi),
    }


# %% [markdown]
# ### With TorchRL
# `ClipPPOLoss` calls the policy and the critic and returns the three terms, already weighted. The
# agent dimension, dimension -2, is excluded from the averaging when advantages are normalized.

# %% id="loss"
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
optimizer = torch.optim.Adam(loss_module.parameters(), lr=cfg.lr, fused=True)

# %% [markdown]
# Before the first update, every ratio is 1, so a mistake could go unnoticed. To expose it, the
# check shifts the stored log-probabilities and one agent's advantages by random amounts.

# %% id="loss_check"
torch.manual_seed(seed_for("shift"))
frames = first_batch.clone()
estimate_advantages(frames)
frames = frames.reshape(-1)[:minibatch_frames]
noise = torch.randn(minibatch_frames, n_agents, device=cfg.device)
frames["agents", "action_log_prob"] += 0.3 * noise
frames["advantage"][:, 0] += noise[:, :1]
torch.manual_seed(seed_for("entropy"))
by_library = loss_module(frames.clone())
torch.manual_seed(seed_for("entropy"))
value = critic_network(frames["agents", "observation"])
for term, by_hand in loss_by_hand(policy.get_dist(frames), value, frames, cfg).items():
    torch.testing.assert_close(by_library[term], by_hand, rtol=1e-4, atol=1e-5)
    print(f"{term:<15}{by_hand.item():>9.5f}")

# %% [markdown]
# MAPPO:
# ```
# loss_objective   0.13758
# loss_critic      0.00154
# loss_entropy    -0.00013
# ```
#
# TorchRL's `MAPPOLoss` and `IPPOLoss` compute the same loss with multi-agent defaults, and can also
# normalize the values.
#
# ---
# ## 8. Training loop
# Each iteration does this:
#
# 1. collect a batch with the current policy
# 2. estimate the advantages once, with the critic as it is now
# 3. for `num_epochs` epochs, take a gradient step on each minibatch
# 4. measure what happened, and test the policy from time to time
# 5. throw the batch away
#
# The next two cells name the run's folder, start its history and define the metrics, which cover
# only the first episode in each environment, because later ones have less time left in the batch.
# Actions are sampled in training, whereas in a test, the policy acts deterministically and plays
# the same episodes each time. The best policy so far is kept, where *best* means the highest
# success rate in navigation and the highest reward in other scenarios.

# %% id="setup"
algorithm = "MAPPO" if cfg.mappo else "IPPO"
scenario = getattr(cfg.scenario_name, "__name__", cfg.scenario_name)
run_name = f"{algorithm.lower()}-{scenario}-seed{cfg.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
folder = Path(os.path.expanduser(cfg.run_folder or f"runs/{run_name}"))
history = []  # a dictionary of metrics for each iteration
best_policy = copy.deepcopy(policy)
learner = {"policy": policy, "critic": critic, "optimizer": optimizer, "best_policy": best_policy}

# %% id="measures"
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


# %% id="loop"
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

# %% [markdown]
# ### Read the metrics
# `history` has one row per iteration. The engineering cell also writes these rows to `metrics.csv`.
# The table shows the first and last rows of default MAPPO runs, as ranges over ten seeds.
#
# | metric | meaning | first | last |
# |---|---|---|---|
# | `episode_reward` | team progress minus contacts per robot | -0.87 to -0.25 | 2.79 to 3.10 |
# | `success_rate` | fraction of successful episodes | 0.00 | 0.58 to 0.80 |
# | `collisions` | steps in contact, per robot per episode | 0.17 to 0.81 | 0.00 to 0.10 |
# | `loss_critic` | weighted value loss | 0.0043 to 0.0174 | 0.0011 to 0.0026 |
# | `entropy` | randomness of the actions | 1.33 | 0.90 to 0.97 |
# | `kl_approx` | mean distance from the old policy | 0.008 to 0.014 | 0.006 to 0.009 |
# | `clip_fraction` | fraction of ratios outside the clipping range | 0.11 to 0.16 | 0.07 to 0.08 |
# | `explained_variance` | how well the critic predicts its targets | 0.17 to 0.66 | 0.89 to 0.93 |
# | `advantage_std` | standard deviation of the advantages | 0.16 to 0.36 | 0.13 to 0.17 |
#
# Metrics whose names begin with `test_` come from the tests. If your numbers look different, here
# is what to check:
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
# negative. The explained variance flatters the critic and means little for an untrained one,
# because the targets contain the critic's own estimates. Under `torchrun`, each process measures
# its own share of the batch, and the metrics are averages over the processes.
#
# *Question 6. What would an off-policy method do with the replay buffer that PPO must not do?*
#
# ---
# ## 9. Evaluation
# Here the untrained and trained policies play the test episodes. If the best policy tested during
# training did better than the last one, its results are shown as well.

# %% id="evaluation"
evaluation = {"untrained": evaluate(untrained_policy), "trained": evaluate(policy)}
evaluation_of_best, score = evaluate(best_policy), best_key.removeprefix("test_")
if evaluation_of_best[score] > evaluation["trained"][score]:
    evaluation["best"] = evaluation_of_best
title = f"{cfg.evaluation_episodes} episodes, deterministic policy"
print(f"\n{title:<35}" + "".join(f"{name:>12}" for name in evaluation))
for key in evaluation["trained"]:
    print(f"{key:<35}" + "".join(f"{column[key]:>12.3f}" for column in evaluation.values()))

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
# If a best policy is listed, it was chosen for its results on these same episodes, so expect it to
# do slightly worse on others.
#
# *Question 7. Why is the success rate higher here than in the last iteration of training?*
#
# ---
# ## 10. Why one algorithm unlearns the task
# Check your guess by running both commands below or, in a notebook, by changing `mappo` and
# `n_iters`.
#
# ```
# python train_mappo.py --n-iters 15
# python train_mappo.py --no-mappo --n-iters 15
# ```
#
# One seed proves little, so the tables in this section show averages over ten seeds. The first
# gives the success rates in test episodes.
#
# | after | 5 iterations | 10 | 15 | 20 |
# |---|---|---|---|---|
# | MAPPO | 0.34 | 0.95 | 0.99 | 0.99 |
# | IPPO | 0.21 | 0.90 | 0.04 | 0.00 |
#
# IPPO learns the task and then unlearns it. Its training reward falls as well, so it has not found
# anything better. Something is teaching it to get worse.
#
# ### What a wrong value costs
# An error in V_i' enters the advantage. Suppose that robot 1 moves, and that from then on, its
# value is 1 too high. Each delta (Section 6) that contains this value changes, and the advantage of
# the move adds up the changes:
#
# | delta of | changes by | weight in A_1 | adds to A_1 |
# |---|---|---|---|
# | the move | gamma = 0.99 | 1 | 0.990 |
# | the next step | gamma - 1 = -0.01 | gamma lmbda = 0.891 | -0.009 |
# | the one after that | gamma - 1 = -0.01 | (gamma lmbda)^2 = 0.794 | -0.008 |
# | all steps | | | c = 0.91 |
#
# In the delta of the move, only V_1' is wrong. In later deltas, V_1' and V_1 are both wrong and
# nearly cancel. The sum is c = gamma (1 - lmbda) / (1 - gamma lmbda), so **the advantage inherits
# nine tenths of a lasting error**. It inherits less if the episode succeeds soon afterward, and
# more if the episode is cut off. The same formula applies to any lasting change in value, right or
# wrong.
#
# ### Look at what your critic teaches
# Leave the other robots where they are, and put robot 1 at each point of a grid, at rest. When it
# moves a little, it is rewarded for its progress, and its value V_1 changes permanently, so the
# advantage favors the direction in which progress plus c V_1 grows fastest. The next cell draws
# this direction, with thin green arrows where it leads toward the goal and thick red ones where it
# leads away. Many of these situations are rare in training, so the map is a rough sketch.
#
# Where do you expect red arrows, if any?


# %% id="arrow_map"
import builtins

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Circle


def show(name, write):
    """Save a picture in the run's folder and, in a notebook, display it below the cell."""
    save_whole(folder / name, write)
    if hasattr(builtins, "__IPYTHON__"):
        from IPython.display import Image, display

        display(Image(str(folder / name), format="png"))  # "png" makes Jupyter show GIFs, too


def arrow_map(robot=0, points=24):
    """Find the direction in which the advantage pushes a robot, for each point of a grid.

    Return a batch of points**2 environments, which differ only in the robot's position, and three
    tensors of shape (points**2, 2): places, directions and vectors from the goal to the robot.
    """
    scene = make_env(points**2, cfg.evaluation_seed)
    scene.reset()
    for agent in scene.agents:  # make all environments like the first
        agent.set_pos(agent.state.pos[0], batch_index=None)
        agent.goal.set_pos(agent.goal.state.pos[0], batch_index=None)
    line = torch.linspace(-1.2, 1.2, points, device=cfg.device)
    places = torch.cartesian_prod(line, line)
    scene.agents[robot].set_pos(places, batch_index=None)
    observation = torch.stack([scene.scenario.observation(agent) for agent in scene.agents], dim=1)
    with torch.no_grad():
        value = critic_network(observation)[:, robot, 0]
    from_goal = places - scene.agents[robot].goal.state.pos
    worth = (c * value - from_goal.norm(dim=-1)).view(points, points)
    directions = torch.stack(torch.gradient(worth, spacing=(line, line)), dim=-1).view(-1, 2)
    return scene, places, directions, from_goal


def draw_arrow_map(robot=0):
    """Return a figure of a robot's arrow map, and the fraction of arrows that point away."""
    scene, places, directions, from_goal = arrow_map(robot)
    away = (directions * from_goal).sum(-1) > 0
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    axes = figure.subplots()
    for chosen, color, width in ((~away, "tab:green", 0.004), (away, "tab:red", 0.008)):
        arrows = nn.functional.normalize(directions[chosen], dim=-1)
        axes.quiver(*places[chosen].T.cpu(), *arrows.T.cpu(), color=color, width=width, scale=30)
    for index, agent in enumerate(scene.agents):  # this robot's goal, and the other robots
        entity, name = (agent.goal, "goal") if index == robot else (agent, f"robot {index + 1}")
        center = entity.state.pos[0].tolist()
        axes.add_patch(Circle(center, 0.1, color=f"C{index}", alpha=0.6))
        axes.annotate(name, center, ha="center", va="center", weight="bold")
    axes.set(aspect="equal", title=f"{stage}: where robot {robot + 1} is pushed")
    return figure, away.float().mean().item()


gamma_lmbda = cfg.gamma * cfg.lmbda
c = cfg.gamma * (1 - cfg.lmbda) / (1 - gamma_lmbda) if gamma_lmbda < 1 else 0.0
stage = f"{algorithm}, {len(history)} iterations"
sees_own_goal = navigation and not cfg.scenario_options.get("observe_all_goals")
if sees_own_goal:
    with matplotlib.rc_context({"text.usetex": False}):
        figure, away = draw_arrow_map()
        show("arrows.png", figure.savefig)
    print(f"{stage}: {away:.0%} of the arrows point away from the goal")

# %% [markdown]
# With seed 0:
# ```
# MAPPO, 10 iterations: 2% of the arrows point away from the goal
# MAPPO, 15 iterations: 3% of the arrows point away from the goal
# IPPO, 10 iterations: 25% of the arrows point away from the goal
# IPPO, 15 iterations: 52% of the arrows point away from the goal
# ```
#
# Under IPPO, red arrows surround the goal. On this map, its critic has turned the goal into a place
# to avoid.
#
# ### Progress looks like a loss
# All robots drive to their goals at the same time, and a local critic sees nothing beyond its own
# robot and those nearby. When that robot is near its goal, the others usually are too, and there is
# little left for *anybody* to earn. The robots' distances to their goals are correlated, just like
# the numbers in Section 4. So a low value near the goal is a good prediction, but it is the wrong
# standard for one robot's move, because the others get no closer when that robot moves.
#
# Take an extreme case. Suppose that so far, the three robots have nearly always been equally far
# from their goals. At a distance d, the team has 3d left to earn, ignoring discounting, so a local
# critic has learned V_i = 3d, while a centralized critic has seen enough exceptions to learn the
# sum of the three distances. Now robot 1 moves one unit closer to its goal while the others wait.
# Its reward is shared. Compared with the case in which all three wait, each advantage changes by
# the reward plus c times the change in value:
#
# ```
#                               reward    change in value     advantage
#     centralized critic          +1            -1         1 - 0.91 =  0.09
#     local critic, robot 1       +1            -3         1 - 2.72 = -1.72
#     local critic, the others    +1             0                     1.00
# ```
#
# The centralized critic's value drops by what has just been earned. The local critic lowers robot
# 1's value by *more than that*, as if all three had moved. The difference is the same whatever the
# others do, because their part of the reward does not depend on robot 1's choice. So while the
# others drive, waiting looks better for robot 1.
#
# The *slope* s is how much V_i drops per unit of progress when only robot i moves. Here, it is 1 or
# 3. It is the slope of Section 4, with the distance as x_i. A unit of progress changes the
# advantage by 1 - c s, so **progress looks like a loss if the slope is above 1 / c = 1.1**. If the
# slope grows toward the goal, as it does for an exact critic, the threshold is 1 / gamma = 1.01.
# The true slope is below 1 because of discounting, so with an exact critic, progress never looks
# like a loss.
#
# The next cell measures the slope of your critic on a new batch, by moving one robot in the
# critic's input. Its velocity and lidar readings stay as they were.


# %% id="slope"
def value_slope(step=0.05):
    """Return how much V_i drops per unit of distance when only robot i moves closer to its goal.

    This is the mean over one new batch, for robots that are more than 0.1 away.
    """
    env.set_seed(seed_for("slope"))
    torch.manual_seed(seed_for("slope"))
    seen = collector.next()["agents", "observation"]  # (num_envs, max_steps, n_agents, n_obs)
    drops = []
    for robot in range(n_agents):
        from_goal = seen[..., robot, 4:6]  # its position minus its goal
        distance = from_goal.norm(dim=-1, keepdim=True)
        closer = seen.clone()
        closer[..., robot, 0:2] -= step * from_goal / distance  # its position
        closer[..., robot, 4:6] -= step * from_goal / distance
        with torch.no_grad():
            drop = (critic_network(seen) - critic_network(closer))[..., robot, 0]
        drops.append(drop[distance.squeeze(-1) > 0.1])
    return torch.cat(drops).mean().item() / step


if sees_own_goal:
    slope = value_slope()
    print(f"{stage}: the value has slope s = {slope:.2f}")
    print(f"advantage of a unit of progress: 1 - {c:.2f} s = {1 - c * slope:.2f}")

# %% [markdown]
# MAPPO:
# ```
# MAPPO, 10 iterations: the value has slope s = 0.37
# advantage of a unit of progress: 1 - 0.91 s = 0.67
# ```
#
# IPPO:
# ```
# IPPO, 10 iterations: the value has slope s = 1.03
# advantage of a unit of progress: 1 - 0.91 s = 0.06
# ```
#
# The table compares the slopes from Section 4 with those of trained critics. The last two columns
# were also measured after 15 iterations. In the first row, rho is 0.4, the correlation of the
# robots' distances to their goals in IPPO's tenth batch.
#
# | critic | reward | Section 4 | s after 10 iterations | after 15 | 1 - c s | success |
# |---|---|---|---|---|---|---|
# | local | shared | 1 + 2 rho = 1.8 | 0.88 | 1.54 | -0.40 | 0.04 |
# | local | individual | 1 | 0.45 | 0.65 | 0.41 | 1.00 |
# | centralized | shared | 1 | 0.35 | 0.60 | 0.45 | 0.99 |
# | centralized | individual | 1/3 | 0.12 | 0.20 | 0.82 | 0.99 |
#
# A new critic is nearly flat, so at first the reward dominates the advantage, and both algorithms
# learn. Then all slopes grow. They are ordered as in Section 4, but smaller, probably because of
# discounting, failed episodes, and critics that are still learning. Only in the first row does the
# slope pass 1.1. With every seed, it does so after 11 or 12 iterations, and within two more, IPPO's
# success rate in tests has fallen to less than half of its best. All the while, the explained
# variance rises, from 0.84 after 10 iterations to 0.95 after 15.
#
# Not everything fits. The local critic's slope is 2.5 times the centralized one's, not 1.8 times.
# The success rate begins to fall shortly before the mean slope passes 1.1. Much later, the reward
# recovers for a while, but the success rate does not. We do not know why.
#
# ### Baseline or bootstrap value?
# Section 6 says that an error in the baseline averages out, while one in the bootstrap value does
# not. To test this, train both critics at once on the same targets. One of them provides all the
# values in the targets, and the other serves as the baseline, so the advantage is the target minus
# the baseline critic's value.
#
# | targets from | baseline from | slope after 15 iterations | success after 10 | after 15 |
# |---|---|---|---|---|
# | local critic | local critic (IPPO) | 1.54 | 0.90 | 0.04 |
# | local critic | centralized critic | 1.34 | 0.73 | 0.24 |
# | centralized critic | local critic | 0.48 | 0.77 | 0.85 |
# | centralized critic | centralized critic (MAPPO) | 0.60 | 0.95 | 0.99 |
#
# The slope is that of the critic that provides the targets. With two different critics, learning is
# slower, but the policy unlearns the task only where the bootstrap value comes from a local critic.
#
# ### What theory says
# The observation o_i' is not a Markov state, because how much the team will still earn depends on
# where the others are. Together, o_i, a_i and o_i' tell you more about that than o_i' alone, since
# a robot's own move does not move the others. But V_i' is computed from o_i' alone, so
# bootstrapping from it is biased. This does not contradict Lyu et al. (2021, arXiv:2102.04402), who
# prove that the two kinds of critic give the same gradient in expectation, because they assume
# action-value critics that have converged, and a local critic that sees its agent's whole
# *history*, including the step just taken. They also prove that a centralized critic does not lower
# the variance.
#
# ### When does a centralized critic pay off?
# On this account, a local critic misleads the policy only where all four of these conditions hold:
#
# 1. What the critic cannot see makes up much of the return.
# 2. It is positively *correlated* with what the critic sees.
# 3. It lies within the horizon, which is about 1 / (1 - gamma) steps.
# 4. The advantages rely on bootstrapping, so c is not small.
#
# A centralized critic removes the first condition. If you weaken any of them enough in another way,
# progress should no longer look like a loss. The table shows slopes and success rates after 15
# iterations, with empty cells where nothing was measured. The code for each change is in the folder
# `study` or `cookbook`.
#
# | change | weakens | IPPO's slope | IPPO's success | MAPPO's |
# |---|---|---|---|---|
# | none | | 1.54 | 0.04 | 0.99 |
# | the critic also sees the sum of the others' distances | 1 | 0.63 | 0.99 | |
# | individual rewards | 1 | 0.65 | 1.00 | 0.99 |
# | gamma = 0.9, with c = 0.47 | 3 and 4 | 0.35 | 1.00 | 0.99 |
# | gamma = 0.9 and lmbda = 0, with c = 0.90 | 3 | 0.14 | 0.86 | 1.00 |
# | lmbda = 0.99, with c = 0.50 | 4 | 1.05 | 0.14 | 0.74 |
# | value normalization | nothing | 1.50 | 0.08 | |
# | all goals equally far away | nothing (it strengthens 2) | 1.79 | 0.01 | 0.90 |
# | a smaller arena without collisions | nothing | 1.49 | 0.00 | 1.00 |
# | the same arena, but only one robot drives at a time | 2, and 3 somewhat | 0.57 | 1.00 | 1.00 |
#
# The last two rows are the closest pair. The reward, gamma and the rule for ending an episode are
# the same in both, but when the robots take turns in random order, rho after ten iterations is 0.08
# instead of 0.52. The others' rewards also come later, which lowers every slope. Just as this
# explanation predicts, IPPO then does not unlearn the task, and its slope is no larger than
# MAPPO's.
#
# Two predictions failed. With gamma = 0.9 and lmbda = 0, the slope stays small and nothing
# collapses, but IPPO does worse in tests after 20 iterations than after 15, while MAPPO nearly
# always succeeds. With lmbda = 0.99, the mean slope stays below 1 / c, which is 2.0 in long
# episodes but lower where the batch ends soon, and yet IPPO hardly ever succeeds, while MAPPO
# learns the task, only more slowly. So a local critic does some harm that 1 - c s does not capture.
#
# Could this just be a bug in this file? TorchRL's own tutorial stops after 5 iterations. If you let
# it run longer, its IPPO unlearns the task as well, although the tutorial differs from this file in
# initialization, normalization, the weight of the value loss and more. This is its training reward:
#
# | TorchRL's tutorial after | 5 iterations | 12 | 25 |
# |---|---|---|---|
# | MAPPO | 1.74 | 2.90 | 3.02 |
# | IPPO | 1.70 | 2.86 | 1.65 |
#
# All this rests on one task and its variants. The IPPO and MAPPO papers find IPPO competitive on
# many others.
#
# ---
# ## 11. Files and pictures
# A run leaves its policies, its evaluation, its learning curves and a video of one test episode in
# its folder. These cells have nothing to do with the method.

# %% id="files"
saved_policy = {"network": policy_options, **action_bounds}
best = best_policy if "best" in evaluation else policy
for name, actor in {"policy.pt": policy, "best_policy.pt": best}.items():
    saved_policy["state_dict"] = actor[0].module[0].state_dict()
    save_whole(folder / name, lambda file: torch.save(saved_policy, file))
text = json.dumps({"iterations": len(history), **evaluation}, indent=2)
save_whole(folder / "evaluation.json", lambda file: file.write(text.encode()))
print(f"The results are in {folder}")

# %% id="curves"
import csv


def comparable_runs():
    """Return {folder: (algorithm, rows)} for this run and for comparable runs next to it.

    A run is comparable if it differs only in the algorithm, the seed and settings that do not
    affect learning.
    """
    mine, runs = folder.resolve(), {}
    differ = {"mappo", "seed", *BOOKKEEPING} - ({"n_iters"} if cfg.anneal_lr else set())
    own = {**asdict(cfg), "world_size": world_size}  # as JSON, like the settings of other runs:
    own = json.loads(json.dumps(own, default=lambda x: getattr(x, "__name__", str(x))))
    for path in sorted(mine.parent.glob("*/hyperparameters.json")):
        try:
            settings = json.loads(path.read_text("utf-8"))
            with open(path.with_name("metrics.csv"), newline="", encoding="utf-8") as table:
                rows = [{k: float(x) for k, x in row.items() if x} for row in csv.DictReader(table)]
            like = all(settings[name] == own[name] for name in own.keys() - differ)
            if like and rows and path.parent.resolve() != mine:
                runs[path.parent.resolve()] = ("MAPPO" if settings["mappo"] else "IPPO", rows)
        except (OSError, ValueError, KeyError) as error:
            print(f"{path.parent} was left out of the learning curves ({type(error).__name__})")
    return {**runs, mine: (algorithm, history)}


def draw_learning_curves(runs):
    """Plot the reward and the success rate of each run against the number of frames."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, keys in zip(panels, [("episode_reward",), (success_key, test_key)], strict=True):
        for place, (label, rows) in runs.items():
            color, dashes = {"MAPPO": ("tab:blue", "-"), "IPPO": ("tab:orange", "--")}[label]
            width = 3 if place == folder.resolve() else 1
            for key, style in zip(keys, ("." + dashes, "o"), strict=False):
                points = [(row["frames"], row[key]) for row in rows if key in row]
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.plot(x, y, style, color=color, linewidth=width, label=label)
        axes.set(title=keys[0].replace("_", " "), xlabel="frames")
    panels[1].set(ylim=(-0.05, 1.05), ylabel="lines: training, circles: tests")
    labels = {line.get_label(): line for line in panels[0].get_lines()}
    panels[0].legend(labels.values(), labels.keys(), title="thick: this run")
    return figure


with matplotlib.rc_context({"text.usetex": False}):
    show("learning_curves.png", draw_learning_curves(comparable_runs()).savefig)

# %% id="video"
from PIL import Image


def film(policy):
    """Return the pictures of one test episode, played with the deterministic policy."""
    scene, images = make_env(1, cfg.evaluation_seed), []
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        data = scene.reset()
        while not images or not data["done"].any():
            images.append(Image.fromarray(scene.render("rgb_array")).reduce(2))
            data = scene.step_mdp(scene.step(policy(data)))
    images.append(Image.fromarray(scene.render("rgb_array")).reduce(2))
    scene.close()
    return images


try:
    images = film(policy)
except Exception as error:  # VMAS's renderer can raise many kinds of exceptions
    print(
        f"No rollout.gif was made, because VMAS raised {type(error).__name__}: {error}. "
        "If OpenGL is missing: apt-get install libgl1 libegl1 libglu1-mesa libgl1-mesa-dri"
    )
else:
    gif = {"format": "GIF", "save_all": True, "append_images": images[1:], "duration": 60}
    show("rollout.gif", lambda file: images[0].save(file, **gif, loop=0))

# %% [markdown]
# ---
# ## Answers
# 1. `6000 / 400 * 30 = 450`. An epoch has 15 minibatches, and there are 30 epochs.
# 2. The target of the last step would be that step's reward alone. The critic could not see this
#    coming, because the observations do not include the time step. So it would undervalue states in
#    which episodes often run out of time.
# 3. `18*256 + 256 + 256*256 + 256 + 256*4 + 4 = 71684`, and three times as many without sharing.
# 4. `8 * 18 = 144` under MAPPO, and 18 under IPPO, for any team size.
# 5. One. The advantage is then r_i + gamma V_i' - V_i.
# 6. It would keep old frames and learn from them again. PPO must not, because its ratio corrects
#    for the change in the probabilities of actions, but not for the change in the states visited,
#    and its advantages belong to the old policy.
# 7. Two likely reasons are that actions are sampled during training, so robots jitter around their
#    goals, and that the last batch was collected before the last update.
