"""The checks of the exercises. Each prints that an answer is right, or raises a Hint."""

import functools
import inspect
import json
import math
import re
import textwrap
import traceback
from numbers import Real

import kit
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import MultiAgentMLP, NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import MultiAgentGAE

BLANK = "Fill in the blank. It still returns None."


class Hint(AssertionError):
    """A wrong answer. Notebooks show only what it says, without a traceback."""

    def _render_traceback_(self):
        return [str(self)]


def need(condition, exercise, hint):
    """Raise a Hint unless the condition holds."""
    if not condition:
        raise Hint(f"Exercise {exercise}: {hint}")


def right(exercise, more=""):
    """Say that an exercise is done."""
    print(f"Exercise {exercise} is correct. {more}".rstrip())


def call(exercise, function, *arguments, hint, errors=None):
    """Call a student's function; turn an error in it into a Hint.

    `errors` is {what the error says: a hint to give in place of `hint`}.
    """
    need(callable(function), exercise, "The function is missing. Run the cell that defines it.")
    try:
        return function(*arguments)
    except Hint:
        raise
    except Exception as error:
        words = str(error).strip().split("\n")[0].rstrip(".") or "no message"
        steps = traceback.extract_tb(error.__traceback__)
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        own = [step for step in steps if step.filename == file]
        where = f" in the line `{own[-1].line}`" if own and own[-1].line else ""
        said = f"Your function stopped{where} with {type(error).__name__}: {words}."
        hint = next((one for part, one in (errors or {}).items() if part in words), hint)
        raise Hint(f"Exercise {exercise}: {said} {hint}") from None


def stacked(answer):
    """Return a list of tensors as one tensor, and anything else as it is."""
    is_list = isinstance(answer, (list, tuple)) and len(answer) > 0
    of_tensors = is_list and all(isinstance(one, torch.Tensor) for one in answer)
    same = of_tensors and len({one.shape for one in answer}) == 1
    return torch.stack([*answer]) if same else answer


def tensor(exercise, answer, shape, hint):
    """Return an answer as a tensor of floats of this shape, or raise a Hint."""
    need(answer is not None, exercise, BLANK)
    try:
        answer = torch.as_tensor(stacked(answer)).detach().float()
    except (TypeError, ValueError, RuntimeError):
        kind = type(answer).__name__
        raise Hint(f"Exercise {exercise}: You returned a {kind}, not a tensor. {hint}") from None
    found = tuple(answer.shape)
    words = f"The shape is {found}, but should be {tuple(shape)}. {hint}"
    need(found == tuple(shape), exercise, words)
    return answer


def number(exercise, answer, name):
    """Return an answer as a float, or raise a Hint that names what it stands for."""
    need(answer is not None, exercise, f"Write down your answer for {name}.")
    is_number = isinstance(answer, Real) and not isinstance(answer, bool)
    if isinstance(answer, torch.Tensor) and answer.numel() == 1:
        answer, is_number = answer.item(), True
    words = f"For {name}, write a number such as 0.5. You wrote {answer!r}."
    need(is_number and math.isfinite(answer), exercise, words)
    return float(answer)


def close(answer, expected, tolerance=1e-3):
    """Return True if tensors or numbers differ at most by the tolerance."""
    answer, expected = torch.as_tensor(answer), torch.as_tensor(expected)
    return torch.allclose(answer.double(), expected.double(), rtol=0, atol=tolerance)


def compare(exercise, answer, expected, mistakes, otherwise, tolerance=1e-3):
    """Raise the Hint of the mistake that gives this answer, unless it is the expected one.

    `mistakes` is {hint: a wrong answer, or a list of them}.
    """
    if close(answer, expected, tolerance):
        return
    for hint, wrong in mistakes.items():
        for one in wrong if isinstance(wrong, list) else [wrong]:
            same_shape = torch.as_tensor(one).shape == torch.as_tensor(answer).shape
            need(not (same_shape and close(answer, one, tolerance)), exercise, hint)
    raise Hint(f"Exercise {exercise}: {otherwise}")


def short(values):
    """Return a tensor's numbers with three decimals, as text."""
    return str([x if isinstance(x, bool) else round(x, 3) for x in values.tolist()])


# Exercise 1


def small_critics(n_agents=3, depth=2):
    """Return a centralized and a local critic with random weights, and observations.

    The observations have the shape (5, n_agents, 6).
    """
    torch.manual_seed(0)
    sizes = {"n_agents": n_agents, "n_agent_inputs": 6, "n_agent_outputs": 1}
    sizes |= {"depth": depth, "num_cells": 16}
    critics = {
        name: MultiAgentMLP(**sizes, centralized=name == "MAPPO", share_params=True)
        for name in ("MAPPO", "IPPO")
    }
    return critics, torch.randn(5, n_agents, 6)


def whose_value_changes(prediction):
    """Check the agents whose values change when agent 1 observes something else."""
    critics, observation = small_critics()
    changed = observation.clone()
    changed[:, 1] += 1.0
    for name, critic in critics.items():
        answer = prediction.get(name) if isinstance(prediction, dict) else None
        need(answer is not None, 1, f"Write down your prediction for {name}.")
        words = "Write a list of agents, such as [0] or [0, 2]. Agents are numbered from 0 to 2."
        need(isinstance(answer, (list, tuple, set, range)), 1, words)
        numbers = all(isinstance(x, int) and not isinstance(x, bool) for x in answer)
        need(numbers and all(0 <= x <= 2 for x in answer), 1, words)
        need(len(set(answer)) == len(answer), 1, "An agent is in your list twice.")
        moved = (critic(changed) - critic(observation)).abs().amax(dim=(0, 2)) > 0
        agents = set(moved.nonzero().flatten().tolist())
        wrong = sorted(set(answer) ^ agents)
        need(
            not wrong,
            1,
            f"Think again about agent {min(wrong, default=0)} under {name}. Which observations "
            "does that agent's critic receive?",
        )
    right(1, "A critic can only react to what it receives.")


# Exercise 2


@functools.cache
def fit(centralized, n_agents, rho):
    """Fit a small critic to the sum of correlated numbers; return explained variance and slope."""
    torch.manual_seed(0)
    sizes = {"n_agents": n_agents, "n_agent_inputs": 1, "n_agent_outputs": 1}
    critic = MultiAgentMLP(
        **sizes, depth=1, num_cells=32, centralized=centralized, share_params=True
    )
    adam = torch.optim.Adam(critic.parameters(), lr=1e-2)

    def draw(frames):
        common, own = torch.randn(frames, 1, 1), torch.randn(frames, n_agents, 1)
        x = rho**0.5 * common + (1 - rho) ** 0.5 * own
        return x, x.sum(dim=1, keepdim=True).expand_as(x)

    for _ in range(200):
        x, target = draw(1024)
        adam.zero_grad()
        (target - critic(x)).square().mean().backward()
        adam.step()
    with torch.no_grad():
        x, target = draw(10_000)
        explained = 1 - (target - critic(x)).var() / target.var()
        raised = x.clone()
        raised[:, 0] += 0.1
        slope = (critic(raised) - critic(x))[:, 0].mean() / 0.1
    return explained.item(), slope.item()


def what_a_critic_says(prediction, trust):
    """Check the explained variance and the slope of a local critic, and which one to trust."""
    cases = [(3, 0.0), (3, 0.5), (3, 0.9), (8, 0.5)]
    for n, rho in cases:
        name = f"{n} agents, rho {rho}"
        pair = prediction.get((n, rho)) if isinstance(prediction, dict) else None
        words = f"Write down two numbers for {name}: the explained variance, then the slope."
        need(isinstance(pair, (tuple, list)) and len(pair) == 2, 2, words)
        explained = number(2, pair[0], f"the explained variance, {name}")
        slope = number(2, pair[1], f"the slope, {name}")
        true_slope = 1 + (n - 1) * rho
        true_explained = true_slope / n
        is_percent = close(explained, 100 * true_explained, 1.2)
        need(not is_percent, 2, f"{name}: write the explained variance as a fraction of 1.")
        swapped = abs(explained - true_slope) < 0.06 and abs(slope - true_explained) < 0.02
        need(not (swapped and n > 1), 2, f"{name}: the explained variance comes first.")
        mistakes = {
            f"{name}: 1 is the true slope. But when x_i rises, what does a local critic expect of "
            "the numbers it cannot see?": 1.0,
            f"{name}: that counts only one of the others. How many are there?": 1 + rho,
            f"{name}: the others add rho each. What does the agent's own number add?": n * rho,
            f"{name}: that leaves out the agent's own number.": (n - 1) * rho,
            f"{name}: that would be right if all numbers were equal.": float(n),
            f"{name}: that is the explained variance.": true_explained,
        }
        otherwise = (
            f"{name}: the slope is not {slope:g}. On average, how much larger are the other "
            "numbers where x_i is larger by 1? Add that to the 1 of its own number."
        )
        compare(2, slope, true_slope, mistakes, otherwise, 0.06)
        mistakes = {
            f"{name}: rho is the correlation of two numbers, not of x_i with the sum.": rho,
            f"{name}: that is right only for rho 0. Correlated numbers tell it more.": 1 / n,
            f"{name}: that would be a perfect prediction. Does the critic see all numbers?": 1.0,
            f"{name}: that is the fraction that is *not* explained.": 1 - true_explained,
        }
        otherwise = (
            f"{name}: the explained variance is not {explained:g}. The best prediction from x_i "
            "is the slope times x_i. What fraction of the sum's variance does it have?"
        )
        rounded = explained == round(true_explained, 1)
        words = f"{name}: write the explained variance to two decimal places."
        need(not rounded or close(explained, true_explained, 0.012), 2, words)
        compare(2, explained, true_explained, mistakes, otherwise, 0.012)
    print("local critic      predicted             measured")
    for n, rho in cases:
        found = "explained {:.2f}, slope {:.2f}"
        said, measured = found.format(*map(float, prediction[n, rho])), fit(False, n, rho)
        print(f"{n} agents, rho {rho}: {said}, {found.format(*measured)}")
    for rho in (0.0, 0.9):
        answer = str(trust.get(rho) if isinstance(trust, dict) else None).lower()
        words = f"Say which critic you would trust for rho {rho}: local, centralized or both."
        need(answer in ("local", "centralized", "both"), 2, words)
        slopes = {name: fit(name == "centralized", 3, rho)[1] for name in ("local", "centralized")}
        good = [name for name, slope in slopes.items() if abs(slope - 1) < 0.1]
        expected = good[0] if len(good) == 1 else "both"
        need(
            answer == expected,
            2,
            f"Trust for rho {rho}: an agent wants to know what its own number is worth. Which "
            "critics have a slope of 1 there, whatever variance they explain?",
        )
    right(2, "The better a local critic predicts the sum, the further off its slope is.")


# Exercise 3


def find_the_bug(delta):
    """Check `delta` on data where an episode ends between two rows."""
    # Step 0 is the last of an episode, and row 1 starts a new one.
    reward, value, stored = (torch.tensor(x) for x in ([0.1, 0.3], [0.5, 0.9], [0.8, 0.7]))
    shape = "Return one number per step. The arguments are tensors of shape (steps,)."
    cases = ((torch.tensor([True, False]), 0.9), (torch.tensor([False, False]), 0.5))
    for ended, gamma in cases:
        given = [x.clone() for x in (reward, value, stored, ended)]
        found = call(3, delta, *given, gamma, hint=shape)
        found = tensor(3, found, (2,), shape)
        goes_on = 1 - ended.float()
        next_row = torch.cat([value[1:], stored[-1:]])
        after = gamma * goes_on * stored
        mistakes = {
            "You keep the next value where the episode terminated, and only there. Use "
            "1 - terminated.": [
                reward + gamma * (1 - goes_on) * one - value for one in (stored, next_row)
            ],
            "Running out of time is not a termination. What follows still has a value.": reward
            - value,
            "Row 1 belongs to another episode. Its value, 0.9, says nothing about how the first "
            "episode would have continued. Which argument does?": [
                reward + gamma * factor * next_row - value for factor in (goes_on, 1)
            ],
            "The value of row 0 cannot stand for what follows row 1, and that of row 1 belongs "
            "to another episode.": reward + gamma * goes_on * value.roll(-1) - value,
            "After a termination, nothing more can be earned, so the next value counts 0.": reward
            + gamma * stored
            - value,
            "The reward still counts in the step that ends the episode.": (reward + gamma * stored)
            * goes_on
            - value,
            "The baseline, V, is subtracted in the step that ends the episode, too.": reward
            + goes_on * (gamma * stored - value),
            "The reward is missing.": after - value,
            "The baseline, the value before the step, is missing.": reward + after,
            "The baseline, the value before the step, is subtracted, not added.": reward
            + after
            + value,
            "The discount factor gamma is missing.": reward + goes_on * stored - value,
            "Use the argument gamma, not a number of your own.": [
                reward + number * goes_on * stored - value for number in (0.9, 0.99)
            ],
            "Each step has its own next value.": reward + gamma * goes_on * stored[0] - value,
        }
        expected = reward + after - value
        otherwise = (
            f"You returned {short(found)}, but it should be {short(expected)} for reward "
            f"{short(reward)}, value {short(value)}, stored next value {short(stored)}, terminated "
            f"{short(ended)} and gamma {gamma}."
        )
        compare(3, found, expected, mistakes, otherwise)
    right(3, "The next value is that of the stored next observation.")


# Exercise 4


def look(prediction):
    """Compare predicted success rates with those of the policies in trained/."""
    cases = [(name, iterations) for name in ("MAPPO", "IPPO") for iterations in (10, 15)]
    for case in cases:
        name = f"{case[0]} after {case[1]} iterations"
        answer = prediction.get(case) if isinstance(prediction, dict) else None
        rate = number(4, answer, name)
        words = f"{name}: a success rate lies between 0 and 1. Write 0.5 for one half."
        need(0 <= rate <= 1, 4, words)
    for name, iterations in cases:
        rate = kit.success_rate(kit.load_trained(name.lower(), iterations))
        predicted = float(prediction[name, iterations])
        print(f"{name:<6}{iterations} iterations: predicted {predicted:.2f}, measured {rate:.2f}")


# Exercise 5


def slopes_of_four(prediction):
    """Check which of four slopes are about 1/3, about 1, and larger."""
    kinds = ((0, 0.6), (0.6, 1.2), (1.2, 2.5))
    hints = {
        ("local", "shared"): "The others drive home, too. Where this robot is close, how close "
        "are they, and what does a critic that sees only this robot expect?",
        ("local", "individual"): "The return is this robot's own remaining distance, and the "
        "critic sees it.",
        ("centralized", "shared"): "Only one of the three distances changes, and the critic sees "
        "all of them.",
        ("centralized", "individual"): "One value has to serve all three robots, so it predicts "
        "the average of their returns. How much does one robot add to an average of three?",
    }
    slopes = {}
    for (critic, reward), hint in hints.items():
        name = f"a {critic} critic and {reward} reward{'s' if reward == 'individual' else ''}"
        answer = prediction.get((critic, reward)) if isinstance(prediction, dict) else None
        words = f"Write down your slope for {name}: 1/3, 1 or 2."
        need(answer is not None, 5, words)
        predicted = number(5, answer, name)
        words = f"For {name}, you wrote {predicted:g}. How much the value *falls* is positive."
        need(predicted > 0, 5, words)
        slope = slopes[name] = kit.toy_slope(critic, reward)
        low, high = next(kind for kind in kinds if kind[0] < slope <= kind[1])
        almost = (critic, reward) == ("local", "shared") and predicted > high
        words = "A slope of almost 3 needs robots that are nearly always at equal distances."
        need(not almost, 5, f"{words} But each of these drives at its own speed.")
        need(low < predicted <= high, 5, f"Think again about {name}. {hint}")
    for name, slope in slopes.items():
        print(f"{name}: the slope is {slope:.2f}")
    print("All four slopes are right. One of them is clearly larger than 1.")


def advantage_of_progress(function):
    """Check the advantage of one unit of progress over standing still."""
    hint = "Compute it from slope, gamma and lmbda alone, as a number."
    for slope, gamma, lmbda in ((0.0, 0.99, 0.9), (2.0, 0.99, 0.9), (1.0, 0.9, 0.5), (2.0, 0.9, 1)):
        answer = call(5, function, slope, gamma, lmbda, hint=hint)
        need(answer is not None, 5, BLANK)
        found = number(5, answer, "the advantage")
        c = gamma * (1 - lmbda) / (1 - gamma * lmbda)
        mistakes = {
            "That is right for lmbda 0. With a larger lmbda, later deltas take part of the loss "
            "back. Use c.": 1 - gamma * slope,
            "That counts the whole slope. How much of a lasting change of V' remains in the "
            "advantage? Use c.": 1 - slope,
            "Coming closer *lowers* the value, so the slope counts against the reward.": 1
            + c * slope,
            "The reward for one unit of progress is 1.": -c * slope,
            "That is the cost of an error that lasts for one step. Progress lasts.": 1
            - gamma * (1 - lmbda) * slope,
            "The slope is missing: how much of the value is lost?": 1 - c,
        }
        otherwise = (
            f"For slope {slope}, gamma {gamma} and lmbda {lmbda}, the advantage is not {found:.3f}."
            " What does a unit of progress earn, what does it cost, and what does c do to the cost?"
        )
        compare(5, found, 1 - c * slope, mistakes, otherwise, 1e-4)
    print("The advantage of progress is right.")


def where_the_sign_flips(function, turning):
    """Check the largest gamma and the smallest spread for which progress is still a gain."""
    advantage_of_progress(function)
    turning = turning if isinstance(turning, dict) else {}
    knobs = {"gamma": (0.01, 2, "largest gamma"), "spread": (-0.1, 1, "smallest spread")}
    for knob, (step, digits, name) in knobs.items():
        value = number(5, turning.get(knob), f"the {name}")
        inside = 0 < value < 1 if knob == "gamma" else 0 <= value <= 1
        need(inside, 5, f"The {name} lies between 0 and 1. You wrote {value:g}.")
        words = f"Give the {name} to {digits} decimal place{'s' if digits > 1 else ''}."
        need(abs(round(value, digits) - value) < 1e-9, 5, words)

        def worth(x, knob=knob):
            gamma = x if knob == "gamma" else 0.99
            c = gamma * 0.1 / (1 - 0.9 * gamma)
            return 1 - c * kit.toy_slope("local", "shared", **{knob: x})

        here, beyond = worth(value), worth(round(value + step, digits))
        words = f"With {knob} {value:g}, the advantage of progress is {here:.2f}, already a loss."
        need(here > 0, 5, words)
        words = f"With {knob} {value + step:.{digits}f}, progress is still a gain ({beyond:.2f})."
        need(beyond < 0, 5, words)
    right(5, "A shorter horizon and robots that are less alike both protect a local critic.")


# Exercise 6


def centralized_critic(function):
    """Compare a forward pass with that of MultiAgentMLP, for two teams and two depths."""
    for n_agents, depth in ((3, 2), (2, 1)):
        critics, seen = small_critics(n_agents, depth)
        seen = torch.cat([seen, torch.randn(2, n_agents, 6)])  # two agents, but seven frames
        parameters = [*critics["MAPPO"].parameters()]
        layers = [*zip(parameters[::2], parameters[1::2], strict=True)]

        def forward(joined, activation=torch.tanh, last=False, layers=layers, n_agents=n_agents):
            for index, (weight, bias) in enumerate(layers):
                joined = joined @ weight.mT + bias
                if index < len(layers) - 1 or last:
                    joined = activation(joined)
            return joined.unsqueeze(-2).expand(-1, n_agents, 1)

        hint = (
            f"The first layer takes the observations of all agents in one vector of {6 * n_agents} "
            "numbers, so join the last two dimensions first. A weight has the shape (outputs, "
            "inputs), so multiply by its transpose, as in `hidden @ weight.mT + bias`. There may "
            "be any number of agents and of layers."
        )
        found = stacked(call(6, function, seen.clone(), layers, hint=hint))
        hint = "Give the team's single value to every agent, along dimension -2."
        answer = tensor(6, found, (len(seen), n_agents, 1), hint)
        joined, by_feature = seen.flatten(-2), seen.mT.flatten(-2)
        mistakes = {
            "There is a tanh after the last layer, so no value can exceed 1.": forward(
                joined, last=True
            ),
            "There is no tanh between the layers, so the network is linear.": forward(
                joined, lambda x: x
            ),
            "The hidden layers have the wrong nonlinearity. It is tanh.": forward(
                joined, torch.relu
            ),
            "Join the observations agent by agent, not feature by feature.": forward(by_feature),
        }
        otherwise = (
            "The values differ from MultiAgentMLP's. Join the observations agent by agent, add "
            "each bias, and put a tanh between the layers, but not after the last one."
        )
        with torch.no_grad():
            expected = critics["MAPPO"](seen)
        compare(6, answer, expected, mistakes, otherwise, 1e-4)
        words = (
            "The values are right, but no gradient reaches all of the weights, so this critic "
            "would not learn. Do without `detach` and `no_grad`."
        )
        has_gradient = isinstance(found, torch.Tensor) and found.requires_grad
        need(has_gradient, 6, words)
        reached = torch.autograd.grad(found.sum(), parameters, allow_unused=True)
        need(all(one is not None for one in reached), 6, words)
    right(6)


# Exercise 7


def gae_with(mistake, reward, value, next_value, terminated, done, gamma, lmbda):
    """Return advantages as GAE with a typical mistake gives them, or the right ones for ""."""
    terminated, done = terminated.float(), done.float()
    ended = {"done": done, "never": 0 * done}.get(mistake, terminated)
    if mistake == "next row":
        next_value = torch.cat([value[1:], next_value[-1:]])
    one_step = 1.0 if mistake == "no gamma" else gamma
    delta = reward + one_step * (1 - ended) * next_value - value
    starts = {"next value": next_value, "value": value, "delta": delta}
    factor = {"no lmbda": gamma, "lmbda alone": lmbda, "no sum": 0.0}.get(mistake, gamma * lmbda)
    advantage = torch.zeros_like(delta)
    following = starts.get(mistake, advantage)[-1]
    steps = range(len(delta)) if mistake == "forward" else reversed(range(len(delta)))
    for step in steps:
        stops = {"goes on": 0 * done, "terminated": terminated}.get(mistake, done)[step]
        stops = stops.max() if mistake == "any" else stops
        following = delta[step] + factor * (1 - stops) * following
        advantage[step] = following
    advantage = advantage.flip(0) if mistake == "order" else advantage
    return advantage + value if mistake == "target" else advantage


GAE_HINTS = {
    "no gamma": "The next value in delta is not discounted. Multiply it by gamma.",
    "done": "A truncated step is done, too, but the next value still counts there. Only a "
    "termination sets it to 0.",
    "never": "After a termination, nothing more can be earned. Set the next value to 0 there.",
    "goes on": "The sum must stop where an episode is done. The advantages of the next episode "
    "leak into this one.",
    "terminated": "A truncated episode is over, too. The sum must stop at every done, not only at "
    "terminations.",
    "next row": "Use the stored next value. The next row may belong to another episode.",
    "no lmbda": "The sum is weighted by gamma alone. Multiply by lmbda as well.",
    "lmbda alone": "The sum is weighted by lmbda alone. Multiply by gamma as well.",
    "no sum": "Those are the deltas. Add the discounted advantage of the step after.",
    "any": "The end of an episode in one environment must not stop the sum in the others.",
    "next value": "Nothing follows the last step of the batch, so the sum begins with zeros.",
    "value": "Nothing follows the last step of the batch, so the sum begins with 0.",
    "delta": "The last delta counts twice. The sum begins with zeros.",
    "forward": "An advantage sums what comes *after* its step. Begin with the last step.",
    "order": "The advantages are in reverse order. The first belongs to the first step.",
    "target": "Those are the value targets. Return the advantages.",
}


def gae(function):
    """Check an implementation of GAE on an example to work out by hand, and on a batch."""
    shape = (
        "All tensors have the same shape, with the steps first. A step has one number for each "
        "environment and agent, so use `1 - terminated.float()` rather than `if`."
    )
    errors = {"out of bounds": "Nothing follows the last step. Begin with zeros there."}
    numbers = [torch.tensor(x) for x in ([0.0, 0.0, 1.0], [0.5] * 3, [0.5, 0.5, 0.8])]
    flags = torch.zeros(3, dtype=torch.bool), torch.tensor([False, False, True])
    examples = [(numbers, flags), (numbers, (flags[1], flags[1]))]
    torch.manual_seed(0)
    done = torch.rand(4, 30, 1) < 0.2
    done[:, -1] = torch.tensor([[True], [True], [False], [False]])  # the batch ends in any case
    terminated = done & (torch.rand(4, 30, 1) < 0.5)
    reward, value, next_value = (torch.randn(4, 30, 2, 1) for _ in range(3))
    goes_on = ~done[:, :-1].unsqueeze(-1)  # within an episode, V' is the V of the next step
    next_value[:, :-1] = torch.where(goes_on, value[:, 1:], next_value[:, :-1])
    by_time = [x.squeeze(-1).transpose(0, 1) for x in (reward, value, next_value)]  # (30, 4, 2)
    by_agent = [x.transpose(0, 1).expand(30, 4, 2) for x in (terminated, done)]
    examples.append((by_time, by_agent))
    for (values, ends), gamma, lmbda in zip(
        examples, (0.9, 0.9, 0.8), (0.5, 0.5, 0.7), strict=True
    ):
        given = [*(x.clone() for x in values), *(x.clone() for x in ends), gamma, lmbda]
        answer = call(7, function, *given, hint=shape, errors=errors)
        answer = tensor(7, answer, values[0].shape, shape)
        expected = gae_with("", *values, *ends, gamma, lmbda)
        mistakes = {}
        for mistake, hint in GAE_HINTS.items():
            mistakes.setdefault(hint, gae_with(mistake, *values, *ends, gamma, lmbda))
        mistakes["Use the arguments gamma and lmbda, not numbers of your own."] = [
            gae_with("", *values, *ends, *pair)
            for pair in ((0.9, 0.5), (0.9, lmbda), (gamma, 0.5), (0.99, 0.9), (0.99, lmbda))
            if pair != (gamma, lmbda)
        ]
        otherwise = "Your advantages differ from MultiAgentGAE's. Compare each factor with the " \
            "formulas in Section 6."  # fmt: skip
        if answer.dim() == 1:
            wrong = ((answer - expected).abs() > 1e-3) * torch.arange(len(answer))
            otherwise = (
                f"For reward {short(values[0])}, value {short(values[1])}, next value "
                f"{short(values[2])}, terminated {short(ends[0])}, done {short(ends[1])}, gamma "
                f"{gamma} and lmbda {lmbda}, you returned {short(answer)}, but it should be "
                f"{short(expected)}. If you go backward, the first wrong step is "
                f"{wrong.max().item()}."
            )
        compare(7, answer, expected, mistakes, otherwise)
    flags = {"done": done, "terminated": terminated}
    following = {"agents": {"reward": reward, "state_value": next_value}, **flags}
    data = TensorDict({"agents": {"state_value": value}, "next": following}, [4, 30])
    estimator = MultiAgentGAE(gamma=0.8, lmbda=0.7, value_network=None)
    estimator.set_keys(reward=("agents", "reward"), value=("agents", "state_value"))
    library = estimator(data)["advantage"].squeeze(-1).transpose(0, 1)
    need(close(answer, library), 7, "Your advantages differ from MultiAgentGAE's.")
    right(7, "It agrees with TorchRL's MultiAgentGAE.")


# Exercise 8


def clipped_objective(function, zero_gradient, team_ratio):
    """Check the clipped objective, its six cases and the ratio of a team of three."""
    ratio = torch.tensor([0.5, 1.05, 1.5, 0.5, 1.05, 1.5], requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, 2.0, -0.5, -0.5, -0.5])
    shape = "Return one number for each sample, without a mean or a sum."
    errors = {
        "Boolean value of Tensor": "Python's min compares single numbers. Use `torch.minimum`.",
        "in-place": "Don't change the ratio in place. Make a new tensor, as `clamp` does.",
    }
    for epsilon in (0.1, 0.2):
        answer = call(8, function, ratio, advantage, epsilon, hint=shape, errors=errors)
        answer = stacked(answer)
        found = tensor(8, answer, (6,), shape)
        plain, within = (ratio * advantage).detach(), ratio.detach().clamp(1 - epsilon, 1 + epsilon)
        clipped = within * advantage
        expected = torch.minimum(plain, clipped)
        mistakes = {
            "Without the min, a ratio that has moved the wrong way gets no gradient to pull it "
            "back.": clipped,
            "Nothing is clipped.": plain,
            "Take the smaller of the two terms, not the larger.": torch.maximum(plain, clipped),
            "The objective is to be maximized, so it has no minus sign.": -expected,
            "Use the argument epsilon, not 0.2.": torch.minimum(
                plain, ratio.detach().clamp(0.8, 1.2) * advantage
            ),
            "Multiply by the advantage first, then take the smaller of the two terms.": (
                torch.minimum(ratio.detach(), within) * advantage
            ),
            "Clip the ratio, then multiply by the advantage. Look at A < 0 with a ratio of 0.5.": [
                torch.minimum(plain, plain.clamp(1 - epsilon, 1 + epsilon)),
                torch.minimum(plain, within),
            ],
            "Clip from below as well.": torch.minimum(
                plain, ratio.detach().clamp(max=1 + epsilon) * advantage
            ),
            "Multiply by the advantage itself, not by its sign or a normalized one.": (
                expected / advantage.abs()
            ),
        }
        otherwise = (
            f"With epsilon {epsilon}, ratios {short(ratio)} and advantages {short(advantage)}, "
            f"you returned {short(found)}, but it should be {short(expected)}."
        )
        compare(8, found, expected, mistakes, otherwise)
    has_gradient = isinstance(answer, torch.Tensor) and answer.requires_grad
    need(has_gradient, 8, "The result has lost its gradient. Do not detach the ratio.")
    gradient = torch.autograd.grad(answer.sum(), ratio)[0]
    is_flat = expected != plain  # where the clipped term is the smaller one
    words = "Your objective has the right values, but not the right gradient. Detach neither term."
    need(close(gradient, torch.where(is_flat, 0.0, advantage)), 8, words)
    cases = [(sign, place) for sign in ("A > 0", "A < 0") for place in ("below", "inside", "above")]
    for (sign, place), flat in zip(cases, is_flat.tolist(), strict=True):
        name = f"{sign} with a ratio {place} the range"
        said = zero_gradient.get((sign, place)) if isinstance(zero_gradient, dict) else None
        need(said in (True, False), 8, f"Write True or False for {name}: is the gradient 0?")
        words = "Which of the two terms is smaller there, and does it change with the ratio?"
        need(said == flat, 8, f"Think again about {name}. {words}")
    joint = number(8, team_ratio, "the team's ratio")
    mistakes = {
        "Every agent's ratio is 1.2. What is the ratio of all three actions together?": 1.2,
        "Probabilities of independent actions are multiplied, not added.": 3.6,
        "That is the product of two ratios. The team has three robots.": 1.44,
        "Changes of 20% compound. Multiply the ratios.": 1.6,
        "Write the team's ratio to two decimal places.": 1.7,
    }
    otherwise = "Given their observations, agents act independently, so the probability of the " \
        "joint action is a product."  # fmt: skip
    compare(8, joint, 1.2**3, mistakes, otherwise, 0.006)
    right(8, "Each agent is inside its range, yet the team's ratio is far outside.")


# Exercise 9


def make_networks():
    """Build a policy and a critic, always with the same weights."""
    torch.manual_seed(1)
    sizes = {"n_agents": 3, "n_agent_inputs": 6, "depth": 1, "num_cells": 16, "share_params": True}
    network = MultiAgentMLP(**sizes, n_agent_outputs=4, centralized=False)
    module = TensorDictModule(
        nn.Sequential(network, NormalParamExtractor()),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "loc"), ("agents", "scale")],
    )
    policy = ProbabilisticActor(
        module,
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    critic = TensorDictModule(
        MultiAgentMLP(**sizes, n_agent_outputs=1, centralized=True),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )
    return policy, critic


def loss_with(mistake, pi, values, data, epsilon, critic_coeff):
    """Return the loss with a typical mistake, or the right one for ""."""
    epsilon = 0.2 if mistake == "epsilon" else epsilon
    critic_coeff = 0.5 if mistake == "coefficient" else critic_coeff
    log_ratio = pi.log_prob(data["action"]) - data["old_log_prob"]
    log_ratio = -log_ratio if mistake == "inverse" else log_ratio
    log_ratio = log_ratio.sum(-1, keepdim=True) if mistake == "team" else log_ratio
    log_ratio = log_ratio - log_ratio.detach() if mistake == "recomputed" else log_ratio
    ratio = (log_ratio if mistake == "no exp" else log_ratio.exp()).unsqueeze(-1)
    advantage = data["advantage"]
    mean, std = advantage.mean(0), advantage.std(0)
    if mistake == "over all":
        mean, std = advantage.mean(), advantage.std()
    if mistake == "over agents":
        mean, std = advantage.mean(1, keepdim=True), advantage.std(1, keepdim=True)
    std = advantage.std(0, unbiased=False) if mistake == "biased" else std
    std = 1.0 if mistake == "mean only" else std
    advantage = advantage if mistake == "not normalized" else (advantage - mean) / std
    plain, clipped = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
    others = {"no clip": plain, "no min": clipped, "max": torch.maximum(plain, clipped)}
    objective = others.get(mistake, torch.minimum(plain, clipped))
    objective = objective.sum(1) if mistake == "sum of agents" else objective
    objective = objective.sum() if mistake == "sum" else objective.mean()
    error = nn.functional.smooth_l1_loss(values, data["value_target"])
    if mistake == "squared":
        error = nn.functional.mse_loss(values, data["value_target"])
    coefficient = {"no coeff": 1.0, "no critic": 0.0, "critic sign": -critic_coeff}.get(
        mistake, critic_coeff
    )
    objective = -objective if mistake == "sign" else objective
    return -objective + coefficient * error


EPSILON, CRITIC_COEFF = 0.1, 0.3  # other than the defaults, which a student may have written
LOSS_HINTS = {
    "no clip": "The ratio is not clipped.",
    "no min": "Take the smaller of the clipped and the unclipped term.",
    "squared": "The value loss is the smooth L1 distance, not the squared error.",
    "over all": "The advantages are normalized over all agents at once. Do it for each agent "
    "separately, over the frames.",
    "biased": "Divide by the sample standard deviation, `advantage.std(0)`.",
    "mean only": "The mean is subtracted, but nothing is divided by the standard deviation.",
    "not normalized": "The advantages are not normalized.",
    "inverse": "The ratio is upside down. It is new over old.",
    "team": "That is the ratio of the team's joint action. Each agent has its own.",
    "recomputed": "The ratio is always 1. The old log-probability is the stored one.",
    "over agents": "The advantages are normalized over dimension 1, the agents. Do it over the "
    "frames, dimension 0.",
    "max": "Take the smaller of the clipped and the unclipped term, not the larger.",
    "sum of agents": "The objective is a mean over the agents, too, not a sum.",
    "no exp": "That is the logarithm of the ratio. Exponentiate it.",
    "no coeff": "The value loss is not weighted. Multiply it by critic_coeff.",
    "no critic": "The value loss is missing.",
    "critic sign": "The value loss is to be minimized. Its sign is wrong.",
    "sum": "The objective is a mean over samples and agents, not a sum.",
    "epsilon": "Use the argument epsilon, not 0.2.",
    "coefficient": "Use the argument critic_coeff, not 0.5.",
    "sign": "The objective is to be maximized, but the loss is minimized. A sign is wrong.",
}


def weights_after_a_step(loss_by_hand=None):
    """Return all weights after one step of SGD, by default with the loss of `ClipPPOLoss`."""
    policy, critic = make_networks()
    torch.manual_seed(2)
    frames = TensorDict({"agents": {"observation": torch.randn(64, 3, 6)}}, [64])
    with torch.no_grad():
        policy(frames)
    frames["agents", "action_log_prob"] += 0.3 * torch.randn(64, 3)  # as if from an older policy
    frames["advantage"] = torch.randn(64, 3, 1) + torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1)
    frames["value_target"] = 2 * torch.randn(64, 3, 1)
    loss_module = ClipPPOLoss(
        policy,
        critic,
        clip_epsilon=EPSILON,
        entropy_bonus=False,
        critic_coeff=CRITIC_COEFF,
        normalize_advantage=True,
        normalize_advantage_exclude_dims=(-2,),
        functional=False,
    )
    loss_module.set_keys(value=("agents", "state_value"))
    sgd = torch.optim.SGD(loss_module.parameters(), lr=1.0)
    if loss_by_hand:
        data = {
            "action": frames["agents", "action"],
            "old_log_prob": frames["agents", "action_log_prob"],
            "advantage": frames["advantage"],
            "value_target": frames["value_target"],
        }
        values = critic(frames.clone())["agents", "state_value"]
        loss = loss_by_hand(policy.get_dist(frames), values, data, EPSILON, CRITIC_COEFF)
    else:
        losses = loss_module(frames)
        loss = losses["loss_objective"] + losses["loss_critic"]
    loss.backward()
    sgd.step()
    return torch.cat([parameter.detach().flatten() for parameter in loss_module.parameters()])


@functools.cache
def weights_by_mistake():
    """Return the weights after a step with TorchRL's loss, and {hint: those after a wrong one}."""
    wrong = {
        hint: weights_after_a_step(functools.partial(loss_with, mistake))
        for mistake, hint in LOSS_HINTS.items()
    }
    return weights_after_a_step(), wrong


def complete_update(my_loss):
    """Compare the weights after a step with the given loss to those after a step with TorchRL's."""
    hint = (
        "Log-probabilities have the shape (64, 3), but values and advantages have (64, 3, 1). Give "
        "the ratio a last dimension with `unsqueeze(-1)`."
    )

    losses = {}

    def checked(*arguments):
        loss = call(9, my_loss, *arguments, hint=hint)
        need(loss is not None, 9, BLANK)
        words = "Return a tensor. A plain number, such as `.item()` gives, has no gradient."
        need(not isinstance(loss, Real), 9, words)
        is_tensor = isinstance(loss, torch.Tensor)
        need(is_tensor and loss.dim() == 0, 9, "Return a single number, the mean over everything.")
        losses["found"], losses["right"] = loss.item(), loss_with("", *arguments).item()
        need(loss.requires_grad, 9, "The loss has lost its gradient. Do not detach the networks.")
        return loss

    try:
        found = weights_after_a_step(checked)
    except RuntimeError as error:
        raise Hint(f"Exercise 9: No gradient comes through your loss: {error}.") from None
    expected, mistakes = weights_by_mistake()
    before = torch.cat(
        [x.detach().flatten() for part in make_networks() for x in part.parameters()]
    )
    n_policy = sum(x.numel() for x in make_networks()[0].parameters())
    moved = [(found != before)[part].any() for part in (slice(n_policy), slice(n_policy, None))]
    if close(losses["found"], losses["right"], 1e-5):
        for name, changes in zip(("policy", "critic"), moved, strict=True):
            words = f"Your loss has the right value, but no gradient of it reaches the {name}."
            need(changes, 9, f"{words} Something in it is detached.")
    otherwise = (
        f"The weights after a step differ from TorchRL's. Your loss is {losses['found']:.4f}, and "
        f"TorchRL's {losses['right']:.4f}. Compare the ratio, the advantages, the objective and "
        "the value loss one by one with Section 7."
    )
    compare(9, found, expected, mistakes, otherwise, 1e-5)
    right(9, "You have written MAPPO's update.")


# Exercise 10


def two_robots(train, iterations=12):
    """Check that training alone makes two robots succeed, within fifty lines."""
    import vmas

    need(callable(train), 10, "The function `train` is missing. Run the cell that defines it.")
    source = source_of(train)
    for word in ("ClipPPOLoss", "MultiAgentGAE", "torch.load", "load_trained", "trained/"):
        need(word not in source, 10, f"Do it without {word}. The point is to use your own pieces.")
    hint = "It takes a number of iterations and returns a function from observations to actions."

    def success(act):
        env = vmas.make_env("navigation", num_envs=100, seed=12345, n_agents=2)
        seen, done = torch.stack(env.reset(), 1), torch.zeros(100, dtype=torch.bool)
        for _ in range(100):
            with torch.no_grad():
                action = call(10, act, seen, hint="It maps (envs, 2, 18) to (envs, 2, 2).")
            words = "Actions are forces between -1 and 1, for each of two robots."
            action = tensor(10, action, (100, 2, 2), words)
            need(action.abs().max() <= 1.0001, 10, f"{words} Clamp them.")
            seen, _, ended, _ = env.step(list(action.unbind(1)))
            seen, done = torch.stack(seen, 1), done | ended
        return done.float().mean().item()

    act = call(10, train, 0, hint=hint)
    need(act is not None, 10, BLANK)
    need(callable(act), 10, f"`train` returned a {type(act).__name__}. {hint}")
    before = success(act)
    words = (
        f"Without training, the robots already succeed in {before:.0%} of the episodes, so "
        "something other than learning drives them. `train(0)` must return an untrained policy."
    )
    need(before < 0.3, 10, words)
    early = success(call(10, train, 1, hint=hint))
    words = (
        f"After a single iteration, the robots already succeed in {early:.0%} of the episodes. "
        "No training is that fast, so something other than learning drives them."
    )
    need(early < 0.5, 10, words)
    print(f"Training for {iterations} iterations ...", flush=True)
    act = call(10, train, iterations, hint=hint)
    torch.manual_seed(0)
    seen = torch.rand(50, 2, 18)
    changed = seen.clone()
    changed[:, 1] += 0.5
    with torch.no_grad():
        same = close(act(seen)[:, 0], act(changed)[:, 0], 1e-5)
    words = (
        "The first robot's action depends on what the second one observes. The critic may see "
        "everything, but each robot acts on its own observation alone."
    )
    need(same, 10, words)
    after = success(act)
    words = (
        f"After {iterations} iterations, the robots succeed in {after:.0%} of the test episodes. "
        "At least 60% are needed. Does the team's reward rise from one iteration to the next? If "
        "not, check the signs in the loss, and whether the critic learns. If it rises slowly, "
        "raise the learning rate or the epochs. Is your policy deterministic in the test?"
    )
    need(after >= 0.6, 10, words)
    lines = [line for line in source.splitlines() if line.strip()]
    print(f"Success: {before:.0%} before training, {after:.0%} after. Lines: {len(lines)}")
    right(10, "You have written MAPPO yourself.")


def source_of(function):
    """Return the source of a function, or nothing where it cannot be found."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


# Exercise 11

LABELS = ("sound", "wrong reward", "learning rate", "critic not trained", "ratio always 1")
RUNS = {  # what each run really is, and where to look
    "run_a": ("wrong reward", "Look at episode_reward and collisions. What does this run improve?"),
    "run_b": ("learning rate", "Look at kl_approx and clip_fraction in the first rows."),
    "run_c": (
        "sound",
        "Is its reward high, does its critic learn, and are its steps of a normal size?",
    ),
    "run_d": ("critic not trained", "Look at loss_critic and explained_variance."),
    "run_e": ("ratio always 1", "Look at kl_approx and clip_fraction. What ratio gives these?"),
}


def silent_bugs(answers):
    """Check which run has which mistake."""
    names = ", ".join(LABELS)
    answers = answers if isinstance(answers, dict) else {}
    for name in RUNS:
        said = answers.get(name)
        need(
            str(said).lower() in LABELS,
            11,
            f"For {name}, write one of: {names}. You wrote {said!r}.",
        )
    for name, (label, hint) in RUNS.items():
        need(answers[name].lower() == label, 11, f"{name} is something else. {hint}")
    print("All five runs are right. Now find the line.")


def repaired_line(line):
    """Check a line that makes the program with a bug train all its networks."""
    need(line is not None, 11, "Write the corrected line as a string.")
    need(isinstance(line, str), 11, "Write the line as a string, in quotes.")
    hint = (
        "Which run of the five is this program's, and which networks must change while it trains? "
        "Look for the line that decides which weights change."
    )
    policy, critic = nn.Linear(2, 2), nn.Linear(3, 1)
    loss_module = nn.ModuleList([policy, critic])
    config = type("Config", (), {"lr": 1.25e-4})()
    space = {"torch": torch, "nn": nn, "cfg": config, "loss_module": loss_module}
    space |= {"policy": policy, "critic": critic}
    space |= {"policy_network": policy, "critic_network": critic}
    need(re.match(r"\s*optimizer\s*=", line), 11, f"That is not the line. {hint}")
    try:
        exec(line.strip(), space)
        groups = space["optimizer"].param_groups
    except Exception as error:
        words = f"The line fails with {type(error).__name__}: {error}."
        raise Hint(f"Exercise 11: {words} Correct only what is wrong in it.") from None
    is_adam = type(space["optimizer"]) is torch.optim.Adam
    need(is_adam, 11, "Adam was right. Correct only what is wrong in the line.")
    trained = {id(weight) for group in groups for weight in group["params"]}
    missing = [
        name
        for name, network in (("policy", policy), ("critic", critic))
        if not {id(weight) for weight in network.parameters()} <= trained
    ]
    need(not missing, 11, f"With your line, the {' and the '.join(missing)} does not learn.")
    need(
        all(group["lr"] == config.lr for group in groups),
        11,
        "The learning rate was right. Leave it as it was.",
    )
    default = torch.optim.Adam(policy.parameters()).param_groups[0]
    kept = default.keys() - {"params", "lr", "fused", "foreach"}
    same = all(group[name] == default[name] for group in groups for name in kept)
    need(same, 11, "Adam's other options were right. Correct only what is wrong in the line.")
    right(11, "The program never raised an error. Only the metrics knew.")


# Exercises 12 and 13

FIXED = ("mappo", "n_iters", "seed", "n_agents", "scenario_name", "max_steps", "frames_per_batch")
FIXED += ("run_folder", "logger", "device", "n_processes")
FIXED += ("evaluation_interval", "evaluation_episodes", "evaluation_seed")


def names_of_options():
    """Return the names of the lesson's hyperparameters, with their defaults."""
    space = {"__name__": "__main__"}
    cells = kit.lesson_cells()
    exec(cells["imports"], space)
    exec(cells["config"], space)
    return space["asdict"](space["Config"]())


def one_option(exercise, edit):
    """Return the name of the only option that a list of words changes, or raise a Hint."""
    example = 'Write it as on the command line, for example ["--lr", "1e-3"].'
    need(isinstance(edit, (list, tuple)), exercise, f"`edit` is a list of words. {example}")
    need(len(edit) > 0, exercise, f"Give the option that you change, and its new value. {example}")
    words = [str(word) for word in edit]
    words[:1] = re.split(r"[= ]", words[0].strip(), maxsplit=1)
    options = [word for word in words if word.startswith("--")]
    need(words[0].startswith("--"), exercise, f"An option begins with two dashes. {example}")
    need(len(options) == 1, exercise, "Change one option only.")
    name = options[0][2:].replace("-", "_")
    defaults = names_of_options()
    name = name.removeprefix("no_") if name not in defaults else name
    known = ", ".join(one for one in defaults if one not in FIXED)
    need(name in defaults, exercise, f"There is no option {options[0]}. There are {known}.")
    reason = f"{options[0]} has to stay as it is. The team, the task and the algorithm are given."
    need(name not in FIXED, exercise, reason)
    is_flag = isinstance(defaults[name], bool)
    counts = len(words) == (1 if is_flag else 2)
    need(
        counts, exercise, f"{options[0]} takes {'no value' if is_flag else 'one value'}. {example}"
    )
    return name, words


def one_change(edit, train=False):
    """Check one changed option; train the local critic with it if `train` is True."""
    name, words = one_option(12, edit)
    if name == "scenario_options":
        try:
            options = json.loads(words[1])
        except ValueError:
            options = {}  # the program says what is wrong with it
        same = not isinstance(options, dict) or options.keys() <= {"shared_rew"}
        need(same, 12, "That makes it another task. The robots, the square and the goals stay.")
    if not train:
        print(f"--{name.replace('_', '-')} can be changed. Set TRAIN = True to see if it helps.")
        return None
    try:
        test = kit.train_lesson(["--no-mappo", "--n-iters", "15", *words])
    except kit.TrainingFailed as error:
        raise Hint(f"Exercise 12: The program says: {error}") from None
    success = test.get("success_rate", 0.0)
    print(f"With {' '.join(words)}: success rate {success:.2f}")
    hint = (
        f"The robots still succeed in only {success:.0%} of the test episodes. Which part of the "
        "return can the critic not see, and how could you make that part matter less?"
    )
    need(success > 0.9, 12, hint)
    right(12)
    return success


def told_distance(function):
    """Check the sum of the others' distances on one team and on a batch; return its source."""
    need(callable(function), 13, "The function is missing. Run the cell that defines it.")
    source = textwrap.dedent(source_of(function))
    words = "Define the function with `def`, in a cell. Another program gets its source to train."
    need(source.startswith("def "), 13, words)
    space = {"torch": torch, "nn": nn}  # what that program has
    exec(source, space)
    alone = space[function.__name__]
    names = "Another program trains with it, so define inside it all that it needs."
    hint = (
        "Entries 4 and 5 of the last dimension are a robot's position minus its goal. The agents "
        "are dimension -2, whatever stands in front of it, and sums need `keepdim=True`."
    )
    torch.manual_seed(0)
    example = torch.ones(3, 18)
    example[:, 4:6] = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    for seen in (example, torch.randn(5, 3, 18), torch.randn(4, 5, 3, 18)):
        answer = call(13, alone, seen.clone(), hint=hint, errors={"is not defined": names})
        words = f"Keep all dimensions but the last, which becomes 1 (`keepdim=True`). {hint}"
        answer = tensor(13, answer, (*seen.shape[:-1], 1), words)
        own = seen[..., 4:6].norm(dim=-1, keepdim=True)
        total = own.sum(dim=-2, keepdim=True)
        mistakes = {
            "That includes the robot's own distance, which its critic sees already.": total.expand(
                own.shape
            ),
            "That is the robot's own distance, which its critic sees already.": own,
            "That is the mean. Return the sum of the others' distances.": (total - own) / 2,
            "You sum over the first dimension. With a batch, that adds up different "
            "environments. The agents are dimension -2.": own.sum(0, keepdim=True) - own,
            "The agents are dimension -2, whatever stands in front of it.": own.sum(1, keepdim=True)
            - own,
            "Entries 0 and 1 are the position. You need 4 and 5.": (
                seen[..., 0:2].norm(dim=-1, keepdim=True).sum(-2, keepdim=True)
                - seen[..., 0:2].norm(dim=-1, keepdim=True)
            ),
            "A distance is the square root of the sum of squares.": (
                own.square().sum(-2, keepdim=True) - own.square()
            ),
        }
        otherwise = f"For distances 5, 1 and 2, the others' sums are 3, 7 and 6. {hint}"
        compare(13, answer, total - own, mistakes, otherwise)
    return f"{source}\nothers_distance = {function.__name__}\n"


TOLD_CRITIC = """
class ToldCritic(MultiAgentMLP):
    def forward(self, observation):
        return super().forward(torch.cat([observation, others_distance(observation)], dim=-1))


torch.manual_seed(seed_for("critic"))
told_options = {**network_options, "n_agent_inputs": n_obs + 1, "n_agent_outputs": 1}
critic_network = ToldCritic(
    **told_options, centralized=cfg.mappo, share_params=True, device=cfg.device
)
orthogonal_init(critic_network, final_gain=1.0)
critic = TensorDictModule(
    critic_network, in_keys=[("agents", "observation")], out_keys=[("agents", "state_value")]
)
"""


def tell_the_critic(function, train=False):
    """Check the extra input; train the local critic with it if `train` is True."""
    source = told_distance(function)
    if not train:
        print("Your function is right. Set TRAIN = True to see what a critic makes of it.")
        return None
    # The lesson's hand-written cells do not know the extra input.
    replacing = {"critic": f"{source}\n{TOLD_CRITIC}", "critic_check": "", "loss_check": ""}
    replacing["critic_by_hand"] = replacing["gae_check"] = ""
    try:
        test = kit.train_lesson(["--no-mappo", "--n-iters", "15"], replacing)
    except kit.TrainingFailed as error:
        raise Hint(f"Exercise 13: The program says: {error}") from None
    success = test["success_rate"]
    print(f"A local critic with one extra number: success rate {success:.2f}")
    need(success > 0.9, 13, "It should be above 0.9. Is the lesson beside this notebook unchanged?")
    right(13)
    return success
