"""What the recipes cost, and what limits the speed of train_mappo.py. Prints a table.

    python study/benchmark.py            some ten minutes on two cores
    python study/benchmark.py --quick    two minutes: fewer turns, and no 6000 environments
    python study/benchmark.py --record   replace the rows of speed.csv, too
    python study/benchmark.py --tutorial path/to/multiagent_ppo.py    compare with TorchRL's, too

Whole trainings run in processes of their own. Everything else is measured in this process, with the
objects that a short run of train_mappo.py leaves. Things that are compared take turns, so that a
change of the machine's speed meets all of them.
"""

import argparse
import contextlib
import io
import math
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import torchrl_tutorial
from study import RECIPES, SCRIPT, train, with_variant, write_whole
from tables import SPEED, speed


def take_turns(part, unit, works, turns):
    """Let works take turns; return a row of speed.csv for each turn of each.

    `works` are {name: (amount, function)}. A function does `amount` units of work, and returns how
    many seconds they took.
    """
    rows = []
    for turn in tqdm(range(turns), desc=part):
        for name, (amount, work) in works.items():
            row = {"part": part, "unit": unit, "name": name, "turn": turn, "amount": amount}
            rows.append(row | {"seconds": round(work(), 4)})
    return rows


def timed(work):
    """Return a function that does `work` and returns its seconds; do it once, uncounted."""

    def measure():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    work()
    return measure


def run_script(*options):
    """Run train_mappo.py up to its training loop in this process, silently; return its names.

    Raises a RuntimeError with what it says if it refuses the options.
    """
    argv, hook, said = sys.argv, sys.excepthook, io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, SCRIPT.name)
        script.write_text(with_variant(SCRIPT.read_text("utf-8"), ""), "utf-8")
        sys.argv = [str(script), "--device", "cpu", "--run-folder", f"{folder}/run", *options]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                return runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            raise RuntimeError(said.getvalue()) from end
        finally:
            sys.argv, sys.excepthook = argv, hook


def short_run(num_vmas_envs):
    """Run one iteration with one epoch; return the names of train_mappo.py."""
    frames = ["--frames-per-batch", str(100 * num_vmas_envs)]
    return run_script(*frames, "--n-iters=1", "--num-epochs=1", "--evaluation-episodes=1")


# ------------------------------------------------------------------------------ whole trainings


def seconds_of_training(options, algorithm="MAPPO"):
    """Return a function that trains once and returns the seconds of all its iterations."""

    def measure():
        rows = train("benchmark", options, "", algorithm, "0", threads=torch.get_num_threads())
        return rows["seconds"].astype(float).sum()

    return measure


def seconds_of_tutorial(path, iterations):
    """Return a function that runs TorchRL's tutorial and returns the seconds of its iterations."""
    source = torchrl_tutorial.patched(Path(path).read_text("utf-8"), "MAPPO", 0, iterations)
    source += "print('SECONDS', pbar.last_print_t - pbar.start_t)\n"

    def measure():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "multiagent_ppo.py").write_text(source, "utf-8")
            environment = os.environ | {"MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
            said = subprocess.run(
                [sys.executable, "multiagent_ppo.py"],
                cwd=folder,
                env=environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )
        return float(said.stdout.split()[-1])

    return measure


def benchmark_trainings(turns, algorithms):
    """Return rows of whole trainings by the recipes, and of three iterations with the defaults."""
    works = {"an iteration with the defaults": (3, seconds_of_training("--n-iters 3"))}
    for algorithm in algorithms:
        for name, options in RECIPES.items():
            works[f"{name}, {algorithm}"] = (1, seconds_of_training(options, algorithm))
    return take_turns("training", "training", works, turns)


def benchmark_tutorial(path, turns):
    """Return rows of iterations of TorchRL's tutorial and of train_mappo.py."""
    works = {
        "TorchRL's tutorial": (3, seconds_of_tutorial(path, 3)),
        "train_mappo.py": (3, seconds_of_training("--n-iters 3")),
    }
    return take_turns("iteration", "iteration", works, turns)


# ----------------------------------------------------------------------------------- the update


class BareUpdate:
    """MAPPO's update of the same weights on the same frames, in PyTorch alone.

    It stands for what could be had without TensorDict and TorchRL's loss. `names` are those of
    train_mappo.py.
    """

    def __init__(self, names):
        frames = names["batch"].reshape(-1)  # (frames_per_batch,)
        keys = [("agents", "observation"), ("agents", "action"), ("agents", "action_log_prob")]
        self.tensors = [frames[key].clone() for key in [*keys, "advantage", "value_target"]]
        self.names, self.cfg = names, names["cfg"]
        self.policy, self.critic = self.copy(names["policy"]), self.copy(names["critic"])
        self.parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=names["cfg"].lr, fused=True)

    @staticmethod
    def copy(network):
        """Return the weights of a network as a plain stack of linear layers and tanh."""
        layers, parameters = [], list(network.parameters())
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            layers += [nn.Linear(*reversed(weight.shape)), nn.Tanh()]
            layers[-2].load_state_dict({"weight": weight, "bias": bias})
        return nn.Sequential(*layers[:-1])

    def log_prob(self, normal, before_tanh):
        """Return the log-density of tanh(before_tanh), summed over the numbers of an action."""
        slope = 2 * (math.log(2) - before_tanh - nn.functional.softplus(-2 * before_tanh))
        return (normal.log_prob(before_tanh) - slope).sum(dim=-1)

    def loss(self, observation, action, old_log_prob, advantage, value_target, entropy_eps):
        """Return the loss of a minibatch; all tensors are (minibatch_size, n_agents, ...)."""
        clip_epsilon = self.cfg.clip_epsilon
        std, mean = torch.std_mean(advantage, dim=0)
        advantage = (advantage - mean) / std
        loc, scale = self.policy(observation).chunk(2, dim=-1)
        scale = nn.functional.softplus(scale + math.log(math.expm1(0.99))) + 0.01  # 1 for 0
        normal = torch.distributions.Normal(loc, scale.clamp_min(1e-4), validate_args=False)
        log_prob = self.log_prob(normal, action.clamp(-1 + 1e-6, 1 - 1e-6).atanh())
        ratio = (log_prob - old_log_prob).exp().unsqueeze(-1)
        clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
        objective = torch.min(ratio * advantage, clipped * advantage).mean()
        entropy = -self.log_prob(normal, normal.rsample()).mean()
        value = self.critic(observation.flatten(1)).unsqueeze(1).expand_as(value_target)
        value_loss = nn.functional.smooth_l1_loss(value, value_target)
        return self.cfg.critic_coeff * value_loss - objective - entropy_eps * entropy

    def epoch(self):
        """Pass over the frames once, in minibatches without replacement."""
        order = torch.randperm(len(self.tensors[0]))
        for rows in order.split(self.cfg.minibatch_size):
            minibatch = [tensor[rows] for tensor in self.tensors]
            self.optimizer.zero_grad()
            self.loss(*minibatch, self.cfg.entropy_eps).backward()
            nn.utils.clip_grad_norm_(self.parameters, self.cfg.max_grad_norm)
            self.optimizer.step()

    def check(self):
        """Raise an AssertionError unless the gradients are those of train_mappo.py.

        Without the entropy bonus, as each samples the entropy for itself.
        """
        size, loss_module = self.cfg.minibatch_size, self.names["loss_module"]
        losses = loss_module(self.names["batch"].reshape(-1)[:size])
        loss_module.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"]).backward()
        self.loss(*(tensor[:size] for tensor in self.tensors), entropy_eps=0).backward()
        theirs = [*self.names["policy"].parameters(), *self.names["critic"].parameters()]
        for ours, parameter in zip(self.parameters, theirs, strict=True):
            torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-4, atol=1e-6)


def benchmark_update(names, turns):
    """Return rows of an epoch of train_mappo.py's objects, and of one in bare PyTorch."""
    bare = BareUpdate(names)
    bare.check()
    loss_module, optimizer = names["loss_module"], names["optimizer"]

    def epoch():
        for minibatch in names["replay_buffer"]:
            losses = loss_module(minibatch)
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), names["cfg"].max_grad_norm)
            optimizer.step()

    steps = names["cfg"].frames_per_batch // names["cfg"].minibatch_size
    works = {"bare PyTorch": (steps, timed(bare.epoch)), "train_mappo.py": (steps, timed(epoch))}
    return take_turns("gradient step", "gradient step", works, turns)


# ------------------------------------------------------------------------------- the collection


def benchmark_collection(num_vmas_envs, turns):
    """Return rows of VMAS alone, with random actions, and of the collector."""
    names = short_run(num_vmas_envs)
    simulator = names["make_env"](num_vmas_envs, 0).base_env._env  # the environment of VMAS

    def step_alone():
        simulator.reset()
        for _ in range(names["cfg"].max_steps):
            simulator.step(simulator.get_random_actions())

    frames = names["cfg"].frames_per_batch
    works = {
        "VMAS alone, random actions": (frames, timed(step_alone)),
        "train_mappo.py": (frames, timed(names["collector"].next)),
    }
    return take_turns(f"frames of {num_vmas_envs} environments", "frame", works, turns)


# ------------------------------------------------------------------------------- the evaluation


def benchmark_evaluation(turns):
    """Return rows of a test of the policy, beside the five iterations from one test to the next."""
    names = run_script("--n-iters=1", "--num-epochs=1", "--evaluation-interval=2")
    works = {
        "five iterations": (1, seconds_of_training("--n-iters 5 --evaluation-interval 6")),
        "the test after them": (1, timed(lambda: names["evaluate"](names["policy"]))),
    }
    return take_turns("evaluation", "test", works, turns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--record", action="store_true", help="replace the rows of speed.csv")
    parser.add_argument("--tutorial", metavar="PATH", help="TorchRL's multiagent_ppo.py")
    arguments = parser.parse_args()
    quick = arguments.quick
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}")
    rows = benchmark_trainings(1 if quick else 3, ["MAPPO"] if quick else ["MAPPO", "IPPO"])
    if arguments.tutorial:
        rows += benchmark_tutorial(arguments.tutorial, 1 if quick else 5)
    rows += benchmark_evaluation(1 if quick else 3)
    rows += benchmark_update(short_run(60), 5 if quick else 20)
    turns = {60: 3, 600: 3} if quick else {60: 9, 600: 5, 6000: 3}
    for num_vmas_envs in turns:
        rows += benchmark_collection(num_vmas_envs, turns[num_vmas_envs])
    rows = pd.DataFrame(rows)
    print(speed(rows))
    if arguments.record:
        write_whole(SPEED, rows.to_csv(index=False, lineterminator="\n"))
