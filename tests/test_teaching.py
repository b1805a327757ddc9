"""The class kit: solutions pass, wrong answers fail with a hint that fits, notebooks are whole."""

import csv
import json
import linecache
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jupytext
import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

TEACHING = Path(__file__).resolve().parents[1] / "teaching"
STUDENT, TEACHER = TEACHING / "student", TEACHING / "teacher"
sys.path[:0] = [str(TEACHING), str(STUDENT)]
import checks  # noqa: E402
import kit  # noqa: E402
import make_notebooks  # noqa: E402
import make_pictures  # noqa: E402
import make_silent_bugs  # noqa: E402

matplotlib.use("agg")
SOLUTIONS = {
    cell.metadata["id"]: cell.source
    for cell in jupytext.read(TEACHER / "solutions.py").cells
    if cell.cell_type == "code"
}
BLANKS = {
    cell.id: cell.source
    for cell in [*make_notebooks.make_exercises().cells, *make_notebooks.make_part_c().cells]
    if cell.cell_type == "code"
}
SLOW = {"check_4", "maps_4", "check_10"}  # they play episodes or train
LONG = 2_000_000  # bytes: a notebook that is longer is not shown on web pages


def run(name, source, space):
    """Run a cell as a notebook does, so that the source of its functions can be found."""
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), space)


@pytest.fixture(scope="module")
def solved():
    """Run all solutions and their checks; return the names before each cell."""
    before, space = {}, {"__name__": "__main__"}
    here = os.getcwd()
    os.chdir(TEACHER)
    for name, source in SOLUTIONS.items():
        before[name] = dict(space)
        if name not in SLOW:
            run(name, source, space)
    os.chdir(here)
    before["end"] = dict(space)
    return before


def test_the_solutions_pass_their_checks(solved):
    assert set(solved) == {*SOLUTIONS, "end"}


CHECKED = [name for name in SOLUTIONS if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKED)
def test_a_blank_left_empty_fails_with_a_hint(solved, check, monkeypatch):
    monkeypatch.chdir(TEACHING)
    blank = check.replace("check", "blank")
    space = dict(solved[blank])
    run(f"{blank} left empty", BLANKS[blank], space)
    with pytest.raises(checks.Hint, match=r"^Exercise \d+: .{15}") as caught:
        run(check, BLANKS[check], space)
    assert caught.value._render_traceback_() == [str(caught.value)]  # all that a notebook shows


def test_the_fifty_lines_run(solved):
    """That they learn in twelve iterations takes a minute, so here they only run one."""
    function = solved["end"]["train"]
    lines = [line for line in checks.source_of(function).splitlines() if line.strip()]
    assert len(lines) <= 50
    action = function(1)(torch.zeros(5, 2, 18))
    assert action.shape == (5, 2, 2) and action.abs().max() <= 1


def fails(exercise, hint, check, *answers):
    """Assert that an answer fails with a hint for this exercise."""
    with pytest.raises(checks.Hint) as caught:
        check(*answers)
    assert str(caught.value).startswith(f"Exercise {exercise}: "), caught.value
    assert re.search(hint, str(caught.value)), caught.value


@pytest.mark.parametrize(
    "answer, hint",
    [
        (None, "prediction for MAPPO"),
        ({"MAPPO": [0, 1, 2]}, "prediction for IPPO"),
        ({"MAPPO": [0, 1, 2], "IPPO": 1}, "Write a list"),
        ({"MAPPO": [0, 1, 2], "IPPO": "1"}, "Write a list"),
        ({"MAPPO": [0, 1, 2], "IPPO": ["1"]}, "Write a list"),
        ({"MAPPO": [1, 2, 3], "IPPO": [2]}, "numbered from 0"),
        ({"MAPPO": [0, 1, 2], "IPPO": [0]}, "agent 0 under IPPO"),
        ({"MAPPO": [0, 1, 2], "IPPO": [0, 1, 2]}, "agent 0 under IPPO"),
        ({"MAPPO": [1], "IPPO": [1]}, "agent 0 under MAPPO"),
        ({"MAPPO": [0, 1, 2, 2], "IPPO": [1]}, "twice"),
        ({"MAPPO": [True], "IPPO": [1]}, "Write a list"),
    ],
)
def test_wrong_agents_fail(answer, hint):
    fails(1, hint, checks.whose_value_changes, answer)


RHO = {(3, 0.0): (1 / 3, 1), (3, 0.5): (2 / 3, 2), (3, 0.9): (0.93, 2.8), (8, 0.5): (0.5625, 4.5)}
TRUST = {0.0: "both", 0.9: "centralized"}


@pytest.mark.parametrize(
    "changed, hint",
    [
        ({(3, 0.0): (0.0, 1)}, "correlation of two numbers"),
        ({(3, 0.0): (0.5, 1)}, "explained variance is not 0.5"),
        ({(3, 0.0): (33, 1)}, "fraction of 1"),
        ({(3, 0.0): (0.3, 1)}, "two decimal places"),
        ({(3, 0.0): (1 / 3, 0.0)}, "leaves out the agent's own number|others add rho"),
        ({(3, 0.0): 1 / 3}, "two numbers"),
        ({(3, 0.0): ("1/3", 1)}, "write a number"),
        ({(3, 0.5): (2 / 3, 1)}, "true slope"),
        ({(3, 0.5): (2 / 3, 1.5)}, "only one of the others"),
        ({(3, 0.5): (2, 2 / 3)}, "comes first"),
        ({(3, 0.5): (0.5, 2)}, "correlation of two numbers"),
        ({(3, 0.5): (1 / 3, 2)}, "only for rho 0"),
        ({(3, 0.9): (0.93, 2.7)}, "others add rho each"),
        ({(3, 0.9): (0.93, 3)}, "all numbers were equal"),
        ({(3, 0.9): (1.0, 2.8)}, "perfect prediction"),
        ({(3, 0.9): (0.07, 2.8)}, "not. explained"),
        ({(8, 0.5): (1 / 7, 4.5)}, "explained variance is not"),
        ({(8, 0.5): (0.5625, 8)}, "all numbers were equal"),
        ({(8, 0.5): (float("nan"), 4.5)}, "write a number"),
    ],
)
def test_wrong_predictions_of_the_probe_fail(changed, hint):
    fails(2, hint, checks.what_a_critic_says, {**RHO, **changed}, TRUST)


def test_other_right_forms_pass(capsys):
    """A range, capitals, fractions and numbers of NumPy are as good as what the blanks show."""
    checks.whose_value_changes({"MAPPO": range(3), "IPPO": {1}})
    checks.what_a_critic_says(RHO, {0.0: "Both", 0.9: "Centralized"})
    checks.slopes_of_four({**SLOPES, ("centralized", "individual"): Fraction(1, 3)})
    checks.advantage_of_progress(lambda s, g, lm: np.float32(1 - g * (1 - lm) / (1 - g * lm) * s))
    checks.silent_bugs({name: label.capitalize() for name, label in RIGHT.items()})
    assert capsys.readouterr().out.count("correct") == 2


@pytest.mark.parametrize(
    "trust, hint",
    [
        (None, "Say which critic"),
        ({**TRUST, 0.9: "local"}, "slope of 1"),
        ({**TRUST, 0.9: "both"}, "slope of 1"),
        ({**TRUST, 0.0: "local"}, "slope of 1"),
        ({**TRUST, 0.0: "MAPPO"}, "local, centralized or both"),
    ],
)
def test_trust_in_the_wrong_critic_fails(trust, hint):
    fails(2, hint, checks.what_a_critic_says, RHO, trust)


@pytest.mark.parametrize(
    "formula, hint",
    [
        ("r + g * on * torch.cat([v[1:], n[-1:]]) - v", "another episode"),
        ("r + g * on * v.roll(-1) - v", "row"),
        ("r + g * n - v", "next value counts 0"),
        ("g * on * n - v", "reward is missing"),
        ("(r + g * n) * on - v", "reward still counts"),
        ("r + g * on * n[0] - v", "own next value"),
        ("r + g * on * n", "baseline"),
        ("r + on * n - v", "gamma is missing"),
        ("r - v", "not a termination"),
        ("r + g * on * n + v", "not added"),
        ("r + g * (1 - on) * n - v", "Use 1 - terminated"),
        ("r + g * (1 - on) * torch.cat([v[1:], n[-1:]]) - v", "Use 1 - terminated"),
        ("r + 0.9 * on * n - v", "argument gamma"),
        ("r + on * (g * n - v)", "baseline, V, is subtracted"),
        ("v - r - g * on * n", r"You returned \[0.4, -0.03\].* and gamma 0.9\.$"),
        ("(r + g * on * n - v)[0]", "shape"),
        ("(r + g * on * n - v).unsqueeze(1)", "shape"),
        ("r + g * (1 - t) * n - v", "stopped"),
        ("None", "returns None"),
        ("'delta'", "not a tensor"),
    ],
)
def test_wrong_deltas_fail(formula, hint):
    source = f"lambda r, v, n, t, g: (on := 1 - t.float(), {formula})[1]"
    fails(3, hint, checks.find_the_bug, eval(source))


@pytest.mark.parametrize("rate", [95, 1.2, -0.1, "0.9", None, True, float("nan")])
def test_success_rates_outside_of_0_to_1_fail(rate):
    said = {("MAPPO", 10): 0.9, ("MAPPO", 15): 0.9, ("IPPO", 10): 0.9, ("IPPO", 15): rate}
    fails(4, "IPPO after 15 iterations", checks.look, said)


SLOPES = {
    ("local", "shared"): 2,
    ("local", "individual"): 1,
    ("centralized", "shared"): 1,
    ("centralized", "individual"): 1 / 3,
}


@pytest.mark.parametrize(
    "case, slope, hint",
    [
        (("local", "shared"), 1, "others drive home, too"),
        (("local", "shared"), 1 / 3, "others drive home, too"),
        (("local", "shared"), 3, "always at equal distances"),
        (("local", "shared"), 2.8, "always at equal distances"),
        (("local", "shared"), -2, "is positive"),
        (("local", "individual"), 2, "own remaining distance"),
        (("centralized", "shared"), 2, "Only one of the three"),
        (("centralized", "shared"), 1 / 3, "Only one of the three"),
        (("centralized", "individual"), 1, "average"),
        (("centralized", "individual"), "1/3", "write a number"),
        (("centralized", "individual"), None, "Write down"),
    ],
)
def test_wrong_slopes_fail(case, slope, hint):
    fails(5, hint, checks.slopes_of_four, {**SLOPES, case: slope})


@pytest.mark.parametrize(
    "formula, hint",
    [
        ("1 - g * s", "lmbda 0"),
        ("1 - s", "whole slope"),
        ("1 + g * (1 - l) / (1 - g * l) * s", "lowers"),
        ("-g * (1 - l) / (1 - g * l) * s", "reward for one unit"),
        ("1 - g * (1 - l) * s", "one step"),
        ("1 - g * (1 - l) / (1 - g * l)", "slope is missing"),
        ("1 - 0.908 * s", "the advantage is"),
        ("None", "returns None"),
        ("'loss'", "write a number"),
        ("s.item()", "stopped"),
    ],
)
def test_wrong_advantages_of_progress_fail(formula, hint):
    fails(5, hint, checks.advantage_of_progress, eval(f"lambda s, g, l: {formula}"))


@pytest.mark.parametrize(
    "turning, hint",
    [
        ({"gamma": 0.9, "spread": 0.9}, "gamma 0.91, progress is still"),
        ({"gamma": 0.98, "spread": 0.9}, "already a loss"),
        ({"gamma": 0.97, "spread": 1.0}, "spread 0.9, progress is still"),
        ({"gamma": 0.97, "spread": 0.5}, "already a loss"),
        ({"gamma": 0.975, "spread": 0.9}, "2 decimal places"),
        ({"gamma": 97, "spread": 0.9}, "between 0 and 1"),
        ({"gamma": 0.97}, "smallest spread"),
        (None, "largest gamma"),
    ],
)
def test_wrong_turning_points_fail(solved, turning, hint):
    function = solved["end"]["advantage_of_progress"]
    fails(5, hint, checks.where_the_sign_flips, function, turning)


def changed_function(solved, blank, name, right, wrong):
    """Return a function of a solution with one piece of its source replaced."""
    source = SOLUTIONS[blank]
    assert source.count(right) == 1, source
    space = dict(solved["end"])
    run(f"{blank} changed", source.replace(right, wrong), space)
    return space[name]


@pytest.mark.parametrize(
    "right, wrong, hint",
    [
        ("(hidden @ weight.mT + bias).tanh()", "(hidden @ weight + bias).tanh()", "transpose"),
        ("observation.flatten(-2)", "observation", "join the last two"),
        ("observation.flatten(-2)", "observation.mean(-2)", "join the last two"),
        ("observation.flatten(-2)", "observation.mT.flatten(-2)", "agent by agent"),
        ("weight.mT + bias).tanh()", "weight.mT + bias)", "no tanh between"),
        ("weight.mT + bias).tanh()", "weight.mT + bias).relu()", "wrong nonlinearity"),
        ("hidden @ weight.mT + bias  #", "(hidden @ weight.mT + bias).tanh()  #", "after the last"),
        ("weight.mT + bias).tanh()", "weight.mT).tanh()", "add each bias"),
        ("value.unsqueeze(-2).expand(-1, observation.shape[-2], -1)", "value", "every agent"),
        ("value.unsqueeze(-2).expand(-1, observation.shape[-2], -1)", "value[0]", "every agent"),
        ("value.unsqueeze(-2).expand(-1, observation.shape[-2], -1)", "[value]", "tensor|shape"),
        ("hidden = observation", "hidden = obs", "NameError"),
        ("expand(-1, observation.shape[-2], -1)", "expand(5, 3, 1)", "stopped"),
        ("expand(-1, observation.shape[-2], -1)", "expand(-1, 3, -1)", r"\(7, 3, 1\)"),
        (
            "for weight, bias in layers[:-1]",
            "for weight, bias in layers[0], layers[1]",
            "shape|stop",
        ),
        ("value = hidden @", "value = hidden.detach() @", "no gradient reaches all"),
        (
            "@ weight.mT + bias  #",
            "@ weight.mT.detach() + bias.detach()  #",
            "no gradient reaches all",
        ),
    ],
)
def test_wrong_critics_fail(solved, right, wrong, hint):
    function = changed_function(solved, "blank_6", "centralized_critic", right, wrong)
    fails(6, hint, checks.centralized_critic, function)


@pytest.mark.parametrize(
    "right, wrong, hint",
    [
        ("gamma * (1 - terminated.float())", "(1 - terminated.float())", "Multiply it by gamma"),
        ("(1 - terminated.float())", "(1 - done.float())", "truncated step is done"),
        ("(1 - terminated.float()) * next_value", "next_value", "nothing more can be earned"),
        ("lmbda * (1 - done[step].float())", "lmbda", "sum must stop"),
        ("(1 - done[step].float())", "(1 - terminated[step].float())", "at every done"),
        ("* next_value", "* torch.cat([value[1:], next_value[-1:]])", "stored next value"),
        ("gamma * lmbda * (1", "gamma * (1", "gamma alone"),
        ("gamma * lmbda * (1", "lmbda * (1", "lmbda alone"),
        (" + gamma * lmbda * (1 - done[step].float()) * following", "", "deltas"),
        ("in reversed(range(len(reward)))", "in range(len(reward))", "last step"),
        ("return advantage", "return advantage + value", "value targets"),
        ("return advantage", "return advantage.flip(0)", "reverse order"),
        ("return advantage", "return advantage.tolist()[0]", "shape|one number"),
        ("return advantage", "return advantage.mean()", "shape"),
        ("next_value - value\n", "next_value\n", "you returned"),
        ("(1 - done[step].float()) *", "(not done[step]) *", "rather than `if`"),
        ("1 - terminated.float()", "1 - terminated", "stopped"),
        ("torch.zeros_like(reward[0])", "next_value[-1]", "begins with zeros"),
        ("torch.zeros_like(reward[0])", "value[-1]", "begins with 0"),
        ("torch.zeros_like(reward[0])", "delta[-1]", "counts twice"),
        ("gamma * (1 - term", "0.9 * (1 - term", "arguments gamma and lmbda|differ"),
        ("    delta =", "    gamma, lmbda = 0.9, 0.5\n    delta =", "arguments gamma and lmbda"),
        ("    delta =", "    gamma, lmbda = 0.99, 0.9\n    delta =", "arguments gamma and lmbda"),
        ("(1 - done[step].float()) * following", "(not done[step].any()) * following", "others"),
        (
            "lmbda * (1 - done[step].float()) * following",
            "lmbda * advantage[step + 1]",
            "Begin with",
        ),
        (
            "in reversed(range(len(reward)))",
            "in range(len(reward) - 1, 0, -1)",
            "first wrong step is 0",
        ),
    ],
)
def test_wrong_gae_fails(solved, right, wrong, hint):
    fails(7, hint, checks.gae, changed_function(solved, "blank_7", "gae", right, wrong))


def with_lambda_returns(reward, value, next_value, terminated, done, gamma, lmbda):
    """Return GAE as the lambda return minus the value, in a list."""
    following, returns = next_value[-1], []
    for step in reversed(range(len(reward))):
        after = next_value[step]
        mixed = torch.where(done[step], after, (1 - lmbda) * after + lmbda * following)
        following = reward[step] + gamma * (1 - terminated[step].float()) * mixed
        returns.insert(0, following - value[step])
    return returns


def from_the_next_row(reward, value, next_value, terminated, done, gamma, lmbda):
    """Return GAE with V of the next row within an episode, where it is V'."""
    following = torch.cat([value[1:], next_value[-1:]])
    after = torch.where(done, next_value, following)
    return checks.gae_with("", reward, value, after, terminated, done, gamma, lmbda)


@pytest.mark.parametrize("function", [with_lambda_returns, from_the_next_row])
def test_other_right_forms_of_gae_pass(function, capsys):
    checks.gae(function)
    assert "Exercise 7 is correct" in capsys.readouterr().out


CASES = {("A > 0", "below"): False, ("A > 0", "inside"): False, ("A > 0", "above"): True}
CASES |= {("A < 0", "below"): True, ("A < 0", "inside"): False, ("A < 0", "above"): False}


@pytest.mark.parametrize(
    "formula, hint",
    [
        ("c * a", "Without the min"),
        ("r * a", "Nothing is clipped"),
        ("torch.maximum(r * a, c * a)", "not the larger"),
        ("-torch.minimum(r * a, c * a)", "no minus sign"),
        ("torch.minimum(r * a, c * a).mean()", "without a mean"),
        ("torch.minimum(r, c) * a", "Multiply by the advantage first"),
        ("torch.minimum(r * a, r.clamp(0.8, 1.2) * a)", "not 0.2"),
        ("torch.minimum(r * a, r.clamp(max=1 + e) * a)", "from below"),
        ("torch.minimum(r * a, c * a).detach()", "lost its gradient"),
        ("torch.minimum(r * a, c * a).unsqueeze(0)", "shape"),
        ("min(r * a, c * a)", "stopped.*Use `torch.minimum`"),
        ("torch.minimum(r.mul_(a), c * a)", "in place"),
        ("torch.minimum(r * a, (r * a).clamp(1 - e, 1 + e))", "Clip the ratio, then"),
        ("torch.minimum(r * a, c)", "Clip the ratio, then"),
        ("torch.minimum((r * a).detach(), c * a)", "Detach neither"),
        ("torch.minimum(r * a, (c * a).detach())", "Detach neither"),
        ("torch.minimum(r * a.sign(), c * a.sign())", "not by its sign"),
        ("torch.minimum(r * (b := (a - a.mean()) / a.std()), c * b)", "you returned"),
        ("None", "returns None"),
    ],
)
def test_wrong_objectives_fail(formula, hint):
    function = eval(f"lambda r, a, e: (c := r.clamp(1 - e, 1 + e), {formula})[1]")
    fails(8, hint, checks.clipped_objective, function, CASES, 1.728)


def test_a_wrong_objective_and_a_table_that_fits_it_fail():
    outside = {(sign, place): place != "inside" for sign, place in CASES}
    wrong = lambda r, a, e: torch.minimum((r * a).detach(), r.clamp(1 - e, 1 + e) * a)  # noqa: E731
    fails(8, "not the right gradient", checks.clipped_objective, wrong, outside, 1.728)


def test_ones_and_zeros_are_true_and_false(solved):
    cases = {case: int(flat) for case, flat in CASES.items()}
    checks.clipped_objective(solved["end"]["clipped_objective"], cases, 1.73)


@pytest.mark.parametrize(
    "cases, ratio, hint",
    [
        ({**CASES, ("A < 0", "above"): True}, 1.728, "A < 0 with a ratio above"),
        ({**CASES, ("A > 0", "above"): False}, 1.728, "A > 0 with a ratio above"),
        ({**CASES, ("A > 0", "above"): None}, 1.728, "True or False"),
        ({**CASES, ("A > 0", "above"): "yes"}, 1.728, "True or False"),
        (CASES, 1.2, "all three actions"),
        (CASES, 3.6, "multiplied, not added"),
        (CASES, 1.44, "three robots"),
        (CASES, 1.6, "compound"),
        (CASES, 1.7, "two decimal places"),
        (CASES, 2, "product"),
        (CASES, None, "team's ratio"),
    ],
)
def test_wrong_cases_of_clipping_fail(solved, cases, ratio, hint):
    function = solved["end"]["clipped_objective"]
    fails(8, hint, checks.clipped_objective, function, cases, ratio)


@pytest.mark.parametrize(
    "right, wrong, hint",
    [
        ("critic_coeff * ", "", "not weighted"),
        ("critic_coeff * ", "0.5 * ", "argument critic_coeff"),
        ("advantage, epsilon)", "advantage, 0.2)", "argument epsilon"),
        ("return -objective", "return objective", "sign"),
        ("-objective + critic", "-objective - critic", "Its sign is wrong"),
        ("epsilon).mean()", "epsilon).sum()", "not a sum"),
        ("return -objective", "return -100 * objective", "weights after a step differ"),
        ("advantage.mean(0)) / advantage.std(0)", "advantage.mean()) / advantage.std()", "all age"),
        ("advantage.std(0)", "advantage.std(0, unbiased=False)", "sample standard"),
        (" / advantage.std(0)", "", "nothing is divided"),
        ("advantage = (advantage - advantage.mean(0)) / advantage.std(0)", "pass", "not normalize"),
        ("functional.smooth_l1_loss(", "functional.mse_loss(", "smooth L1"),
        ("clipped_objective(ratio, advantage, epsilon)", "(ratio * advantage)", "not clipped"),
        (".exp().unsqueeze(-1)", ".unsqueeze(-1)", "Exponentiate"),
        (".exp().unsqueeze(-1)", ".neg().exp().unsqueeze(-1)", "upside down"),
        (".exp().unsqueeze(-1)", ".exp()", "unsqueeze"),
        ("return -objective +", "return", "weights after a step differ"),
        ("    return -objective", "    return torch.tensor(0.0)  #", "lost its gradient"),
        ("epsilon).mean()", "epsilon)", "single number"),
        ('data["value_target"])', 'data["value_target"]).item()', "reaches the critic"),
        ("loss(values, ", "loss(values.detach(), ", "reaches the critic"),
        (".exp().unsqueeze(-1)", ".exp().unsqueeze(-1).detach()", "reaches the policy"),
        ('data["old_log_prob"])', 'pi.log_prob(data["action"]).detach())', "always 1"),
        (").exp().unsqueeze(-1)", ").sum(-1, keepdim=True).exp().unsqueeze(-1)", "team's joint"),
        ("advantage.mean(0)", "advantage.mean(1, keepdim=True)", "differ"),
        ("epsilon).mean()", "epsilon).sum(1).mean()", "mean over the agents, too"),
        ("    return -objective", "    return 1.0\n    return -objective", "plain number"),
    ],
)
def test_wrong_losses_fail(solved, right, wrong, hint):
    function = changed_function(solved, "blank_9", "my_loss", right, wrong)
    fails(9, hint, checks.complete_update, function)


def hand_made(iterations):
    return lambda seen: (-2 * seen[..., 4:6] - seen[..., 2:4]).clamp(-1, 1)


@pytest.mark.parametrize(
    "function, hint",
    [
        (hand_made, "something other than learning"),
        (lambda iterations: None, "returns None"),
        (lambda iterations: 3, "returned a int"),
        (lambda: None, "stopped"),
        (lambda iterations: lambda seen: seen, "for each of two robots"),
        (lambda iterations: lambda seen: 5 + 0 * seen[..., :2], "Clamp"),
        (lambda iterations: lambda seen: seen @ seen, r"maps \(envs, 2, 18\)"),
        (lambda iterations: lambda seen: 0 * seen[..., :2], "succeed in 0%"),
        (lambda n: hand_made(n) if n else lambda seen: 0 * seen[..., :2], "No training is that"),
        (
            lambda iterations: lambda seen: seen.flip(1)[..., :2].clamp(-1, 1),
            "on its own observation",
        ),
        (7, "missing"),
    ],
)
def test_what_is_no_training_fails(function, hint):
    fails(10, hint, checks.two_robots, function)


def test_a_ready_made_loss_fails(solved):
    space = dict(solved["end"])
    run("ready made", "def train(iterations):\n    loss = ClipPPOLoss\n", space)
    fails(10, "without ClipPPOLoss", checks.two_robots, space["train"])


RIGHT = {name: label for name, (label, _) in checks.RUNS.items()}


@pytest.mark.parametrize(
    "answers, hint",
    [
        (None, "run_a"),
        ({**RIGHT, "run_a": "sound"}, "run_a is something else.*episode_reward"),
        ({**RIGHT, "run_b": "ratio always 1"}, "run_b is something else.*kl_approx"),
        ({**RIGHT, "run_c": "critic not trained"}, "run_c is something else.*normal size"),
        ({**RIGHT, "run_d": "sound"}, "run_d is something else.*explained_variance"),
        ({**RIGHT, "run_e": "learning rate"}, "run_e is something else.*ratio"),
        ({**RIGHT, "run_e": "entropy"}, "write one of"),
    ],
)
def test_wrong_matches_of_the_silent_bugs_fail(answers, hint):
    fails(11, hint, checks.silent_bugs, answers)


ADAM = "optimizer = torch.optim.Adam(loss_module.parameters(), lr=cfg.lr"


@pytest.mark.parametrize(
    "line, hint",
    [
        (None, "Write the corrected line"),
        (49, "in quotes"),
        ("optimizer = torch.optim.AdamW(loss_module.parameters(), lr=cfg.lr)", "Adam was right"),
        (f"{ADAM}, weight_decay=0.1)", "other options"),
        (f"{ADAM}, maximize=True)", "other options"),
        ("optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.lr)", "critic does not learn"),
        ("optimizer = torch.optim.Adam(critic.parameters(), lr=cfg.lr)", "policy does not learn"),
        ("optimizer = torch.optim.Adam(loss_module.parameters())", "learning rate was right"),
        ("optimizer = torch.optim.Adam(loss_module, lr=cfg.lr)", "fails with TypeError"),
        ("optimizer = torch.optim.SGD(loss_module.parameters(), lr=cfg.lr)", "Adam was right"),
        ("optimizer = torch.optim.Adam(loss_module.parameters(), lr=3e-4)", "Leave it"),
        ("optimizer = Adam(loss_module.parameters(), lr=cfg.lr)", "NameError"),
        ("losses = loss_module(minibatch)", "not the line"),
        ("print('hello')", "not the line"),
    ],
)
def test_wrong_repairs_fail(line, hint):
    fails(11, hint, checks.repaired_line, line)


def in_place(reward, value, next_value, terminated, gamma):
    next_value[terminated] = 0
    return reward.add_(gamma * next_value).sub_(value)


def test_a_function_may_change_its_arguments(capsys):
    checks.find_the_bug(in_place)
    assert "Exercise 3 is correct" in capsys.readouterr().out


def test_a_function_of_a_library_gets_a_hint():
    fails(3, "stopped with TypeError", checks.find_the_bug, torch.add)


def test_other_right_repairs_pass():
    for both in (
        "[*policy.parameters(), *critic.parameters()]",
        "list(policy.parameters()) + list(critic_network.parameters())",
    ):
        checks.repaired_line(f"optimizer = torch.optim.Adam({both}, lr=cfg.lr)")


def test_the_tables_show_their_mistakes():
    """Each run differs from the sound one where the hints say."""
    rows = {}
    for name in RIGHT:
        with open(STUDENT / "silent_bug" / f"{name}.csv", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        rows[name] = {key: [float(row[key]) for row in table] for key in table[0] if table[0][key]}
    assert max(rows["run_a"]["episode_reward"]) < 0 and rows["run_a"]["collisions"][-1] == 0
    assert min(rows["run_b"]["kl_approx"]) > 0.05 and min(rows["run_b"]["clip_fraction"]) > 0.3
    assert rows["run_c"]["episode_reward"][-1] > 2 and rows["run_c"]["loss_critic"][-1] < 0.005
    assert rows["run_d"]["loss_critic"][-1] > 4 * rows["run_c"]["loss_critic"][-1]
    assert rows["run_d"]["explained_variance"][-1] < 0.6 < rows["run_c"]["explained_variance"][-1]
    assert max(map(abs, rows["run_e"]["kl_approx"] + rows["run_e"]["clip_fraction"])) < 1e-3


def test_the_program_with_a_bug_is_the_lesson_with_its_mistake():
    """If this fails, run `python teaching/make_silent_bugs.py program`."""
    text = (STUDENT / "silent_bug" / "program_with_a_bug.py").read_text("utf-8")
    assert text == make_silent_bugs.make_program()
    assert text.count(make_silent_bugs.MISTAKES["run_d"][1]) == 1


def test_the_tables_fit_on_a_laptop(capsys):
    """A line of the output is no longer than what Jupyter shows at 1280 pixels."""
    kit.show_tables()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 105 and sum(line.startswith("run_") for line in lines) == 5
    assert [line.split()[0] for line in lines if re.match(" +[18] ", line)] == ["1", "8"] * 5


@pytest.mark.parametrize(
    "edit, hint",
    [
        ([], "Give the option"),
        ("--gamma 0.9", "list of words"),
        ({"gamma": 0.9}, "list of words"),
        (["make", "it", "better"], "two dashes"),
        (["--mappo"], "has to stay"),
        (["--no-mappo"], "has to stay"),
        (["--n-iters", "10"], "has to stay"),
        (["--n-agents", "1"], "has to stay"),
        (["--seed", "3"], "has to stay"),
        (["--evaluation-seed", "3"], "has to stay"),
        (["--gama", "0.9"], "no option --gama"),
        (["--gamma"], "takes one value"),
        (["--gamma", "0.9", "0.8"], "takes one value"),
        (["--anneal-lr", "true"], "takes no value"),
        (["--gamma", "0.9", "--lmbda", "0.5"], "one option only"),
        (["--scenario-options", '{"world_spawning_x": 0.6}'], "another task"),
        (["--scenario-options", '{"shared_rew": false, "collisions": false}'], "another task"),
    ],
)
def test_wrong_options_fail(edit, hint):
    fails(12, hint, checks.one_change, edit)


@pytest.mark.parametrize(
    "edit",
    [
        *(["--gamma", "0.9"], ["--gamma=0.9"], ["--gamma 0.9"], ["--gamma", 0.9], ["--lr", "1"]),
        *(["--anneal-lr"], ["--scenario-options", '{"shared_rew": false}']),
    ],
)
def test_an_option_alone_is_never_called_correct(edit, capsys):
    checks.one_change(edit)
    assert "TRAIN = True" in (said := capsys.readouterr().out) and "correct" not in said


def test_the_program_says_what_is_wrong_with_an_option():
    """A dictionary as Python writes it is refused in the program's own words."""
    edit = ["--scenario-options", "{'shared_rew': False}"]
    fails(12, "error: .*JSON", checks.one_change, edit, True)


@pytest.mark.parametrize("success, passes", [(0.95, True), (0.4, False)])
def test_only_the_success_rate_decides(success, passes, monkeypatch, capsys):
    told = []

    def train(options, replacing=None):
        told.append(options)
        return {"success_rate": success}

    monkeypatch.setattr(kit, "train_lesson", train)
    if passes:
        checks.one_change(["--gamma", "0.9"], True)
        assert "correct" in capsys.readouterr().out
    else:
        fails(12, "40%", checks.one_change, ["--lr", "1e-4"], True)
    assert told[0][:3] == ["--no-mappo", "--n-iters", "15"]


@pytest.mark.parametrize(
    "formula, hint",
    [
        ("d.sum(0) - d", "first dimension"),
        ("d.sum(-2, keepdim=True).expand(d.shape)", "own distance"),
        ("d", "own distance"),
        ("(d.sum(-2, keepdim=True) - d) / 2", "mean"),
        ("d.sum(-2) - d", "keepdim|sum over|shape"),
        ("(d.sum(-2, keepdim=True) - d).squeeze(-1)", "keepdim"),
        ("o[..., 4:6].norm(dim=-1).sum(-1) - o[..., 4:6].norm(dim=-1)", "keepdim|dimension"),
        ("(p := o[..., 0:2].norm(dim=-1, keepdim=True)).sum(-2, keepdim=True) - p", "You need 4"),
        ("(q := d.square()).sum(-2, keepdim=True) - q", "square root"),
        ("d.sum() - d", "3, 7 and 6"),
        ("None", "returns None"),
        ("o[..., 4:6] @ o", "stopped"),
        ("d.sum(1, keepdim=True) - d", "agents are dimension -2"),
        ("helper(d)", "helper.*define inside it"),
    ],
)
def test_wrong_sums_of_distances_fail(formula, hint):
    space = {"torch": torch, "helper": lambda d: d.sum(-2, keepdim=True) - d}
    source = f"d = o[..., 4:6].norm(dim=-1, keepdim=True)\n    return {formula}\n"
    run(formula, f"def others(o):\n    {source}", space)
    fails(13, hint, checks.tell_the_critic, space["others"])


def test_what_has_no_source_to_train_with_fails(solved):
    fails(13, "with `def`", checks.tell_the_critic, lambda o: solved["end"]["others_distance"](o))


def test_a_critic_that_is_told_a_number_trains(monkeypatch, solved, capsys):
    """With tiny sizes the check says no, but the program has run to its end with the new cell."""
    train = kit.train_lesson
    sizes = "--max-steps 10 --frames-per-batch 100 --minibatch-size 50 --num-epochs 1 --num-cells 8"

    def tiny(options, replacing):
        options = [*options, *sizes.split(), "--n-iters", "1", "--evaluation-episodes", "5"]
        return train(options, replacing)

    monkeypatch.setattr(kit, "train_lesson", tiny)
    function = solved["end"]["others_distance"]
    fails(13, "above 0.9", checks.tell_the_critic, function, True)
    said = capsys.readouterr().out
    assert "1/1 [" in said and "one extra number: success rate 0.00" in said


def test_the_arrow_maps_tell_the_algorithms_apart():
    """What the pictures show: after 15 iterations, half of IPPO's arrows lead away, not MAPPO's."""
    figure = matplotlib.figure.Figure()
    away = {
        name: kit.draw_arrow_map(figure.subplots(), kit.load_trained(name, 15))
        for name in ("mappo", "ippo")
    }
    assert away["mappo"] < 0.1 and 0.4 < away["ippo"] < 0.7


def test_the_pictures_are_there_and_small():
    names = {path.name for path in (TEACHING / "pictures").iterdir()}
    script = (TEACHING / "make_pictures.py").read_text("utf-8")
    for name in names:
        path = TEACHING / "pictures" / name
        assert path.stat().st_size < (1_500_000 if name.endswith(".gif") else 150_000)
        with Image.open(path) as image:
            assert min(image.size) > 300 and (name.endswith(".png") or image.n_frames > 30)
        assert name.removesuffix(".png") in script
    text = (TEACHER / "slides.html").read_text("utf-8")
    assert set(re.findall(r'src="\.\./pictures/([^"]+)"', text)) == names


@pytest.mark.parametrize("name", ["lesson", "exercises", "part_c", "colab"])
def test_student_notebooks_are_those_of_the_sources(name):
    """If this fails, run `python teaching/make_notebooks.py student`."""
    found = nbformat.read(str(STUDENT / f"{name}.ipynb"), as_version=4)
    nbformat.validate(found)
    made = make_notebooks.MAKERS[f"student/{name}.ipynb"]()
    assert [(cell.id, cell.source) for cell in found.cells] == [
        (cell.id, cell.source) for cell in made.cells
    ]
    for cell in found.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize("name", ["lesson", "solutions"])
def test_teacher_notebooks_are_executed(name):
    """If this fails, run `python teaching/make_notebooks.py teacher`."""
    path = TEACHER / f"{name}.ipynb"
    notebook = nbformat.read(str(path), as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LONG
    source = make_notebooks.LESSON if name == "lesson" else TEACHER / "solutions.py"
    text = make_notebooks.without_marks(source.read_text("utf-8"))
    made = make_notebooks.read(text)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in made.cells]
    counts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            counts.append(cell.execution_count)
            for output in cell.outputs:
                assert output.output_type != "error"
                text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
                assert not re.search(r"it/s|(^|[\s'\"])/(tmp|home|root|work|Users)/", text)
    assert counts == [*range(1, len(counts) + 1)]
    pictures = [one for cell in notebook.cells for one in cell.get("outputs", []) if "data" in one]
    assert len(pictures) >= 2


def texts_of_students():
    """Return (name, text, whether it is prose) for all that a student opens."""
    for path in sorted(STUDENT.rglob("*")):
        if path.suffix == ".ipynb":
            for cell in json.loads(path.read_text("utf-8"))["cells"]:
                text = "".join(cell["source"])
                yield f"{path.name}, {cell['id']}", text, cell["cell_type"] == "markdown"
        elif path.suffix in (".md", ".html", ".py"):
            yield path.name, path.read_text("utf-8"), path.suffix != ".py"


FATE = r"\b(fail|forget|forgot|unlearn|collapse|worse|never|stop|deteriorat|fall|drop|misle)\w*"
NUMBERS = r"(?<!\d)0?\.(90|8[57]|0[0145]|865|005|695)\b|\b(1|4|5|52|85|87|90|93)%"


def spoilers(text, is_prose=True):
    """Return the sentences and table rows of a text that tell what IPPO comes to."""
    text = re.sub(r"\n(?!\s*(\n|[|#*-]|<))", " ", text)  # join the lines of a paragraph
    sentences = re.split(r"(?<=[.?!])\s|\n", text)
    told = [one for one in sentences if re.search("IPPO|no-mappo", one)]
    patterns = [FATE, NUMBERS] if is_prose else [FATE]
    return [one for one in told if any(re.search(one_of, one, re.I) for one_of in patterns)]


def test_students_meet_no_result_of_ippo():
    """Neither in words nor numbers, nor in pictures or links to where they are."""
    for name, text, is_prose in texts_of_students():
        assert spoilers(text, is_prose) == [], name
        assert not re.search(r"pictures/|arrow-maps|!\[|<img|explore\.html|solutions", text), name
    assert not [path for path in STUDENT.rglob("*") if path.suffix in (".png", ".gif", ".jpg")]


def test_spoilers_are_found():
    """The test above would see what it looks for, for example in the teacher's files."""
    assert spoilers("MAPPO is fine. After 15 iterations, IPPO has\nunlearned the task.")
    assert spoilers("| MAPPO | 0.95 | 0.98 |\n| IPPO | 0.87 | 0.05 |")
    assert spoilers((TEACHER / "plan.md").read_text("utf-8"))
    assert spoilers((TEACHER / "slides.html").read_text("utf-8").replace("\n", " ")) != []


def test_predictions_are_sealed_before_exercise_2():
    """What a local critic says about a sum would give away which algorithm fails."""
    for path in (STUDENT / "prediction_sheet.html", TEACHER / "slides.html"):
        text = path.read_text("utf-8")
        success = text.index("raction of the test episodes succeed?")
        assert success < text.index("explained variance"), path


def test_students_meet_no_hint_of_the_unlearning_before_they_predict():
    """Not in the lesson, the sheet or parts A and B, and not on the slides before the reveal."""
    told = r"unlearn|Five\s+iterations\s+later|Which\s+one\s+fails|succeeded\s+earlier"
    assert len(re.findall(told, make_notebooks.LESSON.read_text("utf-8"))) > 5
    for name, text, _ in texts_of_students():
        if not name.startswith("part_c"):
            assert not re.search(told, text), name
    cells = make_notebooks.make_student_lesson().cells
    opening = next(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "after 10 and after 15 iterations?" in opening.split("With several agents")[0]
    headings = re.findall(r"^##? 10\..*", "\n".join(cell.source for cell in cells), re.MULTILINE)
    assert headings == ["## 10. What your critic teaches"]
    slides = (TEACHER / "slides.html").read_text("utf-8").split("<section>")[1:]
    reveal = next(i for i, slide in enumerate(slides) if "exercise 4" in slide)
    assert not re.search(told, " ".join(slides[:reveal]))


def test_the_surprise_comes_before_its_reasons():
    cells = make_notebooks.make_exercises().cells
    names = [cell.id for cell in cells]
    in_class = ["exercise_1", "exercise_2", "exercise_3", "exercise_4", "exercise_5", "exercise_6"]
    places = [names.index(name) for name in in_class]
    assert places == sorted(places)
    later = make_notebooks.make_part_c().cells  # a notebook of its own
    for_later = {"exercise_5b", "exercise_5c", "exercise_11", "exercise_12", "exercise_13"}
    assert for_later <= {cell.id for cell in later} and not for_later & {*names}
    text = "\n".join(cell.source for cell in [*cells, *later])
    numbers = re.findall(r"^## (\d+)\. .*\((★+), (\d+) minutes", text, re.MULTILINE)
    assert [int(number) for number, _, _ in numbers] == [*range(1, 14)]
    assert text.count("<details>") == text.count("</details>") >= 13


def test_the_rubric_adds_up_and_grades_what_the_exercises_ask_for():
    rubric = (TEACHER / "rubric.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (\d+)(?: more)? \| ([^|]*) \|$", rubric, re.MULTILINE)
    points = {name: int(number) for name, number, _ in rows}
    names = [*points]
    total = names.index("all of these")
    assert sum(points[name] for name in names[:total]) == points["all of these"]
    chosen = [name for name in names if re.match("1[123] ", name)]
    assert {points[name] for name in chosen} == {points["one of 11 to 13"]}
    for name, number, reasons in rows:
        parts = [int(x) for x in re.findall(r"(?<![\w.])(\d)(?= for)", reasons)]
        parts += parts[-1:] if "for each knob" in reasons else []
        assert not parts or sum(parts) == int(number), name
    cells = {
        cell.metadata["id"]: cell.source
        for cell in jupytext.read(TEACHER / "solutions.py").cells
        if cell.cell_type == "markdown"
    }
    graded = [name.split()[0] for name in names if re.match(r"\d+ (?!b)", name)]
    assert sorted(map(int, graded)) == [*range(6, 14)]
    for number in [*graded, "5c"]:
        assert "**Hand in:**" in cells[f"exercise_{number}"], number


def test_the_set_up_check_says_what_is_missing(capsys):
    source = make_notebooks.setup_check(["torch==0.1", "surely-not-there==2.0"])
    exec(source, {})
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "%pip install surely-not-there==2.0"
    assert said[2].endswith("the tested one: torch")
    exec(BLANKS["set-up"], {})
    assert capsys.readouterr().out == "Everything is installed.\n"


def test_colab_asks_for_the_zip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="Upload mappo-class.zip"):
        exec(make_notebooks.COLAB, {})


def test_colab_unpacks_the_zip(tmp_path, monkeypatch):
    student = tmp_path / "packed" / "mappo-class" / "teaching" / "student"
    student.mkdir(parents=True)
    shutil.make_archive(tmp_path / "mappo-class", "zip", tmp_path / "packed")
    installed = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda words, check: installed.append(words[-1]))
    exec(make_notebooks.COLAB, {})
    assert Path.cwd() == tmp_path / "mappo-class" / "teaching" / "student"
    assert installed == [str(tmp_path / "mappo-class" / "requirements.txt")]


def test_pins_agree():
    """A package that two lists of requirements name has the same version in both."""
    places = [TEACHING / "requirements.txt", TEACHING.parent / "tests" / "requirements.txt"]
    pins = [dict(re.findall(r"^([\w-]+)==(\S+)$", path.read_text(), re.M)) for path in places]
    assert {key: pins[1][key] for key in pins[0].keys() & pins[1].keys()}.items() <= pins[0].items()
    assert "-r ../requirements.txt" in places[0].read_text()


def test_links_lead_somewhere():
    for path in [TEACHING / "README.md", *TEACHER.glob("*.md"), *STUDENT.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text("utf-8")):
            assert target.startswith("http") or (path.parent / target).exists(), (path, target)


def test_the_plan_names_slides_sections_and_exercises_that_exist():
    plan = (TEACHER / "plan.md").read_text("utf-8")
    slides = (TEACHER / "slides.html").read_text("utf-8").count("<section>")
    headings = re.findall(r"^# ###? (.*)", make_notebooks.LESSON.read_text("utf-8"), re.MULTILINE)
    sections = {heading.split(".")[0] for heading in headings} | set(headings)
    rows = re.findall(r"^\| \d+ to \d+ \|.*", plan, re.MULTILINE)
    assert len(rows) > 25
    for row in rows:
        columns = [part.strip() for part in row.strip("|").split("|")]
        assert all(int(x) <= slides for x in re.findall(r"\d+", columns[2])), row
        if len(columns) == 6:  # the plan for 90 minutes names sections, too
            assert set(re.findall(r"\d+", columns[3])) <= sections, row
            assert set(re.findall(r'"(.*)"', columns[3])) <= sections, row
            order = [int(x) for x in re.findall(r"\d+", columns[3])]
            assert order == sorted(order) and (6 not in order or 5 in order), row
        exercises = re.findall(
            r"\d+", columns[-2 if len(columns) == 6 else 3] if columns[3:] else ""
        )
        assert all(1 <= int(x) <= 13 for x in exercises), row


def test_the_board_does_the_sums_of_gae_right():
    """The three steps on the board are what the lesson computes, and slide 7 has them, too."""
    board = (TEACHER / "board.md").read_text("utf-8")
    lines = re.findall(
        r"\b(r|V|V'|delta|A) +([\d.]+) +([\d.]+) +([\d.]+)(?:  |$)", board, re.MULTILINE
    )
    assert [name for name, *_ in lines] == ["r", "V", "V'", "delta", "A", "delta", "A"]
    numbers = [torch.tensor([float(x) for x in numbers]) for _, *numbers in lines]
    reward, value, after = (x.view(1, 3, 1, 1) for x in numbers[:3])
    space = {"torch": torch}
    exec(kit.lesson_cells()["gae_by_hand"], space)
    done = torch.tensor([False, False, True]).view(1, 3, 1)
    for terminated, (delta, advantage) in ((False, numbers[3:5]), (True, numbers[5:7])):
        for lmbda, expected in ((0.0, delta), (0.8, advantage)):
            flags = done, done & terminated
            found = space["gae_by_hand"](reward, value, after, *flags, 0.5, lmbda)[0]
            torch.testing.assert_close(found.flatten(), expected)

    slide = (TEACHER / "slides.html").read_text("utf-8").split("<section>")[7]
    shown = re.findall(r"<tr><td>[^<]*\b(r|V|V'|delta|A)</td>(.*)</tr>", slide)
    assert [
        (name, *re.findall(r'<td class="n">([\d.]+)</td>', cells)) for name, cells in shown
    ] == lines


def test_the_board_does_the_sums_of_waiting_right():
    """Ten steps of 0.3 are left. What is it worth if all drive, if nobody does, or if one waits?"""
    board = (TEACHER / "board.md").read_text("utf-8")

    def worth(rewards):
        return sum(0.99**step * reward for step, reward in enumerate(rewards))

    value = worth([0.3] * 10)
    nobody = 0.99 * value - value
    one = worth([0.2, *[0.3] * 9, 0.1]) - value
    assert f"= {value:.2f}," in board and f"delta = 0.99 V - V = {nobody:.3f}\n" in board
    assert f"= {one:.4f}\n" in board and abs(one + 0.1 * (1 - 0.99**10)) < 1e-9


def test_the_board_quotes_section_10():
    """The slopes of ten seeds are those of the lesson, and 1 - c s is computed from them."""
    lesson = make_notebooks.LESSON.read_text("utf-8")
    board = (TEACHER / "board.md").read_text("utf-8")
    c = 0.99 * (1 - 0.9) / (1 - 0.99 * 0.9)
    for name, critic in (("MAPPO", "centralized"), ("IPPO", "local")):
        [row] = re.findall(rf"^# \| {critic} \| shared \|(.*)\|$", lesson, re.MULTILINE)
        slopes = [float(x) for x in re.findall(r"[\d.]+", row.split("|", 1)[1])[:2]]
        [shown] = re.findall(rf"\| {name} \|((?: [^|]+ \|){{4}})$", board, re.MULTILINE)
        found = [float(x) for x in re.findall(r"[+-]?\d\.\d+", shown)]
        assert found[:2] == slopes
        assert found[2:] == pytest.approx([1 - c * slope for slope in slopes], abs=0.01)


def test_waiting_pays_more_than_driving_under_ippo_alone():
    """What slide 15 says of a step where all robots are 0.3 from their goals."""
    slides = re.sub(r"<[^>]+>", "", (TEACHER / "slides.html").read_text("utf-8"))
    found = {}
    for name in ("mappo", "ippo"):
        names = kit.load_trained(name, 15)
        for movers in make_pictures.MOVERS:
            reward, change = make_pictures.one_step(names, movers)
            found[name, movers] = f"{reward + names['c'] * change:+.2f}"
    drive, wait = (0, 1, 2), (1, 2)
    assert f"{found['ippo', drive]} for driving and {found['ippo', wait]} for waiting" in slides
    assert f"gives it {found['mappo', drive]} and {found['mappo', wait]}." in slides
    assert float(found["ippo", (0,)]) < 0 < float(found["mappo", (0,)])


@pytest.mark.parametrize("iterations", [10, 15])
def test_the_slope_of_ippo_is_steepest_in_a_ring(iterations):
    """Slide 12, board and plan: at 0.2 to 0.6, flatter far away, and flat at the goal itself."""
    names = kit.load_trained("ippo", iterations)
    names["env"].set_seed(1)
    torch.manual_seed(1)
    seen = names["env"].rollout(100, names["policy"], break_when_any_done=False)
    seen = seen["agents", "observation"][..., :3, :].reshape(-1, 3, 18)
    from_goal = seen[..., 4:6]
    distance = from_goal.norm(dim=-1, keepdim=True)
    closer = seen.clone()
    step = 0.01 * from_goal / distance.clamp_min(1e-6)
    closer[..., 0:2] -= step
    closer[..., 4:6] -= step
    with torch.no_grad():
        drop = (names["critic_network"](seen) - names["critic_network"](closer)) / 0.01

    def mean(low, high):
        return drop[(distance > low) & (distance < high)].mean().item()

    assert mean(0.2, 0.6) > 4 * mean(0, 0.05)
    assert mean(0.2, 0.6) > mean(0.8, 1.0) > mean(1.3, 1.7)


def test_the_four_slopes_have_the_right_worth():
    """The table of 1 - c s on the slide, and where it becomes a loss, are what c gives."""
    text = re.sub(r"<[^>]+>", " | ", (TEACHER / "slides.html").read_text("utf-8"))
    c = 0.99 * (1 - 0.9) / (1 - 0.99 * 0.9)
    assert f"{1 - c:.2f} - {2 * c:.2f} rho" in text
    assert f"a loss if rho is above {(1 / c - 1) / 2:.2f}" in text
    assert text.count(f"| {1 - c:.2f} |") == 2 and text.count(f"| {1 - c / 3:.2f} |") == 1
    assert f"1 / c = {1 / c:.2f}" in text


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Return the folder in which the students' ZIP has been unpacked; the plan says how to pack it.

    The ZIP holds what has been committed.
    """
    root, place = TEACHING.parent, tmp_path_factory.mktemp("student")
    [command] = re.findall(
        r"^git archive .*", (TEACHER / "plan.md").read_text("utf-8"), re.MULTILINE
    )
    if not (root / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs git and a clone of the project")
    words = command.replace("../mappo-class.zip", str(place / "mappo-class.zip")).split()
    subprocess.run(words, cwd=root, check=True)
    assert (place / "mappo-class.zip").stat().st_size < 10_000_000
    shutil.unpack_archive(place / "mappo-class.zip", place)
    return place / "mappo-class"


def test_the_zip_for_students_has_what_they_need_and_no_more(unpacked):
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    tops = {"LICENSE", "requirements.txt", "teaching/requirements.txt"}
    assert tops < files
    assert {str(Path(*Path(name).parts[:2])) for name in files - tops} == {
        "teaching/student",
        "teaching/trained",
    }
    for path in STUDENT.iterdir():
        assert (
            path.name.startswith((".", "__"))
            or (unpacked / "teaching/student" / path.name).exists()
        )


def test_the_zip_for_students_works_by_itself(unpacked):
    """The first cells, exercise 1 and the networks of exercise 4 need nothing outside of it."""
    lines = [BLANKS["set-up"], BLANKS["start"], SOLUTIONS["blank_1"], BLANKS["check_1"]]
    lines += [
        "for name in ('mappo', 'ippo'):",
        "    print(kit.load_trained(name, 15)['cfg'].mappo)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Exercise 1 is correct." in done.stdout and done.stdout.endswith("True\nFalse\n")


@pytest.mark.parametrize("name", ["MAPPO", "IPPO"])
def test_the_slides_quote_section_10(name):
    """After 10 and 15 iterations, the success rates on the slides are those of the lesson."""
    lesson = make_notebooks.LESSON.read_text("utf-8")
    slides = (TEACHER / "slides.html").read_text("utf-8")
    [row] = re.findall(rf"^# \| {name} \|((?: \S+ \|){{4}})$", lesson, re.MULTILINE)
    [shown] = re.findall(rf"<td>{name}</td>(.*0\..*)</tr>", slides)
    assert re.findall(r"0\.\d+", shown) == re.findall(r"[^ |]+", row)[1:3]


@pytest.mark.parametrize("script", ["notebooks", "pictures", "silent_bugs"])
def test_a_wrong_name_is_refused(script, tmp_path):
    program = TEACHING / f"make_{script}.py"
    done = subprocess.run(
        [sys.executable, program, "nothing"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "nothing" in done.stderr and "there are" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
