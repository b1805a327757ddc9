"""The runs behind study/README.md: many trainings by train_mappo.py, one row of results for each.

    python study/study.py run                 do every run that results.csv lacks, two at a time
    python study/study.py run flag payment    only the runs of these experiments
    python study/study.py report              write the tables of README.md anew, draw its figures
    python study/study.py coverage            how often the intervals hold what they should

Each run is `python train_mappo.py` with the options in its row, in a process and a folder of its
own, on the CPU with one thread. What is known of it comes from files it leaves: evaluation.json,
and metrics.csv for the curves. A stopped study goes on where it was.
"""

import argparse
import csv
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from torchrl.envs import VmasEnv

STUDY = Path(__file__).resolve().parent
SCRIPT = STUDY.parent / "train_mappo.py"
RESULTS = STUDY / "results.csv"
README = STUDY / "README.md"
SPEED = STUDY / "speed.csv"  # written by benchmark.py, a row for each turn of what is timed
SPEED_COLUMNS = ["table", "name", "algorithm", "turn", "amount", "seconds"]

# What a row of results.csv says: which run it is, its evaluation, and its curves, a value for each
# iteration, separated by spaces.
RUN = ["experiment", "options", "algorithm", "seed"]
EVALUATION = ["success_rate", "episode_reward", "episode_length", "collisions"]
CURVES = ["success_rate", "episode_reward", "explained_variance", "advantage_std", "kl_approx"]
ARRIVALS = ["value_at_arrival", "reward_at_arrival", "advantage_at_arrival"]  # see CHANGES
SLOPE = "value_slope"
STOPS = [f"stops_{name}" for name in EVALUATION]  # the evaluation at each stop, where there are any
UNTRAINED = [f"untrained_{name}" for name in EVALUATION]  # not in the first rows
COLUMNS = [*RUN, *EVALUATION, "training_seconds", *(f"curve_{name}" for name in CURVES), *STOPS]
COLUMNS += [*(f"curve_{name}" for name in ARRIVALS), *UNTRAINED, f"curve_{SLOPE}"]
DIGITS = {"success_rate": 3, "episode_reward": 2, "episode_length": 1, "collisions": 3}
BETTER = {"success_rate": 1, "episode_reward": 1, "episode_length": -1, "collisions": -1}
DIGITS |= dict.fromkeys(ARRIVALS, 2)
BETTER |= dict.fromkeys(ARRIVALS, 1)  # higher
STEPS = "steps (a failed episode counts as 100)"
TRUSTED = 0.85  # an interval is shown if at least so many of its kind hold what they should
ATTAINABLE = "attainable"
COLOR = {"MAPPO": "tab:blue", "IPPO": "tab:orange"}
MARKER = {"MAPPO": "o", "IPPO": "s"}

EIGHT = "--n-agents 8 --lr 1e-3 --anneal-lr --num-epochs 10 --num-cells 128"
SHARED = """--scenario-options '{"collisions": false, "shared_rew": true}'"""
OWN = """--scenario-options '{"collisions": false, "shared_rew": false}'"""
TEAM_PAID, EACH_PAID = f"{EIGHT} {SHARED}", f"{EIGHT} {OWN}"

SMALL = "--anneal-lr --lmbda 0.8 --num-cells 64 --gamma 0.95"
RECIPES = {
    "quick": f"{SMALL} --num-epochs 5 --lr 5e-3 --minibatch-size 600 --n-iters 11",
    "thorough": f"{SMALL} --num-epochs 8 --lr 2e-3 --frames-per-batch 12000 "
    "--minibatch-size 1200 --n-iters 12",
}
TEAMS = {f"{RECIPES['thorough']} --n-agents {number}": f"{number} robots" for number in (2, 4, 8)}

# With --no-share-parameters-policy alone, MAPPO's ten runs are those of "policies".
SHARING = {
    "--no-share-parameters-critic": "separate critics",
    "--no-share-parameters-policy --no-share-parameters-critic": "separate policies and critics",
    "--no-share-parameters-policy --n-iters 30": "separate policies, 30 iterations",
    "--no-share-parameters-policy --frames-per-batch 18000 --minibatch-size 1200": (
        "separate policies, three times the frames in as many gradient steps"
    ),
}

CRITIC = """
critic_network = MultiAgentMLP("""
TOLD_CRITIC = """

class ToldNetwork(MultiAgentMLP):
    def __init__(self, n_agent_inputs, **others):
        super().__init__(n_agent_inputs=n_agent_inputs + 1, **others)

    def forward(self, observations):
        ways = observations[..., 4:6].norm(dim=-1, keepdim=True)
        told = {told}
        return super().forward(torch.cat([observations, told], dim=-1))


critic_network = ToldNetwork("""

# A few runs are of the script with a piece of its text replaced, or are started in another way. The
# comment at the end of their options says so: a shell does not read it, and results.csv shows it.
MEASURED = "arrivals measured"
SLOPES = "slopes measured"
NO_ENDS = "arrivals do not end an episode"
TWO_THREADS = "two threads"
TOLD = "the critic is told how far the others have to go"
TOLD_ITS_OWN = "the critic is told how far its own robot has to go"
CHANGES = {
    # What happens in the step in which the last robot arrives: the critic's value before it, the
    # reward of it, and its advantage in standard deviations, means over robots and arrivals.
    MEASURED: (
        """
    row["seconds"] = """,
        """
    ended = batch["next", "terminated"].squeeze(-1)
    row["value_at_arrival"] = batch["agents", "state_value"][ended].mean().item()
    row["reward_at_arrival"] = batch["next", "agents", "reward"][ended].mean().item()
    row["advantage_at_arrival"] = batch["advantage"][ended].mean().item() / row["advantage_std"]
    row["seconds"] = """,
    ),
    # By how much the critic's value of a robot falls if that robot alone were nearer to its goal,
    # for each unit of the way; a mean over all frames in which it is farther than 0.1.
    SLOPES: (
        """
    row["seconds"] = """,
        """
    seen = batch["agents", "observation"]
    slopes = []
    for robot in range(env.n_agents):
        way = seen[..., robot, 4:6]
        step = 0.05 * way / way.norm(dim=-1, keepdim=True)
        nearer = seen.clone()
        nearer[..., robot, 0:2] -= step
        nearer[..., robot, 4:6] -= step
        with torch.no_grad():
            fall = (critic_network(seen) - critic_network(nearer))[..., robot, 0]
        slopes.append(fall[way.norm(dim=-1) > 0.1] / 0.05)
    row["value_slope"] = torch.cat(slopes).mean().item()
    row["seconds"] = """,
    ),
    # One number more for the critic: of the way to the goal (the numbers 4 and 5 of an observation)
    # the length, summed over the other robots, or, to compare, only its own robot's.
    TOLD: (CRITIC, TOLD_CRITIC.format(told="ways.sum(dim=-2, keepdim=True) - ways")),
    TOLD_ITS_OWN: (CRITIC, TOLD_CRITIC.format(told="ways")),
    # The advantage of an arrival is estimated as if more could be earned after it: the critic's
    # value of the state in which all robots are at their goals stands where a 0 did.
    NO_ENDS: (
        """
    estimate_advantages(batch) """,
        """
    terminated = batch["next", "terminated"].clone()
    batch["next", "terminated"].zero_()
    estimate_advantages(batch)
    batch["next", "terminated"].copy_(terminated) """,
    ),
}

# Why IPPO falls apart after ten iterations: each of these takes one cause away.
ENDS = {
    f"--n-iters 15 # {NO_ENDS}": "arrivals do not end an episode",
    """--n-iters 15 --scenario-options '{"shared_rew": false}'""": "each robot paid for itself",
    "--gamma 0.9 --n-iters 15": "gamma 0.9",
}
OWN_CRITICS = f"{EACH_PAID} --no-share-parameters-critic"

# IPPO's critic with one number more, over twenty iterations and with eight robots paid as a team.
ONE_NUMBER = {TOLD: "the others' ways", TOLD_ITS_OWN: "its own robot's way"}
TOLD_LONG = f"--n-iters 20 # {TOLD}"
TOLD_EIGHT = {f"{TEAM_PAID} # {change}": label for change, label in ONE_NUMBER.items()}
# Without bootstrapping (but where an episode is cut off), a critic is a baseline and no more.
UNBOOTSTRAPPED_EIGHT = f"{TEAM_PAID} --lmbda 1"
# Do the runs of IPPO that fell behind with a recipe do so for the same reason?
HURRIED = [f"{options} # {change}" for options in RECIPES.values() for change in (NO_ENDS, TOLD)]

# Another scenario: robots inside a hollow package push it to a goal that each of them sees.
TRANSPORT = (
    """--scenario-name reverse_transport --scenario-options '{"package_mass": 1}' --n-agents 4 """
    "--max-steps 200 --frames-per-batch 12000 --minibatch-size 600 "
    "--lr 1e-3 --num-epochs 10 --num-cells 128 --n-iters 40"
)
# And one that neither algorithm solved in these many frames.
GIVE_WAY = (
    "--scenario-name multi_give_way --max-steps 200 --frames-per-batch 12000 "
    "--lr 1e-3 --num-epochs 10 --num-cells 128 --n-iters 15"
)


def pairs(options, seeds=range(10)):
    """Runs with the same options, both algorithms of a seed in turn: (options, algorithm, seed)."""
    return [(options, algorithm, seed) for seed in seeds for algorithm in ("MAPPO", "IPPO")]


EXPERIMENTS = {
    "flag": pairs(""),
    "fresh": pairs("", seeds=range(10, 20)),
    "both": pairs("", seeds=range(20)),
    "newcomer": [(f"# {TWO_THREADS}", "MAPPO", 0)],
    "payment": [*pairs(TEAM_PAID), *pairs(EACH_PAID)],
    "payment-fresh": [*pairs(TEAM_PAID, range(10, 20)), *pairs(EACH_PAID, range(10, 20))],
    "epochs": [*pairs("--num-epochs 5"), *pairs("--num-epochs 10"), *pairs("")],
    "horizon": [*pairs("--gamma 0.9"), *pairs("")],
    "policies": [*pairs("--no-share-parameters-policy"), *pairs("")],
    "recipes": [*pairs(RECIPES["quick"]), *pairs(RECIPES["thorough"])],
    "recipes-fresh": pairs(RECIPES["quick"], seeds=range(30, 50)),
    "rejected": pairs(RECIPES["thorough"].replace("epochs 8", "epochs 10")),
    "teams": [run for options in TEAMS for run in pairs(options)],
    "lasting": pairs("--n-iters 50"),
    "arrivals": pairs(f"--n-iters 10 # {MEASURED}"),
    "ends": [(options, "IPPO", seed) for options in ENDS for seed in range(10)],
    "unended": [*pairs(f"# {NO_ENDS}"), *pairs(f"{TEAM_PAID} # {NO_ENDS}")],
    "critics": [(OWN_CRITICS, "MAPPO", seed) for seed in range(10)],
    "sharing": [(options, "MAPPO", seed) for options in SHARING for seed in range(10)],
    "told": [(run, "IPPO", seed) for run in (*TOLD_EIGHT, TOLD_LONG) for seed in range(10)],
    "slopes": [
        *pairs(f"--n-iters 10 # {SLOPES}"),
        *pairs(f"{TEAM_PAID} # {SLOPES}"),
        *pairs(f"{EACH_PAID} # {SLOPES}"),
        *((f"{options} + {SLOPES}", "IPPO", seed) for options in TOLD_EIGHT for seed in range(10)),
        *((f"--n-iters 15 # {SLOPES}", "IPPO", seed) for seed in range(10)),
        *((f"--n-iters 15 # {NO_ENDS} + {SLOPES}", "IPPO", seed) for seed in range(10)),
    ],
    "unbootstrapped": [*pairs(UNBOOTSTRAPPED_EIGHT), *pairs(TEAM_PAID)],
    "hurried": [(options, "IPPO", seed) for options in HURRIED for seed in range(10)],
    "transport": pairs(TRANSPORT),
    "unsolved": pairs(GIVE_WAY, seeds=[0]),
    # No run, but how much all robots together could earn in the episodes of the evaluation.
    "attainable": [(options, ATTAINABLE, 12345) for options in ("", *TEAMS, TEAM_PAID)],
}
# Runs that are evaluated on their way: stopped after these iterations, and gone on with.
STOPPED_AFTER = {"--n-iters 50": range(5, 51, 5), TRANSPORT: (5, 10, 20, 40)}
STOPPED_AFTER[TOLD_LONG] = (10, 15, 20)
# Which options an experiment's table compares, and what it calls them.
TABLES = {
    "flag": {"": "seeds 0 to 9"},
    "fresh": {"": "seeds 10 to 19"},
    "both": {"": "all twenty"},
    "payment": {TEAM_PAID: "the team's progress", EACH_PAID: "its own progress"},
    "payment-fresh": {
        TEAM_PAID: "the team's progress, seeds 10 to 19",
        EACH_PAID: "its own progress, seeds 10 to 19",
    },
    "epochs": {"--num-epochs 5": "5 epochs", "--num-epochs 10": "10 epochs", "": "30 epochs"},
    "horizon": {"--gamma 0.9": "gamma 0.9", "": "gamma 0.99"},
    "policies": {"--no-share-parameters-policy": "separate policies", "": "a shared policy"},
    "recipes": {options: name for name, options in RECIPES.items()},
    "recipes-fresh": {RECIPES["quick"]: "quick, seeds 30 to 49"},
    "teams": TEAMS,
    "unbootstrapped": {UNBOOTSTRAPPED_EIGHT: "lambda 1", TEAM_PAID: "lambda 0.9"},
    "unended": {
        f"# {NO_ENDS}": "3 robots, defaults",
        f"{TEAM_PAID} # {NO_ENDS}": "8 robots, the team's progress",
    },
}


# ------------------------------------------------------------------------------------------- runs


def script_for(options, folder):
    """The script that `options` ask for: the project's, or a changed copy of it in `folder`."""
    text = SCRIPT.read_text("utf-8")
    changed = text
    for change in options.partition("# ")[2].split(" + "):
        if change in ("", TWO_THREADS):
            continue
        old, new = CHANGES[change]
        if changed.count(old) != 1:
            raise RuntimeError(f"{change}: {SCRIPT.name} must hold this once: {old}")
        changed = changed.replace(old, new)
    if changed == text:
        return SCRIPT
    script = Path(folder, SCRIPT.name)
    script.write_text(changed, encoding="utf-8")
    return script


def with_success(measured):
    """Measurements in which success is called so in every scenario, not "terminated_rate"."""
    return {{"terminated_rate": "success_rate"}.get(key, key): measured[key] for key in measured}


def attainable(options, seed):
    """The mean reward per agent that could be earned in the episodes of the evaluation.

    In navigation, the way that all robots have to go. An episode ends before its last bit is paid:
    up to 0.10 of each robot's way are left.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenario-options", type=json.loads, default={})
    parser.add_argument("--n-agents", type=int, default=3)
    given = parser.parse_known_args(shlex.split(options, comments=True))[0]
    scenario = {"n_agents": given.n_agents, **given.scenario_options}
    env = VmasEnv("navigation", num_envs=200, seed=seed, scenario_kwargs=scenario)
    env.reset()  # as the evaluation does
    return sum(agent.pos_shaping.mean().item() for agent in env._env.agents)


def train(experiment, options, algorithm, seed, threads=1):
    """Do one run on `threads` threads and return its row, a dictionary with the keys COLUMNS.

    Raises a RuntimeError if the run fails.
    """
    row = {"experiment": experiment, "options": options, "algorithm": algorithm, "seed": seed}
    if algorithm == ATTAINABLE:
        return row | {"episode_reward": f"{attainable(options, seed):.4f}"}
    if options.endswith(f"# {TWO_THREADS}"):
        threads = 2
    flag = "--mappo" if algorithm == "MAPPO" else "--no-mappo"
    evaluations = []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "run")
        given = ["--device", "cpu", flag, "--seed", str(seed), "--run-folder", str(folder)]
        script = script_for(options, parent)
        command = [sys.executable, str(script), *shlex.split(options, comments=True), *given]
        stops = [["--n-iters", str(number)] for number in STOPPED_AFTER.get(options, [])]
        for stop in stops or [[]]:  # the same run each time, a little longer
            process = subprocess.run(
                [*command, *stop],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                capture_output=True,
                text=True,
            )
            if process.returncode:
                reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"{command}: exit status {process.returncode}: {reason}")
            evaluation = json.loads((folder / "evaluation.json").read_text())
            evaluation = {key: evaluation[key] for key in ("untrained", "trained")}
            evaluation = {key: with_success(evaluation[key]) for key in evaluation}
            evaluations.append(evaluation["trained"])
        with open(folder / "metrics.csv", newline="") as file:
            rows = [with_success(line) for line in csv.DictReader(file)]
    for name in EVALUATION:
        row[f"untrained_{name}"] = evaluation["untrained"].get(name, "")
        numbers = [f"{trained[name]:.4f}" for trained in evaluations if name in trained]
        row[name] = numbers[-1] if numbers else ""
        row[f"stops_{name}"] = " ".join(numbers) if stops else ""
    row["training_seconds"] = f"{sum(float(line['seconds']) for line in rows):.1f}"
    for name in [*CURVES, *ARRIVALS, SLOPE]:
        numbers = [f"{float(line[name] or 'nan'):.4f}" for line in rows if name in line]
        row[f"curve_{name}"] = " ".join(numbers)
    return row


@functools.lru_cache(maxsize=4)
def parse(path, changed):
    """The rows of a .csv as it was when it was last changed; a report asks for them very often."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_rows(path):
    """The rows of a .csv, as a list of dictionaries of strings; none if there is no file."""
    if not path.exists():
        return []
    return parse(path, path.stat().st_mtime_ns)


def add_result(row):
    """Add a row to results.csv, after the names of the columns if it is the first."""
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def run_missing(names):
    """Do the runs of these experiments that results.csv lacks; return how many of them failed."""
    done = {tuple(row[column] for column in RUN[1:]) for row in read_rows(RESULTS)}
    missing = {}
    for name in names:
        for options, algorithm, seed in EXPERIMENTS[name]:
            if (options, algorithm, str(seed)) not in done:
                missing.setdefault((options, algorithm, seed), name)
    failed = 0
    pool = ThreadPoolExecutor(max_workers=2)  # each thread waits for one process
    try:
        started = [pool.submit(train, missing[run], *run) for run in missing]
        for number, future in enumerate(as_completed(started), start=1):
            try:
                row = future.result()
            except RuntimeError as error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
            else:
                add_result(row)
                text = ", ".join(str(row[name]) for name in [*RUN, *EVALUATION] if name in row)
                print(f"{number} of {len(missing)}: {text}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not begin the runs that still wait
    return failed


# ------------------------------------------------------------------------------------- statistics


def values(name, options, algorithm, column):
    """One number for each seed of an experiment, in the order of the seeds; arrays for curves."""
    found = {}
    for row in read_rows(RESULTS):
        if (row["options"], row["algorithm"]) == (options, algorithm):
            found[int(row["seed"])] = [float(number) for number in row[column].split()]
    seeds = sorted({seed for its_options, _, seed in EXPERIMENTS[name] if its_options == options})
    curves = np.array([found[seed] for seed in seeds if seed in found])
    return curves if column.startswith(("curve_", "stops_")) else curves[:, 0]


def at_stop(name, options, algorithm, iterations):
    """The evaluations of runs that were stopped on their way, after so many iterations.

    A dictionary with those keys of EVALUATION that the scenario has, one number for each seed, as
    `values` gives them.
    """
    place = list(STOPPED_AFTER[options]).index(iterations)
    found = {one: values(name, options, algorithm, f"stops_{one}") for one in EVALUATION}
    return {one: runs[:, place] for one, runs in found.items() if runs.shape[1] > 0}


def at_end(name, options, algorithm):
    """The evaluations after the last iteration, like `at_stop`."""
    return {column: values(name, options, algorithm, column) for column in EVALUATION}


def interval(differences):
    """Student's 95% interval of the mean of paired differences; no width if all are equal."""
    if np.ptp(differences) == 0:
        return differences[0], differences[0]
    center, width = differences.mean(), stats.sem(differences)
    return stats.t.interval(0.95, len(differences) - 1, center, width)


def probability_of_improvement(ours, theirs):
    """P(X > Y) + P(X = Y) / 2 over all pairs of runs (Agarwal et al. 2021, arXiv:2108.13264)."""
    return ((ours[:, None] > theirs) + (ours[:, None] == theirs) / 2).mean()


def coverage(population, draws=20_000, n=10):
    """How often the interval from n paired differences drawn from `population` holds its mean."""
    generator = np.random.default_rng(0)
    samples = generator.choice(population, (draws, n))
    width = stats.t.ppf(0.975, n - 1) * stats.sem(samples, axis=1)
    return (np.abs(samples.mean(axis=1) - population.mean()) <= width + 1e-12).mean()


def print_coverage():
    """Print the coverage of the intervals of each table, from its own differences as population."""
    for name, labels in TABLES.items():
        for options, label in labels.items():
            cells = []
            for column in EVALUATION:
                ours, theirs = (
                    values(name, options, algorithm, column) for algorithm in ("MAPPO", "IPPO")
                )
                if np.ptp(ours - theirs) > 0:
                    cells.append(f"{column} {coverage(ours - theirs, n=len(ours)):.2f}")
            print(f"{name}, {label}: {', '.join(cells)}")


def mean_and_worst(runs, column):
    """Such as `0.953 (worst 0.920)`."""
    worst = runs.min() if BETTER[column] == 1 else runs.max()
    return f"{runs.mean():.{DIGITS[column]}f} (worst {worst:.{DIGITS[column]}f})"


def difference(ours, theirs, column):
    """The mean of the paired differences, its interval, and the pairs in which ours is better.

    Such as `+0.08 [+0.02, +0.14], 9 of 10`. There is no interval where it could not be trusted: if
    of intervals from as many differences, drawn from these, less than 85% would hold their mean.
    """
    differences = ours - theirs
    if not differences.any():
        return "none"
    digits = DIGITS[column]
    text = f"{differences.mean():+.{digits}f}"
    if np.ptp(differences) > 0 and coverage(differences, n=len(differences)) >= TRUSTED:
        low, high = interval(differences)
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    better = (BETTER[column] * differences > 0).sum()
    return f"{text}, {better} of {len(differences)}"


def probability_better(ours, theirs, column):
    """The probability that one of our runs does better in this column than one of theirs."""
    sign = BETTER[column]
    return f"{probability_of_improvement(sign * ours, sign * theirs):.2f}"


def line_of(*cells):
    """A line of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table(name):
    """An experiment as a Markdown table: for each algorithm the mean and the worst run.

    Below them the mean difference between the runs of a seed, MAPPO less IPPO, with its interval,
    and the probability that a run of MAPPO does better than one of IPPO.
    """
    lines = [
        "| | algorithm | runs | success rate | reward per agent | steps | collisions |",
        "|---|---|---|---|---|---|---|",
    ]
    for options, label in TABLES[name].items():
        ours, theirs = (at_end(name, options, algorithm) for algorithm in ("MAPPO", "IPPO"))
        for algorithm, found in (("MAPPO", ours), ("IPPO", theirs)):
            cells = [mean_and_worst(found[column], column) for column in EVALUATION]
            lines.append(line_of(label, algorithm, len(found["success_rate"]), *cells))
        cells = [difference(ours[one], theirs[one], one) for one in EVALUATION]
        lines.append(line_of(label, "difference", f"{len(ours['success_rate'])} pairs", *cells))
        cells = [probability_better(ours[one], theirs[one], one) for one in EVALUATION]
        lines.append(f"| {label} | P(MAPPO better) | | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_time(name, options, stops, columns):
    """A Markdown table of runs that were evaluated on their way: both algorithms at these stops.

    `columns` says which two columns of an evaluation it shows, and what it calls them.
    """
    head = ["IPPO", "difference", "P(MAPPO better)"]
    titles = [title for label in columns.values() for title in (f"{label}: MAPPO", *head)]
    lines = [line_of("iterations", *titles), line_of(*["---"] * 9)]
    for iterations in stops:
        ours, theirs = (
            at_stop(name, options, algorithm, iterations) for algorithm in ("MAPPO", "IPPO")
        )
        cells = []
        for column in columns:
            cells += [mean_and_worst(found[column], column) for found in (ours, theirs)]
            cells.append(difference(ours[column], theirs[column], column))
            cells.append(probability_better(ours[column], theirs[column], column))
        lines.append(line_of(iterations, *cells))
    return "\n".join(lines)


def lasting():
    """A Markdown table of the long runs: success and reward of both algorithms at their stops."""
    columns = {"success_rate": "success", "episode_reward": "reward"}
    return over_time("lasting", "--n-iters 50", STOPPED_AFTER["--n-iters 50"], columns)


def transport():
    """A Markdown table of the other scenario: success and steps of both algorithms."""
    columns = {"success_rate": "success", "episode_length": "steps"}
    return over_time("transport", TRANSPORT, STOPPED_AFTER[TRANSPORT], columns)


def arrivals():
    """A Markdown table of the step in which the last robot arrives, in a run's last batch."""
    options = f"--n-iters 10 # {MEASURED}"
    labels = ["value before it", "reward of it", "advantage of it, in standard deviations"]
    lines = [
        line_of(
            "in the step of the last arrival", "MAPPO", "IPPO", "difference", "P(MAPPO higher)"
        ),
        line_of(*["---"] * 5),
    ]
    for column, label in zip(ARRIVALS, labels, strict=True):
        ours, theirs = (
            values("arrivals", options, algorithm, f"curve_{column}")[:, -1]
            for algorithm in ("MAPPO", "IPPO")
        )
        cells = [
            f"{runs.mean():.2f} ({runs.min():.2f} to {runs.max():.2f})" for runs in (ours, theirs)
        ]
        probability = f"{probability_of_improvement(ours, theirs):.2f}"
        lines.append(line_of(label, *cells, difference(ours, theirs, column), probability))
    return "\n".join(lines)


def against_the_first(variants, column="success_rate"):
    """A Markdown table: variants of a run, and how they differ from the first of them in a column.

    `variants` are pairs of a label and evaluations as `at_end` gives them. What the column is
    called stands in the head of the table.
    """
    titles = {"success_rate": "success rate", "episode_reward": "reward per agent"}
    titles |= {"episode_length": "steps", "collisions": "collisions"}
    head = ["", "runs", *titles.values()]
    head += [f"{titles[column]}: difference to the first", "P(better)"]
    lines = [line_of(*head), line_of(*["---"] * 8)]
    reference = variants[0][1][column]
    for label, found in variants:
        cells = [mean_and_worst(found[one], one) for one in EVALUATION]
        compared = ["", ""]
        if found[column] is not reference:
            compared = [difference(found[column], reference, column)]
            compared.append(probability_better(found[column], reference, column))
        lines.append(line_of(label, len(found[column]), *cells, *compared))
    return "\n".join(lines)


def ends():
    """A Markdown table of IPPO after 15 iterations, with one cause or another taken away."""
    variants = [("the default", at_stop("lasting", "--n-iters 50", "IPPO", 15))]
    variants += [(label, at_end("ends", options, "IPPO")) for options, label in ENDS.items()]
    return against_the_first(variants)


def shared_or_not():
    """MAPPO with networks that are shared, or are not: pairs of a label and evaluations."""
    variants = [("both shared, the default", at_end("flag", "", "MAPPO"))]
    longer = at_stop("lasting", "--n-iters 50", "MAPPO", 30)
    separate = "--no-share-parameters-policy"
    variants.append(("separate policies", at_end("policies", separate, "MAPPO")))
    for options, label in SHARING.items():
        variants.append((label, at_end("sharing", options, "MAPPO")))
    variants.append(("both shared, 30 iterations", longer))
    return variants


def sharing():
    """A Markdown table of MAPPO with networks that are shared, or are not."""
    return against_the_first(shared_or_not())


def told_with_eight():
    """What the critics see, with eight robots paid as a team: pairs of a label and evaluations."""
    team = f"{EIGHT} {SHARED}"
    variants = [("IPPO", at_end("payment", team, "IPPO"))]
    for options, label in TOLD_EIGHT.items():
        variants.append((f"IPPO, told {label}", at_end("told", options, "IPPO")))
    variants.append(("MAPPO", at_end("payment", team, "MAPPO")))
    return variants


def told_eight():
    """A Markdown table of what the critics see, with eight robots paid as a team."""
    return against_the_first(told_with_eight(), "episode_length")


def told_long():
    """A Markdown table of success with three robots, after 10, 15 and 20 iterations."""
    stops = (10, 15, 20)
    lines = [line_of("success rate after", *(f"{number} iterations" for number in stops))]
    lines.append(line_of(*["---"] * 4))
    for label, *run in [
        ("IPPO", "lasting", "--n-iters 50", "IPPO"),
        ("IPPO, told the others' ways", "told", TOLD_LONG, "IPPO"),
        ("MAPPO", "lasting", "--n-iters 50", "MAPPO"),
    ]:
        found = [at_stop(*run, iterations)["success_rate"] for iterations in stops]
        lines.append(line_of(label, *(mean_and_worst(one, "success_rate") for one in found)))
    return "\n".join(lines)


def slopes():
    """A Markdown table of how a critic's value falls as one robot alone comes nearer."""
    told = [f"{options} + {SLOPES}" for options in TOLD_EIGHT]
    lines = [
        line_of("8 robots, paid", "the critic sees", "its value falls by", "success rate", "steps"),
        line_of(*["---"] * 5),
    ]
    for payment, sees, options, algorithm in [
        ("each for itself", "its observation: IPPO", f"{EACH_PAID} # {SLOPES}", "IPPO"),
        ("each for itself", "all observations: MAPPO", f"{EACH_PAID} # {SLOPES}", "MAPPO"),
        ("as a team", "all observations: MAPPO", f"{TEAM_PAID} # {SLOPES}", "MAPPO"),
        ("as a team", "its own, and the others' ways", told[0], "IPPO"),
        ("as a team", "its observation: IPPO", f"{TEAM_PAID} # {SLOPES}", "IPPO"),
        ("as a team", "its own, and its own way", told[1], "IPPO"),
    ]:
        fall = values("slopes", options, algorithm, f"curve_{SLOPE}")[:, -1]
        cells = [f"{fall.mean():.2f} ({fall.min():.2f} to {fall.max():.2f})"]
        for column in ("success_rate", "episode_length"):
            cells.append(mean_and_worst(values("slopes", options, algorithm, column), column))
        lines.append(line_of(payment, sees, *cells))
    return "\n".join(lines)


def slopes_long():
    """A Markdown table of the same with three robots, after some iterations with the defaults."""
    lines = [line_of("its value falls by", "5 iterations", "10", "15"), line_of(*["---"] * 4)]
    for label, algorithm, options in [
        ("MAPPO", "MAPPO", f"--n-iters 10 # {SLOPES}"),
        ("IPPO", "IPPO", f"--n-iters 15 # {SLOPES}"),
        (f"IPPO, {NO_ENDS}", "IPPO", f"--n-iters 15 # {NO_ENDS} + {SLOPES}"),
    ]:
        falls = values("slopes", options, algorithm, f"curve_{SLOPE}").T[4::5]
        cells = [f"{fall.mean():.2f} ({fall.min():.2f} to {fall.max():.2f})" for fall in falls]
        lines.append(line_of(label, *cells, *[""] * (3 - len(cells))))
    return "\n".join(lines)


def hurried():
    """A Markdown table of success with the recipes, and whether IPPO's is mended by a change."""
    lines = [line_of("success rate", "MAPPO", "IPPO", f"IPPO, {NO_ENDS}", "IPPO, told")]
    lines.append(line_of(*["---"] * 5))
    for label, options in RECIPES.items():
        found = [
            values("recipes", options, algorithm, "success_rate") for algorithm in ("MAPPO", "IPPO")
        ]
        for change in (NO_ENDS, TOLD):
            found.append(values("hurried", f"{options} # {change}", "IPPO", "success_rate"))
        lines.append(line_of(label, *(mean_and_worst(one, "success_rate") for one in found)))
    return "\n".join(lines)


def own_critics():
    """A Markdown table of 8 robots, each paid for itself, with one critic or one for each."""
    variants = {
        "MAPPO, one critic for all": ("payment", EACH_PAID, "MAPPO"),
        "MAPPO, one for each robot": ("critics", OWN_CRITICS, "MAPPO"),
        "IPPO, one critic for all": ("payment", EACH_PAID, "IPPO"),
    }
    titles = ["", "runs", "steps", "difference to the first", "P(better)"]
    lines = [line_of(*titles, "explained variance, last batch"), line_of(*["---"] * 6)]
    first = values(*variants["MAPPO, one critic for all"], "episode_length")
    for label, runs in variants.items():
        steps = values(*runs, "episode_length")
        explained = values(*runs, "curve_explained_variance")[:, -1].mean()
        compared = ["", ""]
        if label != "MAPPO, one critic for all":
            compared = [difference(steps, first, "episode_length")]
            compared.append(probability_better(steps, first, "episode_length"))
        cells = [len(steps), mean_and_worst(steps, "episode_length"), *compared]
        lines.append(line_of(label, *cells, f"{explained:.2f}"))
    return "\n".join(lines)


def critics():
    """A Markdown table of what the critics knew: means over runs, after some iterations."""
    which = {"first batch": 0, "fifth": 4, "last": -1}
    head = ["", "algorithm"]
    head += [f"explained variance, {place}" for place in which]
    head += [f"deviation of advantages, {place}" for place in which]
    lines = [line_of(*head), line_of(*["---"] * len(head))]
    for options, label in TABLES["payment"].items():
        for algorithm in ("MAPPO", "IPPO"):
            cells = []
            for column in ("explained_variance", "advantage_std"):
                curves = values("payment", options, algorithm, f"curve_{column}")
                cells += [f"{curves[:, place].mean():.2f}" for place in which.values()]
            lines.append(line_of(label, algorithm, *cells))
    return "\n".join(lines)


def successful():
    """A Markdown table of the steps of the episodes that succeed, with MAPPO and with IPPO."""
    lines = [line_of("steps of successful episodes", "MAPPO", "IPPO", "difference")]
    lines.append(line_of(*["---"] * 4))
    tables = {"both": {"": "3 robots, defaults"}, "payment": {TEAM_PAID: "8 robots, team paid"}}
    for name, labels in tables.items():
        for options, label in labels.items():
            found = []
            for algorithm in ("MAPPO", "IPPO"):
                runs = at_end(name, options, algorithm)
                failed = 1 - runs["success_rate"]
                found.append((runs["episode_length"] - 100 * failed) / (1 - failed))
            cells = [f"{steps.mean():.1f}" for steps in found]
            lines.append(line_of(label, *cells, difference(*found, "episode_length")))
    return "\n".join(lines)


def shares():
    """A Markdown table of the reward as a share of what could be earned on the whole way."""
    lines = [line_of("", "attainable", "MAPPO", "IPPO"), line_of(*["---"] * 4)]
    places = {"": ("flag", "3 robots, defaults")}
    places |= {options: ("teams", f"{label}, thorough") for options, label in TEAMS.items()}
    places[TEAM_PAID] = ("payment", "8 robots that cannot collide, team paid")
    for options, (name, label) in places.items():
        [whole] = values("attainable", options, ATTAINABLE, "episode_reward")
        found = [
            values(name, options, algorithm, "episode_reward").mean() / whole
            for algorithm in ("MAPPO", "IPPO")
        ]
        lines.append(line_of(label, f"{whole:.2f}", *(f"{100 * share:.0f}%" for share in found)))
    return "\n".join(lines)


def turns_of(rows, table):
    """The rows of one speed table: {(name, algorithm): seconds for each turn, over the amount}."""
    found = {}
    for row in rows:
        if row["table"] == table:
            each = float(row["seconds"]) / float(row["amount"])
            found.setdefault((row["name"], row["algorithm"]), []).append(each)
    return {key: np.array(turns) for key, turns in found.items()}


def ratio(these, those):
    """The median of `these` over `those`, turn by turn, with the lowest and the highest."""
    ratios = these / those
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def speed_of_trainings(rows):
    """A Markdown table of whole trainings by the recipes, in iterations with the defaults."""
    turns = turns_of(rows, "trainings")
    iteration = turns.pop(("defaults", "MAPPO"))
    lines = [line_of("whole trainings", "algorithm", "seconds, median", "default iterations")]
    lines.append(line_of(*["---"] * 4))
    for (name, algorithm), taken in turns.items():
        lines.append(line_of(name, algorithm, f"{np.median(taken):.1f}", ratio(taken, iteration)))
    return "\n".join(lines)


def speed_of_steps(rows):
    """A Markdown table of a gradient step by the script and in bare PyTorch."""
    turns = turns_of(rows, "steps")
    bare = turns["the same in bare PyTorch", "MAPPO"]
    lines = [line_of("a gradient step", "milliseconds, median", "times the bare one")]
    lines.append(line_of(*["---"] * 3))
    for (name, _), taken in turns.items():
        lines.append(line_of(name, f"{1000 * np.median(taken):.2f}", ratio(taken, bare)))
    return "\n".join(lines)


def speed_of_collection(rows):
    """A Markdown table of the collector and of the simulator alone, with random actions."""
    turns = turns_of(rows, "collection")
    lines = [
        line_of("environments", "frames per second", "VMAS alone, random actions", "times as long")
    ]
    lines.append(line_of(*["---"] * 4))
    for name in [name for name, _ in turns if "," not in name]:
        ours, alone = turns[name, "MAPPO"], turns[f"{name}, VMAS alone", "MAPPO"]
        speeds = [f"{1 / np.median(taken):,.0f}" for taken in (ours, alone)]
        lines.append(line_of(name, *speeds, ratio(ours, alone)))
    return "\n".join(lines)


SPEED_TABLES = {
    "speed-of-trainings": speed_of_trainings,
    "speed-of-steps": speed_of_steps,
    "speed-of-collection": speed_of_collection,
}


def make_table(name):
    """The table that study/README.md calls `name`, in Markdown."""
    if name in TABLES:
        return table(name)
    if name in SPEED_TABLES:
        return SPEED_TABLES[name](read_rows(SPEED))
    others = {
        "critics": critics,
        "successful": successful,
        "shares": shares,
        "own-critics": own_critics,
        "lasting": lasting,
        "arrivals": arrivals,
        "ends": ends,
        "told-eight": told_eight,
        "told-long": told_long,
        "slopes": slopes,
        "slopes-long": slopes_long,
        "hurried": hurried,
        "sharing": sharing,
        "transport": transport,
    }
    return others[name]()


def with_tables(text):
    """A README's text with the tables between <!-- table:NAME --> and <!-- /table --> made anew."""
    return re.sub(
        r"<!-- table:([\w-]+) -->.*?<!-- /table -->",
        lambda found: f"<!-- table:{found[1]} -->\n{make_table(found[1])}\n<!-- /table -->",
        text,
        flags=re.DOTALL,
    )


# ---------------------------------------------------------------------------------------- figures


def mark_of(algorithm):
    """How the mark of a run is drawn: MAPPO's filled and IPPO's open, which shows in print, too."""
    color = COLOR[algorithm]
    inside = color if algorithm == "MAPPO" else "white"
    style = {"linestyle": "none", "marker": MARKER[algorithm], "markersize": 5}
    return {**style, "color": color, "markerfacecolor": inside}


def draw_marks(axes, place, runs, algorithm, **label):
    """A mark for each run beside one another, so that equal ones can be counted, and their mean."""
    where = place + np.linspace(-0.09, 0.09, len(runs))
    axes.plot(where, runs, **mark_of(algorithm), **label)
    axes.hlines(runs.mean(), place - 0.14, place + 0.14, color="black", linewidth=2)


def draw_pairs(axes, name, column):
    """One column of an experiment: a mark for each run, a line between the two of a seed."""
    for place, options in enumerate(TABLES[name]):
        ours, theirs = (values(name, options, one, column) for one in ("MAPPO", "IPPO"))
        shift = np.linspace(-0.09, 0.09, len(ours))
        for one, other, beside in zip(ours, theirs, shift, strict=True):
            where = [place - 0.22 + beside, place + 0.22 + beside]
            axes.plot(where, [one, other], color="lightgray", linewidth=1, zorder=0)
        draw_marks(axes, place - 0.22, ours, "MAPPO", label="MAPPO, a run")
        draw_marks(axes, place + 0.22, theirs, "IPPO", label="IPPO, a run")
    axes.set_xticks(range(len(TABLES[name])), TABLES[name].values())
    axes.set_xlim(-0.5, len(TABLES[name]) - 0.5)
    axes.grid(axis="y", alpha=0.3)


def draw_comparison(name, what):
    """An experiment's success rate and steps, as study/NAME.png; `what` says what its options are.

    Runs of one seed are joined by a line.
    """
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_pairs(left, name, "success_rate")
    left.set(ylabel="success rate", ylim=(-0.03, 1.05))
    draw_pairs(right, name, "episode_length")
    right.set(ylabel=STEPS, ylim=(30, 102))
    for axes in (left, right):
        axes.set_xlabel(what)
    handles, labels = left.get_legend_handles_labels()
    handles = [*handles[:2], left.plot([], [], color="black", linewidth=2)[0]]
    handles.append(left.plot([], [], color="lightgray")[0])
    labels = [*labels[:2], "mean", "the same seed"]
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    figure.savefig(STUDY / f"{name}.png", dpi=120)


def draw_flag():
    """The success rate while learning and after it, with the defaults: study/flag.png."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    for algorithm, line in (("MAPPO", "-"), ("IPPO", "--")):
        curves = values("flag", "", algorithm, "curve_success_rate")
        frames = 6000 * np.arange(1, curves.shape[1] + 1)
        color = COLOR[algorithm]
        left.plot(frames, curves.T, line, color=color, linewidth=0.6, alpha=0.5)
        label = f"{algorithm}, mean of {len(curves)} runs"
        left.plot(frames, curves.mean(axis=0), line, color=color, linewidth=2.5, label=label)
        place = 0 if algorithm == "MAPPO" else 1
        draw_marks(right, place, values("flag", "", algorithm, "success_rate"), algorithm)
    left.set(title="while learning: actions are drawn", xlabel="frames")
    left.set(ylabel="success rate", ylim=(-0.03, 1.03))
    left.legend(loc="upper left")
    left.grid(axis="y", alpha=0.3)
    right.set(title="after it: deterministic", xlim=(-0.5, 1.5))
    right.set_xticks([0, 1], ["MAPPO", "IPPO"])
    right.grid(axis="y", alpha=0.3)
    figure.savefig(STUDY / "flag.png", dpi=120)


def draw_over_time(name, options, columns):
    """Runs that were evaluated on their way, over their iterations, as study/NAME.png.

    `columns` says which two columns of an evaluation it shows: {column: (what it is, its limits)}.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    both = figure.subplots(1, 2)
    iterations = STOPPED_AFTER[options]
    for axes, (column, (ylabel, ylim)) in zip(both, columns.items(), strict=True):
        for algorithm, line in (("MAPPO", "-"), ("IPPO", "--")):
            runs = values(name, options, algorithm, f"stops_{column}")
            color, marker = COLOR[algorithm], MARKER[algorithm]
            axes.plot(iterations, runs.T, line, color=color, linewidth=0.6, alpha=0.5)
            label = f"{algorithm}, mean of {len(runs)} runs"
            style = {"color": color, "linewidth": 2.5, "marker": marker, "label": label}
            axes.plot(iterations, runs.mean(axis=0), line, **style)
        axes.set(xlabel="iterations", ylabel=ylabel, ylim=ylim)
        axes.grid(axis="y", alpha=0.3)
    both[0].legend(loc="center right")
    figure.savefig(STUDY / f"{name}.png", dpi=120)


def draw_variants(name, variants, columns):
    """Variants of a run, a mark for each run, as study/NAME.png.

    `variants` are pairs of a label and evaluations; `columns` as in `draw_over_time`.
    """
    figure = Figure(figsize=(8, 0.9 + 0.5 * len(variants)), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, (column, (xlabel, xlim)) in zip(both, columns.items(), strict=True):
        for place, (label, found) in enumerate(variants):
            algorithm = "IPPO" if label.startswith("IPPO") else "MAPPO"
            runs = found[column]
            where = place + np.linspace(-0.2, 0.2, len(runs))
            axes.plot(runs, where, **mark_of(algorithm))
            axes.vlines(runs.mean(), place - 0.3, place + 0.3, color="black", linewidth=2)
        axes.set(xlabel=xlabel, xlim=xlim)
        axes.grid(axis="x", alpha=0.3)
    labels = [textwrap.fill(label, 34) for label, _ in variants]
    both[0].set_yticks(range(len(variants)), labels)
    both[0].set_ylim(len(variants) - 0.5, -0.5)  # the first on top
    figure.savefig(STUDY / f"{name}.png", dpi=120)


def draw_figures():
    """All figures of study/README.md, from the rows."""
    draw_flag()
    draw_comparison("payment", "what each of 8 robots is paid for")
    draw_comparison("epochs", "passes over each batch")
    draw_comparison("recipes", "recipe")
    draw_comparison("teams", "size of the team, thorough recipe")
    success = ("success rate, deterministic policy", (-0.03, 1.03))
    reward = ("reward per agent, deterministic policy", (0, 3.4))
    columns = {"success_rate": success, "episode_reward": reward}
    draw_over_time("lasting", "--n-iters 50", columns)
    columns = {
        "success_rate": success,
        "episode_length": ("steps (a failed episode counts as 200)", (40, 125)),
    }
    draw_over_time("transport", TRANSPORT, columns)
    columns = {
        "success_rate": ("success rate", (-0.03, 1.05)),
        "episode_length": (STEPS, (50, 102)),
    }
    draw_variants("told", told_with_eight(), columns)
    draw_variants("sharing", shared_or_not(), columns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "report", "coverage"])
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}")
    arguments = parser.parse_args()
    unknown = set(arguments.experiments) - set(EXPERIMENTS)
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if arguments.command == "run":
        sys.exit(1 if run_missing(arguments.experiments or list(EXPERIMENTS)) else 0)
    if arguments.command == "report":
        README.write_text(with_tables(README.read_text("utf-8")), encoding="utf-8")
        draw_figures()
    if arguments.command == "coverage":
        print_coverage()
