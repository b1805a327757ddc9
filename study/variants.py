# ruff: noqa: F811, F821
"""Changes to the method that the study compares, as cells for train_mappo.py.

study.py puts the cells of a variant into a copy of that file, in front of the cell that `before`
names: the one that assigns this name, or the training loop's. You can paste them there, too. Their
names are those of train_mappo.py.
"""


# %% others' distance before="estimate_advantages"
class CriticWithDistance(MultiAgentMLP):
    """A critic with one more input: the distance that the other robots have left, summed."""

    def forward(self, observation):
        distance = observation[..., 4:6].norm(dim=-1, keepdim=True)  # (..., n_agents, 1)
        others = distance.sum(dim=-2, keepdim=True) - distance
        return super().forward(torch.cat([observation, others], dim=-1))


# %% own distance before="estimate_advantages"
class CriticWithDistance(MultiAgentMLP):
    """A control: the additional input is the robot's own distance, which it observes anyway."""

    def forward(self, observation):
        distance = observation[..., 4:6].norm(dim=-1, keepdim=True)  # (..., n_agents, 1)
        return super().forward(torch.cat([observation, distance], dim=-1))


# %% others' distance, own distance before="estimate_advantages"
torch.manual_seed(seed_for("critic"))
critic_network = CriticWithDistance(
    n_agents=env.n_agents,
    n_agent_inputs=n_obs + 1,
    n_agent_outputs=1,
    centralized=mappo,
    share_params=share_parameters_critic,
    depth=depth,
    num_cells=num_cells,
    device=device,
)
orthogonal_init(critic_network, final_gain=1.0)
critic = TensorDictModule(
    critic_network,
    in_keys=[("agents", "observation")],
    out_keys=[("agents", "state_value")],
)

# %% arrivals bootstrapped before="loop"
# Advantages as if an episode could go on after all robots have arrived, like after a time limit.
estimate_with_terminations = estimate_advantages


def estimate_advantages(batch):
    terminated = batch["next", "terminated"].clone()
    batch["next", "terminated"].zero_()
    estimate_with_terminations(batch)
    batch["next", "terminated"].copy_(terminated)


# %% arrivals measured before="loop"
def measure_arrivals(row):
    """Put into `row` means over the robots and those steps of the batch that end with a success.

    They are the critic's value before the step, its reward, and its advantage in standard
    deviations of all advantages.
    """
    arrived = batch["next", "terminated"].squeeze(-1)  # (num_vmas_envs, max_steps)
    advantage = batch["advantage"][arrived].mean().item()
    row["value_at_arrival"] = batch["agents", "state_value"][arrived].mean().item()
    row["reward_at_arrival"] = batch["next", "agents", "reward"][arrived].mean().item()
    row["advantage_at_arrival"] = advantage / batch["advantage"].std().item()


after_iteration.insert(0, measure_arrivals)


# %% slopes measured before="loop"
def measure_slope(row):
    """Put into `row` by how much V_i drops per unit of distance that only robot i is closer.

    As `value_slope` in Section 10 does it, but in the training batch of each iteration.
    """
    observation = batch["agents", "observation"]  # (num_vmas_envs, max_steps, n_agents, n_obs)
    drops = []
    for robot in range(env.n_agents):
        to_goal = observation[..., robot, 4:6]
        distance = to_goal.norm(dim=-1, keepdim=True)
        closer = observation.clone()
        closer[..., robot, 0:2] -= 0.05 * to_goal / distance
        closer[..., robot, 4:6] -= 0.05 * to_goal / distance
        with torch.no_grad():
            drop = (critic_network(observation) - critic_network(closer))[..., robot, 0]
        drops.append(drop[distance.squeeze(-1) > 0.1] / 0.05)
    row["value_slope"] = torch.cat(drops).mean().item()


after_iteration.insert(0, measure_slope)

# %% slopes measured before="the end"
# The slope that Section 10 prints becomes a part of the evaluation.
evaluation["trained"]["value_slope"] = value_slope()
(folder / "evaluation.json").write_text(json.dumps(evaluation))
