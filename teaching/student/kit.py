"""What the exercises use besides PyTorch: the lesson's cells, trained networks, training runs."""

import ast
import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
LESSON = HERE / "lesson.ipynb"
TRAINED = HERE.parent / "trained"
NOT_NEEDED = {"set-up", "engineering", "critic_by_hand", "critic_check", "probe"}


class TrainingFailed(RuntimeError):
    """A training run that ended with an error; the message is its last line."""


def lesson_cells():
    """Return the lesson's cells of code from top to bottom, as {id: source}."""
    cells = json.loads(LESSON.read_text("utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def lesson_names(**settings):
    """Run Sections 1 to 4 of the lesson with other settings; return the names they define.

    The functions of Sections 8 and 10 are among them: `measure`, `evaluate`, `arrow_map`.
    """
    names, cells = {"__name__": "__main__"}, lesson_cells()
    with contextlib.redirect_stdout(io.StringIO()):
        for name, source in cells.items():
            if name not in NOT_NEEDED:
                exec(source, names)
            if name == "config":
                for field, value in {"device": "cpu", **settings}.items():
                    setattr(names["cfg"], field, value)
            if name == "critic":
                break
        names["scenario"] = names["cfg"].scenario_name
        exec(cells["measures"], names)
        exec(imports_and_functions(cells["arrow_map"]), names)
    gamma, lmbda = names["cfg"].gamma, names["cfg"].lmbda
    names["c"] = gamma * (1 - lmbda) / (1 - gamma * lmbda)
    return names


def imports_and_functions(source):
    """Return a cell's imports and functions without the statements that use them."""
    tree = ast.parse(source)
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    return ast.unparse(tree)


def load_trained(name, iterations):
    """Return the lesson's names with trained networks, for "mappo" or "ippo" and 10 or 15."""
    names = lesson_names(mappo=name == "mappo")
    saved = torch.load(TRAINED / f"{name}-{iterations}.pt", weights_only=True)
    names["policy_network"].load_state_dict(saved["policy"])
    names["critic_network"].load_state_dict(saved["critic"])
    names["policy"] = names["untrained_policy"]  # it is trained now
    return names


def success_rate(names):
    """Play the lesson's test episodes; return the fraction that succeed."""
    return names["evaluate"](names["policy"])["success_rate"]


def draw_arrow_map(axes, names, robot=0, points=24):
    """Draw where the advantage pushes a robot; return the fraction of arrows that point away."""
    scene, places, directions, from_goal = names["arrow_map"](robot, points)
    away = (directions * from_goal).sum(-1) > 0
    for chosen, color, width in ((~away, "tab:green", 0.004), (away, "tab:red", 0.008)):
        arrows = nn.functional.normalize(directions[chosen], dim=-1)
        axes.quiver(*places[chosen].T, *arrows.T, color=color, width=width, scale=30)
    for index, agent in enumerate(scene.agents):
        goal, place = agent.goal.state.pos[0].tolist(), agent.state.pos[0].tolist()
        mine = index == robot
        axes.add_artist(disc(axes, goal, f"C{index}", 0.5 if mine else 0.2))
        if not mine:
            axes.add_artist(disc(axes, place, f"C{index}", 1.0))
    axes.set(aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    return away.float().mean().item()


def disc(axes, center, color, alpha):
    """Return a disc of the size of a robot."""
    from matplotlib.patches import Circle

    return Circle(center, 0.1, color=color, alpha=alpha, transform=axes.transData)


def train_lesson(options, replacing=None):
    """Train with a copy of the lesson, show its progress, and return what the test measured.

    `options` is a list of words as on the command line. `replacing` is {id: source}, for cells
    that are to be replaced. Raise TrainingFailed with the program's own words if it fails.
    """
    cells = {name: source for name, source in lesson_cells().items() if name != "set-up"}
    leave_out = {"probe", "arrow_map", "slope", "curves", "video"}
    cells = {name: source for name, source in cells.items() if name not in leave_out}
    cells |= replacing or {}
    with tempfile.TemporaryDirectory() as place:
        script, folder = Path(place, "train_mappo.py"), Path(place, "run")
        script.write_text("\n\n".join(cells.values()), encoding="utf-8")
        words = [sys.executable, str(script), *options, "--run-folder", str(folder)]
        follow(words, {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"})
        return json.loads((folder / "evaluation.json").read_text())["trained"]


def follow(words, environment):
    """Run a program, show its progress bar as one line, and raise TrainingFailed if it fails."""
    said, line = [], ""
    program = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    while letter := program.stderr.read(1):
        if letter not in "\r\n":
            line += letter
            continue
        if re.search(r"\d+%\|", line):
            print("\r" + re.sub(r"\|[^|]*\|", " ", line).strip(), end="", flush=True)
        elif line.strip():
            said.append(line.strip())
        line = ""
    print()
    said += [line.strip()] if line.strip() else []
    if program.wait() != 0:
        errors = [one for one in said if re.search(r"[Ee]rror", one)]
        raise TrainingFailed((errors or said or ["no message"])[-1])


def plot(draw, rows=1, columns=1, size=(6, 4)):
    """Make a figure, let `draw` fill its axes, and show it below the cell."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    draw(axes)
    plt.show()
    plt.close(figure)


def toy_slope(critic, reward, gamma=0.99, spread=0.33, n_robots=3):
    """Return the slope of a value for robots that drive home at the same time, without networks.

    Each robot drives straight at its own speed, at most `spread` times faster or slower than 0.03
    a step. The return is regressed on the distances that the critic sees. `critic` is "local" or
    "centralized" (one value for the team), and `reward` is "shared" or "individual".
    """
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, 4000, n_robots, generator=generator)
    distance, speed = 2 * uniform[0], 0.03 * (1 + spread * (2 * uniform[1] - 1))
    distances, rewards = [], []
    for _ in range(100):
        progress = torch.minimum(speed, distance)
        own = progress[:, 0] if critic == "local" else progress.mean(-1)
        distances.append(distance)
        rewards.append(progress.sum(-1) if reward == "shared" else own)
        distance = distance - progress
    following, returns = torch.zeros(4000), []
    for earned in reversed(rewards):
        following = earned + gamma * following
        returns.insert(0, following)
    seen = torch.cat(distances)
    seen = seen[:, :1] if critic == "local" else seen
    columns = torch.cat([seen, torch.ones(len(seen), 1)], dim=1)
    return torch.linalg.lstsq(columns, torch.cat(returns).unsqueeze(1)).solution[0].item()


def show_tables():
    """Print the metrics of the five runs of the exercise about silent bugs.

    Names stand on two lines, so that a row fits on a laptop's screen.
    """
    hidden = {"iteration", "frames", "loss_objective", "loss_entropy"}
    for path in sorted((HERE / "silent_bug").glob("run_*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name not in hidden and not name.startswith("test_")]
        heads = [name.partition("_")[::2] for name in names]
        widths = [max(len(first) + 2, len(second) + 2, 9) for first, second in heads]
        print(path.stem)
        for line in zip(*heads, strict=True):
            print("   " + "".join(f"{x:>{width}}" for x, width in zip(line, widths, strict=True)))
        for number, row in enumerate(rows, start=1):
            numbers = zip((float(row[name]) for name in names), widths, strict=True)
            print(f"{number:>3}" + "".join(f"{x:>{width}.3g}" for x, width in numbers))
        print()
