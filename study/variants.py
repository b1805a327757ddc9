# ruff: noqa: E402, F811, F821
"""Changes to the lesson that the study compares, as cells for train_mappo.py.

study.py puts the cells of a variant into a copy of that file, in front of the cell whose id is
`before`. You can paste them there, too. Their names are those of train_mappo.py. Two more variants,
agent_ids and value_normalization, are recipes of the cookbook.
"""


# %% slopes before="loop"
class MeasuredRun(SavedRun):
    """A run whose history also says what its critic has learned, after each iteration tested."""

    def save(self, history, learner):
        if test_key in history[-1]:
            history[-1] |= measure_slope()
        super().save(history, learner)


def measure_slope(step=0.05):
    """Return the value's slope, the correlation of the distances left, and the slope it predicts.

    The slope is the lesson's `value_slope()`, `near_slope` the same for robots that are less than
    0.4 away, and `steep` the fraction of places at which the slope is above 1.1, where progress
    looks like a loss. The others are means over the robots in the same batch: the correlation `rho`
    of the distances that two robots have left, and the coefficient of a linear regression of the
    team's distance left, summed, on one robot's own.
    """
    env.set_seed(seed_for("slope"))
    torch.manual_seed(seed_for("slope"))
    seen = collector.next()["agents", "observation"]  # (num_envs, max_steps, n_agents, n_obs)
    drops, near_drops = [], []
    for robot in range(n_agents):
        from_goal = seen[..., robot, 4:6]  # its position minus its goal
        distance = from_goal.norm(dim=-1, keepdim=True)
        closer = seen.clone()
        closer[..., robot, 0:2] -= step * from_goal / distance  # its position
        closer[..., robot, 4:6] -= step * from_goal / distance
        with torch.no_grad():
            drop = (critic_network(seen) - critic_network(closer))[..., robot, 0]
        distance = distance.squeeze(-1)
        drops.append(drop[distance > 0.1])
        near_drops.append(drop[(distance > 0.1) & (distance < 0.4)])
    slopes = torch.cat(drops) / step
    left = seen[..., 4:6].norm(dim=-1).flatten(0, 1).T  # (n_agents, frames)
    covariance, correlation = left.cov(), left.corrcoef()
    pairs = n_agents * (n_agents - 1)
    return {
        "slope": slopes.mean().item(),
        "near_slope": torch.cat(near_drops).mean().item() / step,
        "steep": (slopes > 1.1).float().mean().item(),
        "rho": ((correlation.sum() - correlation.trace()) / pairs).item(),
        "predicted_slope": (covariance.sum(1) / covariance.diagonal()).mean().item(),
    }


run = MeasuredRun(cfg, is_program)

# %% goals that move on before="engineering"
from vmas.scenarios.navigation import Scenario as Navigation


class GoalsMoveOn(Navigation):
    """A robot that arrives gets a new random goal, and the episode lasts until its time is up."""

    def agent_reward(self, agent):
        progress = super().agent_reward(agent)
        arrived = (agent.distance_to_goal < agent.shape.radius).unsqueeze(-1)
        goal, new = agent.goal.state.pos, 2 * torch.rand_like(agent.state.pos) - 1
        agent.goal.set_pos(torch.where(arrived, new, goal), batch_index=None)
        agent.pos_shaping = (agent.state.pos - agent.goal.state.pos).norm(dim=-1)
        return progress

    def done(self):
        return torch.zeros(self.world.batch_dim, dtype=torch.bool, device=self.world.device)


cfg.scenario_name = GoalsMoveOn

# %% equal distances before="engineering"
from vmas.scenarios.navigation import Scenario as Navigation


class EqualDistances(Navigation):
    """Each goal is moved along its direction, so that all robots have equally far to go."""

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        agents, chosen = self.world.agents, slice(None) if env_index is None else [env_index]
        start = torch.stack([agent.state.pos[chosen] for agent in agents])
        way = torch.stack([agent.goal.state.pos[chosen] for agent in agents]) - start
        distance = way.norm(dim=-1, keepdim=True)  # (n_agents, environments, 1)
        goals = start + way / distance * distance.mean(dim=0)
        for agent, goal in zip(agents, goals, strict=True):
            agent.goal.set_pos(goal if env_index is None else goal[0], batch_index=env_index)
            agent.pos_shaping[chosen] = distance.mean(dim=0).squeeze(-1)


cfg.scenario_name = EqualDistances

# %% taking turns before="engineering"
from vmas.scenarios.navigation import Scenario as Navigation


class TakingTurns(Navigation):
    """Robots drive one after the other, in a random order, so only one robot's motors are on."""

    def make_world(self, batch_dim, device, **options):
        world = super().make_world(batch_dim, device, **options)
        self.order = torch.zeros(batch_dim, self.n_agents, device=device)
        return world

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        self.order[env_index] = torch.rand_like(self.order[env_index])

    def process_action(self, agent):
        agents = self.world.agents
        distance = torch.stack([(a.state.pos - a.goal.state.pos).norm(dim=-1) for a in agents], 1)
        arrived = distance < agent.shape.radius  # (environments, n_agents)
        turn = (self.order + arrived).argmin(dim=1)  # the first in order that has not arrived
        agent.action.u[turn != agents.index(agent)] = 0


cfg.scenario_name = TakingTurns


# %% others' distance before="gae"
class CriticWithDistance(MultiAgentMLP):
    """A critic with one more input: the distance that the other robots have left, summed."""

    def forward(self, observation):
        distance = observation[..., 4:6].norm(dim=-1, keepdim=True)  # (..., n_agents, 1)
        others = distance.sum(dim=-2, keepdim=True) - distance
        return super().forward(torch.cat([observation, others], dim=-1))


torch.manual_seed(seed_for("critic"))
critic_network = CriticWithDistance(
    **network_options | {"n_agent_inputs": n_obs + 1},
    n_agent_outputs=1,
    centralized=cfg.mappo,
    share_params=cfg.share_parameters_critic,
    device=cfg.device,
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


# %% two critics before="loop"
# The lesson's critic provides the bootstrap values only. The baseline comes from another critic,
# which is local if the first one is centralized, and the other way around. It learns the same
# targets. The advantage is the lambda-return of the first critic minus the value of the second.
baseline_network = MultiAgentMLP(
    **network_options,
    n_agent_outputs=1,
    centralized=not cfg.mappo,
    share_params=cfg.share_parameters_critic,
    device=cfg.device,
)
orthogonal_init(baseline_network, final_gain=1.0)
baseline_optimizer = torch.optim.Adam(baseline_network.parameters(), lr=cfg.lr)
estimate_with_one_critic = estimate_advantages


def estimate_advantages(batch):
    estimate_with_one_critic(batch)
    observation, target = batch["agents", "observation"], batch["value_target"]
    with torch.no_grad():
        batch["advantage"] = target - baseline_network(observation)
    observation, target = observation.flatten(0, 1), target.flatten(0, 1)
    for _ in range(cfg.num_epochs):
        for chosen in torch.randperm(len(target), device=cfg.device).split(minibatch_frames):
            value = baseline_network(observation[chosen])
            baseline_optimizer.zero_grad()
            nn.functional.smooth_l1_loss(value, target[chosen]).backward()
            nn.utils.clip_grad_norm_(baseline_network.parameters(), cfg.max_grad_norm)
            baseline_optimizer.step()
