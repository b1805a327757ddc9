"""The study: its tables come from its rows, and its statistics are what they are called."""

import re
import sys
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
import torch
from scipy import stats
from torchrl.envs import VmasEnv
from torchrl.modules import MultiAgentMLP

from conftest import REPOSITORY, SCRIPT

sys.path.insert(0, str(REPOSITORY / "study"))
import benchmark  # noqa: E402
import study  # noqa: E402


def test_the_tables_are_those_of_the_rows():
    """`python study/study.py report` would change nothing in its README."""
    text = study.README.read_text("utf-8")
    assert text.count("<!-- table:") >= 4
    assert study.with_tables(text) == text


def test_what_is_compared_has_ten_pairs_and_each_run_one_row():
    rows = study.read_rows(study.RESULTS)
    runs = [tuple(row[name] for name in study.RUN[1:]) for row in rows]
    assert len(set(runs)) == len(runs)
    shown = study.README.read_text("utf-8")
    for name, tables in study.TABLES.items():
        if f"<!-- table:{name} -->" in shown:
            for options in tables:
                for algorithm in ("MAPPO", "IPPO"):
                    assert len(study.values(name, options, algorithm, "success_rate")) >= 10


def test_the_lesson_of_section_4_has_its_rows():
    """The numbers in the script's own table."""
    lines = SCRIPT.read_text("utf-8").splitlines()
    for options, label in study.TABLES["payment"].items():
        cells = []
        for one in ("MAPPO", "IPPO"):
            success = study.values("payment", options, one, "success_rate")
            cells.append((f"{success.mean():.2f}", f"{success.min():.2f}"))
        steps = [
            study.values("payment", options, one, "episode_length") for one in ("MAPPO", "IPPO")
        ]
        [line] = [line for line in lines if line.startswith(f"# | {label} |")]
        (ours, our_worst), (theirs, their_worst) = cells
        assert f"| {ours} (worst run {our_worst}) | {theirs} (worst {their_worst}) |" in line
        assert f"| {steps[0].mean():.1f} | {steps[1].mean():.1f} |" in line


def test_the_seeds_that_were_not_looked_at_before_have_their_rows():
    """What Section 4 and README.md say of ten others, paid as a team."""
    success, steps = (
        [
            study.values("payment-fresh", study.TEAM_PAID, algorithm, column).mean()
            for algorithm in ("MAPPO", "IPPO")
        ]
        for column in ("success_rate", "episode_length")
    )
    file = "ten other seeds: {} and {}, in {:.1f} and {:.1f} steps"
    page = "(Ten other seeds: {} in {:.0f}, {} in {:.0f}.)"
    assert file.format(*map(two, success), *steps) in prose(SCRIPT)
    shown = page.format(two(success[0]), steps[0], two(success[1]), steps[1])
    assert shown in prose(REPOSITORY / "README.md")


def two(number):
    """A number with two digits, as one learns to round: 0.695 is 0.70."""
    return str(Decimal(f"{number:.4f}").quantize(Decimal("0.01"), ROUND_HALF_UP))


def prose(path):
    """A file's text without its line breaks and comment signs, so that sentences can be found."""
    return " ".join(path.read_text("utf-8").replace("\n# ", " ").split())


def test_the_lesson_of_the_slopes_has_its_rows():
    """The first table of Section 5, and what Section 4 says of the one number."""
    told, told_its_own = (f"{options} + {study.SLOPES}" for options in study.TOLD_EIGHT)
    for sees, options, algorithm in [
        ("its observation (IPPO)", f"{study.EACH_PAID} # {study.SLOPES}", "IPPO"),
        ("all observations (MAPPO)", f"{study.TEAM_PAID} # {study.SLOPES}", "MAPPO"),
        ("its own, and how far the others have to go", told, "IPPO"),
        ("its own (IPPO)", f"{study.TEAM_PAID} # {study.SLOPES}", "IPPO"),
        ("its own, and how far its robot has to go", told_its_own, "IPPO"),
    ]:
        fall = study.values("slopes", options, algorithm, f"curve_{study.SLOPE}")
        success, steps = (
            study.values("slopes", options, algorithm, column).mean()
            for column in ("success_rate", "episode_length")
        )
        assert len(fall) == 10
        row = f"| {sees} | {fall[:, -1].mean():.2f} | {success:.2f} | {steps:.1f} |"
        assert row in SCRIPT.read_text("utf-8")
    weight = 0.99 * (1 - 0.9) / (1 - 0.99 * 0.9)
    assert f"= {weight:.2f}. So the advantage of a unit is 1 - {weight:.2f} s" in prose(SCRIPT)
    for options, algorithm in [
        (f"{study.EACH_PAID} # {study.SLOPES}", "IPPO"),
        (f"{study.TEAM_PAID} # {study.SLOPES}", "IPPO"),
        (told_its_own, "IPPO"),
    ]:
        fall = study.values("slopes", options, algorithm, f"curve_{study.SLOPE}")[:, -1].mean()
        assert f"{1 - weight * fall:.2f}" in prose(SCRIPT)
    for algorithm, longest, iterations in (("MAPPO", 10, 10), ("IPPO", 15, 10), ("IPPO", 15, 15)):
        options = f"--n-iters {longest} # {study.SLOPES}"
        falls = study.values("slopes", options, algorithm, f"curve_{study.SLOPE}")
        assert f" {falls[:, iterations - 1].mean():.2f} " in prose(SCRIPT)
    ours, theirs = (
        study.values("unbootstrapped", study.UNBOOTSTRAPPED_EIGHT, algorithm, "success_rate").mean()
        for algorithm in ("MAPPO", "IPPO")
    )
    assert f"(success {ours:.2f} with MAPPO, {theirs:.2f} with IPPO)" in prose(SCRIPT)
    [options] = [run for run, label in study.TOLD_EIGHT.items() if "others" in label]
    found = study.at_end("told", options, "IPPO")
    assert found["success_rate"].min() == 1
    assert f"in {found['episode_length'].mean():.1f} steps, better than" in prose(SCRIPT)


def test_the_lesson_of_the_long_runs_has_its_rows():
    """The second table of Section 5, the two values above it and the three cures below."""
    text = SCRIPT.read_text("utf-8")
    [head] = [line for line in text.splitlines() if line.startswith("# | after |")]
    for algorithm in ("MAPPO", "IPPO"):
        means = []
        for number in re.findall(r"\d+", head):
            found = study.at_stop("lasting", "--n-iters 50", algorithm, int(number))
            means.append(f"{found['success_rate'].mean():.2f}")
        assert f"# | {algorithm} | {' | '.join(means)} |\n" in text
    means = []
    for number in (10, 15, 20):
        found = study.at_stop("told", study.TOLD_LONG, "IPPO", number)["success_rate"]
        assert len(found) == 10
        means.append(f"{found.mean():.2f}")
    assert (
        f"# | a local critic, told how far the others have to go | {' | '.join(means)} | |\n"
        in text
    )
    options = f"--n-iters 10 # {study.MEASURED}"
    before, reward = (
        study.values("arrivals", options, "IPPO", f"curve_{name}")[:, -1].mean()
        for name in study.ARRIVALS[:2]
    )
    assert f"critic expected {before:.2f} on average just before" in prose(SCRIPT)
    reward, before = round(reward, 2), round(before, 2)
    assert f"delta = {reward} + 0           - {before} = {reward - before:.2f}\n" in text
    ends, paid, gamma = (
        study.values("ends", run, "IPPO", "success_rate").mean() for run in study.ENDS
    )
    options = f"--n-iters 15 # {study.NO_ENDS} + {study.SLOPES}"
    fall = study.values("slopes", options, "IPPO", f"curve_{study.SLOPE}")[:, -1]
    assert len(fall) == 10
    assert f"the fall stays at {fall.mean():.2f} after 15 iterations" in prose(SCRIPT)
    assert f"IPPO still has a success rate of {ends:.2f}." in prose(SCRIPT)
    assert f"{paid:.2f} if each robot is paid for itself, and {gamma:.2f} with" in prose(SCRIPT)
    rewards = [
        study.at_stop("lasting", "--n-iters 50", "IPPO", number)["episode_reward"].mean()
        for number in (10, 15, 20)
    ]
    falls = "from {:.2f} to {:.2f} to {:.2f} after 20 iterations".format(*rewards)
    assert falls in prose(SCRIPT)


def test_the_other_scenario_has_its_rows():
    """The success rates that Section 7 names, and the command that is printed with them."""
    means = []
    for iterations in (5, 10, 40):
        found = [
            study.at_stop("transport", study.TRANSPORT, algorithm, iterations)
            for algorithm in ("MAPPO", "IPPO")
        ]
        assert all("collisions" not in one and len(one["success_rate"]) == 10 for one in found)
        [mean] = {f"{one['success_rate'].mean():.2f}" for one in found}  # that of both
        means.append(mean)
    assert (
        f"({means[0]} each after 5 iterations, {means[1]} after 10) and lasted ({means[2]} after 40"
    ) in prose(SCRIPT)
    assert f"python train_mappo.py {study.TRANSPORT}\n" in study.README.read_text("utf-8")
    for algorithm, reward in (("MAPPO", "3.0"), ("IPPO", "1.1")):
        found = study.values("unsolved", study.GIVE_WAY, algorithm, "episode_reward")
        assert [f"{one:.1f}" for one in found] == [reward]


def test_the_first_page_has_its_rows():
    """The table below the pictures of README.md, and what its experiments promise."""
    page = prose(REPOSITORY / "README.md")
    for algorithm in ("MAPPO", "IPPO"):
        means = []
        for number in (10, 15, 20):
            found = study.at_stop("lasting", "--n-iters 50", algorithm, number)
            means.append(two(found["success_rate"].mean()))
        assert f"| {algorithm} | {' | '.join(means)} |" in page

    def success(name, options, algorithm):
        return study.values(name, options, algorithm, "success_rate")

    def steps(name, options, algorithm):
        return study.values(name, options, algorithm, "episode_length").mean()

    long_ippo, long_mappo = (
        study.at_stop("lasting", "--n-iters 50", algorithm, 15)["success_rate"]
        for algorithm in ("IPPO", "MAPPO")
    )
    short = success("flag", "", "IPPO")
    assert (
        f"Success {two(long_ippo.mean())} (best run {two(long_ippo.max())}), down from "
        f"{two(short.mean())} (worst {two(short.min())}) after ten iterations; "
        f"MAPPO has {two(long_mappo.mean())} (worst {two(long_mappo.min())})."
    ) in page
    team, each = study.TEAM_PAID, study.EACH_PAID
    for options in (team, each):
        assert f"python train_mappo.py {options} " in page
    assert success("payment", team, "MAPPO").min() == 1
    ippo = success("payment", team, "IPPO")
    assert (
        f"Success 1.00 in each of ten runs with MAPPO, in {steps('payment', team, 'MAPPO'):.0f} "
        f"steps; with `--no-mappo` {two(ippo.mean())} (worst run {two(ippo.min())}, with seed "
        f"{ippo.argmin()}), in {steps('payment', team, 'IPPO'):.0f}."
    ) in page
    assert min(success("payment", each, one).min() for one in ("MAPPO", "IPPO")) == 1
    assert (
        f"with both, in {steps('payment', each, 'MAPPO'):.0f} and "
        f"{steps('payment', each, 'IPPO'):.0f} steps"
    ) in page
    both = [success("horizon", "--gamma 0.9", one) for one in ("MAPPO", "IPPO")]
    [mean] = {two(one.mean()) for one in both}
    assert (
        f"Success {mean} with both (worst runs {two(both[0].min())} and {two(both[1].min())})"
        in page
    )
    separate = "--no-share-parameters-policy"
    ours, theirs = (success("policies", separate, one) for one in ("MAPPO", "IPPO"))
    longer = success("sharing", f"{separate} --n-iters 30", "MAPPO")
    assert (
        f"Success {two(ours.mean())} (worst run {two(ours.min())}), and {two(theirs.mean())} "
        f"(worst {two(theirs.min())}) with `--no-mappo`"
    ) in page
    assert f"with `--n-iters 30` MAPPO is at {two(longer.mean())}" in page


@pytest.mark.parametrize("change", study.CHANGES)
def test_a_changed_script_differs_in_that_only(change, tmp_path):
    changed = study.script_for(f"--n-iters 3 # {change}", tmp_path).read_text("utf-8")
    old, new = study.CHANGES[change]
    assert changed.count(new) == 1
    assert changed.replace(new, old) == SCRIPT.read_text("utf-8")
    assert study.script_for("--n-iters 3", tmp_path) == SCRIPT


def test_a_change_that_fits_nowhere_is_reported(monkeypatch, tmp_path):
    monkeypatch.setitem(study.CHANGES, "a test", ("no such line", "another"))
    with pytest.raises(RuntimeError, match="a test: train_mappo.py must hold"):
        study.script_for("# a test", tmp_path)


def test_slopes_are_measured_in_each_iteration():
    """As a column of the changed script's metrics.csv."""
    options = "--max-steps 5 --frames-per-batch 20 --minibatch-size 10 --num-epochs 1 --n-iters 2"
    options += f" --num-cells 8 --evaluation-episodes 3 # {study.SLOPES}"
    slopes = study.train("a test", options, "MAPPO", 0)[f"curve_{study.SLOPE}"].split()
    assert len(slopes) == 2 and all(abs(float(slope)) < 10 for slope in slopes)


@pytest.mark.parametrize("change", [study.TOLD, study.TOLD_ITS_OWN])
def test_a_critic_that_is_told_gets_one_number_more(change, monkeypatch, tmp_path):
    """The length of the way, of the robot itself or of all others together."""
    script = study.script_for(f"# {change}", tmp_path).read_text("utf-8")
    cell = re.search(r"^class ToldNetwork.*?\n\n\n", script, re.MULTILINE | re.DOTALL)[0]
    names = {"MultiAgentMLP": MultiAgentMLP, "torch": torch}
    exec(cell, names)
    told = []
    network = names["ToldNetwork"](
        n_agents=3, n_agent_inputs=6, n_agent_outputs=1, centralized=False, share_params=True
    )
    monkeypatch.setattr(MultiAgentMLP, "forward", lambda self, inputs: told.append(inputs))
    seen = torch.zeros(3, 6)
    seen[:, 4:6] = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    network(seen)
    assert told[0][:, :6].equal(seen)
    expected = [5.0, 1.0, 2.0] if change == study.TOLD_ITS_OWN else [3.0, 7.0, 6.0]
    assert told[0][:, 6].tolist() == expected


def test_arrivals_are_measured_in_each_iteration():
    """As columns of the changed script's metrics.csv; nan, as nobody arrives in so short a run."""
    options = "--max-steps 5 --frames-per-batch 20 --minibatch-size 10 --num-epochs 1 --n-iters 2"
    options += f" --num-cells 8 --evaluation-episodes 3 # {study.MEASURED}"
    row = study.train("a test", options, "IPPO", 0)
    assert {row[f"curve_{name}"] for name in study.ARRIVALS} == {"nan nan"}


def test_the_recipes_are_the_printed_commands_and_have_their_rows():
    """Both recipes in the study's README, the quick one with its numbers on the first page."""
    page = (REPOSITORY / "README.md").read_text("utf-8")
    for recipe in study.RECIPES.values():
        assert f"python train_mappo.py {recipe}\n" in study.README.read_text("utf-8")
    quick = study.RECIPES["quick"]
    assert f"`python train_mappo.py {quick}`" in page
    found = np.concatenate(
        [
            study.values(name, quick, "MAPPO", "success_rate")
            for name in ("recipes", "recipes-fresh")
        ]
    )
    assert len(found) == 30
    assert f"reaches {found.mean():.2f} (worst of thirty runs {two(found.min())})" in page


def test_a_run_is_evaluated_at_each_stop_and_goes_on(monkeypatch):
    """As often as it is stopped; the last evaluation is that of the run."""
    options = "--max-steps 5 --frames-per-batch 20 --minibatch-size 10 --num-epochs 1"
    options += " --num-cells 8 --evaluation-episodes 3"
    monkeypatch.setitem(study.STOPPED_AFTER, options, [1, 3])
    row = study.train("a test", options, "IPPO", 0)
    assert len(row["curve_kl_approx"].split()) == 3
    for name in study.EVALUATION:
        stops = row[f"stops_{name}"].split()
        assert len(stops) == 2
        assert stops[-1] == row[name]
    assert set(row) == set(study.COLUMNS)


def test_the_times_of_a_turn_are_compared_with_each_other():
    """A ratio is the median over turns, not the ratio of medians; an amount divides the seconds."""
    times = {"defaults": (3, [3.0, 6.0, 9.0]), "quick": (1, [2.0, 2.0, 6.0])}
    rows = []
    for name, (amount, seconds) in times.items():
        for turn, taken in enumerate(seconds):
            rows.append(benchmark.row_of("trainings", name, "MAPPO", turn, amount, taken))
    table = study.speed_of_trainings(rows)
    assert table.splitlines()[-1] == "| quick | MAPPO | 2.0 | 2.00 (1.00 to 2.00) |"


def test_what_is_attainable_is_the_way_to_the_goals():
    """As the first step of a rollout sees it, summed over the robots of each episode."""
    options = "--n-agents 4 --num-epochs 3"
    env = VmasEnv("navigation", num_envs=200, seed=7, scenario_kwargs={"n_agents": 4})
    seen = env.rollout(1)["agents", "observation"][:, 0]
    ways = seen[..., 4:6].norm(dim=-1).sum(dim=-1).mean().item()
    assert study.attainable(options, 7) == pytest.approx(ways, rel=1e-5)


# Outside of tests, Python does not show this warning of a library to a library.
@pytest.mark.filterwarnings("ignore:Creating .*Updater:DeprecationWarning")
def test_the_benchmark_compares_with_the_same_gradients(monkeypatch):
    """Its update in bare PyTorch is that of the script, or its check would raise."""
    monkeypatch.setattr(sys, "argv", sys.argv)  # which it changes
    bare = benchmark.BareUpdate(benchmark.run_script(4))
    bare.check()
    bare.names["clip_epsilon"] = 1e-3
    bare.names["critic_coeff"] = 2.0
    with pytest.raises(AssertionError):
        bare.check()


def test_the_shown_run_is_a_row():
    """What README.md shows of a run is what a newcomer's first command gave, before and after."""
    options = f"# {study.TWO_THREADS}"
    [row] = [row for row in study.read_rows(study.RESULTS) if row["options"] == options]
    page = (REPOSITORY / "README.md").read_text("utf-8")
    for name in study.EVALUATION:
        before, after = float(row[f"untrained_{name}"]), float(row[name])
        assert f"{name:<35}{before:>12.3f}{after:>12.3f}\n" in page


def test_a_difference_has_an_interval_only_where_it_can_be_trusted():
    """One run in ten that fails hides from most samples of ten; a spread like a normal does not."""
    failing = np.array([0.9] + [0.0] * 9)
    assert study.difference(failing, np.zeros(10), "success_rate") == "+0.090, 1 of 10"
    spread = stats.norm.ppf((np.arange(10) + 0.5) / 10)
    shown = study.difference(spread, np.full(10, -0.5), "episode_length")
    low, high = study.interval(spread + 0.5)
    assert shown == f"+0.5 [{low:+.1f}, {high:+.1f}], 3 of 10"  # fewer steps are better
    assert study.difference(spread, spread, "success_rate") == "none"


def test_the_interval_is_that_of_a_paired_test():
    """0 lies on its border if and only if the paired t-test gives 5%."""
    differences = np.random.default_rng(0).normal(1.0, 1.5, 10)
    low, high = study.interval(differences)
    for border in (low, high):
        assert stats.ttest_1samp(differences, border).pvalue == pytest.approx(0.05)
    assert study.interval(np.full(10, 0.3)) == (0.3, 0.3)


def test_its_coverage_is_that_of_a_normal_population_where_there_is_one():
    """Simulated as for the study, but drawn from a population for which 95% is exact."""
    population = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    assert study.coverage(population) == pytest.approx(0.95, abs=0.01)


def test_the_probability_of_improvement_counts_pairs():
    ours, theirs = np.array([1.0, 2.0]), np.array([1.0, 0.0])
    assert study.probability_of_improvement(ours, theirs) == (0.5 + 1 + 1 + 1) / 4
