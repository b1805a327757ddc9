"""How fast is the tutorial script, and what limits it? Prints Markdown tables; asserts nothing about time.

    python tests/benchmark.py                    some ten minutes on two cores
    python tests/benchmark.py --quick            a minute or two: no 6000 environments, no other options
    python tests/benchmark.py --device cuda      the same on a GPU

Wherever two things are compared, they take turns, so that a change of the machine's speed meets both; a ratio is the
median over the turns. What is measured is the script's own code: its functions, its networks, its Collector(...) and
the statements of its training loop, found in its source and run again.
"""

import argparse
import ast
import contextlib
import io
import math
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import vmas
from torch import nn

from study import RECIPES

SCRIPT = str(Path(__file__).resolve().parents[1] / "train_mappo.py")
FIRST_STEP = """
import runpy, sys, time
from torchrl.envs import VmasEnv
VmasEnv._step = lambda *_: sys.exit(print("first step at", time.time()))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def tiny_settings(device, folder):
    """The script's command line for one short iteration with the default networks, batch and minibatches."""
    return [SCRIPT, "--device", device, "--output-dir", folder, "--n-iters", "1", "--num-epochs", "1",
            "--evaluation-episodes", "1"]


def run_script(device, folder, *options):
    """Run the script with tiny settings and return its global names, those that its functions read, too."""
    sys.argv = [*tiny_settings(device, folder), *options]
    with contextlib.redirect_stdout(io.StringIO()):
        return runpy.run_path(SCRIPT, run_name="__main__")["make_env"].__globals__


def run_script_up_to_training(device, folder):
    """As run_script, but stop before the training loop: training, evaluation and pictures need memory of their own."""
    sys.argv, names = tiny_settings(device, folder), {"__name__": "__main__", "__file__": SCRIPT}
    training = find_loop("iteration").lineno
    with contextlib.redirect_stdout(io.StringIO()):
        run([statement for statement in parse().body if statement.lineno < training], names)
    return names


def parse():
    """The script's source as a syntax tree."""
    return ast.parse(Path(SCRIPT).read_text(encoding="utf-8"))


def find(is_it):
    """The first part of the script's source for which `is_it` is true."""
    return next(node for node in ast.walk(parse()) if is_it(node))


def find_loop(variable):
    """The script's loop over `variable`."""
    return find(lambda node: isinstance(node, ast.For) and getattr(node.target, "id", "") == variable)


def default(name):
    """The value that Section 1 of the script gives to a hyperparameter."""
    return find(lambda node: isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name).value.value


def run(statements, names):
    """Run some statements of the script again, in its own `names`."""
    exec(compile(ast.Module(statements, []), SCRIPT, "exec"), names)


def seconds(work):
    """How long `work` takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(works, rounds):
    """Let the `works`, a dictionary of functions, take turns and return the seconds of each turn of each of them."""
    for work in works.values():  # what happens only once (allocations, caches) is not counted
        work()
    turns = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in works}


def ratio(these, those):
    """The median of `these` over `those`, turn by turn, with the lowest and the highest."""
    ratios = [this / that for this, that in zip(these, those)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def print_table(title, columns, rows):
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


class Reference:
    """The update of MAPPO in bare PyTorch: the mathematics of the script's loss, without its diagnostics.

    The weights and the batch are copies of the script's, laid out as flat tensors. It stands for the speed that is to
    be had without TensorDict and TorchRL's loss.
    """

    def __init__(self, names):
        keys, self.names = names["loss_module"].tensor_keys, names
        batch = names["batch"].reshape(-1)
        self.data = [batch[key].clone() for key in (("agents", "observation"), ("agents", "action"),
                                                    keys.sample_log_prob, keys.advantage, keys.value_target)]
        self.policy, self.critic = self.copy(names["policy_network"]), self.copy(names["critic_network"])
        self.parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=names["lr"], fused=True)

    @staticmethod
    def copy(network):
        """The same weights in a plain stack of linear layers and tanh."""
        weights, biases = ([p for p in network.parameters() if p.ndim == ndim] for ndim in (2, 1))
        layers = []
        for weight, bias in zip(weights, biases):
            layers += [nn.Linear(*reversed(weight.shape), device=weight.device), nn.Tanh()]
            layers[-2].load_state_dict({"weight": weight, "bias": bias})
        return nn.Sequential(*layers[:-1])

    @staticmethod
    def log_prob(x, loc, scale):
        """Log-probability of the action tanh(x), with x from a normal distribution."""
        normal = -((x - loc) ** 2) / (2 * scale**2) - scale.log() - math.log(math.sqrt(2 * math.pi))
        return (normal - 2 * (math.log(2) - x - F.softplus(-2 * x))).sum(-1)

    def loss(self, observation, action, old_log_prob, advantage, value_target, entropy_eps):
        epsilon, n_agents = self.names["clip_epsilon"], observation.shape[1]
        advantage = (advantage - advantage.mean(dim=0)) / advantage.std(dim=0).clamp_min(1e-6)
        loc, scale = self.policy(observation).chunk(2, dim=-1)
        scale = (F.softplus(scale + math.log(math.expm1(0.99))) + 0.01).clamp_min(1e-4)
        taken = action.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        log_ratio = (self.log_prob(taken, loc, scale) - old_log_prob).unsqueeze(-1)
        clipped = log_ratio.clamp(math.log1p(-epsilon), math.log1p(epsilon))
        objective = torch.min(log_ratio.exp() * advantage, clipped.exp() * advantage).mean()
        entropy = -self.log_prob(loc + scale * torch.randn_like(loc), loc, scale).mean()
        value = self.critic(observation.flatten(1)).unsqueeze(1).expand(-1, n_agents, -1)
        return self.names["critic_coeff"] * F.smooth_l1_loss(value, value_target) - objective - entropy_eps * entropy

    def epoch(self):
        for rows in torch.randperm(len(self.data[0]), device=self.data[0].device).split(self.names["minibatch_size"]):
            loss = self.loss(*(tensor[rows] for tensor in self.data), self.names["entropy_eps"])
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, self.names["max_grad_norm"])
            self.optimizer.step()

    def check(self):
        """Loss and gradients are those of the script; without the entropy bonus, which either samples for itself."""
        loss_module, size = self.names["loss_module"], self.names["minibatch_size"]
        coefficient = loss_module.entropy_coeff.clone()
        loss_module.entropy_coeff.zero_()
        loss_module.zero_grad()
        losses = loss_module(self.names["batch"].reshape(-1)[:size])
        theirs = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
        theirs.backward()
        loss_module.entropy_coeff.copy_(coefficient)
        ours = self.loss(*(tensor[:size] for tensor in self.data), entropy_eps=0)
        ours.backward()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        for network, copy in (("policy_network", self.policy), ("critic_network", self.critic)):
            for ndim in (2, 1):
                for parameter, twin in zip(*([p for p in module.parameters() if p.ndim == ndim]
                                             for module in (self.names[network], copy)), strict=True):
                    torch.testing.assert_close(twin.grad, parameter.grad, rtol=1e-4, atol=1e-6)


def benchmark_update(names, rounds):
    """One epoch through the script's replay buffer, as in its training loop, against one of the reference."""
    reference, epoch = Reference(names), find_loop("minibatch")
    reference.check()

    def script():
        names["all_losses"] = []
        run([epoch], names)

    turns = take_turns({"train_mappo.py": script, "bare PyTorch": reference.epoch}, rounds)
    updates = names["frames_per_batch"] // names["minibatch_size"]
    print_table("Update of one minibatch (400 frames)", ["", "ms, median", "times the bare update"], [
        [name, f"{1e3 * statistics.median(times) / updates:.2f}", ratio(times, turns["bare PyTorch"])]
        for name, times in turns.items()])


def make_collection(names, num_envs, ends_early=False):
    """A function that collects a batch of `max_steps` steps with the script's Collector(...).

    With `ends_early`, an episode ends in each step with probability 1/55, as if the goals had been reached, so that the
    environments are reset at different times. A trained policy needs about 55 steps, too.
    """
    env = names["make_env"](num_envs, 0)
    if ends_early:
        simulator, random = env.base_env._env, torch.Generator(names["device"]).manual_seed(0)
        simulator.scenario.done = lambda: (simulator.steps > 0) & (
            torch.rand(num_envs, generator=random, device=names["device"]) < 1 / 55)
    call = find(lambda node: isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Collector")
    return eval(compile(ast.Expression(call), SCRIPT, "eval"),
                names | {"env": env, "frames_per_batch": num_envs * names["max_steps"]}).next


def make_plain_stepping(names, num_envs):
    """A function that steps VMAS alone, with random actions, for an episode of `max_steps` from a fresh reset."""
    env = vmas.make_env(names["scenario_name"], num_envs, device=names["device"], seed=0, n_agents=names["n_agents"])

    def episode():
        env.reset()
        for _ in range(names["max_steps"]):
            env.step(env.get_random_actions())

    return episode


def make_bare_collection(names, num_envs):
    """As plain stepping, but with actions of the policy network in bare PyTorch: the least that collecting takes."""
    env = vmas.make_env(names["scenario_name"], num_envs, device=names["device"], seed=0, n_agents=names["n_agents"])
    policy = Reference.copy(names["policy_network"])

    @torch.no_grad()
    def episode():
        observations = env.reset()
        for _ in range(names["max_steps"]):
            loc, scale = policy(torch.stack(observations, dim=1)).chunk(2, dim=-1)
            scale = F.softplus(scale + math.log(math.expm1(0.99))) + 0.01
            x = loc + scale * torch.randn_like(loc)
            Reference.log_prob(x, loc, scale)  # PPO needs it
            observations = env.step(list(x.tanh().unbind(dim=1)))[0]

    return episode


def benchmark_collection(names, rounds):
    """The script's collection against the simulator alone, full-length episodes, at several numbers of environments."""
    rows = []
    for num_envs, times in rounds.items():
        turns = take_turns({"script": make_collection(names, num_envs), "plain": make_plain_stepping(names, num_envs),
                            "bare": make_bare_collection(names, num_envs)}, times)
        speed = {name: num_envs * names["max_steps"] / statistics.median(turn) for name, turn in turns.items()}
        rows.append([num_envs, *(f"{speed[name]:,.0f}" for name in ("script", "bare", "plain")),
                     ratio(turns["plain"], turns["script"]), ratio(turns["plain"], turns["bare"])])
    print_table("Collection, frames per second", [
        "environments", "train_mappo.py", "VMAS + policy network in bare PyTorch", "VMAS, random actions",
        "script / VMAS", "bare / VMAS"], rows)


def benchmark_early_ends(names, rounds):
    """Collection late in training, when episodes end early and at different times, against full-length episodes."""
    rows = []
    for num_envs, times in rounds.items():
        turns = take_turns({"full": make_collection(names, num_envs),
                            "early": make_collection(names, num_envs, ends_early=True)}, times)
        speed = {name: num_envs * names["max_steps"] / statistics.median(turn) for name, turn in turns.items()}
        rows.append([num_envs, f"{speed['full']:,.0f}", f"{speed['early']:,.0f}", ratio(turns["full"], turns["early"])])
    print_table("Collection when episodes end early, frames per second", [
        "environments", "full-length episodes", "episodes of about 50 steps", "early / full"], rows)


def megabytes(device):
    """Peak memory so far: on a GPU that of the tensors, else that of the process."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def benchmark_memory(device, sizes):
    """Peak memory of a process that has come to the script's training loop and then collects one batch.

    A process inherits the peak of the one that starts it, so this comes before anything large is done here.
    """
    rows = []
    for num_envs in sizes:
        script, plain = (subprocess.run(
            [sys.executable, __file__, "--device", device, "--memory-of", kind, str(num_envs)], check=True,
            stdout=subprocess.PIPE, text=True).stdout.split() for kind in ("collection", "plain_stepping"))
        rows.append([num_envs, script[0], script[1], plain[1]])
    print_table("Peak memory, MB", ["environments", "before", "after collecting with train_mappo.py",
                                    "after stepping VMAS alone, nothing kept"], rows)


def benchmark_start(device, folder, rounds):
    """Seconds from the start of a process to the first step of an environment."""
    times = []
    for _ in range(rounds):
        start = time.time()
        output = subprocess.run([sys.executable, "-c", FIRST_STEP, *tiny_settings(device, folder)],
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        times.append(float(output.split("first step at")[1]) - start)
    print_table("Start", ["", "seconds, median", "fastest", "slowest"], [
        ["from the start of the process to the first environment step", f"{statistics.median(times):.1f}",
         f"{min(times):.1f}", f"{max(times):.1f}"]])


def benchmark_iteration(names, rounds):
    """Where the time of an iteration with the default hyperparameters goes: each statement of the loop, timed."""
    names["num_epochs"] = default("num_epochs")
    turns = {"collection": [], "advantages": [], "updates": [], "the rest": []}
    for _ in range(rounds):
        spent = dict.fromkeys(turns, 0)
        for statement in find_loop("iteration").body:
            text = ast.unparse(statement)
            part = ("collection" if text.startswith("batch =") else "advantages" if "estimate_advantages" in text else
                    "updates" if isinstance(statement, ast.For) else "the rest")
            spent[part] += seconds(lambda: run([statement], names))
        for part in turns:
            turns[part].append(spent[part])
    medians = {part: statistics.median(times) for part, times in turns.items()}
    print_table("One iteration with the default hyperparameters", ["", "seconds, median", "share"], [
        [part, f"{median:.2f}", f"{median / sum(medians.values()):.0%}"] for part, median in medians.items()])


def benchmark_options(device, folder, rounds):
    """Whole iterations with other options: the README's recipes, and more agents, for which MAPPO's critic grows."""
    iteration = find_loop("iteration").body

    def make_iteration(names):
        return lambda: run(iteration, names)

    works, inputs = {}, {}
    for options in ["", "--no-mappo", *RECIPES, *(
            f"--n-agents {n_agents}{flag}" for n_agents in (2, 4, 8) for flag in ("", " --no-mappo"))]:
        names = run_script(device, folder, *options.split())
        if "--num-epochs" not in options:
            names["num_epochs"] = default("num_epochs")
        works[options] = make_iteration(names)
        inputs[options] = names["n_obs"] * (names["n_agents"] if names["mappo"] else 1)
    turns = take_turns(works, rounds)
    print_table("One iteration with other options", [
        "options", "inputs of the critic", "seconds, median", "times the defaults"], [
        [f"`{options}`" if options else "the defaults", inputs[options], f"{statistics.median(times):.2f}",
         ratio(times, turns[""])] for options, times in turns.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer turns, and no 6000 environments")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # how it starts itself to measure memory
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_of:
            (kind, num_envs), names = options.memory_of, run_script_up_to_training(options.device, folder)
            before = megabytes(options.device)
            {"collection": make_collection, "plain_stepping": make_plain_stepping}[kind](names, int(num_envs))()
            return print(before, megabytes(options.device))
        where = torch.cuda.get_device_name() if options.device == "cuda" else (
            f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores")
        print(f"{where}, torch {torch.__version__}; in parentheses the lowest and the highest turn", flush=True)
        rounds = {60: 3, 600: 3} if options.quick else {60: 9, 600: 5, 6000: 3}
        benchmark_memory(options.device, rounds)
        benchmark_start(options.device, folder, 1 if options.quick else 3)
        names = run_script(options.device, folder)
        benchmark_update(names, 5 if options.quick else 20)
        benchmark_collection(names, rounds)
        benchmark_early_ends(names, {size: rounds[size] for size in (60, 600)})
        benchmark_iteration(names, 1 if options.quick else 3)
        if not options.quick:
            benchmark_options(options.device, folder, 3)


if __name__ == "__main__":
    main()
