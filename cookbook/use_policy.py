"""Use the policy elsewhere: a plain PyTorch module, an exported program and an ONNX model.

    python cookbook/use_policy.py runs/FOLDER/policy.pt

writes policy.pt2 (PyTorch) and policy.onnx beside policy.pt; best_policy.pt works as well. ONNX
needs `pip install onnxscript`. With `pip install onnxruntime`, these lines run that file, here for
one robot:

    session = onnxruntime.InferenceSession("policy.onnx")
    [actions] = session.run(None, {"observation": numpy.zeros((1, 18), numpy.float32)})

This is a program, not a cell. To use the policy in your own program, copy the class. It needs
PyTorch alone, one policy serves a team of any size, and `policy.to("cuda")` moves it as a whole.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import nn


class Policy(nn.Module):
    """The deterministic policy, which maps observations (..., n_obs) to actions (..., n_actions).

    If the robots don't share weights, observations have the shape (..., n_agents, n_obs). If the
    actions are discrete, it returns their numbers, of shape (...).
    """

    def __init__(self, path):
        super().__init__()
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.n_agents, self.n_obs = (saved["network"][n] for n in ("n_agents", "n_agent_inputs"))
        layers = list(saved["state_dict"].values())  # weight, bias, weight, bias, ...
        self.weights, self.biases = nn.ParameterList(layers[::2]), nn.ParameterList(layers[1::2])
        self.discrete = "low" not in saved
        if not self.discrete:
            self.register_buffer("low", saved["low"][0].clone())
            self.register_buffer("high", saved["high"][0].clone())

    def forward(self, observation):
        hidden = observation
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = hidden.tanh() if index else hidden
            hidden = (weight @ hidden.unsqueeze(-1)).squeeze(-1) + bias
        if self.discrete:
            return hidden.argmax(dim=-1)
        mean, _ = hidden.chunk(2, dim=-1)
        return self.low + (self.high - self.low) * (mean.tanh() + 1) / 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Export a policy for PyTorch and for ONNX.")
    parser.add_argument("policy", type=Path, help="policy.pt or best_policy.pt of a run")
    path = parser.parse_args().policy
    if not path.is_file():
        parser.error(f"policy is '{path}', but must be a file such as runs/FOLDER/policy.pt")
    policy = Policy(path)
    example = torch.zeros(max(2, policy.n_agents), policy.n_obs)
    any_number = ({0: torch.export.Dim.AUTO},)  # of robots, if they share the weights
    program = torch.export.export(policy, (example,), dynamic_shapes=any_number)
    writers = {".pt2": lambda file: torch.export.save(program, file)}
    if importlib.util.find_spec("onnxscript"):
        writers[".onnx"] = lambda file: torch.onnx.export(
            program, f=file, external_data=False, verbose=False
        )
    for ending, write in writers.items():
        target = path.with_suffix(ending)
        if target.exists():
            parser.error(f"{target} exists already. Move it, or export another policy")
        write(target)
        print(f"Wrote {target}")
