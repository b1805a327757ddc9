"""Several seeds in one figure: every run as a thin line, their mean and its 95% interval.

    for seed in 0 1 2 3 4; do
        for flag in --mappo --no-mappo; do
            python train_mappo.py --n-iters 15 --seed $seed $flag --run-folder runs/five/$seed$flag
        done
    done
    python cookbook/several_seeds.py runs/five

writes runs/five.png. If you stop the loop, start it again, and it resumes. This is a program, not a
cell. All runs in the folder should differ in the seed and the algorithm alone. The mean covers the
tests that all runs have in common. The interval is a bootstrap over runs, which is too narrow for a
handful of them, so with fewer than ten seeds look at the thin lines first. `--metric` draws another
column of metrics.csv, such as test_episode_reward, into a figure of its own.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

parser = argparse.ArgumentParser(description="Draw the learning curves of several runs.")
parser.add_argument("folder", type=Path, help="folder that contains the folders of the runs")
parser.add_argument("--metric", help="column of metrics.csv; by default the success in tests")
given = parser.parse_args()
names = [given.metric] if given.metric else ["test_success_rate", "test_terminated_rate"]
ending = f"-{given.metric}.png" if given.metric else ".png"
picture, runs = given.folder.with_name(given.folder.name + ending), {}
for path in sorted(given.folder.glob("*/metrics.csv")):
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = {
        int(row["frames"]): float(row[name]) for row in rows for name in names if row.get(name)
    }
    mappo = json.loads(path.with_name("hyperparameters.json").read_text("utf-8"))["mappo"]
    if values:
        runs.setdefault("MAPPO" if mappo else "IPPO", []).append(values)
if not runs:
    parser.error(f"folder is '{given.folder}', but must contain runs with {' or '.join(names)}")
if picture.exists():
    parser.error(f"{picture} exists already. Move it, or delete it")
figure, random = Figure(figsize=(6, 4), layout="constrained"), np.random.default_rng(0)
axes = figure.subplots()
for algorithm, curves in runs.items():
    color = {"MAPPO": "tab:blue", "IPPO": "tab:orange"}[algorithm]
    frames = sorted(set.intersection(*map(set, curves)))  # which all runs have reached
    table = np.array([[curve[x] for x in frames] for curve in curves])  # (runs, points)
    samples = random.integers(len(curves), size=(2000, len(curves)))
    low, high = np.percentile(table[samples].mean(axis=1), [2.5, 97.5], axis=0)
    for curve in curves:
        axes.plot([*curve], [*curve.values()], ".-", color=color, linewidth=0.5)
    label = f"{algorithm}, mean of {len(curves)} runs and its 95% interval"
    axes.plot(frames, table.mean(axis=0), "o-", color=color, label=label)
    axes.fill_between(frames, low, high, color=color, alpha=0.2)
axes.set(xlabel="frames", title=given.metric or "success rate in test episodes")
if names[0].endswith("_rate"):
    axes.set_ylim(-0.05, 1.05)
axes.legend()
figure.savefig(picture)
print(f"Wrote {picture}")
