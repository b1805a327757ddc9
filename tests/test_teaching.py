"""The class kit: solutions pass, blanks and mistakes fail with a hint, notebooks are whole."""

import re
import sys

import jupytext
import matplotlib
import nbformat
import pytest
import torch

from conftest import REPOSITORY, SCRIPT

TEACHING = REPOSITORY / "teaching"
sys.path.insert(0, str(TEACHING))
import make_notebooks  # noqa: E402

SOLUTIONS = jupytext.reads((TEACHING / "solutions.py").read_text("utf-8"), fmt="py:percent")
BLANKS = make_notebooks.make_exercises()
LONG = 2_000_000  # bytes: a notebook that is longer is not shown on web pages


def code(notebook):
    """Return the sources of the cells of code."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def solved():
    """Run all solutions in the kit's folder; return the names after each cell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TEACHING)
        matplotlib.use("agg")
        space, after = {"__name__": "notebook"}, []
        for source in code(SOLUTIONS):
            if "inspect.getsource" in source:  # which knows cells of a notebook only
                source = source.replace("inspect.getsource(others_distance)", '"pass"')
            exec(compile(source, "cell", "exec"), space)
            after.append(dict(space))
        yield after


def test_the_solutions_pass_their_checks(solved):
    assert len(solved) == len(code(SOLUTIONS)) == len(code(BLANKS))


EXERCISES = [
    number
    for number, (mine, theirs) in enumerate(zip(code(SOLUTIONS), code(BLANKS), strict=True))
    if mine != theirs
]


@pytest.mark.parametrize("cell", EXERCISES)
def test_a_blank_left_empty_fails_with_its_hint(solved, cell, monkeypatch):
    """Each of the exercises: the check below it names the exercise and says what to do."""
    monkeypatch.chdir(TEACHING)
    space = dict(solved[cell - 1])
    exec(compile(code(BLANKS)[cell], "cell", "exec"), space)
    # Until the next exercise: an import or a figure may stand before the check.
    with pytest.raises(AssertionError, match=r"^Exercise \d+: .{15}"):
        for source in code(BLANKS)[cell + 1 : cell + 3]:
            exec(compile(source, "cell", "exec"), space)


def test_there_are_thirteen_exercises():
    text = "\n".join(cell.source for cell in SOLUTIONS.cells if cell.cell_type == "markdown")
    numbers = re.findall(r"^## (\d+)\. .*\((\d+) minutes", text, re.MULTILINE)
    assert (
        [int(number) for number, _ in numbers] == [*range(1, 14)] == [*range(1, len(EXERCISES) + 1)]
    )


def gae_with(mistake):
    """Return a function like `gae` with a typical mistake."""

    def gae(reward, value, next_value, terminated, done, gamma, lmbda):
        advantages, following = [], 0.0
        for step in reversed(range(len(reward))):
            ended = done[step] if mistake == "done taken for terminated" else terminated[step]
            after = next_value[step]
            if mistake == "the next row's value" and step + 1 < len(value):
                after = value[step + 1]
            delta = reward[step] + (0.0 if ended else gamma * after) - value[step]
            goes_on = mistake == "the sum never stops" or not done[step]
            following = delta + (gamma * lmbda * following if goes_on else 0.0)
            advantages.insert(0, following)
        return advantages

    return gae


@pytest.mark.parametrize(
    "mistake", ["done taken for terminated", "the next row's value", "the sum never stops"]
)
def test_typical_mistakes_in_gae_fail(solved, mistake):
    solved[-1]["check_gae"](gae_with(None))
    with pytest.raises(AssertionError, match="^Exercise 4: "):
        solved[-1]["check_gae"](gae_with(mistake))


def test_typical_mistakes_in_delta_fail(solved):
    def next_row(reward, value, next_value, terminated, gamma):
        return reward + gamma * (1 - terminated.float()) * value.roll(-1) - value

    def no_end(reward, value, next_value, terminated, gamma):
        return reward + gamma * next_value - value

    def no_reward(reward, value, next_value, terminated, gamma):
        return gamma * (1 - terminated.float()) * next_value - value

    def no_reward_at_the_end(reward, value, next_value, terminated, gamma):
        return (reward + gamma * next_value) * (1 - terminated.float()) - value

    def first_value(reward, value, next_value, terminated, gamma):
        return reward + gamma * (1 - terminated.float()) * next_value[0] - value

    for mistake in (next_row, no_end, no_reward, no_reward_at_the_end, first_value):
        with pytest.raises(AssertionError, match="^Exercise 5: "):
            solved[-1]["check_delta"](mistake)


def test_typical_mistakes_in_the_objective_fail(solved):
    def no_min(ratio, advantage, epsilon):
        return ratio.clamp(1 - epsilon, 1 + epsilon) * advantage

    def largest(ratio, advantage, epsilon):
        return torch.maximum(ratio * advantage, no_min(ratio, advantage, epsilon))

    def other_epsilon(ratio, advantage, epsilon):
        return torch.minimum(ratio * advantage, no_min(ratio, advantage, 0.2))

    for mistake in (no_min, largest, other_epsilon):
        with pytest.raises(AssertionError, match="^Exercise 6: "):
            solved[-1]["check_objective"](mistake)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("critic_coeff * ", ""),
        ("return -obj", "return 100 * -obj"),
        ("epsilon).mean()", "epsilon).sum()"),
        ("advantage.mean(0)) / advantage.std(0)", "advantage.mean()) / advantage.std()"),
        ("advantage.std(0)", "advantage.std(0, unbiased=False)"),
        ("advantage = (advantage - advantage.mean(0)) / advantage.std(0)", "pass"),
    ],
)
def test_typical_mistakes_in_the_loss_fail(solved, right, wrong):
    [source] = [one for one in code(SOLUTIONS) if one.startswith("def my_loss")]
    assert source.count(right) == 1
    space = dict(solved[-1])
    exec(source.replace(right, wrong), space)
    with pytest.raises(AssertionError, match="^Exercise 9: the weights differ"):
        space["check_loss"](space["my_loss"])


@pytest.mark.parametrize("answer", [1, [0], "1"])
def test_a_wrong_prediction_of_the_agents_fails(solved, answer):
    cells = code(SOLUTIONS)
    [number] = [i for i, one in enumerate(cells) if "Exercise 2: write a list" in one]
    space = {**solved[number - 2], "prediction": {"MAPPO": [2, 0, 1], "IPPO": answer}}
    with pytest.raises(AssertionError, match="^Exercise 2: "):
        exec(cells[number], space)


@pytest.mark.parametrize("name", ["lesson", "exercises", "solutions"])
def test_the_notebooks_are_whole(name):
    """They validate, hold no error, no path and no progress bar, and are short enough to show."""
    path = TEACHING / f"{name}.ipynb"
    notebook = nbformat.read(str(path), as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LONG
    counts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            counts.append(cell.execution_count)
            for output in cell.outputs:
                assert output.output_type != "error"
                text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
                assert not re.search(r"it/s|(^|[\s'\"])/(tmp|home|root|work|Users)/", text)
    ran = [*range(1, len(counts) + 1)]
    assert counts == ([None] * len(counts) if name == "exercises" else ran)


def test_the_lesson_is_the_file():
    """If this fails, the file was changed: run `python teaching/make_notebooks.py lesson`."""
    lesson = nbformat.read(str(TEACHING / "lesson.ipynb"), as_version=4)
    file = make_notebooks.read(SCRIPT.read_text("utf-8"))
    assert [(cell.cell_type, cell.source) for cell in lesson.cells] == [
        (cell.cell_type, cell.source) for cell in file.cells
    ]
    pictures = [
        output
        for cell in lesson.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3  # two figures of curves and the video
    text = "".join(
        output.get("text", "") for cell in lesson.cells for output in cell.get("outputs", [])
    )
    assert "200 episodes, deterministic policy" in text and "slope of the value" in text


def test_the_exercises_are_the_solutions_with_blanks():
    """If this fails, run `python teaching/make_notebooks.py exercises solutions`."""
    exercises = nbformat.read(str(TEACHING / "exercises.ipynb"), as_version=4)
    solutions = nbformat.read(str(TEACHING / "solutions.ipynb"), as_version=4)
    assert [cell.source for cell in exercises.cells] == [cell.source for cell in BLANKS.cells]
    clean = [re.sub(r" *# (solution: .*|end of solution)\n?", "", one) for one in code(SOLUTIONS)]
    found = [source.replace("TRAIN = True", "TRAIN = False") for source in code(solutions)]
    assert [one.strip() for one in found] == [one.strip() for one in clean]
