"""The checks of the exercises. Each prints that an answer is right, or raises a Hint."""

import functools
import inspect
import math
import re
import traceback

import kit
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import MultiAgentMLP, NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import MultiAgentGAE

BLANK = "Fill in the blank. It still returns None."
MEASURED = {}  # (algorithm, iterations): success rate, once exercise 4 is done


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


def call(exercise, function, *arguments, hint):
    """Call a student's function; turn an error in it into a Hint."""
    need(callable(function), exercise, "The function is missing. Run the cell that defines it.")
    try:
        return function(*arguments)
    except Hint:
        raise
    except Exception as error:
        words = str(error).strip().split("\n")[0] or "no message"
        steps = traceback.extract_tb(error.__traceback__)
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        own = [step for step in steps if step.filename == file]
        where = f" in the line `{own[-1].line}`" if own and own[-1].line else ""
        said = f"Your function stopped{where} with {type(error).__name__}: {words}."
        raise Hint(f"Exercise {exercise}: {said} {hint}") from None


def tensor(exercise, answer, shape, hint):
    """Return an answer as a tensor of floats of this shape, or raise a Hint."""
    need(answer is not None, exercise, BLANK)
    try:
        answer = torch.as_tensor(answer).detach().float()
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
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
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
    """Raise the Hint of the mistake that gives this answer, unless it is the expected one."""
    if close(answer, expected, tolerance):
        return
    for hint, wrong in mistakes.items():
        same_shape = tuple(torch.as_tensor(wrong).shape) == tuple(torch.as_tensor(answer).shape)
        need(not (same_shape and close(answer, wrong, tolerance)), exercise, hint)
    raise Hint(f"Exercise {exercise}: {otherwise}")


# Exercise 1


def small_critics():
    """Return a centralized and a local critic with random weights, and observations (5, 3, 6)."""
    torch.manual_seed(0)
    sizes = {"n_agent_inputs": 6, "n_agent_outputs": 1, "n_agents": 3, "depth": 2, "num_cells": 16}
    critics = {
        name: MultiAgentMLP(**sizes, centralized=name == "MAPPO", share_params=True)
        for name in ("MAPPO", "IPPO")
    }
    return critics, torch.randn(5, 3, 6)


def whose_value_changes(prediction):
    """Check the agents whose values change when agent 1 observes something else."""
    critics, observation = small_critics()
    changed = observation.clone()
    changed[:, 1] += 1.0
    for name, critic in critics.items():
        answer = prediction.get(name) if isinstance(prediction, dict) else None
        need(answer is not None, 1, f"Write down your prediction for {name}.")
        words = "Write a list of agents, such as [0] or [0, 2]. Agents are numbered from 0 to 2."
        need(isinstance(answer, (list, tuple, set)), 1, words)
        numbers = all(isinstance(x, int) and not isinstance(x, bool) for x in answer)
        need(numbers and all(0 <= x <= 2 for x in answer), 1, words)
        need(len(set(answer)) == len(answer), 1, "An agent is in your list twice.")
        moved = (critic(changed) - critic(observation)).abs().amax(dim=(0, 2)) > 0
        agents = set(moved.nonzero().flatten().tolist())
        wrong = sorted(set(answer) ^ agents)
        need(
            not wrong,
            1,
            f"Think again about agent {wrong[:1]} under {name}. Which observations does that "
            "agent's critic receive?",
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
            "the numbers that it cannot see?": 1.0,
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
            f"{name}: that is right only for rho 0. Correlated numbers tell more.": 1 / n,
            f"{name}: that would be a perfect prediction. Does the critic see all numbers?": 1.0,
            f"{name}: that is the fraction that is *not* explained.": 1 - true_explained,
        }
        otherwise = (
            f"{name}: the explained variance is not {explained:g}. The best prediction from x_i "
            "is slope * x_i, whose variance is slope ** 2. Divide it by the variance of the sum, "
            "n * (1 + (n - 1) * rho)."
        )
        compare(2, explained, true_explained, mistakes, otherwise, 0.012)
    print("local critic      predicted             measured")
    for n, rho in cases:
        found = "explained {:.2f}, slope {:.2f}"
        said, measured = found.format(*map(float, prediction[n, rho])), fit(False, n, rho)
        print(f"{n} agents, rho {rho}: {said}, {found.format(*measured)}")
    for rho in (0.0, 0.9):
        answer = trust.get(rho) if isinstance(trust, dict) else None
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
    right(2, "The better a local critic predicts the sum, the wronger its slope.")


# Exercise 3


def find_the_bug(delta):
    """Check `delta` on data where an episode ends between two rows."""
    # Step 0 is the last of an episode that runs out of time. Row 1 starts a new episode.
    reward, value, stored = (torch.tensor(x) for x in ([0.1, 0.3], [0.5, 0.9], [0.8, 0.7]))
    shape = "Return one number per step. The arguments are tensors of shape (steps,)."
    for ended in (torch.tensor([False, False]), torch.tensor([True, False])):
        given = [x.clone() for x in (reward, value, stored, ended)]
        found = call(3, delta, *given, 0.9, hint=shape)
        found = tensor(3, found, (2,), shape)
        goes_on = 1 - ended.float()
        next_row = torch.cat([value[1:], stored[-1:]])
        mistakes = {
            "Row 1 belongs to another episode. Its value, 0.9, says nothing about how the first "
            "episode would have gone on. Which argument does?": reward
            + 0.9 * goes_on * next_row
            - value,
            "The value of row 0 cannot stand for what follows row 1, and that of row 1 belongs "
            "to another episode.": reward + 0.9 * goes_on * value.roll(-1) - value,
            "After a termination, nothing more can be earned, so the next value counts 0.": reward
            + 0.9 * stored
            - value,
            "The reward still counts in the step that ends the episode.": (reward + 0.9 * stored)
            * goes_on
            - value,
            "The reward is missing.": 0.9 * goes_on * stored - value,
            "The baseline, the value before the step, is missing.": reward + 0.9 * goes_on * stored,
            "The discount factor gamma is missing.": reward + goes_on * stored - value,
            "Running out of time is not a termination. What follows still has a value.": reward
            - value,
            "Each step has its own next value.": reward + 0.9 * goes_on * stored[0] - value,
        }
        expected = reward + 0.9 * goes_on * stored - value
        otherwise = (
            f"You returned {[round(x, 3) for x in found.tolist()]}, but it should be "
            f"{[round(x, 3) for x in expected.tolist()]} for reward {reward.tolist()}, value "
            f"{value.tolist()}, stored next value {stored.tolist()}, terminated {ended.tolist()}."
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
        MEASURED[name, iterations] = rate
        predicted = float(prediction[name, iterations])
        print(f"{name:<6}{iterations} iterations: predicted {predicted:.2f}, measured {rate:.2f}")


# Exercise 5


def slopes_of_four(prediction):
    """Check which of four slopes are about 1/3, about 1, and larger."""
    kinds = {"about 1/3": (0, 0.6), "about 1": (0.6, 1.2), "more than 1": (1.2, math.inf)}
    hints = {
        ("local", "shared"): "The others drive home, too. Where this robot is close, how close "
        "are they, and what does a critic expect that sees this robot alone?",
        ("local", "individual"): "The return is this robot's own remaining distance, and the "
        "critic sees it.",
        ("centralized", "shared"): "Only one of the three distances changes, and the critic sees "
        "all of them.",
        ("centralized", "individual"): "One value has to serve all three robots, so it predicts "
        "the average of their returns. How much does one robot add to an average of three?",
    }
    for (critic, reward), hint in hints.items():
        name = f"a {critic} critic and {reward} reward{'s' if reward == 'individual' else ''}"
        answer = prediction.get((critic, reward)) if isinstance(prediction, dict) else None
        words = f"Write down your slope for {name}: 1/3, 1 or 2."
        need(answer is not None, 5, words)
        predicted = number(5, answer, name)
        slope = kit.toy_slope(critic, reward)
        wanted = next(kind for kind, (low, high) in kinds.items() if low < slope <= high)
        low, high = kinds[wanted]
        need(low < predicted <= high, 5, f"The slope for {name} is {slope:.2f}, {wanted}. {hint}")
        need(
            predicted < 3,
            5,
            "A slope of 3 for the local critic would need robots that are always at equal "
            "distances. Are they?",
        )
    print("All four slopes are right. One of them is larger than 1.")


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
            "back. Use c from Section 10.": 1 - gamma * slope,
            "That counts the whole slope. How much of a lasting change of V' remains in the "
            "advantage? Use c from Section 10.": 1 - slope,
            "Coming closer *lowers* the value, so the slope counts against the reward.": 1
            + c * slope,
            "The reward for one unit of progress is 1.": -c * slope,
            "That is the cost of an error that lasts for one step. Progress lasts.": 1
            - gamma * (1 - lmbda) * slope,
            "The slope is missing: how much of the value is lost?": 1 - c,
        }
        compare(5, found, 1 - c * slope, mistakes, f"For slope {slope}, gamma {gamma} and lmbda "
                f"{lmbda}, the advantage is {1 - c * slope:.3f}, but you returned {found:.3f}. It "
                "is the reward, 1, minus c times the slope.", 1e-4)  # fmt: skip
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
        words = f"Give the {name} with {digits} decimal{'s' if digits > 1 else ''}."
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
    """Compare a forward pass with that of MultiAgentMLP, for two numbers of frames."""
    critics, observation = small_critics()
    critic = critics["MAPPO"]
    parameters = [parameter.detach() for parameter in critic.parameters()]
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))

    def forward(joined, activation=torch.tanh, last=False):
        for index, (weight, bias) in enumerate(layers):
            joined = joined @ weight.mT + bias
            if index < len(layers) - 1 or last:
                joined = activation(joined)
        return joined.unsqueeze(-2).expand(-1, 3, 1)

    for seen in (observation, torch.randn(7, 3, 6)):
        hint = (
            "The first layer takes the observations of all agents in one vector of 18 numbers, so "
            "join the last two dimensions first. A weight has the shape (outputs, inputs), so "
            "multiply by its transpose, as in `hidden @ weight.mT + bias`."
        )
        answer = call(6, function, seen.clone(), layers, hint=hint)
        hint = "Give the team's single value to every agent, along dimension -2."
        answer = tensor(6, answer, (len(seen), 3, 1), hint)
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
        compare(6, answer, critic(seen).detach(), mistakes, otherwise, 1e-4)
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
    factor = {"no lmbda": gamma, "lmbda alone": lmbda, "no sum": 0.0}.get(mistake, gamma * lmbda)
    advantage, following = torch.zeros_like(delta), torch.zeros_like(delta[0])
    steps = range(len(delta)) if mistake == "forward" else reversed(range(len(delta)))
    for step in steps:
        stops = {"goes on": 0 * done, "terminated": terminated}.get(mistake, done)[step]
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
    numbers = [torch.tensor(x) for x in ([0.0, 0.0, 1.0], [0.5] * 3, [0.5, 0.5, 0.8])]
    flags = torch.zeros(3, dtype=torch.bool), torch.tensor([False, False, True])
    examples = [(numbers, flags), (numbers, (flags[1], flags[1]))]
    torch.manual_seed(0)
    done = torch.rand(4, 30, 1) < 0.2
    done[:, -1] = True  # the batch ends
    terminated = done & (torch.rand(4, 30, 1) < 0.5)
    batch = [torch.randn(4, 30, 2, 1) for _ in range(3)]
    by_time = [x.squeeze(-1).transpose(0, 1) for x in batch]  # (30, 4, 2)
    by_agent = [x.transpose(0, 1).expand(30, 4, 2) for x in (terminated, done)]
    examples.append((by_time, by_agent))
    for values, ends in examples:
        given = [*(x.clone() for x in values), *(x.clone() for x in ends), 0.9, 0.5]
        answer = call(7, function, *given, hint=shape)
        answer = tensor(7, answer, values[0].shape, shape)
        expected = gae_with("", *values, *ends, 0.9, 0.5)
        mistakes = {}
        for mistake, hint in GAE_HINTS.items():
            mistakes.setdefault(hint, gae_with(mistake, *values, *ends, 0.9, 0.5))
        mistakes = {k: v for k, v in mistakes.items() if not close(v, expected)}
        otherwise = "Your advantages differ from MultiAgentGAE's. Compare each factor with the " \
            "formulas in Section 6."  # fmt: skip
        if answer.dim() == 1:
            otherwise = (
                f"For reward {values[0].tolist()}, value {values[1].tolist()}, next value "
                f"{[round(x, 1) for x in values[2].tolist()]} and terminated {ends[0].tolist()}, "
                f"you returned {[round(x, 3) for x in answer.tolist()]}, but it should be "
                f"{[round(x, 3) for x in expected.tolist()]}. Work out the last step first."
            )
        compare(7, answer, expected, mistakes, otherwise)
    flags = {"done": done, "terminated": terminated}
    following = {"agents": {"reward": batch[0], "state_value": batch[2]}, **flags}
    data = TensorDict({"agents": {"state_value": batch[1]}, "next": following}, [4, 30])
    estimator = MultiAgentGAE(gamma=0.9, lmbda=0.5, value_network=None)
    estimator.set_keys(reward=("agents", "reward"), value=("agents", "state_value"))
    library = estimator(data)["advantage"].squeeze(-1).transpose(0, 1)
    need(close(answer, library), 7, "Your advantages differ from MultiAgentGAE's.")
    right(7, "It agrees with TorchRL's MultiAgentGAE.")


# Exercise 8


def clipped_objective(function, zero_gradient, team_ratio):
    """Check the clipped objective, its six cases and the ratio of a team of three."""
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    shape = "Return one number for each sample, without a mean or a sum."
    for epsilon in (0.1, 0.2):
        answer = call(8, function, ratio, advantage, epsilon, hint=shape)
        found = tensor(8, answer, (6,), shape)
        plain = (ratio * advantage).detach()
        clipped = (ratio.clamp(1 - epsilon, 1 + epsilon) * advantage).detach()
        expected = torch.minimum(plain, clipped)
        fixed = torch.minimum(plain, ratio.clamp(0.8, 1.2).detach() * advantage)
        mistakes = {
            "Without the min, a ratio that has moved the wrong way gets no gradient to pull it "
            "back.": clipped,
            "Nothing is clipped.": plain,
            "Take the smaller of the two terms, not the larger.": torch.maximum(plain, clipped),
            "The objective is to be maximized, so it has no minus sign.": -expected,
            "Use the argument epsilon, not 0.2.": fixed,
            "Multiply by the advantage first, then take the smaller of the two terms.": (
                torch.minimum(ratio, ratio.clamp(1 - epsilon, 1 + epsilon)) * advantage
            ).detach(),
            "Clip from below as well.": torch.minimum(
                plain, ratio.clamp(max=1 + epsilon).detach() * advantage
            ),
        }
        mistakes = {k: v for k, v in mistakes.items() if not close(v, expected)}
        otherwise = (
            f"With epsilon {epsilon}, ratios {ratio.tolist()} and advantages "
            f"{advantage.tolist()}, you returned {[round(x, 2) for x in found.tolist()]}, but it "
            f"should be {[round(x, 2) for x in expected.tolist()]}."
        )
        compare(8, found, expected, mistakes, otherwise)
    need(answer.requires_grad, 8, "The result has lost its gradient. Do not detach the ratio.")
    gradient = torch.autograd.grad(answer.sum(), ratio)[0]
    cases = [(sign, place) for sign in ("A > 0", "A < 0") for place in ("below", "inside", "above")]
    for case, slope in zip(cases, gradient.tolist(), strict=True):
        said = zero_gradient.get(case) if isinstance(zero_gradient, dict) else None
        need(isinstance(said, bool), 8, f"Write True or False for {case}: is the gradient 0?")
        words = "Which of the two terms is smaller there, and does it change with the ratio?"
        need(said == (slope == 0), 8, f"Think again about {case}. {words}")
    joint = number(8, team_ratio, "the team's ratio")
    mistakes = {
        "Every agent's ratio is 1.2. What is the ratio of all three actions together?": 1.2,
        "Probabilities of independent actions are multiplied, not added.": 3.6,
        "That is the product of two ratios. The team has three robots.": 1.44,
        "Changes of 20% compound. Multiply the ratios.": 1.6,
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
    ratio = (log_ratio if mistake == "no exp" else log_ratio.exp()).unsqueeze(-1)
    advantage = data["advantage"]
    mean, std = advantage.mean(0), advantage.std(0)
    if mistake == "over all":
        mean, std = advantage.mean(), advantage.std()
    std = advantage.std(0, unbiased=False) if mistake == "biased" else std
    std = 1.0 if mistake == "mean only" else std
    advantage = advantage if mistake == "not normalized" else (advantage - mean) / std
    plain, clipped = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
    objective = {"no clip": plain, "no min": clipped}.get(mistake, torch.minimum(plain, clipped))
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

    def checked(*arguments):
        loss = call(9, my_loss, *arguments, hint=hint)
        need(loss is not None, 9, BLANK)
        is_tensor = isinstance(loss, torch.Tensor)
        need(is_tensor and loss.dim() == 0, 9, "Return a single number, the mean over everything.")
        need(loss.requires_grad, 9, "The loss has lost its gradient. Do not detach the networks.")
        return loss

    try:
        found = weights_after_a_step(checked)
    except RuntimeError as error:
        raise Hint(f"Exercise 9: No gradient comes through your loss: {error}.") from None
    expected, mistakes = weights_by_mistake()
    otherwise = (
        "The weights after a step differ from TorchRL's. Check each part. Is the ratio "
        "exp(new - old), for each agent, with a last dimension of size 1? Are the advantages "
        "normalized over the frames, for each agent? Is the smaller of the two terms taken, and "
        "clipped? Is the value loss the smooth L1 distance, times critic_coeff? Both are means."
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
    print(f"Training for {iterations} iterations ...", flush=True)
    after = success(call(10, train, iterations, hint=hint))
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
    "run_c": ("sound", "Compare all its columns with the table of default runs in Section 8."),
    "run_d": ("critic not trained", "Look at loss_critic and explained_variance."),
    "run_e": ("ratio always 1", "Look at kl_approx and clip_fraction. What ratio gives these?"),
}


def silent_bugs(answers):
    """Check which run has which mistake."""
    names = ", ".join(LABELS)
    answers = answers if isinstance(answers, dict) else {}
    for name in RUNS:
        said = answers.get(name)
        need(said in LABELS, 11, f"For {name}, write one of: {names}. You wrote {said!r}.")
    for name, (label, hint) in RUNS.items():
        need(answers[name] == label, 11, f"{name} is something else. {hint}")
    print("All five runs are right. Now find the line.")


def repaired_line(line):
    """Check a line that makes the program with a bug train all its networks."""
    need(line is not None, 11, "Write the corrected line as a text.")
    need(isinstance(line, str), 11, "Write the line as a text, in quotes.")
    hint = (
        "Which run of the five is this program's, and which networks must change while it trains? "
        "Look for the line that decides which weights change."
    )
    policy, critic = nn.Linear(2, 2), nn.Linear(3, 1)
    loss_module = nn.ModuleList([policy, critic])
    config = type("Config", (), {"lr": 1.25e-4})()
    space = {"torch": torch, "nn": nn, "cfg": config, "loss_module": loss_module}
    space |= {"policy": policy, "critic": critic}
    need(re.match(r"\s*optimizer\s*=", line), 11, f"That is not the line. {hint}")
    try:
        exec(line.strip(), space)
        groups = space["optimizer"].param_groups
    except Exception as error:
        words = f"The line fails with {type(error).__name__}: {error}."
        raise Hint(f"Exercise 11: {words} Correct only what is wrong in it.") from None
    is_adam = isinstance(space["optimizer"], torch.optim.Adam)
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
    right(11, "The program ran without an error all the time. Only the metrics knew.")


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
    words = [part for word in words for part in word.split("=", 1)] if "=" in words[0] else words
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


def help_the_one_that_fails(edit, train=False):
    """Check one changed option; train the weaker algorithm with it if `train` is True."""
    need(MEASURED, 12, "Do exercise 4 first. It shows which algorithm needs help.")
    name, words = one_option(12, edit)
    weaker = min(("MAPPO", "IPPO"), key=lambda algorithm: MEASURED[algorithm, 15])
    if not train:
        print(f"--{name.replace('_', '-')} can be changed. Set TRAIN = True to see if it helps.")
        return None
    flag = "--mappo" if weaker == "MAPPO" else "--no-mappo"
    try:
        test = kit.train_lesson([flag, "--n-iters", "15", *words])
    except kit.TrainingFailed as error:
        raise Hint(f"Exercise 12: The program says: {error}") from None
    success = test.get("success_rate", 0.0)
    print(f"{weaker} with {' '.join(words)}: success rate {success:.2f}")
    hint = (
        f"{weaker} still succeeds in only {success:.0%} of the test episodes. Which part of the "
        "return can its critic not see, and how could you make that part matter less? Think of "
        "the horizon or of the reward."
    )
    need(success > 0.9, 12, hint)
    right(12)
    return success


def told_distance(function):
    """Check the sum of the others' distances on one team and on a batch."""
    hint = (
        "Entries 4 and 5 of the last dimension are a robot's position minus its goal. The agents "
        "are dimension -2, whatever stands in front of it, and sums need `keepdim=True`."
    )
    torch.manual_seed(0)
    example = torch.zeros(3, 18)
    example[:, 4:6] = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    for seen in (example, torch.randn(5, 3, 18), torch.randn(4, 5, 3, 18)):
        answer = call(13, function, seen.clone(), hint=hint)
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
            "Entries 0 and 1 are the position. You need 4 and 5.": (
                seen[..., 0:2].norm(dim=-1, keepdim=True).sum(-2, keepdim=True)
                - seen[..., 0:2].norm(dim=-1, keepdim=True)
            ),
            "A distance is the square root of the sum of squares.": (
                own.square().sum(-2, keepdim=True) - own.square()
            ),
        }
        mistakes = {k: v for k, v in mistakes.items() if not close(v, total - own)}
        otherwise = f"For distances 5, 1 and 2, the others' sums are 3, 7 and 6. {hint}"
        compare(13, answer, total - own, mistakes, otherwise)


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
    told_distance(function)
    if not train:
        print("Your function is right. Set TRAIN = True to see what a critic makes of it.")
        return None
    source = source_of(function)
    need(source, 13, "The source of your function cannot be found. Define it in a cell.")
    source = re.sub(rf"^def {function.__name__}\b", "def others_distance", source)
    # The lesson's hand-written cells do not know the extra input.
    replacing = {"critic": f"{source}\n{TOLD_CRITIC}", "critic_check": "", "loss_check": ""}
    replacing["critic_by_hand"] = replacing["gae_check"] = ""
    try:
        test = kit.train_lesson(["--no-mappo", "--n-iters", "15"], replacing)
    except kit.TrainingFailed as error:
        raise Hint(f"Exercise 13: The program says: {error}") from None
    success = test["success_rate"]
    print(f"A local critic with one extra number: success rate {success:.2f}")
    words = "It should be above 0.9. Does your function use names that only your notebook has?"
    need(success > 0.9, 13, words)
    right(13)
    return success
