"""Fine-tune: start from what another run has learned, for example in a world that is different now.

The policy and the critic start with the weights of that run, so its networks must be as large as
those of this run. A shared policy fits a team of any size, but a centralized critic does not, so
leave the second cell out for another team. In Section 9, "untrained" is then the policy that this
run started from. Put the folder of the other run in place of runs/FOLDER.

The first cell goes after the cell `policy`, and the second one after `critic`.
"""
# ruff: noqa: F821

# %% after="policy"
old_run = torch.load("runs/FOLDER/checkpoint.pt", map_location=cfg.device, weights_only=True)
untrained_policy.load_state_dict(old_run["best_policy"])  # or "policy", its last one

# %% after="critic"
critic.load_state_dict(old_run["critic"])
