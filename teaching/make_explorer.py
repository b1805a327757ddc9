"""Make explore.html, a page to drag robots in and watch both critics, from trained/.

    python teaching/make_explorer.py

The page is explorer_template.html with data put into it: the weights of the four critics as float32
in base64, and one test episode as driven by each of the four policies. It needs no server and no
network.
"""

import base64
import json
import struct
from pathlib import Path

import torch
from torchrl.envs import MarlGroupMapType, VmasEnv
from torchrl.modules import MultiAgentMLP

TEACHING = Path(__file__).resolve().parent
ALGORITHMS, ITERATIONS = ("mappo", "ippo"), (10, 15)
EPISODE = 78  # of the 200 test episodes; all policies but IPPO's after 15 iterations succeed
EPISODES, EVALUATION_SEED, MAX_STEPS = 200, 12345, 100  # as in the evaluation in train_mappo.py
N_AGENTS, N_OBS, N_ACTIONS, NUM_CELLS, DEPTH = 3, 18, 2, 256, 2


def load(algorithm, iterations):
    """Return the trained policy and critic, as networks."""
    path = TEACHING / "trained" / f"{algorithm}-{iterations}.pt"
    weights = torch.load(path, weights_only=True)
    networks = []
    for name, outputs, centralized in (
        ("policy", 2 * N_ACTIONS, False),
        ("critic", 1, algorithm == "mappo"),
    ):
        network = MultiAgentMLP(
            n_agent_inputs=N_OBS,
            n_agent_outputs=outputs,
            n_agents=N_AGENTS,
            centralized=centralized,
            share_params=True,
            depth=DEPTH,
            num_cells=NUM_CELLS,
            activation_class=torch.nn.Tanh,
        )
        network.load_state_dict(weights[name])
        networks.append(network)
    return networks


def pack(critic):
    """Return the critic's weights and biases, layer by layer, as base64 of float32."""
    numbers = torch.cat([value.flatten() for value in critic.state_dict().values()]).tolist()
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode("ascii")


def record(policy):
    """Play the test episodes with the deterministic policy and return the chosen one.

    It is a list of frames, from the first to the last, and a frame is a list of robots, each as
    [x, y, velocity along x, velocity along y, x of its goal, y of its goal].
    """
    env = VmasEnv(
        "navigation",
        num_envs=EPISODES,
        seed=EVALUATION_SEED,
        group_map=MarlGroupMapType.ALL_IN_ONE_GROUP,
        n_agents=N_AGENTS,
    )
    frames, state = [], env.reset()
    for _ in range(MAX_STEPS + 1):
        seen = state["agents", "observation"]
        position, velocity, from_goal = seen[EPISODE, :, :6].split(2, dim=-1)
        frames.append(torch.cat([position, velocity, position - from_goal], dim=-1))
        if state["done"][EPISODE]:
            break
        state["agents", "action"] = policy(seen)[..., :N_ACTIONS].tanh()
        state = env.step(state)["next"]
    return [[[round(x, 4) for x in robot] for robot in frame.tolist()] for frame in frames]


def make_page():
    """Return the text of the page."""
    data = {"weights": {}, "episodes": {}}
    for algorithm in ALGORITHMS:
        for iterations in ITERATIONS:
            name = f"{algorithm}-{iterations}"
            policy, critic = load(algorithm, iterations)
            data["weights"][name] = pack(critic)
            with torch.no_grad():
                data["episodes"][name] = record(policy)
    template = (TEACHING / "explorer_template.html").read_text("utf-8")
    return template.replace("DATA_GOES_HERE", json.dumps(data, separators=(",", ":")))


if __name__ == "__main__":
    page = make_page()
    (TEACHING / "explore.html").write_text(page, "utf-8")
    print(f"explore.html: {len(page) / 1e6:.2f} MB")
