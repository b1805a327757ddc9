"""From the rows of results.csv to numbers, and from these to tables in Markdown and figures."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

KEY = ["experiment", "options", "variant", "algorithm", "seed"]  # which run it is
EVALUATION = ["success_rate", "episode_reward", "episode_length", "collisions"]
METRICS = ["episode_reward", "success_rate", "collisions", "loss_critic", "entropy", "kl_approx"]
METRICS += ["clip_fraction", "explained_variance", "advantage_std"]  # of metrics.csv
ARRIVALS = ["value_at_arrival", "reward_at_arrival", "advantage_at_arrival"]
CURVES = [f"curve_{name}" for name in [*METRICS, *ARRIVALS, "value_slope"]]

TITLES = {
    "success_rate": "success rate",
    "episode_reward": "reward per agent",
    "episode_length": "steps",
    "successful_length": "steps of successful episodes",
    "value_slope": "slope of the value",
    "curve_value_slope": "slope of the value",
    "curve_value_at_arrival": "value before it",
    "curve_reward_at_arrival": "reward of it",
    "curve_advantage_at_arrival": "advantage of it, in standard deviations",
    "curve_episode_reward": "training reward",
    "curve_explained_variance": "explained variance",
    "curve_advantage_std": "standard deviation of the advantages",
}
DIGITS = {"success_rate": 3, "episode_length": 1, "successful_length": 1, "collisions": 3}  # or 2
LESS_IS_BETTER = ["episode_length", "successful_length", "collisions"]
TRUSTED = 0.85  # the least coverage with which an interval is shown


# ----------------------------------------------------------------------------- rows to numbers


def tidy(rows):
    """Return results.csv as numbers: a line for each run and iteration, sorted.

    Its columns are KEY, "iterations" (from 1 on), the curves, and the evaluation where there was
    one. The steps of successful episodes are those of runs with max_steps = 100.
    """
    rows = rows.astype({"seed": int}).set_index(KEY)
    columns = []
    for name in CURVES:
        found = rows[name].str.split().explode().dropna().astype(float).to_frame()
        found["iterations"] = found.groupby(KEY).cumcount() + 1
        columns.append(found.set_index("iterations", append=True))
    for name in [*EVALUATION, "value_slope"]:
        found = rows.loc[rows[name] != "", ["evaluated_after", name]]
        found = found.apply(lambda column: column.str.split()).explode(["evaluated_after", name])
        found = found.astype({"evaluated_after": int, name: float})
        found = found.rename(columns={"evaluated_after": "iterations"})
        columns.append(found.set_index("iterations", append=True))
    order = [name != "algorithm" for name in [*KEY, "iterations"]]  # MAPPO before IPPO
    table = pd.concat(columns, axis=1).sort_index(ascending=order)
    failed = 1 - table["success_rate"]
    table["successful_length"] = (table["episode_length"] - 100 * failed) / (1 - failed)
    return table.reset_index()


def choose(table, runs):
    """Return the lines of `runs`: after their stops, or at the end of each if they have none."""
    same = (table[["experiment", "options", "variant"]] == list(runs[:3])).all(axis=1)
    same &= table["algorithm"].isin(runs.algorithms) & table["seed"].isin(runs.seeds)
    found = table[same]
    if runs.stops:
        return found[found["iterations"].isin(runs.stops)]
    return found.groupby(["algorithm", "seed"]).tail(1)


def gather(table, groups):
    """Return the lines of `groups`, a dictionary of a label and runs (or a list of them).

    The index is (label, algorithm, iterations, seed). A label without rows is left out.
    """
    lists = {label: runs if isinstance(runs, list) else [runs] for label, runs in groups.items()}
    parts = [
        choose(table, one).assign(label=label) for label, many in lists.items() for one in many
    ]
    return pd.concat(parts).set_index(["label", "algorithm", "iterations", "seed"])


# ----------------------------------------------------------------------------------- statistics


def coverage(differences, draws=20_000):
    """Return how often Student's 95% interval of the mean holds the mean of its population.

    The samples are as large as `differences`, and drawn from them.
    """
    n, generator = len(differences), np.random.default_rng(0)
    samples = generator.choice(differences.to_numpy(), (draws, n))
    width = stats.t.ppf(0.975, n - 1) * stats.sem(samples, axis=1)
    return (np.abs(samples.mean(axis=1) - differences.mean()) <= width + 1e-12).mean()


def sign_of(name):
    """Return -1 for a measurement of which less is better, otherwise 1."""
    return -1 if name in LESS_IS_BETTER else 1


def summary(runs):
    """Return the mean over runs with the worst of them, or with the range of a curve or slope.

    Such as "0.953 (worst 0.920)" and "0.37 (0.35 to 0.39)"; "" if there are no numbers.
    """
    if runs.isna().all():
        return ""
    digits = DIGITS.get(runs.name, 2)
    mean, low, high = (f"{x:.{digits}f}" for x in (runs.mean(), runs.min(), runs.max()))
    if runs.name in [*EVALUATION, "successful_length"]:
        return f"{mean} (worst {low if sign_of(runs.name) == 1 else high})"
    return f"{mean} ({low} to {high})"


def difference(ours, theirs):
    """Compare runs with the same seeds: mean difference, 95% interval, and pairs that are better.

    Such as "+0.08 [+0.02, +0.14], 9 of 10". Without the interval if it could not be trusted, as its
    coverage is below TRUSTED. Both are Series indexed by seed.
    """
    ours, theirs = ours.align(theirs, join="inner")
    gaps, digits = ours - theirs, DIGITS.get(ours.name, 2)
    if not gaps.any():
        return "none"
    text = f"{gaps.mean():+.{digits}f}"
    if gaps.nunique() > 1 and coverage(gaps) >= TRUSTED:
        low, high = stats.ttest_rel(ours, theirs).confidence_interval()
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{text}, {(sign_of(ours.name) * gaps > 0).sum()} of {len(gaps)}"


def probability_better(ours, theirs):
    """Return the probability that one of our runs is better than one of theirs; ties count half.

    The probability of improvement of Agarwal et al. 2021, arXiv:2108.13264.
    """
    sign = sign_of(ours.name)
    test = stats.mannwhitneyu(sign * ours, sign * theirs, method="asymptotic")
    return f"{test.statistic / (len(ours) * len(theirs)):.2f}"


def compare(ours, theirs):
    """Return `difference` and `probability_better`, or empty cells if one of them is empty."""
    if ours.empty or theirs.empty:
        return ["", ""]
    return [difference(ours, theirs), probability_better(ours, theirs)]


# --------------------------------------------------------------------------------------- tables


def markdown(head, lines):
    """Return a table in Markdown; all lines are lists of cells."""
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def stops_of(data):
    """Return the numbers of iterations shown, if a label has more than one; otherwise []."""
    stops = data.reset_index().groupby("label")["iterations"].unique()
    return sorted(set().union(*stops)) if stops.map(len).max() > 1 else []


def versus(data, columns=EVALUATION):
    """Compare MAPPO with IPPO: a line for each label, number of iterations and measurement."""
    lines, stops = [], stops_of(data)
    for (label, iterations), runs in data.groupby(["label", "iterations"], sort=False):
        label = f"{label} {iterations} iterations".strip() if stops else label
        for name in columns:
            wide = runs[name].unstack("algorithm").droplevel(["label", "iterations"])
            ours, theirs = (wide.get(one, wide.iloc[:0, 0]).dropna() for one in STYLE)
            ours.name = theirs.name = name
            line = [label, TITLES.get(name, name), summary(ours), summary(theirs)]
            lines.append([*line, *compare(ours, theirs), max(len(ours), len(theirs))])
    return markdown(["", "", "MAPPO", "IPPO", "difference", "P(MAPPO better)", "runs"], lines)


def grid(data, columns=EVALUATION, against=None):
    """Show a line for each label; measurements after several iterations have a column for each.

    `against` is a measurement in which each label is compared with the first one.
    """
    lines, stops, first = [], stops_of(data), None
    for label, runs in data.groupby("label", sort=False):
        runs = runs.reset_index().set_index("seed")
        parts = [runs[runs["iterations"] == stop] for stop in stops] or [runs]
        line = [label, *(summary(part[name]) for name in columns for part in parts)]
        if against is not None:
            line += ["", ""] if first is None else compare(runs[against], first)
            first = runs[against] if first is None else first
        lines.append([*line, runs.index.nunique()])
    titles = [TITLES.get(name, name) for name in columns]
    head = [f"{title}, iteration {stop}" for title in titles for stop in stops] or titles
    head += [f"{TITLES[against]}: difference to the first", "P(better)"] if against else []
    return markdown(["", *head, "runs"], lines)


def band(data):
    """Show the range over runs of each column of metrics.csv."""
    groups = data.groupby(["algorithm", "iterations"], sort=False)
    cells = groups[[f"curve_{name}" for name in METRICS]].agg(["min", "max"])
    head = [f"{algorithm}, iteration {stop}" for algorithm, stop in cells.index]
    lines = [
        [f"`{name}`", *(f"{low:.3g} to {high:.3g}" for low, high in cells[f"curve_{name}"].values)]
        for name in METRICS
    ]
    return markdown(["", *head], lines)


def transfer(rows):
    """Show how policies trained in one team act in others; `rows` are those of transfer.csv."""
    rows = rows.astype({"n_agents": int} | dict.fromkeys(EVALUATION, float))
    lines = [
        [f"{n_agents} robots", *(summary(runs[name]) for name in EVALUATION), len(runs)]
        for n_agents, runs in rows.groupby("n_agents")
    ]
    return markdown(["", *(TITLES.get(name, name) for name in EVALUATION), "runs"], lines)


def speed(rows):
    """Show median times, and the ratio, turn by turn, to what comes first in the same part.

    `rows` are those of speed.csv. A ratio is the median over the turns, with lowest and highest.
    """
    rows = rows.assign(each=rows["seconds"].astype(float) / rows["amount"].astype(float))
    forms = {"gradient step": lambda s: f"{1000 * s:.2f} ms", "frame": lambda s: f"{1 / s:,.0f}/s"}
    lines = []
    for (part, unit), found in rows.groupby(["part", "unit"], sort=False):
        turns = found.set_index("turn").groupby("name", sort=False)["each"]
        first = None
        for name, taken in turns:
            first = taken if first is None else first
            ratio = taken / first
            text = f"{ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
            median = forms.get(unit, lambda s: f"{s:.1f} s")(taken.median())
            lines.append([part, name, median, text])
    return markdown(["", "", "median", "times the first"], lines)


# -------------------------------------------------------------------------------------- figures

STYLE = {
    "MAPPO": {"color": "tab:blue", "marker": "o", "markerfacecolor": "tab:blue", "linestyle": "-"},
    "IPPO": {"color": "tab:orange", "marker": "s", "markerfacecolor": "white", "linestyle": "--"},
}


def draw_runs(data):
    """Draw success rate and steps: a mark for each run and a line for the mean of each label."""
    groups = data.groupby(["label", "algorithm"], sort=False)
    figure = Figure(figsize=(8, 1 + 0.35 * len(groups)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = []
    for place, ((label, algorithm), runs) in enumerate(groups):
        labels.append(label if algorithm in label else f"{label}, {algorithm}")
        where = place + np.linspace(-0.25, 0.25, len(runs))
        for axes, name in zip(panels, ("success_rate", "episode_length"), strict=True):
            style = STYLE[algorithm] | {"linestyle": "none", "markersize": 4}
            axes.plot(runs[name], where, **style)
            axes.vlines(runs[name].mean(), place - 0.35, place + 0.35, color="black", linewidth=2)
            axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set(ylim=(len(labels) - 0.5, -0.5), xlim=(-0.03, 1.03), xlabel="success rate")
    panels[1].set_xlabel("steps, 100 for a failed episode")
    return figure


def draw_over_time(data, columns):
    """Draw measurements over iterations: a thin line for each run, a thick one for their mean.

    `columns` are {measurement: (title, limits)}.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(columns))
    for axes, (name, (title, limits)) in zip(panels, columns.items(), strict=True):
        for algorithm, runs in data[name].dropna().groupby("algorithm", sort=False):
            runs = runs.droplevel(["label", "algorithm"]).unstack("seed")
            axes.plot(runs, color=STYLE[algorithm]["color"], linewidth=0.6, alpha=0.5)
            label = f"{algorithm}, mean of {runs.shape[1]} runs"
            axes.plot(runs.mean(axis=1), **STYLE[algorithm], linewidth=2.5, label=label)
        axes.set(xlabel="iterations", title=title, ylim=limits)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize="small")
    return figure
