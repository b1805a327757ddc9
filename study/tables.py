"""From the rows of the study to the tables and figures of its README."""

import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

STUDY = Path(__file__).resolve().parent
RESULTS = STUDY / "results.csv"  # by study.py
ARCHIVE = STUDY / "archive.csv"  # by earlier versions of study.py and train_mappo.py
TUTORIAL = STUDY / "torchrl_tutorial.csv"  # by torchrl_tutorial.py
TRANSFER = STUDY / "transfer.csv"  # by transfer.py
SPEED = STUDY / "speed.csv"  # by benchmark.py
KEY = ["experiment", "options", "variant", "algorithm", "seed"]  # which run a row belongs to

SUCCESS, REWARD, STEPS = "test_success_rate", "test_episode_reward", "test_episode_length"
TITLES = {
    SUCCESS: "success",
    REWARD: "reward",
    STEPS: "steps",
    "test_collisions": "collisions",
    "episode_reward": "training reward",
    "explained_variance": "explained variance",
    "collisions": "collisions in training",
    "slope": "slope",
    "near_slope": "near slope",
    "steep": "steep",
    "rho": "rho",
    "predicted_slope": "predicted slope",
}
DIGITS = {STEPS: 1, "test_collisions": 3, "collisions": 3}  # others have 2
LESS_IS_BETTER = [STEPS, "test_collisions", "collisions"]
STUDENT = 2.262  # 97.5% quantile of Student's t for ten seeds
BAND = ["episode_reward", "success_rate", "collisions", "loss_critic", "entropy", "kl_approx"]
BAND += ["clip_fraction", "explained_variance", "advantage_std"]


def read(path):
    """Return the rows of a .csv as numbers, or an empty table if there is no such file.

    `after` is how many iterations a run had done, and `last` is True in the last row of a run.
    """
    if not path.exists():
        return pd.DataFrame(columns=[*KEY, "script", "iteration", "after", "last"])
    rows = pd.read_csv(path, dtype={"script": str}).fillna(dict.fromkeys(KEY[1:3], ""))
    endless = rows["variant"].str.contains("goals that move on")  # no success ends an episode
    rows.loc[endless, SUCCESS] = float("nan")
    rows["after"] = rows["iteration"] + 1
    rows["last"] = rows["after"] == rows.groupby(KEY)["after"].transform("max")
    return rows


# --------------------------------------------------------------------------------------- tables


def markdown(head, lines):
    """Return a table in Markdown; all lines are lists of cells."""
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def summary(values):
    """Return the mean over runs with the worst of them, or with the range if none is the worst.

    Such as "0.95 (worst 0.92)" and "0.37 (0.35 to 0.39)"; "" if there are no numbers.
    """
    values, digits = values.dropna(), DIGITS.get(values.name, 2)
    if values.empty:
        return ""
    mean, low, high = (f"{x:.{digits}f}" for x in (values.mean(), values.min(), values.max()))
    if values.name == SUCCESS or values.name in LESS_IS_BETTER:
        return f"{mean} (worst {low if values.name == SUCCESS else high})"
    return f"{mean} ({low} to {high})"


def choose(rows, experiment, algorithm, after):
    """Return an experiment's rows after so many iterations, or at the end of its runs if None."""
    same = (rows["experiment"] == experiment) & (rows["algorithm"] == algorithm)
    return rows[same & (rows["last"] if after is None else rows["after"] == after)]


def grid(rows, labels, columns):
    """Show a line for each label and algorithm.

    `labels` are {label: experiment}, and `columns` are {column: numbers of iterations}, where None
    means the end of the run.
    """
    cells = [(column, after) for column, stops in columns.items() for after in stops]
    lines = []
    for label, experiment in labels.items():
        there = set(rows.loc[rows["experiment"] == experiment, "algorithm"])
        for algorithm in sorted(there, reverse=True):  # MAPPO before IPPO
            runs = rows[(rows["experiment"] == experiment) & (rows["algorithm"] == algorithm)]
            shown = [summary(choose(runs, experiment, algorithm, at)[name]) for name, at in cells]
            lines.append([label, algorithm, *shown, runs["seed"].nunique()])
    head = [TITLES[name] + (f" after {after}" if after else "") for name, after in cells]
    return markdown(["", "", *head, "runs"], lines)


def versus(rows, labels, columns=(SUCCESS, STEPS), after=None):
    """Compare MAPPO with IPPO: a line for each label, and how often MAPPO is better on a seed."""
    lines = []
    for label, experiment in labels.items():
        line, pairs = [label], 0
        for name in columns:
            runs = [choose(rows, experiment, one, after) for one in ("MAPPO", "IPPO")]
            ours, theirs = (one.set_index("seed")[name] for one in runs)
            gaps = (ours - theirs).dropna() * (-1 if name in LESS_IS_BETTER else 1)
            pairs = max(pairs, len(gaps))
            line += [summary(ours), summary(theirs), f"{(gaps > 0).sum()} of {len(gaps)}"]
        if pairs:
            lines.append(line)
    head = [x for name in columns for x in (f"{TITLES[name]}, MAPPO", "IPPO", "MAPPO better")]
    return markdown(["", *head], lines)


def paired(rows, labels, columns):
    """Compare the runs of MAPPO in two experiments that differ in one thing, on the same seeds.

    `labels` are {label: experiment}, one pair after another, and `columns` are {column: numbers of
    iterations}, over which it is averaged. A cell is the mean difference, its 95% interval, and on
    how many seeds the second of the pair is higher.
    """
    runs, lines, names = rows[rows["algorithm"] == "MAPPO"], [], [*labels]
    for one, two in zip(names[::2], names[1::2], strict=True):
        if not {labels[one], labels[two]} <= {*runs["experiment"]}:
            continue
        line = [two]
        for name, stops in columns.items():
            chosen = runs[runs["after"].isin(stops)].groupby(["experiment", "seed"])[name].mean()
            gaps = (chosen[labels[two]] - chosen[labels[one]]).dropna()
            mean, half = gaps.mean(), STUDENT * gaps.sem()
            text = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
            line.append(f"{text}, {(gaps > 0).sum()} of {len(gaps)}")
        lines.append(line)
    head = [
        f"{TITLES[name]} {f'after {at[0]}' if len(at) == 1 else f'over {len(at)}'}"
        for name, at in columns.items()
    ]
    return markdown(["", *head], lines)


def course(rows, experiment, stops, columns):
    """Show means over the runs of MAPPO and IPPO, a line for each number of iterations."""
    lines = []
    for after in stops:
        pair = [choose(rows, experiment, one, after) for one in ("MAPPO", "IPPO")]
        lines.append([after, *(f"{runs[name].mean():.2f}" for name in columns for runs in pair)])
    head = [text for name in columns for text in (f"{TITLES[name]}, MAPPO", "IPPO")]
    return markdown(["iterations", *head], lines)


def fall(rows, labels):
    """Show for each seed of IPPO when its slopes pass 1.1, and when its success falls.

    `labels` are {label: experiment} of two, the second of which are the first iterations of the
    same runs, with `near_slope` and `steep` measured as well.
    """
    runs, more = (
        rows[(rows["experiment"] == name) & (rows["algorithm"] == "IPPO")].set_index("after")
        for name in labels.values()
    )
    lines = []

    def first(condition):
        return condition.idxmax() if condition.any() else "never" if len(condition) else ""

    for seed, run in runs.groupby("seed"):
        measured = more[more["seed"] == seed]
        success, slope, near = run[SUCCESS], run["slope"], measured["near_slope"]
        best = success.idxmax()
        there = [x.get(best, float("nan")) for x in (success, slope, near, measured["steep"])]
        passed = [first(x > 1.1) for x in (slope, near)]
        half = first(success[best:] < success[best] / 2)
        lines.append([seed, best, *(f"{x:.2f}" if x == x else "" for x in there), *passed, half])
    head = ["seed", "best success after", "success", "slope there", "near slope", "steep"]
    head += ["slope above 1.1", "near slope above 1.1", "success below half"]
    return markdown(head, lines)


def band(rows, experiment):
    """Show the range over runs of each column of metrics.csv, after the first and the tenth."""
    runs = [choose(rows, experiment, one, at) for one in ("MAPPO", "IPPO") for at in (1, 10)]
    head = [f"{one}, iteration {at}" for one in ("MAPPO", "IPPO") for at in (1, 10)]
    lines = [
        [f"`{name}`", *(f"{one[name].min():.3g} to {one[name].max():.3g}" for one in runs)]
        for name in BAND
    ]
    return markdown(["", *head], lines)


def tutorial():
    """Show the training reward of TorchRL's tutorial: mean and, in brackets, the lowest run."""
    rows, stops = pd.read_csv(TUTORIAL), [1, 5, 10, 12, 15, 20, 25]
    lines = []
    for algorithm, runs in rows.groupby("algorithm", sort=False):
        rewards = [runs.loc[runs["iteration"] == at - 1, "episode_reward_mean"] for at in stops]
        cells = [f"{found.mean():.2f} (worst {found.min():.2f})" for found in rewards]
        lines.append([algorithm, *cells, runs["seed"].nunique()])
    return markdown(["training reward after", *stops, "runs"], lines)


def transfer():
    """Show how policies trained in one team act in others."""
    rows = pd.read_csv(TRANSFER)
    columns = ["success_rate", "episode_reward", "episode_length", "collisions"]
    rows = rows.rename(columns={name: f"test_{name}" for name in columns})
    shown = [f"test_{name}" for name in columns]
    lines = [
        [f"{n_agents} robots", *(summary(runs[name]) for name in shown), len(runs)]
        for n_agents, runs in rows.groupby("n_agents")
    ]
    return markdown(["", *(TITLES[name] for name in shown), "runs"], lines)


def speed(rows=None):
    """Show median times, and the ratio, turn by turn, to what comes first in the same part.

    A ratio is the median over the turns, with the lowest and the highest.
    """
    rows = pd.read_csv(SPEED) if rows is None else rows
    rows = rows.assign(each=rows["seconds"] / rows["amount"])
    forms = {"gradient step": lambda s: f"{1000 * s:.2f} ms", "frame": lambda s: f"{1 / s:,.0f}/s"}
    lines = []
    for (part, unit), found in rows.groupby(["part", "unit"], sort=False):
        first = None
        for name, taken in found.set_index("turn").groupby("name", sort=False)["each"]:
            first = taken if first is None else first
            ratio = taken / first
            text = f"{ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
            median = forms.get(unit, lambda s: f"{s:.1f} s")(taken.median())
            lines.append([part, name, median, text])
    return markdown(["", "", "median", "times the first"], lines)


DEFAULTS = {"the defaults": "defaults"}
REMEDIES = {
    "the defaults": "defaults",
    "value normalization": "value-norm",
    "gamma 0.9": "gamma",
    "gamma 0.9, lambda 0": "gamma-lambda",
    "the others' distance as an input": "one-number",
    "arrivals bootstrapped": "bootstrapped",
    "lambda 0.99": "lambda-0.99",
    "lambda 1": "lambda",
}
CORRELATION = {
    "the defaults": "defaults",
    "individual rewards": "individual",
    "goals that move on": "moving",
    "goals equally far away": "equal",
    "the same square, all drive": "close",
    "one robot drives at a time": "turns",
}
IDS = {
    "the defaults": "defaults",
    "the defaults, with agent IDs": "agent-ids",
    "a contact costs 10": "contacts",
    "a contact costs 10, with agent IDs": "contacts-agent-ids",
}
RECIPES = {"quick": "quick", "thorough": "thorough"}
TEN_TO_TWENTY = [10, 15, 20]
FIRST_15 = range(1, 16)
NEW = {  # tables of results.csv: {name: (function, arguments)}
    "defaults": (grid, {"labels": DEFAULTS, "columns": {SUCCESS: [5, 10, 15, 20]}}),
    "slopes": (
        course,
        {
            "experiment": "defaults",
            "stops": [5, 8, 10, 12, 15, 20],
            "columns": [SUCCESS, "rho", "predicted_slope", "slope", "explained_variance"],
        },
    ),
    "correlation": (
        grid,
        {
            "labels": CORRELATION,
            "columns": {
                "rho": [10],
                "predicted_slope": [10],
                "slope": [10, 15],
                SUCCESS: TEN_TO_TWENTY,
                REWARD: [20],
            },
        },
    ),
    "remedies": (
        grid,
        {
            "labels": REMEDIES,
            "columns": {
                SUCCESS: [*TEN_TO_TWENTY, 30],
                "slope": [10, 15, 30],
                "near_slope": [10],
                "steep": [10, 15],
            },
        },
    ),
    "roles": (
        grid,
        {
            "labels": {"two critics": "two-critics"},
            "columns": {SUCCESS: [5, 10, 15], "slope": [10, 15]},
        },
    ),
    "recipes": (versus, {"labels": RECIPES}),
    "agent-ids": (
        paired,
        {
            "labels": IDS,
            "columns": {
                SUCCESS: [15],
                "test_collisions": [15],
                "collisions": FIRST_15,
                "explained_variance": FIRST_15,
                "slope": [15],
            },
        },
    ),
    "fall": (fall, {"labels": {"runs": "defaults", "again": "near"}}),
    "band": (band, {"experiment": "defaults"}),
}
OLD = {  # tables of archive.csv
    "fifty": (
        grid,
        {
            "labels": {"50 iterations": "50-iterations"},
            "columns": {SUCCESS: [20, 30, 40, 50], REWARD: [20, 30, 40, 50]},
        },
    ),
    "epochs": (
        grid,
        {
            "labels": {"10 epochs, 50 iterations": "10-epochs", "5 epochs, 70": "5-epochs"},
            "columns": {"episode_reward": [10, 20, 30, 50], SUCCESS: [None]},
        },
    ),
    "remedies-15": (
        grid,
        {
            "labels": {
                "lambda 1": "lambda-1",
                "arrivals bootstrapped": "arrivals-bootstrapped",
            },
            "columns": {SUCCESS: [15], STEPS: [15]},
        },
    ),
    "eight": (
        grid,
        {
            "labels": {
                "shared reward": "eight-shared",
                "shared reward, seeds 10 to 19": "eight-shared-fresh",
                "individual rewards": "eight-individual",
                "shared reward, the others' distance as an input": "eight-others-distance",
                "shared reward, its own distance as an input": "eight-own-distance",
            },
            "columns": {SUCCESS: [None], STEPS: [None]},
        },
    ),
    "transport": (
        grid,
        {
            "labels": {"reverse_transport": "reverse-transport"},
            "columns": {SUCCESS: [5, 10, 20, 40], STEPS: [10, 20, 40]},
        },
    ),
    "sharing": (
        grid,
        {
            "labels": {
                "separate policies": "separate-policies",
                "separate critics": "separate-critics",
                "separate policies, three times the frames": "separate-policies-frames",
            },
            "columns": {SUCCESS: [10], STEPS: [10]},
        },
    ),
    "others": (
        versus,
        {
            "labels": {
                "the defaults, seeds 10 to 19": "fresh",
                "quick, seeds 30 to 49": "quick-fresh",
                **{f"thorough, {n} robots": f"team-of-{n}" for n in (2, 4, 8)},
            }
        },
    ),
}
OTHER = {  # tables of other files: {name: (function, file, how its rows are made)}
    "tutorial": (tutorial, TUTORIAL, "torchrl_tutorial.py multiagent_ppo.py"),
    "transfer": (transfer, TRANSFER, "transfer.py"),
    "speed": (speed, SPEED, "benchmark.py --record --tutorial multiagent_ppo.py"),
}


def source_of(rows, labels, archived):
    """Return the line below a table that says how its rows were made."""
    used = [name for name in dict.fromkeys(labels.values()) if (rows["experiment"] == name).any()]
    scripts = set(rows.loc[rows["experiment"].isin(used), "script"].dropna().astype(str)) - {""}
    if archived:
        return f"*Made with an earlier version of the file: {', '.join(used)} in archive.csv.*"
    versions = ", ".join(f"`{script}`" for script in sorted(scripts))
    return f"*`study.py run {' '.join(used)}`, train_mappo.py {versions}.*"


def make_table(name, results, archive):
    """Return the table of README.md that is called `name`, and how its rows were made."""
    if name in OTHER:
        show, path, command = OTHER[name]
        return f"{show()}\n\n*`{command}`*" if path.exists() else "*Not run yet.*"
    rows = results if name in NEW else archive
    show, how = (NEW | OLD)[name]
    labels = how["labels"] if "labels" in how else {name: how["experiment"]}
    if not rows["experiment"].isin(labels.values()).any():
        return "*Not run yet.*"
    return f"{show(rows, **how)}\n\n{source_of(rows, labels, name in OLD)}"


def with_tables(text, results, archive):
    """Return a README's text with new tables between <!-- table:NAME --> and <!-- /table -->."""
    return re.sub(
        r"<!-- table:([\w-]+) -->.*?<!-- /table -->",
        lambda mark: (
            f"<!-- table:{mark[1]} -->\n{make_table(mark[1], results, archive)}\n<!-- /table -->"
        ),
        text,
        flags=re.DOTALL,
    )


# -------------------------------------------------------------------------------------- figures

STYLE = {
    "MAPPO": {"color": "tab:blue", "linestyle": "-"},
    "IPPO": {"color": "tab:orange", "linestyle": "--"},
}
PANELS = {  # of a figure: {column: title}
    SUCCESS: "success rate in test episodes",
    REWARD: "reward in test episodes",
    "slope": "slope of the value",
    "rho": "correlation of the remaining distances",
    "predicted_slope": "slope predicted from the distances",
}


def draw(rows, labels, columns):
    """Draw columns, one below the other, over iterations; a column of panels for each label.

    A thin line is a run, and a thick one the mean of the runs.
    """
    size = (1.4 + 4 / len(labels) ** 0.25 * len(labels), 0.8 + 2.6 * len(columns))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(columns), len(labels), sharex=True, squeeze=False)
    for number, (label, experiment) in enumerate(labels.items()):
        for axes, name in zip(panels[:, number], columns, strict=True):
            axes.set_title(PANELS[name] if len(labels) == 1 else label)
            axes.set_ylabel(PANELS[name] if len(labels) > 1 and number == 0 else "")
            for algorithm, style in STYLE.items():
                same = (rows["experiment"] == experiment) & (rows["algorithm"] == algorithm)
                runs = rows[same].pivot(index="after", columns="seed", values=name).dropna()
                if len(runs):
                    axes.plot(runs, **style, linewidth=0.7, alpha=0.45)
                    text = f"{algorithm}, mean of {runs.shape[1]}"
                    axes.plot(runs.mean(axis=1), **style, linewidth=3.5, label=text)
            if name == SUCCESS:
                axes.set_ylim(-0.03, 1.03)
            if "slope" in name:  # above it, progress has a negative advantage
                axes.axhspan(1.0, 1.1, color="black", alpha=0.15)
                axes.axhline(1.05, color="black", linestyle=":", linewidth=1.5)
                axes.set_ylim(-0.1, 2.1)
            if name == "slope":
                place = axes.get_yaxis_transform()  # x from 0 to 1
                axes.text(0.03, 1.13, "above the band, progress is a loss", transform=place)
            axes.grid(axis="y", alpha=0.3)
            axes.tick_params(labelbottom=True)
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[-1, number].set_xlabel("iterations")
    panels[0, 0].legend(loc="best")
    return figure


DRAWN = ["the defaults", "goals equally far away", "the same square, all drive"]
DRAWN += ["one robot drives at a time"]
FIGURES = {  # {name: (labels, columns)}
    "slopes": (DEFAULTS, [SUCCESS, "slope"]),
    "rho": (DEFAULTS, ["rho", "predicted_slope"]),
    "correlation": ({label: CORRELATION[label] for label in DRAWN}, [SUCCESS, "slope"]),
}
