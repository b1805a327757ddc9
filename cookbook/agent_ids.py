"""Agent IDs and own observations: a shared centralized critic with a value for each agent.

The lesson's centralized critic gets the same input for every agent, so its agents share one value.
Yu et al. (2022) call for more: the critic of agent i receives the global state, o_i and the ID of
agent i. The network is still shared, and its values can differ, for example by the contacts that
only one robot is to blame for.

The cell replaces the cells `critic` and `critic_check`. It is a kind of MAPPO, so leave `mappo` at
True.
"""
# ruff: noqa: F821


# %% replaces="critic, critic_check"
class AgentSpecificCritic(MultiAgentMLP):
    """A network that maps (o_i, o_1, ..., o_n, ID of i) to V_i, with the same weights for all i."""

    def forward(self, observation):
        n = observation.shape[-2]
        team = observation.flatten(-2).unsqueeze(-2).expand(*observation.shape[:-1], -1)
        ids = torch.eye(n, device=observation.device).expand(*observation.shape[:-1], n)
        return super().forward(torch.cat([observation, team, ids], dim=-1))


torch.manual_seed(seed_for("critic"))
critic_network = AgentSpecificCritic(
    **{**network_options, "n_agent_inputs": n_obs + n_agents * n_obs + n_agents},
    n_agent_outputs=1,
    centralized=False,  # the input of each agent already holds all observations
    share_params=True,
    device=cfg.device,
)
orthogonal_init(critic_network, final_gain=1.0)
critic = TensorDictModule(
    critic_network,
    in_keys=[("agents", "observation")],
    out_keys=[("agents", "state_value")],
)
values = critic(first_step.clone())["agents", "state_value"]  # (num_envs, n_agents, 1)
print("values in one environment:", *(f"{x:.4f}" for x in values[0, :, 0].tolist()))
