# %% [markdown] id="top"
# # Multi-agent PPO: exercises
# Fill in the blanks, then run the cell below each of them. It checks your answer. A wrong answer
# gives you a hint. If you need more help, open the hidden hints, one after the other.
#
# | part | exercises | when |
# |---|---|---|
# | A. See it | 1 to 5 a | in class, 5 a also at home |
# | B. Build it | 6 to 10 | at home, in this order; 9 and 10 use 7 and 8 |
# | C. Work like a detective | 5 b and c, 11 to 13 | after class, in any order |
#
# One star means that you can do it with what you have just heard. Two stars need a pencil. Three
# stars need an evening. Times include reading. If you do an exercise for a grade, hand in this
# notebook and what the exercise asks for.

# %% id="start"
import os
import sys
from pathlib import Path

import torch
import vmas
from torch import nn

above = [Path.cwd(), *Path.cwd().parents]
places = [one / name for one in above for name in (".", "student", "teaching/student")]
folder = next((place for place in places if (place / "checks.py").exists()), None)
if folder is None:
    print("The file checks.py is missing. Open this notebook inside the project's folder.")
else:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import checks
    import kit

# %% [markdown] id="exercise_1"
# # A. See it
# ## 1. Whose value changes? (★, 3 minutes)
# Suppose that agent 1's observation changes, and all the others stay the same. Whose values change?
# Write down a list of agents for each algorithm. There are three, numbered 0, 1 and 2.
#
# <details><summary>Hint</summary>
#
# Look at the diagram at the top of the lesson. It counts from 1, so agent 1 observes what is called
# o_2 there. Follow the arrows that start at o_2.
#
# </details>

# %% id="blank_1"
# solution: prediction = {"MAPPO": None, "IPPO": None}
prediction = {"MAPPO": [0, 1, 2], "IPPO": [1]}
# end of solution

# %% id="check_1"
checks.whose_value_changes(prediction)

# %% [markdown] id="solution_1"
# A centralized critic receives all observations, so a change in one of them reaches every value. A
# local critic of agent 0 never receives what agent 1 observes, although both share its weights.

# %% [markdown] id="exercise_2"
# ## 2. What will each critic say? (★★, 8 minutes)
# Do this before you run the last cell of Section 4. Each of n agents has a random number x_i with
# variance 1, and any two numbers have the correlation rho. A local critic sees x_i alone and
# predicts the *sum* of all numbers. Predict two things for each case:
#
# 1. its explained variance, between 0 and 1, to two decimal places
# 2. its slope, which is how much its value rises if x_i alone rises by 1
#
# Then say which critic you would ask what an agent's own number is worth: the `"local"` one, the
# `"centralized"` one, or `"both"`.
#
# <details><summary>Hint 1: the slope</summary>
#
# If x_i is larger by 1, the best guess for every other number is larger by rho. The critic cannot
# tell whether you have changed x_i alone.
#
# </details>
#
# <details><summary>Hint 2: the explained variance</summary>
#
# The best prediction is slope times x_i, and its variance is the slope squared. The variance of the
# sum is n (1 + (n - 1) rho). Divide.
#
# </details>

# %% id="blank_2"
prediction = {  # (number of agents, rho): (explained variance, slope)
    # solution: (3, 0.0): (None, None),
    (3, 0.0): (1 / 3, 1.0),
    # solution: (3, 0.5): (None, None),
    (3, 0.5): (2 / 3, 2.0),
    # solution: (3, 0.9): (None, None),
    (3, 0.9): (2.8 / 3, 2.8),
    # solution: (8, 0.5): (None, None),
    (8, 0.5): (4.5 / 8, 4.5),
    # end of solution
}
# solution: trust = {0.0: None, 0.9: None}  # rho: "local", "centralized" or "both"
trust = {0.0: "both", 0.9: "centralized"}  # rho: "local", "centralized" or "both"
# end of solution

# %% id="check_2"
checks.what_a_critic_says(prediction, trust)

# %% [markdown] id="solution_2"
# The slope is 1 + (n - 1) rho, because a local critic expects the others along with x_i. The
# explained variance is the slope divided by n, so the better such a critic predicts, the further
# off its slope is.

# %% [markdown] id="exercise_3"
# ## 3. Find the bug (★, 5 minutes)
# This function computes delta for every step of one row of a batch. It runs, and it is wrong.
# Correct it. All arguments but `gamma` are tensors of shape (steps,).
#
# <details><summary>Hint</summary>
#
# A row of a batch may look like this:
#
# ```
#     step   0                          46 47                                          99
#            |------ first episode ------| |-------------- second episode --------------|
#                              terminated                                       cut off
# ```
#
# What is in the row after the last step of an episode? Which argument helps where two episodes
# meet?
#
# </details>


# %% id="blank_3"
def delta(reward, value, next_value, terminated, gamma):
    """Return delta for each step; `next_value` is V' of the stored next observations."""
    # solution: after = torch.cat([value[1:], next_value[-1:]])
    after = next_value
    # end of solution
    return reward + gamma * (1 - terminated.float()) * after - value


# %% id="check_3"
checks.find_the_bug(delta)

# %% [markdown] id="solution_3"
# The next row of a batch may be the first of another episode, so its value says nothing about how
# this episode would have gone on. The collector stores every step's own next observation for this
# reason, and V' is computed from that.

# %% [markdown] id="exercise_4"
# ## 4. Predict, then look (★, 7 minutes)
# Which success rates do you expect from MAPPO and IPPO after 10 and after 15 iterations? Copy your
# numbers, between 0 and 1, from part 2 of the prediction sheet. A wrong prediction costs you
# nothing. The check plays 200 test episodes with policies from default runs with seed 0, and takes
# half a minute.

# %% id="blank_4"
prediction = {  # (algorithm, iterations): success rate
    # solution: ("MAPPO", 10): None,
    ("MAPPO", 10): 0.90,
    # solution: ("MAPPO", 15): None,
    ("MAPPO", 15): 0.95,
    # solution: ("IPPO", 10): None,
    ("IPPO", 10): 0.85,
    # solution: ("IPPO", 15): None,
    ("IPPO", 15): 0.90,
    # end of solution
}

# %% id="check_4"
checks.look(prediction)

# %% [markdown] id="exercise_4_maps"
# Now look at what the two critics teach. The lesson's arrow map shows in which direction the
# advantage pushes robot 1 at each place. Thin green arrows point toward its goal, thick red ones
# away from it. What would each of the two critics make of a robot that is nearly at its goal?

# %% id="maps_4"
names = {name: kit.load_trained(name, 15) for name in ("mappo", "ippo")}


def draw(panels):
    """Draw the arrow maps of both algorithms after 15 iterations."""
    for axes, (name, found) in zip(panels, names.items(), strict=True):
        away = kit.draw_arrow_map(axes, found)
        axes.set_title(f"{name.upper()}, 15 iterations: {away:.0%} of the arrows point away")


kit.plot(draw, columns=2, size=(11, 5.6))

# %% [markdown] id="solution_4"
# The predictions in this notebook are a guess at what a class expects: 0.90, 0.95, 0.85, 0.90. The
# measured numbers are those of seed 0. The means of ten seeds, on slide 10 and in Section 10, are
# 0.95, 0.99, 0.90 and 0.04. IPPO has not found a better way to earn reward, because its reward
# falls, too. Its own critic has taught it to stay away from the goals.

# %% [markdown] id="exercise_5"
# ## 5. What is a unit of progress worth? (★★, 5 minutes)
# Here is the same question in a world so small that you can compute it. Robots drive straight home,
# all at the same time, each at its own speed. There are no networks, and nothing is learned. The
# value is a linear regression of the return on the distances that a critic sees. Its slope says how
# much the value falls if one robot comes closer by 1 and the others stay where they are. The code
# is the function `toy_slope` in kit.py.
#
# **a)** Is each of the four slopes about 1/3, about 1, or clearly more than 1? Write 1/3, 1 or 2.
# The centralized critic has one value for the whole team.

# %% id="blank_5a"
slopes = {  # (critic, reward): slope
    # solution: ("local", "shared"): None,
    ("local", "shared"): 2,
    # solution: ("local", "individual"): None,
    ("local", "individual"): 1,
    # solution: ("centralized", "shared"): None,
    ("centralized", "shared"): 1,
    # solution: ("centralized", "individual"): None,
    ("centralized", "individual"): 1 / 3,
    # end of solution
}

# %% id="check_5a"
checks.slopes_of_four(slopes)

# %% [markdown] id="solution_5a"
# The distances of robots that drive home together are correlated, so a local critic takes a robot's
# own progress as a sign of everybody's. Its slope is 1.59, which is less than 1 + 2 rho = 1.93,
# because of discounting. The centralized critic with individual rewards has a wrong slope, too, but
# one that is too small, and that does no harm: progress keeps a positive advantage.

# %% [markdown] id="exercise_6"
# # B. Build it
# ## 6. The centralized critic (★★, 8 minutes)
# Write the forward pass of MAPPO's critic. The lesson has one, so close it. Join the observations
# of all agents, apply the linear layers with a tanh between them, and return the team's value for
# each agent. There may be any number of agents and of layers.
#
# **Hand in:** the line that makes the critic centralized.
#
# <details><summary>Hint 1</summary>
#
# `observation.flatten(-2)` has the shape (frames, n_agents * n_obs).
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A linear layer is `hidden @ weight.mT + bias`. At the end you have the shape (frames, 1).
# `unsqueeze(-2)` and `expand` give it a dimension for the agents.
#
# </details>


# %% id="blank_6"
def centralized_critic(observation, layers):
    """Return values of shape (frames, n_agents, 1) for observations (frames, n_agents, n_obs).

    `layers` is a list of (weight, bias) pairs, of shapes (outputs, inputs) and (outputs,).
    """
    # solution: return None
    hidden = observation.flatten(-2)  # (frames, n_agents * n_obs)
    for weight, bias in layers[:-1]:
        hidden = (hidden @ weight.mT + bias).tanh()
    weight, bias = layers[-1]
    value = hidden @ weight.mT + bias  # (frames, 1)
    return value.unsqueeze(-2).expand(-1, observation.shape[-2], -1)
    # end of solution


# %% id="check_6"
checks.centralized_critic(centralized_critic)

# %% [markdown] id="solution_6"
# All that makes the critic centralized is the `flatten` at the beginning. The value has no agent
# dimension of its own, so it is repeated, and all agents get the same one.

# %% [markdown] id="exercise_7"
# ## 7. Generalized advantage estimation (★★, 12 minutes)
# Implement GAE with a loop that runs backward from the last step. All tensors have the same shape,
# with the steps first, such as (steps, environments, agents). `done` ends the sum. `terminated`
# also means that nothing more can be earned. You need this function again in exercise 10.
#
# **Hand in:** one sentence each on what `done` and `terminated` do.
#
# <details><summary>Hint 1</summary>
#
# Compute all deltas at once, then loop over `reversed(range(len(reward)))`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A step holds many environments, so `if done[step]` does not work. Multiply by `1 -
# done[step].float()` instead.
#
# </details>


# %% id="blank_7"
def gae(reward, value, next_value, terminated, done, gamma, lmbda):
    """Return the advantages, in the shape of `reward`, with the first step first.

    `next_value` holds the critic's values V' of the stored next observations. The flags are boolean
    tensors of the same shape.
    """
    # solution: return None
    delta = reward + gamma * (1 - terminated.float()) * next_value - value
    advantage, following = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for step in reversed(range(len(reward))):
        following = delta[step] + gamma * lmbda * (1 - done[step].float()) * following
        advantage[step] = following
    return advantage
    # end of solution


# %% id="check_7"
checks.gae(gae)

# %% [markdown] id="solution_7"
# Two flags do two different things: `terminated` removes the next value from one delta, and `done`
# keeps the advantages of the next episode out of this one. An episode that runs out of time is done
# but not terminated, so it keeps its next value.

# %% [markdown] id="exercise_8"
# ## 8. The clipped objective (★★, 12 minutes)
# Write the objective of each sample. Then say in which of the six cases its gradient is 0. Each
# case combines the sign of the advantage with a ratio below, inside or above the range from
# 1 - epsilon to 1 + epsilon. Finally, suppose that the ratio of each of three agents is 1.2, the
# upper end of the range. What is the ratio of their joint action, to two decimal places?
#
# **Hand in:** a sketch of the objective over the ratio, for A = 1 and for A = -1.
#
# <details><summary>Hint 1</summary>
#
# Compute `ratio * advantage` and the same with the clipped ratio. Take the smaller, with
# `torch.minimum`.
#
# </details>
#
# <details><summary>Hint 2: the cases</summary>
#
# The gradient is 0 where the clipped term is the smaller one. Draw both terms over the ratio, once
# for A = 1 and once for A = -1.
#
# </details>


# %% id="blank_8"
def clipped_objective(ratio, advantage, epsilon):
    """Return the objective of each sample, to be maximized; `ratio` and `advantage` are tensors."""
    # solution: return None
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return torch.minimum(ratio * advantage, clipped * advantage)
    # end of solution


zero_gradient = {  # (advantage, ratio): True where the gradient is 0
    # solution: ("A > 0", "below"): None,
    ("A > 0", "below"): False,
    # solution: ("A > 0", "inside"): None,
    ("A > 0", "inside"): False,
    # solution: ("A > 0", "above"): None,
    ("A > 0", "above"): True,
    # solution: ("A < 0", "below"): None,
    ("A < 0", "below"): True,
    # solution: ("A < 0", "inside"): None,
    ("A < 0", "inside"): False,
    # solution: ("A < 0", "above"): None,
    ("A < 0", "above"): False,
    # end of solution
}
# solution: team_ratio = None
team_ratio = 1.2**3
# end of solution

# %% id="check_8"
checks.clipped_objective(clipped_objective, zero_gradient, team_ratio)

# %% [markdown] id="solution_8"
# The gradient vanishes only where the ratio has already moved far in the direction that the
# advantage asks for. Where it has moved the wrong way, the unclipped term is the smaller one and
# pulls it back. The joint ratio is a product, so a team can leave the range although no agent does.

# %% [markdown] id="exercise_9"
# ## 9. A complete update (★★★, 15 minutes)
# Put your pieces together. Compute the loss of one minibatch as TorchRL's `ClipPPOLoss` does, and
# return it. Normalize the advantages for each agent separately, with the sample standard deviation.
# The check takes one step of gradient descent with your loss and one with TorchRL's, and compares
# the weights.
#
# **Hand in:** what differs from single-agent PPO, in a list.
#
# <details><summary>Hint 1: shapes</summary>
#
# Log-probabilities have the shape (frames, n_agents), and everything else has a last dimension of
# size 1. Add it to the ratio with `unsqueeze(-1)`.
#
# </details>
#
# <details><summary>Hint 2: signs</summary>
#
# The objective is to be maximized, and the value loss, times critic_coeff, minimized. Return what
# is to be minimized.
#
# </details>


# %% id="blank_9"
def my_loss(pi, values, data, epsilon=0.2, critic_coeff=0.5):
    """Return the loss for a minibatch, without an entropy bonus, as a scalar to be minimized.

    `pi` is the action distribution, with log-probabilities of shape (frames, n_agents). `values`,
    of shape (frames, n_agents, 1), is the critic's output. `data` contains "action",
    "old_log_prob", of shape (frames, n_agents), "advantage" and "value_target", of shape
    (frames, n_agents, 1). The value loss is `nn.functional.smooth_l1_loss`.
    """
    # solution: return None
    ratio = (pi.log_prob(data["action"]) - data["old_log_prob"]).exp().unsqueeze(-1)
    advantage = data["advantage"]
    advantage = (advantage - advantage.mean(0)) / advantage.std(0)
    objective = clipped_objective(ratio, advantage, epsilon).mean()
    return -objective + critic_coeff * nn.functional.smooth_l1_loss(values, data["value_target"])
    # end of solution


# %% id="check_9"
checks.complete_update(my_loss)

# %% [markdown] id="solution_9"
# Three things set this apart from single-agent PPO: each agent has its own ratio, the advantages
# are normalized for each agent, and the means run over agents as well. Everything else is the same.

# %% [markdown] id="exercise_10"
# ## 10. Fifty lines of your own (★★★, 40 minutes, plus one to train)
# Now train two robots with your own pieces. Write `train`, which takes a number of iterations and
# returns a function from observations, of shape (environments, 2, 18), to actions of the same shape
# but with 2 numbers each, between -1 and 1. `train(0)` returns an untrained policy. Use `gae` and
# `clipped_objective` from above, VMAS and PyTorch, and nothing of TorchRL. Aim for fifty lines and
# one minute for 12 iterations. The check requires success in 60% of the test episodes, and that
# each robot acts on its own observation alone.
#
# **Hand in:** one experiment of your own, as a question, what you changed, and what came out.
#
# This is how VMAS works without TorchRL:
#
# ```
# env = vmas.make_env("navigation", num_envs=60, seed=0, n_agents=2)
# observations = torch.stack(env.reset(), dim=1)  # (60, 2, 18)
# observations, rewards, done, info = env.step(list_with_one_action_tensor_per_robot)
# ```
#
# Observations and rewards come as a list with one tensor for each robot. `done`, of shape (60,), is
# True where both robots are at their goals. Your `gae` takes tensors of one shape, here (100, 60,
# 2), so give `done` a dimension for the robots. An environment does not reset itself, so play 100
# steps in all of them, and leave out the frames after the first `done`.
#
# <details><summary>Hint 1: the outline</summary>
#
# 1. Build a policy (18 inputs, 4 outputs: a mean and a logarithm of a standard deviation for each
#    action) and a centralized critic (36 inputs, 1 output), with 64 units and tanh. Make the last
#    layer of the policy small.
# 2. In each iteration, play 100 steps in 60 environments, and keep what you need.
# 3. Compute values, advantages with gamma 0.95 and lmbda 0.9, and targets.
# 4. For 8 epochs, go through the frames in minibatches of 600, and step down the loss.
#
# </details>
#
# <details><summary>Hint 2: the distribution</summary>
#
# `torch.distributions.Normal(mean, log_std.exp())` is enough. Store the sample and its
# log-probability, summed over the two actions, and send the sample to VMAS after clamping it to
# -1 and 1.
#
# </details>
#
# <details><summary>Hint 3: the flags</summary>
#
# `done` of VMAS is a termination here. For `gae`, the last step of the batch is done as well. A
# frame counts if no step before it was done: `done.cumsum(0) - done.int() == 0`.
#
# </details>
#
# <details><summary>Hint 4: it does not learn</summary>
#
# Print the mean of the rewards in each iteration. A learning rate of 3e-3 that falls to 0, and
# gradients clipped to norm 1, are good settings. Is the policy's loss negative the objective?
#
# </details>


# %% id="blank_10"
# solution: def train(iterations):
# solution:     return None
def train(iterations):
    """Train two robots; return the deterministic policy as a function."""
    torch.manual_seed(0)
    policy, critic = (
        nn.Sequential(
            *(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()),
            nn.Linear(64, outputs),
        )
        for inputs, outputs in ((18, 4), (36, 1))
    )
    with torch.no_grad():
        policy[-1].weight.mul_(0.01)
    weights = [*policy.parameters(), *critic.parameters()]
    adam = torch.optim.Adam(weights)

    def pi(seen):
        mean, log_std = policy(seen).chunk(2, dim=-1)
        return torch.distributions.Normal(mean, log_std.exp())

    def team_value(seen):  # (..., 2, 18) to (..., 2)
        return critic(seen.flatten(-2)).expand(*seen.shape[:-1])

    env = vmas.make_env("navigation", num_envs=60, seed=0, n_agents=2)
    for iteration in range(iterations):
        adam.param_groups[0]["lr"] = 3e-3 * (1 - iteration / iterations)
        seen, steps = torch.stack(env.reset(), 1), []
        with torch.no_grad():
            for _ in range(100):
                action = pi(seen).sample()
                old = pi(seen).log_prob(action).sum(-1)
                following, reward, done, _ = env.step(list(action.clamp(-1, 1).unbind(1)))
                following, reward = torch.stack(following, 1), torch.stack(reward, 1)
                steps.append((seen, action, old, reward, following, done))
                seen = following
            seen, action, old, reward, following, done = map(torch.stack, zip(*steps, strict=True))
            ended = done.unsqueeze(-1).expand_as(reward)  # (100, 60, 2)
            last = (torch.arange(100) == 99).view(-1, 1, 1)
            value, after = team_value(seen), team_value(following)
            advantage = gae(reward, value, after, ended, ended | last, 0.95, 0.9)
        counts = done.cumsum(0) - done.int() == 0  # (100, 60)
        data = [x[counts] for x in (seen, action, old, advantage, advantage + value)]
        for _ in range(8):
            for chosen in torch.randperm(len(data[0])).split(600):
                o, a, old, adv, target = (x[chosen] for x in data)
                ratio = (pi(o).log_prob(a).sum(-1) - old).exp()
                adv = (adv - adv.mean(0)) / (adv.std(0) + 1e-6)
                loss = -clipped_objective(ratio, adv, 0.2).mean()
                loss = loss + 0.5 * (team_value(o) - target).square().mean()
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                adam.step()
    return lambda seen: pi(seen).mean.clamp(-1, 1)


# end of solution

# %% id="check_10"
checks.two_robots(train)

# %% [markdown] id="solution_10"
# Nothing of TorchRL is in here, and the order is that of Section 8: collect, estimate, update,
# throw away. The centralized critic appears in one line, and replacing `seen.flatten(-2)` by `seen`
# (with 18 inputs) would make it IPPO.

# %% [markdown] id="part_c"
# # C. Work like a detective
# This part is for after class, in any order. It gives away what you predict there.

# %% [markdown] id="exercise_5b"
# ## 5, continued: What turns a loss into a gain? (★★, 8 minutes)
# **b)** A unit of progress earns a reward of 1 and lowers the value by the slope. What advantage
# does it have over standing still? A robot that has come closer stays closer, so the change of its
# value lasts. Of a lasting change, the advantage contains the fraction
#
#     c = gamma (1 - lmbda) / (1 - gamma lmbda)
#
# because later deltas take a part of it back.


# %% id="blank_5b"
def advantage_of_progress(slope, gamma, lmbda):
    """Return the advantage of one unit of progress, if the slope is the same everywhere."""
    # solution: return None
    c = gamma * (1 - lmbda) / (1 - gamma * lmbda)
    return 1 - c * slope
    # end of solution


# %% id="check_5b"
checks.advantage_of_progress(advantage_of_progress)

# %% [markdown] id="exercise_5c"
# **c)** With gamma 0.99 and lmbda 0.9, progress is a loss to a local critic with a shared reward.
# Two knobs can turn that into a gain. One is `gamma`. The other is `spread`, which says how much
# the robots' speeds differ. Find the largest gamma, to two decimal places (spread 0.33), and the
# smallest spread, to one (gamma 0.99), for which progress is a gain. The plot helps.
#
# **Hand in:** one sentence for each knob on why it turns the sign.

# %% id="plot_5"
gammas = [0.90, 0.92, 0.94, 0.96, 0.98, 0.99]
spreads = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def draw(panels):
    """Draw the advantage of progress over each knob."""
    worth = {
        "gamma": [
            advantage_of_progress(kit.toy_slope("local", "shared", gamma=x), x, 0.9) for x in gammas
        ],
        "spread": [
            advantage_of_progress(kit.toy_slope("local", "shared", spread=x), 0.99, 0.9)
            for x in spreads
        ],
    }
    for axes, values, (knob, found) in zip(panels, (gammas, spreads), worth.items(), strict=True):
        axes.plot(values, found, "o-")
        axes.axhline(0, color="black", linewidth=1)
        axes.set(xlabel=knob, ylabel="advantage of progress")


kit.plot(draw, columns=2, size=(9, 3.4))

# %% id="blank_5c"
# solution: turning = {"gamma": None, "spread": None}
turning = {"gamma": 0.97, "spread": 0.9}
# end of solution

# %% id="check_5c"
checks.where_the_sign_flips(advantage_of_progress, turning)

# %% [markdown] id="solution_5c"
# A smaller gamma shrinks the slope, because the others' progress counts less the later it comes. It
# also shrinks c. A larger spread of speeds shrinks the correlation. Either is enough to bring c
# times the slope below 1, and then progress is a gain.

# %% [markdown] id="exercise_11"
# ## 11. The silent bug (★★, 12 minutes)
# Five people have trained the lesson for eight iterations. One program was sound. Each of the other
# four had one mistake, and none of them raised an error. Here is what they measured. Match each run
# with what happened in it:
#
# | write | what happened |
# |---|---|
# | `"sound"` | nothing is wrong |
# | `"wrong reward"` | the advantages were computed from another key than the reward's |
# | `"learning rate"` | the learning rate was a hundred times too high |
# | `"critic not trained"` | the critic's weights never changed |
# | `"ratio always 1"` | the old log-probabilities were recomputed before each gradient step |
#
# **Hand in:** for each run, the column that gave it away.
#
# <details><summary>Hint</summary>
#
# Compare the five runs column by column. A learning rate shows in kl_approx and clip_fraction, and
# a critic in loss_critic and explained_variance. What does a ratio of 1 make of the two measures of
# how far the policy moves?
#
# </details>

# %% id="tables_11"
kit.show_tables()

# %% id="blank_11"
answers = {
    # solution: "run_a": None,
    "run_a": "wrong reward",
    # solution: "run_b": None,
    "run_b": "learning rate",
    # solution: "run_c": None,
    "run_c": "sound",
    # solution: "run_d": None,
    "run_d": "critic not trained",
    # solution: "run_e": None,
    "run_e": "ratio always 1",
    # end of solution
}

# %% id="check_11"
checks.silent_bugs(answers)

# %% [markdown] id="exercise_11b"
# Now find one of these mistakes. The file silent_bug/program_with_a_bug.py is the lesson's code up
# to the training loop, and one of its lines is wrong. Write down that line as it should be, as a
# string.

# %% id="blank_11b"
# solution: repaired = None  # the corrected line, in quotes
repaired = "optimizer = torch.optim.Adam(loss_module.parameters(), lr=cfg.lr, fused=True)"
# end of solution

# %% id="check_11b"
checks.repaired_line(repaired)

# %% [markdown] id="solution_11"
# Each mistake leaves a trace in one or two columns, and none of them in the reward alone. The wrong
# reward makes the robots avoid each other instead of driving home. A critic that does not learn
# still lets the policy improve a little, because the rewards of a few steps are in the advantage.

# %% [markdown] id="exercise_12"
# ## 12. Help the one that fails (★★, 5 minutes, plus 2 to train)
# In exercise 4, one of the two algorithms failed after 15 iterations. Change *one* option of the
# lesson so that it succeeds. Write it as on the command line, for example `["--lr", "1e-3"]`.
# Options of the scenario are written as JSON, for example `'{"lidar_range": 0.5}'`. (This one is
# refused, because the robots, the task and the number of iterations stay as they are.) If TRAIN is
# True, the check trains for two minutes or so, and only the success rate decides.
#
# **Hand in:** what your option does to the slope, to the correlation, or to c.
#
# <details><summary>Hint</summary>
#
# Think of exercise 5 c. Which option makes a slope smaller, and which takes the correlated part out
# of the return?
#
# </details>

# %% id="blank_12"
TRAIN = False
# solution: edit = []
edit = ["--gamma", "0.9"]
# end of solution

# %% id="check_12"
checks.one_change(edit, TRAIN)

# %% [markdown] id="solution_12"
# A gamma of 0.9 works, and so do individual rewards, `["--scenario-options", '{"shared_rew":
# false}']`. With the first, the slope shrinks, because the others' progress lies beyond the
# horizon, and c falls from 0.91 to 0.47. We do not know which of the two matters. The second takes
# the others' progress out of the return. With lmbda 1, neither algorithm learns the task in time.

# %% [markdown] id="exercise_13"
# ## 13. Tell the critic one number (★★★, 10 minutes, plus 2 to train)
# Does a local critic become as good as a centralized one if it is told a single number, the sum of
# the other robots' remaining distances? Write down your guess, then write the function. Entries 4
# and 5 of an observation are the robot's position minus its goal. Another program trains with your
# function, so it can use `torch`, but nothing else from this notebook.
#
# **Hand in:** the guess, written before you train, and the result beside it.


# %% id="blank_13"
def others_distance(observation):
    """Return, for each robot, the total distance the others have left, (..., n_agents, 1)."""
    # solution: return None
    distance = observation[..., 4:6].norm(dim=-1, keepdim=True)
    return distance.sum(dim=-2, keepdim=True) - distance
    # end of solution


# %% id="check_13"
TRAIN = False
checks.tell_the_critic(others_distance, TRAIN)

# %% [markdown] id="solution_13"
# With this number, a local critic no longer has to guess the others' distances from its own, so its
# slope is right and the policy keeps what it has learned (the study has ten seeds). Its *own*
# distance as an extra input would tell it nothing new, because it can compute that already.
