"""Your own scenario: a class that says what the world is and what the robots see, earn and report.

Here, a team meets wherever it likes. The episode ends once every robot is close to the team's
center, and a robot pays for each robot that it touches. `done` ends the episode, so it is what the
success rate counts; outside navigation, that metric is called `terminated_rate`. VMAS calls
`reward`, `observation` and `info` once for each agent, and all that they return has a row for each
environment. Report `agent_collisions` in `info` to see collisions among the metrics.

The cell goes after the cell `config`. Change the class to what you need; its arguments besides
`n_agents` are what `cfg.scenario_options` sets. Begin with a reward that says in every step how far
the task is from done, as here. Robots that are paid only at the end may never get there by chance.
"""
# ruff: noqa: F821

# %% after="config"
from vmas.simulator.core import Agent, Sphere, World
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import ScenarioUtils


class Meet(BaseScenario):
    """Robots start at random places and have to gather within `radius` of their center."""

    def make_world(self, batch_dim, device, n_agents, radius=0.2):
        self.radius = radius
        world = World(batch_dim, device)
        for index in range(n_agents):
            world.add_agent(Agent(f"robot_{index}", shape=Sphere(0.05)))
        return world

    def reset_world_at(self, env_index=None):  # None resets all environments
        agents, line = self.world.agents, (-1, 1)
        ScenarioUtils.spawn_entities_randomly(agents, self.world, env_index, 0.2, line, line)

    def distances(self):  # of the robots from their center, (batch_dim, n_agents)
        places = torch.stack([agent.state.pos for agent in self.world.agents], dim=1)
        return (places - places.mean(dim=1, keepdim=True)).norm(dim=-1)

    def touched(self, agent):  # how many robots the agent touches, (batch_dim,)
        others = [other for other in self.world.agents if other is not agent]
        gaps = torch.stack([self.world.get_distance(agent, other) for other in others])
        return (gaps < 0.005).float().sum(dim=0)

    def observation(self, agent):
        vectors = [other.state.pos - agent.state.pos for other in self.world.agents]
        return torch.cat([agent.state.pos, agent.state.vel, *vectors], dim=-1)

    def reward(self, agent):
        return -self.distances().mean(dim=-1) - self.touched(agent)

    def done(self):
        return (self.distances() < self.radius).all(dim=-1)

    def info(self, agent):
        return {"agent_collisions": self.touched(agent)}


cfg.scenario_name = Meet
