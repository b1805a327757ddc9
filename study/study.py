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
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

STUDY = Path(__file__).resolve().parent
SCRIPT = STUDY.parent / "train_mappo.py"
RESULTS = STUDY / "results.csv"
README = STUDY / "README.md"

# What a row of results.csv says: which run it is, its evaluation, and its curves, a value for each
# iteration, separated by spaces.
RUN = ["experiment", "options", "algorithm", "seed"]
EVALUATION = ["success_rate", "episode_reward", "episode_length", "collisions"]
CURVES = ["success_rate", "episode_reward", "explained_variance", "advantage_std", "kl_approx"]
ARRIVALS = ["value_at_arrival", "reward_at_arrival", "advantage_at_arrival"]  # see CHANGES
STOPS = [f"stops_{name}" for name in EVALUATION]  # the evaluation at each stop, where there are any
COLUMNS = [*RUN, *EVALUATION, "training_seconds", *(f"curve_{name}" for name in CURVES), *STOPS]
COLUMNS += [f"curve_{name}" for name in ARRIVALS]
DIGITS = {"success_rate": 3, "episode_reward": 2, "episode_length": 1, "collisions": 3}
BETTER = {"success_rate": 1, "episode_reward": 1, "episode_length": -1, "collisions": -1}
COLOR = {"MAPPO": "tab:blue", "IPPO": "tab:orange"}
MARKER = {"MAPPO": "o", "IPPO": "s"}

EIGHT = "--n-agents 8 --lr 1e-3 --anneal-lr --num-epochs 10 --num-cells 128"
SHARED = """--scenario-options '{"collisions": false, "shared_rew": true}'"""
OWN = """--scenario-options '{"collisions": false, "shared_rew": false}'"""

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

# A few runs are of the script with a piece of its text replaced. The comment at the end of their
# options says which: a shell does not read it, and a row of results.csv shows it.
MEASURED = "arrivals measured"
NO_ENDS = "arrivals do not end an episode"
TWO_PROCESSES = "two processes"
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
OWN_CRITICS = f"{EIGHT} {OWN} --no-share-parameters-critic"

# IPPO's critic with one number more, over twenty iterations and with eight robots paid as a team.
ONE_NUMBER = {TOLD: "the others' ways", TOLD_ITS_OWN: "its own robot's way"}
TOLD_LONG = {f"--n-iters 20 # {change}": label for change, label in ONE_NUMBER.items()}
TOLD_EIGHT = {f"{EIGHT} {SHARED} # {change}": label for change, label in ONE_NUMBER.items()}
# Do the runs of IPPO that fell behind in "recipes" and "teams" do so for the same reason?
HURRIED = {
    f"{options} # {change}": f"{name}, {change}"
    for options, name in {**{RECIPES[name]: name for name in RECIPES}, **TEAMS}.items()
    for change in (NO_ENDS, TOLD)
}

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
    "payment": [*pairs(f"{EIGHT} {SHARED}"), *pairs(f"{EIGHT} {OWN}")],
    "epochs": [*pairs("--num-epochs 5"), *pairs("--num-epochs 10")],
    "horizon": pairs("--gamma 0.9"),
    "policies": pairs("--no-share-parameters-policy"),
    "recipes": [*pairs(RECIPES["quick"]), *pairs(RECIPES["thorough"])],
    "rejected": pairs(RECIPES["thorough"].replace("epochs 8", "epochs 10")),
    "teams": [run for options in TEAMS for run in pairs(options)],
    "lasting": pairs("--n-iters 50"),
    "arrivals": pairs(f"--n-iters 10 # {MEASURED}"),
    "ends": [(options, "IPPO", seed) for options in ENDS for seed in range(10)],
    "unended": [*pairs(f"# {NO_ENDS}"), *pairs(f"{EIGHT} {SHARED} # {NO_ENDS}")],
    "critics": [(OWN_CRITICS, "MAPPO", seed) for seed in range(10)],
    "sharing": [(options, "MAPPO", seed) for options in SHARING for seed in range(10)],
    "told": [(run, "IPPO", seed) for run in (*TOLD_EIGHT, *TOLD_LONG) for seed in range(10)],
    "hurried": [(options, "IPPO", seed) for options in HURRIED for seed in range(10)],
    "processes": [(f"# {TWO_PROCESSES}", "MAPPO", seed) for seed in range(10)],
    "transport": pairs(TRANSPORT),
    "unsolved": pairs(GIVE_WAY, seeds=[0]),
}
# Runs that are evaluated on their way: stopped after these iterations, and gone on with.
STOPPED_AFTER = {"--n-iters 50": range(5, 51, 5), TRANSPORT: (5, 10, 20, 40)}
STOPPED_AFTER |= {options: (10, 15, 20) for options in TOLD_LONG}
# Which options an experiment's table compares, and what it calls them.
TABLES = {
    "flag": {"": "seeds 0 to 9"},
    "fresh": {"": "seeds 10 to 19"},
    "payment": {f"{EIGHT} {SHARED}": "the team's progress", f"{EIGHT} {OWN}": "its own progress"},
    "epochs": {"--num-epochs 5": "5 epochs", "--num-epochs 10": "10 epochs"},
    "horizon": {"--gamma 0.9": "gamma 0.9"},
    "policies": {"--no-share-parameters-policy": "separate policies"},
    "recipes": {options: name for name, options in RECIPES.items()},
    "teams": TEAMS,
    "unended": {
        f"# {NO_ENDS}": "3 robots, defaults",
        f"{EIGHT} {SHARED} # {NO_ENDS}": "8 robots, the team's progress",
    },
}


# ------------------------------------------------------------------------------------------- runs


def script_for(options, folder):
    """The script that `options` ask for: the project's, or a changed copy of it in `folder`."""
    change = options.partition("# ")[2]
    if change in ("", TWO_PROCESSES):
        return SCRIPT
    old, new = CHANGES[change]
    text = SCRIPT.read_text("utf-8")
    if text.count(old) != 1:
        raise RuntimeError(f"{change}: {SCRIPT.name} must hold the text to be replaced once: {old}")
    changed = Path(folder, SCRIPT.name)
    changed.write_text(text.replace(old, new), encoding="utf-8")
    return changed


def with_success(measured):
    """Measurements in which success is called so in every scenario, not "terminated_rate"."""
    return {{"terminated_rate": "success_rate"}.get(key, key): measured[key] for key in measured}


def train(experiment, options, algorithm, seed, threads=1):
    """Do one run on `threads` threads and return its row, a dictionary with the keys COLUMNS.

    Raises a RuntimeError if the run fails.
    """
    flag = "--mappo" if algorithm == "MAPPO" else "--no-mappo"
    evaluations = []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "run")
        given = ["--device", "cpu", flag, "--seed", str(seed), "--run-folder", str(folder)]
        script = script_for(options, parent)
        program = [sys.executable]
        if options.endswith(f"# {TWO_PROCESSES}"):
            program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*program, str(script), *shlex.split(options, comments=True), *given]
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
            evaluations.append(with_success(evaluation["trained"]))
        with open(folder / "metrics.csv", newline="") as file:
            rows = [with_success(line) for line in csv.DictReader(file)]
    row = {"experiment": experiment, "options": options, "algorithm": algorithm, "seed": seed}
    for name in EVALUATION:
        numbers = [f"{trained[name]:.4f}" for trained in evaluations if name in trained]
        row[name] = numbers[-1] if numbers else ""
        row[f"stops_{name}"] = " ".join(numbers) if stops else ""
    row["training_seconds"] = f"{sum(float(line['seconds']) for line in rows):.1f}"
    for name in [*CURVES, *ARRIVALS]:
        numbers = [f"{float(line[name] or 'nan'):.4f}" for line in rows if name in line]
        row[f"curve_{name}"] = " ".join(numbers)
    return row


def read_results():
    """The rows of results.csv, as a list of dictionaries of strings; none if there is no file."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def add_result(row):
    """Add a row to results.csv, after the names of the columns if it is the first."""
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def run_missing(names):
    """Do the runs of these experiments that results.csv lacks; return how many of them failed."""
    done = {tuple(row[column] for column in RUN[1:]) for row in read_results()}
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
                text = ", ".join(str(row[name]) for name in [*RUN, *EVALUATION])
                print(f"{number} of {len(missing)}: {text}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not begin the runs that still wait
    return failed


# ------------------------------------------------------------------------------------- statistics


def values(name, options, algorithm, column):
    """One number for each seed of an experiment, in the order of the seeds; arrays for curves."""
    found = {}
    for row in read_results():
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


def mean_and_worst(runs, column):
    """Such as `0.953 (worst 0.920)`."""
    worst = runs.min() if BETTER[column] == 1 else runs.max()
    return f"{runs.mean():.{DIGITS[column]}f} (worst {worst:.{DIGITS[column]}f})"


def difference(ours, theirs, digits):
    """The mean of the paired differences and its interval, such as `+0.08 [+0.02, +0.14]`."""
    low, high = interval(ours - theirs)
    return f"{(ours - theirs).mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


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
        cells = [difference(ours[one], theirs[one], DIGITS[one]) for one in EVALUATION]
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
            cells.append(difference(ours[column], theirs[column], DIGITS[column]))
            cells.append(probability_better(ours[column], theirs[column], column))
        lines.append(line_of(iterations, *cells))
    return "\n".join(lines)


def lasting():
    """A Markdown table of the long runs: success and reward of both algorithms at their stops."""
    columns = {"success_rate": "success", "episode_reward": "reward"}
    return over_time("lasting", "--n-iters 50", (5, 10, 15, 20, 30, 40, 50), columns)


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
        lines.append(line_of(label, *cells, difference(ours, theirs, 2), probability))
    return "\n".join(lines)


def against_the_first(variants):
    """Lines of a Markdown table: variants of a run, and their difference to the first of them.

    `variants` are pairs of a label and evaluations as `at_end` gives them.
    """
    lines = []
    reference = variants[0][1]["success_rate"]
    for label, found in variants:
        cells = [mean_and_worst(found[column], column) for column in EVALUATION]
        success = found["success_rate"]
        compared = ["", ""]
        if success is not reference:
            compared = [difference(success, reference, 3)]
            compared.append(probability_better(success, reference, "success_rate"))
        lines.append(line_of(label, len(success), *cells, *compared))
    return lines


AGAINST_THE_FIRST = [
    "| | runs | success rate | reward per agent | steps | collisions | success: difference to "
    "the default | P(better) |",
    line_of(*["---"] * 8),
]


def ends():
    """A Markdown table of IPPO after 15 iterations, with one cause or another taken away."""
    variants = [("the default", at_stop("lasting", "--n-iters 50", "IPPO", 15))]
    variants += [(label, at_end("ends", options, "IPPO")) for options, label in ENDS.items()]
    return "\n".join(AGAINST_THE_FIRST + against_the_first(variants))


def sharing():
    """A Markdown table of MAPPO with networks that are shared, or are not."""
    variants = [("both shared, the default", at_end("flag", "", "MAPPO"))]
    separate = "--no-share-parameters-policy"
    variants.append(("separate policies", at_end("policies", separate, "MAPPO")))
    for options, label in SHARING.items():
        variants.append((label, at_end("sharing", options, "MAPPO")))
    return "\n".join(AGAINST_THE_FIRST + against_the_first(variants))


def own_critics():
    """A Markdown table of 8 robots, each paid for itself, with one critic or one for each."""
    name, options = "payment", f"{EIGHT} {OWN}"
    variants = [
        ("MAPPO, one critic for all", name, options, "MAPPO"),
        ("MAPPO, one for each robot", "critics", OWN_CRITICS, "MAPPO"),
        ("IPPO, one critic for all", name, options, "IPPO"),
    ]
    theirs = values(name, options, "IPPO", "episode_length")
    lines = ["| | runs | steps | steps: difference to IPPO | explained variance, last batch |"]
    lines.append(line_of(*["---"] * 5))
    for label, *runs in variants:
        steps = values(*runs, "episode_length")
        explained = values(*runs, "curve_explained_variance")[:, -1].mean()
        compared = difference(steps, theirs, 1) if label != variants[-1][0] else ""
        cells = [len(steps), mean_and_worst(steps, "episode_length"), compared]
        lines.append(line_of(label, *cells, f"{explained:.2f}"))
    return "\n".join(lines)


def critics(name):
    """A Markdown table of what the critics knew: means over runs, first and last iteration."""
    lines = [
        "| | algorithm | explained variance, first batch | last | deviation of advantages, first "
        "| last |",
        "|---|---|---|---|---|---|",
    ]
    for options, label in TABLES[name].items():
        for algorithm in ("MAPPO", "IPPO"):
            cells = []
            for column in ("explained_variance", "advantage_std"):
                curves = values(name, options, algorithm, f"curve_{column}")
                cells += [f"{curves[:, 0].mean():.2f}", f"{curves[:, -1].mean():.2f}"]
            lines.append(f"| {label} | {algorithm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_tables(text):
    """A README's text with the tables between <!-- table:NAME --> and <!-- /table --> made anew."""

    def made(found):
        name = found[1]
        if name in TABLES:
            made_table = table(name)
        elif name.startswith("critics-"):
            made_table = critics(name.removeprefix("critics-"))
        else:
            others = {"lasting": lasting, "arrivals": arrivals, "ends": ends, "sharing": sharing}
            others |= {"own-critics": own_critics, "transport": transport}
            made_table = others[name]()
        return f"<!-- table:{name} -->\n{made_table}\n<!-- /table -->"

    return re.sub(r"<!-- table:([\w-]+) -->.*?<!-- /table -->", made, text, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------- figures


def draw_pairs(axes, name, column):
    """One column of an experiment: a mark for each run, a line between the two of a seed."""
    for place, options in enumerate(TABLES[name]):
        runs = {one: values(name, options, one, column) for one in ("MAPPO", "IPPO")}
        for ours, theirs in zip(runs["MAPPO"], runs["IPPO"], strict=True):
            axes.plot([place - 0.2, place + 0.2], [ours, theirs], color="lightgray", zorder=0)
        for algorithm, shift in (("MAPPO", -0.2), ("IPPO", 0.2)):
            where = [place + shift] * len(runs[algorithm])
            marker, color = MARKER[algorithm], COLOR[algorithm]
            axes.plot(where, runs[algorithm], marker, color=color, alpha=0.6, label=algorithm)
            axes.hlines(runs[algorithm].mean(), where[0] - 0.12, where[0] + 0.12, color="black")
    axes.set_xticks(range(len(TABLES[name])), TABLES[name].values())
    axes.set_xlim(-0.5, len(TABLES[name]) - 0.5)
    axes.grid(axis="y", alpha=0.3)


def draw_comparison(name, what, steps):
    """An experiment's success rate and steps, as study/NAME.png.

    `what` says what its options are; `steps` are the limits of the axis of the steps.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_pairs(left, name, "success_rate")
    left.set(ylabel="success rate", ylim=(-0.03, 1.05))
    draw_pairs(right, name, "episode_length")
    right.set(ylabel="steps until all are at their goals", ylim=steps)
    for axes in (left, right):
        axes.set_xlabel(what)
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[:2], labels[:2], loc="lower right")
    figure.savefig(STUDY / f"{name}.png", dpi=120)


def draw_flag():
    """The success rate in training, MAPPO and IPPO with the defaults: study/flag.png."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for algorithm, line in (("MAPPO", "-"), ("IPPO", "--")):
        curves = values("flag", "", algorithm, "curve_success_rate")
        ends = values("flag", "", algorithm, "success_rate")
        frames = 6000 * np.arange(1, curves.shape[1] + 1)
        color = COLOR[algorithm]
        axes.plot(frames, curves.T, line, color=color, linewidth=0.6, alpha=0.5)
        label = f"{algorithm}, mean of {len(curves)} runs"
        axes.plot(frames, curves.mean(axis=0), line, color=color, linewidth=2.5, label=label)
        where = frames[-1] + (1500 if algorithm == "MAPPO" else 3000)
        axes.plot([where] * len(ends), ends, MARKER[algorithm], color=color, alpha=0.5)
    axes.plot([], [], "o", color="gray", label="deterministic, after training")
    axes.set(xlabel="frames", ylabel="success rate, actions drawn", ylim=(-0.03, 1.03))
    axes.legend(loc="upper left")
    figure.savefig(STUDY / "flag.png", dpi=120)


def draw_lasting():
    """Success rate and reward at the stops of the long runs: study/lasting.png."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    iterations = STOPPED_AFTER["--n-iters 50"]
    for axes, column in ((left, "success_rate"), (right, "episode_reward")):
        for algorithm, line in (("MAPPO", "-"), ("IPPO", "--")):
            runs = values("lasting", "--n-iters 50", algorithm, f"stops_{column}")
            color, marker = COLOR[algorithm], MARKER[algorithm]
            axes.plot(iterations, runs.T, line, color=color, linewidth=0.6, alpha=0.5)
            label = f"{algorithm}, mean of {len(runs)} runs"
            style = {"color": color, "linewidth": 2.5, "marker": marker, "label": label}
            axes.plot(iterations, runs.mean(axis=0), line, **style)
        axes.axvline(10, color="gray", linestyle=":", zorder=0)
        axes.set_xlabel("iterations of 6000 frames (dotted: a default run)")
    left.set(ylabel="success rate, deterministic policy", ylim=(-0.03, 1.03))
    right.set(ylabel="reward per agent", ylim=(0, 3.4))
    left.legend(loc="center right")
    figure.savefig(STUDY / "lasting.png", dpi=120)


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
        draw_comparison("payment", "what each of 8 robots is paid for", (40, 100))
        draw_comparison("recipes", "recipe", (40, 100))
        draw_comparison("teams", "size of the team, thorough recipe", (30, 100))
        draw_flag()
        draw_lasting()
    if arguments.command == "coverage":
        for column in EVALUATION:
            both = [
                np.concatenate([values(name, "", one, column) for name in ("flag", "fresh")])
                for one in ("MAPPO", "IPPO")
            ]
            print(f"{column}: {coverage(both[0] - both[1]):.3f}")
