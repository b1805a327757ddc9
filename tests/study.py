"""The studies behind the README: many runs of train_mappo.py, their table of results, statistics and figures.

    python tests/study.py run                   do every run that assets/study.csv lacks, two at a time
    python tests/study.py run flag scenarios    only the runs of these experiments
    python tests/study.py report                print the README's tables and draw its figures, from assets/study.csv

A stopped study goes on where it was: each run adds its row to assets/study.csv as soon as it ends. Statistics follow
Agarwal et al. 2021 (arXiv:2108.13264). The seconds are those of runs side by side, on whatever else the machine did:
they are noted, but neither tabulated nor drawn (tests/benchmark.py measures time).
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"


class Run(NamedTuple):
    """What tells one run from another: columns of assets/study.csv, as they are written there."""
    scenario: str
    algorithm: str
    seed: str
    n_agents: str
    share_parameters_policy: str
    share_parameters_critic: str
    options: str


def runs(scenario, seeds, n_agents=3, algorithms=("MAPPO", "IPPO"), policy="True", critic="True", options=""):
    """One line of the table below, as a list of runs."""
    return [Run(scenario, algorithm, str(seed), str(n_agents), policy, critic, options)
            for seed in seeds for algorithm in algorithms]


LONG = "--n-iters 20 --num-epochs 15"  # twice the experience and the same number of gradient steps as the defaults
RECIPES = ["--gamma 0.9 --lr 1e-3 --anneal-lr --num-epochs 10", "--gamma 0.9 --lr 7e-4 --anneal-lr --num-epochs 15"]

# A run that several experiments name is done once. Scenarios other than navigation set their number of agents
# themselves, or have the default of 3.
EXPERIMENTS = {
    "flag": runs("navigation", range(10)),
    "scenarios": [*runs("multi_give_way", range(5), 4, options=LONG),
                  *runs("balance", range(3), options=LONG),
                  *runs("give_way", range(3), 2, options=LONG)],
    "sharing": [run for policy in ("True", "False") for critic in ("True", "False")
                for run in runs("navigation", range(3), algorithms=["MAPPO"], policy=policy, critic=critic)],
    "agents": [run for n_agents in (2, 3, 4, 8) for run in runs("navigation", range(3), n_agents)],
    "recipe": [run for options in ["", *RECIPES]
               for run in runs("navigation", range(5), algorithms=["MAPPO"], options=options)],
}
# What an experiment varies beside the algorithm and the seed, with its heading: runs that differ here differ in task.
VARIED = {"flag": {}, "scenarios": {"scenario": "scenario"}, "agents": {"n_agents": "agents"},
          "sharing": {"share_parameters_policy": "policy shared", "share_parameters_critic": "critic shared"},
          "recipe": {"options": "options"}}


class Metric(NamedTuple):
    """A result of a run: what train_mappo.py calls it, the decimals to print, and 1 if more is better, -1 if less."""
    label: str
    decimals: int
    sign: int


ENDED = "share that ended before max_steps"  # stands for the success rate in scenarios that do not tell success
METRICS = {"success_rate": Metric("success rate", 2, 1), "episode_reward": Metric("episode reward per agent", 2, 1),
           "episode_length": Metric("episode length in steps", 1, -1),
           "collisions": Metric("collisions per episode and agent", 3, -1),
           "seconds_per_iteration": Metric("seconds per iteration", 1, -1)}


# ---------------------------------------------------------------------------------------------------- runs and results


def train(run):
    """Do a run and return its results, strings in the order of METRICS; empty if the scenario does not report one."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"mappo": run.algorithm == "MAPPO", "share-parameters-policy": run.share_parameters_policy == "True",
                 "share-parameters-critic": run.share_parameters_critic == "True"}
        command = [sys.executable, ROOT / "train_mappo.py", "--device", "cpu", "--scenario-name", run.scenario,
                   "--seed", run.seed, "--n-agents", run.n_agents, "--output-dir", folder, *run.options.split(),
                   *("--" + "no-" * (not on) + flag for flag, on in flags.items())]
        ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{' '.join(run)}: exit status {ended.returncode}: {reason}")
        [table] = Path(folder).glob("*/metrics.csv")
        with open(table, newline="") as file:
            seconds = statistics.median(float(row["seconds"]) for row in csv.DictReader(file))
    number = r"(-?\d+\.\d+)"
    trained = {label: value for label, _, value in re.findall(rf"^(.+?) +{number} +{number}$", ended.stdout, re.M)}
    trained |= {"success rate": trained.get("success rate") or trained[ENDED], "seconds per iteration": seconds}
    return [as_written(trained.get(metric.label)) for metric in METRICS.values()]


def as_written(value):
    """A result as it stands in assets/study.csv: three decimals, no minus before a zero, empty for None."""
    return "" if value is None else f"{round(float(value), 3) + 0.0:.3f}"


def read():
    """Return {run: its results, numbers in the order of METRICS} from assets/study.csv; nan where it has none."""
    if not (ASSETS / "study.csv").exists():
        return {}
    with open(ASSETS / "study.csv", newline="") as file:
        return {Run(*(row[column] for column in Run._fields)): [float(row[metric] or "nan") for metric in METRICS]
                for row in csv.DictReader(file)}


def append(experiment, run, results):
    """Add a row to assets/study.csv, after a row of column names if it is the first."""
    with open(ASSETS / "study.csv", "a", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            rows.writerow(["experiment", *Run._fields, *METRICS])
        rows.writerow([experiment, *run, *results])


def run_missing(names):
    """Do the runs of the named experiments that assets/study.csv lacks; return how many of them failed."""
    results, missing, failed = read(), {}, 0
    for name in names:
        for run in EXPERIMENTS[name]:
            if run not in results:
                missing.setdefault(run, name)
    pool = ThreadPoolExecutor(max_workers=2)  # each thread waits for one process
    try:
        started = {pool.submit(train, run): run for run in missing}
        for done, future in enumerate(as_completed(started), start=1):
            run = started[future]
            try:
                append(missing[run], run, future.result())
                print(f"{done} of {len(missing)}: {missing[run]}, {' '.join(run)}", flush=True)
            except RuntimeError as error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C: do not begin the runs that still wait
    return failed


# ---------------------------------------------------------------------------------------------------------- statistics


def center(values, axis=-1):
    """The interquartile mean: the mean of what is left without the n // 4 least and greatest, as in Agarwal et al.

    Of 5 values or fewer it is the plain mean, because so few have no middle half worth the name.
    """
    return stats.trim_mean(values, 0.25 if values.shape[axis] > 5 else 0, axis=axis)


def improvement(*samples, axis=-1):
    """P(X > Y) + P(X = Y) / 2 for `samples` X, Y of one task, or its mean over tasks for X1, Y1, X2, Y2, ...

    Runs lie along the last dimension; `axis` says so too, as SciPy's bootstrap asks for it.
    """
    tasks = [((x[..., :, None] > y[..., None, :]) + (x[..., :, None] == y[..., None, :]) / 2).mean(axis=(-2, -1))
             for x, y in zip(samples[::2], samples[1::2])]
    return np.mean(tasks, axis=0)


def interval(statistic, *samples):
    """The stratified 95% bootstrap interval of statistic(*samples): each sample is resampled from its own runs alone.

    A percentile interval of 3 runs is rough: it cannot reach beyond the worst and the best of them, and where every
    run of one algorithm beats every run of the other, their probability of improvement is left without any width.
    One run has no interval: its value is returned twice.
    """
    if min(map(len, samples)) < 2:
        return [statistic(*samples)] * 2
    return stats.bootstrap(samples, statistic, n_resamples=10_000, batch=1000, vectorized=True, method="percentile",
                           random_state=np.random.RandomState(0)).confidence_interval  # the same in every version


def groups(name):
    """Return {task: {algorithm: {metric: array of one value a run}}} of the experiment's runs in assets/study.csv."""
    results, tasks = read(), {}
    for run in EXPERIMENTS[name]:
        if run in results:
            task = tuple(getattr(run, column) for column in VARIED[name])
            tasks.setdefault(task, {}).setdefault(run.algorithm, []).append(results[run])
    return {task: {algorithm: dict(zip(METRICS, np.array(rows).T)) for algorithm, rows in algorithms.items()}
            for task, algorithms in tasks.items()}


# -------------------------------------------------------------------------------------------------------------- tables


def cell(statistic, samples, decimals):
    """A statistic with its interval, as text; no interval for one run, nothing for results that were not reported."""
    if np.isnan(np.concatenate(samples)).any():
        return ""
    numbers = [statistic(*samples), *interval(statistic, *samples)]
    value, low, high = (f"{round(float(number), decimals) + 0.0:.{decimals}f}" for number in numbers)
    return value if max(map(len, samples)) == 1 else f"{value} [{low}, {high}]"


def table(name):
    """The experiment as a Markdown table: a row for each group and, where there are two, one that compares them.

    Cells read "interquartile mean [95% interval]" (of 5 runs or fewer: mean). In the rows P(MAPPO better) they are the
    probability that a run of MAPPO does better than one of IPPO: more reward and success, fewer steps and collisions.
    Where episodes may end in failure as well as in success, only the reward tells which is better.
    """
    tasks = groups(name)
    columns = ["episode_reward"] if name == "scenarios" else list(METRICS)[:4]

    def comparison(tasks):
        pairs = [task for task in tasks if len(task) == 2]
        samples = {metric: [METRICS[metric].sign * task[algorithm][metric] for task in pairs for algorithm in
                            ("MAPPO", "IPPO")] for metric in columns}
        return ["P(MAPPO better)", "", *(cell(improvement, samples[metric], 2) for metric in columns)]

    heads = [*VARIED[name].values(), "algorithm", "runs", *(METRICS[metric].label for metric in columns)]
    rows = [heads, ["---"] * len(heads)]
    for task, algorithms in tasks.items():
        shown = [{"True": "yes", "False": "no", "": "the defaults"}.get(v, f"`{v}`" if "-" in v else v) for v in task]
        for algorithm, group in algorithms.items():
            cells = [cell(center, [group[metric]], METRICS[metric].decimals) for metric in columns]
            rows.append([*shown, algorithm, str(len(group["episode_reward"])), *cells])
        if len(algorithms) == 2:
            rows.append([*shown, *comparison([algorithms])])
    if name == "scenarios" and sum(len(task) == 2 for task in tasks.values()) > 1:
        rows.append(["all of these", *comparison(tasks.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tables_in(text):
    """Return {name: table} of the tables that stand between <!-- study:name --> and <!-- /study --> in a text."""
    return {name: found.strip() for name, found in re.findall(r"<!-- study:(\w+) -->(.*?)<!-- /study -->", text, re.S)}


# ------------------------------------------------------------------------------------------------------------- figures

STYLES = {"MAPPO": {"marker": "o", "color": "tab:blue"}, "IPPO": {"marker": "s", "color": "tab:orange"}}


def panel(axis, metric, marks, width):
    """Draw groups of runs, `marks` being a list of (place, algorithm, values), each group about `width` wide.

    Small marks are single runs, and the large one beside them is their center with its interval.
    """
    for place, algorithm, values in marks:
        places = place + width * (np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1))
        axis.plot(places - 0.3 * width, values, **STYLES[algorithm], linestyle="", markersize=4.5, alpha=0.5,
                  markeredgewidth=0)
        middle, (low, high) = center(values), interval(center, values)
        reach = np.maximum([[middle - low], [high - middle]], 0)  # of equal runs, rounding could make it negative
        axis.errorbar(place + 0.3 * width, middle, reach, **STYLES[algorithm], markersize=8, markeredgecolor="black",
                      capsize=4, ecolor="black")
    axis.set_ylabel(METRICS[metric].label)
    axis.grid(axis="y", alpha=0.3)
    if metric == "success_rate":
        axis.set_ylim(-0.03, 1.03)
    elif metric == "collisions":
        top = axis.get_ylim()[1]
        axis.set_ylim(-0.03 * top, 1.03 * top)


def draw(name):
    """Draw the experiment into assets/study_NAME.png, unless it is the recipe, which needs none, or has no runs yet."""
    tasks = groups(name)
    if name == "recipe" or not tasks:
        return
    places, ticks, xlabel, width = {"MAPPO": 0, "IPPO": 1}, list(STYLES), "", 0.6
    if name == "flag":
        panels = [(metric, "", tasks) for metric in list(METRICS)[:4]]
    elif name == "scenarios":
        panels = [("episode_reward", *task, {task: tasks[task]}) for task in tasks]
    else:
        panels = [(metric, "", tasks) for metric in ("success_rate", "episode_length")]
        places, width = ({"MAPPO": 0}, 0.4) if name == "sharing" else ({"MAPPO": -0.2, "IPPO": 0.2}, 0.3)
        shared = {("True", "True"): "both", ("True", "False"): "policy", ("False", "True"): "critic",
                  ("False", "False"): "none"}
        ticks = [shared.get(task, task[0]) for task in tasks]
        xlabel = "networks that all agents share" if name == "sharing" else "number of agents"

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, title, shown) in zip(axes, panels):
        marks = [(i + places[algorithm], algorithm, group[metric])
                 for i, task in enumerate(shown.values()) for algorithm, group in task.items()]
        panel(axis, metric, marks, width)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel(xlabel)
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlim(-0.5, len(ticks) - 0.5)
        if name == "scenarios":
            low, high = axis.get_ylim()
            axis.set_ylim(min(0, low), 1.1 * high)  # from 0: a small difference is not to look large
            axis.set_ylabel(axis.get_ylabel() if axis is axes[0] else "")

    handles, most = [], 0
    for algorithm, style in STYLES.items():
        counts = sorted({len(task[algorithm]["episode_reward"]) for task in tasks.values() if algorithm in task})
        if counts:
            number = " to ".join(map(str, sorted({counts[0], counts[-1]})))
            handles += axes[0].plot([], [], **style, linestyle="", markersize=8, markeredgecolor="black",
                                    label=f"{algorithm}, {number} runs")
            most = max(most, counts[-1])
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, title="small: single runs; "
                  f"large: their {'interquartile ' * (most > 5)}mean and its 95% bootstrap interval")
    figure.savefig(ASSETS / f"study_{name}.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), help=f"of {', '.join(EXPERIMENTS)}")
    given = parser.parse_args()
    if unknown := set(given.experiments) - set(EXPERIMENTS):
        parser.error(f"there is no experiment {', '.join(unknown)}; give some of {', '.join(EXPERIMENTS)}")
    if given.command == "run":
        try:
            sys.exit(1 if run_missing(given.experiments) else 0)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on from here")
    for name in given.experiments:
        print(f"<!-- study:{name} -->\n{table(name)}\n<!-- /study -->\n")
        draw(name)
