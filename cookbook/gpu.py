"""A GPU well used: thousands of environments and large minibatches. Not measured yet.

A GPU simulates 6,000 environments in nearly the same number of kernels as 60, and a minibatch of
40,000 frames likewise, so small sizes leave it idle. These settings keep 15 gradient steps per
epoch and make each of them a hundred times as large. The number of epochs and the learning rate are
guesses. Every claim here is a guess until a row of results.csv shows it. What is likely to be slow
is VMAS's reset of single environments, one after the other, once many episodes end within a batch.

The cell goes after the cell `config`. All of it can be set on the command line as well.
"""
# ruff: noqa: F821

# %% after="config"
torch.set_float32_matmul_precision("high")  # TensorFloat-32 in matrix products
cfg.frames_per_batch = 600_000  # 6,000 environments of 100 steps
cfg.minibatch_size = 40_000
cfg.num_epochs = 10
cfg.lr = 1e-3
cfg.evaluation_episodes = 1_000
