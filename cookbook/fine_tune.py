"""Fine-tune: start from what another run has learned, for example in a world that is different now.

The policy and the critic start with the weights of that run. Its networks must be as large as those
of this run. A policy fits a team of any size. A centralized critic does not, so for another team,
leave the second cell out. In Section 9, "untrained" then is the policy that this run started from.

The first cell goes after the cell `policy`, and the second one after `critic`.
"""
# ruff: noqa: F821

# %% after="policy"
old_run = torch.load("runs/FOLDER/checkpoint.pt", map_location=cfg.device, weights_only=True)
untrained_policy.load_state_dict(old_run["best_policy"])  # or "policy", its last one

# %% after="critic"
critic.load_state_dict(old_run["critic"])
