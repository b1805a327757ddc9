"""What the recipes cost, and what limits the script's speed. Prints Markdown tables.

    python study/benchmark.py            some eight minutes on two cores
    python study/benchmark.py --record   the same, and its rows replace those of speed.csv
    python study/benchmark.py --quick    two minutes: one turn of each, and no 6000 environments

The recipes run as `python train_mappo.py` in processes of their own, in turns with the defaults;
what they took is in the metrics.csv that they leave. Everything else is measured in this process
with the parts of the script themselves, under the names that the script gives them, after a run
with the fewest possible epochs. Things that are compared take turns, so that a change of the
machine's speed meets both; a ratio is the median over the turns, with the lowest and the highest.
"""

import argparse
import contextlib
import csv
import io
import math
import os
import runpy
import sys
import tempfile
import time

import torch
from torch import nn

from study import RECIPES, SCRIPT, SPEED, SPEED_COLUMNS, SPEED_TABLES, train


def seconds(work):
    """How long the function `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def row_of(*cells):
    """A row of speed.csv."""
    return dict(zip(SPEED_COLUMNS, cells, strict=True))


def take_turns(table, works, turns, amount):
    """Let the functions in the dictionary `works` take turns; return a row for each turn of each.

    A row has the keys SPEED_COLUMNS; `amount` is how many steps or frames one turn of one is.
    """
    for work in works.values():  # what happens only once is not counted
        work()
    rows = []
    for turn in range(turns):
        for name, work in works.items():
            rows.append(row_of(table, name, "MAPPO", turn, amount, seconds(work)))
    return rows


def run_script(num_vmas_envs):
    """Run the script with one short iteration of `num_vmas_envs` environments; return its names."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sys.argv = [str(SCRIPT), "--device", "cpu", "--run-folder", f"{folder}/run"]
        sys.argv += ["--frames-per-batch", str(100 * num_vmas_envs), "--n-iters", "1"]
        sys.argv += ["--num-epochs", "1", "--evaluation-episodes", "1"]
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            return runpy.run_path(str(SCRIPT), run_name="__main__")


# ------------------------------------------------------------------------------------ the recipes


def benchmark_recipes(turns, algorithms):
    """Rows of whole trainings by the recipes, in turns with three iterations of the defaults."""
    threads = torch.get_num_threads()
    works = [("defaults", "--n-iters 3", "MAPPO", 3)]
    for algorithm in algorithms:
        works += [(name, options, algorithm, 1) for name, options in RECIPES.items()]
    rows = []
    for turn in range(turns):
        for name, options, algorithm, amount in works:
            run = train("benchmark", options, algorithm, turn, threads)
            taken = float(run["training_seconds"])
            rows.append(row_of("trainings", name, algorithm, turn, amount, taken))
    return rows


# ------------------------------------------------------------------------------------- the update


class BareUpdate:
    """MAPPO's update of the same weights on the same frames, in PyTorch alone.

    It stands for what could be had without TensorDict and TorchRL's loss. `names` are the script's.
    """

    def __init__(self, names):
        frames = names["frames"]
        keys = [("agents", "observation"), ("agents", "action"), ("agents", "action_log_prob")]
        self.tensors = [frames[key].clone() for key in [*keys, "advantage", "value_target"]]
        self.names = names
        self.policy = self.copy(names["policy"][0].module[0])
        self.critic = self.copy(names["critic_network"])
        self.parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=names["lr"], fused=True)

    @staticmethod
    def copy(network):
        """The weights of a MultiAgentMLP in a plain stack of linear layers and tanh."""
        weights = [value for name, value in network.named_parameters() if name.endswith("weight")]
        biases = [value for name, value in network.named_parameters() if name.endswith("bias")]
        layers = []
        for weight, bias in zip(weights, biases, strict=True):
            layers += [nn.Linear(*reversed(weight.shape)), nn.Tanh()]
            layers[-2].load_state_dict({"weight": weight, "bias": bias})
        return nn.Sequential(*layers[:-1])

    def normal(self, observation):
        """The normal distribution that is squashed by a tanh to draw an action."""
        loc, scale = self.policy(observation).chunk(2, dim=-1)
        scale = nn.functional.softplus(scale + math.log(math.expm1(0.99))) + 0.01  # of 0 it is 1
        return torch.distributions.Normal(loc, scale.clamp_min(1e-4), validate_args=False)

    @staticmethod
    def log_prob(normal, before_tanh):
        """The logarithm of the density of tanh(before_tanh), summed over the action's numbers."""
        slope = 2 * (math.log(2) - before_tanh - nn.functional.softplus(-2 * before_tanh))
        return (normal.log_prob(before_tanh) - slope).sum(dim=-1)

    def loss(self, observation, action, old_log_prob, advantage, value_target, entropy_eps):
        """Minus the objective, the value loss and the entropy bonus, each with its weight."""
        clip_epsilon = self.names["clip_epsilon"]
        deviation, mean = torch.std_mean(advantage, dim=0)
        advantage = (advantage - mean) / deviation
        normal = self.normal(observation)
        log_prob = self.log_prob(normal, action.clamp(-1 + 1e-6, 1 - 1e-6).atanh())
        ratio = (log_prob - old_log_prob).exp().unsqueeze(-1)
        clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
        objective = torch.min(ratio * advantage, clipped * advantage).mean()
        entropy = -self.log_prob(normal, normal.rsample()).mean()
        value = self.critic(observation.flatten(1)).unsqueeze(1).expand_as(value_target)
        value_loss = nn.functional.smooth_l1_loss(value, value_target)
        value_loss = self.names["critic_coeff"] * value_loss
        return value_loss - objective - entropy_eps * entropy

    def epoch(self):
        """One pass over the frames, in minibatches without replacement."""
        order = torch.randperm(len(self.tensors[0]))
        for rows in order.split(self.names["minibatch_size"]):
            minibatch = [tensor[rows] for tensor in self.tensors]
            loss = self.loss(*minibatch, entropy_eps=self.names["entropy_eps"])
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, self.names["max_grad_norm"])
            self.optimizer.step()

    def check(self):
        """Raise an AssertionError unless its gradients are the script's, up to rounding.

        The entropy bonus is left out, as each samples the entropy for itself.
        """
        size = self.names["minibatch_size"]
        losses = self.names["loss_module"](self.names["frames"][:size])
        self.names["loss_module"].zero_grad()
        (losses["loss_objective"] + losses["loss_critic"]).backward()
        self.loss(*(tensor[:size] for tensor in self.tensors), entropy_eps=0).backward()
        theirs = [*self.names["policy"].parameters(), *self.names["critic"].parameters()]
        for ours, parameter in zip(self.parameters, theirs, strict=True):
            torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-4, atol=1e-6)


def benchmark_update(names, turns):
    """Rows of an epoch with the script's replay buffer, loss and optimizer, and of a bare one."""
    bare = BareUpdate(names)
    bare.check()
    loss_module, optimizer = names["loss_module"], names["optimizer"]

    def epoch():
        for minibatch in names["replay_buffer"]:
            losses = loss_module(minibatch)
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), names["max_grad_norm"])
            optimizer.step()

    steps = names["frames_per_batch"] // names["minibatch_size"]
    works = {"train_mappo.py": epoch, "the same in bare PyTorch": bare.epoch}
    return take_turns("steps", works, turns, steps)


# --------------------------------------------------------------------------------- the collection


def benchmark_collection(turns):
    """Rows of the collector and of VMAS alone; `turns` says how many, by number of environments."""
    rows = []
    for num_vmas_envs, number in turns.items():
        names = run_script(num_vmas_envs)
        simulator = names["make_env"](num_vmas_envs, 0).base_env._env  # the environment of VMAS

        def step_alone(simulator=simulator, steps=names["max_steps"]):
            simulator.reset()
            for _ in range(steps):
                simulator.step(simulator.get_random_actions())

        works = {
            f"{num_vmas_envs}": names["collector"].next,
            f"{num_vmas_envs}, VMAS alone": step_alone,
        }
        rows += take_turns("collection", works, number, names["frames_per_batch"])
        names["collector"].shutdown()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="one turn, and no 6000 environments")
    how.add_argument("--record", action="store_true", help="replace the rows of speed.csv")
    arguments = parser.parse_args()
    quick = arguments.quick
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}")
    rows = benchmark_recipes(1 if quick else 3, ["MAPPO"] if quick else ["MAPPO", "IPPO"])
    rows += benchmark_update(run_script(60), 5 if quick else 20)
    rows += benchmark_collection({60: 3, 600: 3} if quick else {60: 9, 600: 5, 6000: 3})
    for make_table in SPEED_TABLES.values():
        print(f"\n{make_table(rows)}")
    if arguments.record:
        with open(SPEED, "w", newline="") as file:
            writer = csv.DictWriter(file, SPEED_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "seconds": f"{row['seconds']:.4f}"} for row in rows)
