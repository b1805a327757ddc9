"""The outputs quoted in the prose are those that the cells print, but for what a machine rounds."""

import contextlib
import io
import re

import jupytext
import pytest

from cells import PICTURES, SCRIPT, assigned_names, read_cells, with_values

NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def quoted_outputs(algorithm):
    """Return {source of a cell: lines} of the blocks quoted for an algorithm below each cell.

    A block below the word MAPPO or IPPO is that of this algorithm, others are those of both.
    """
    found, source = {}, None
    for cell in jupytext.read(SCRIPT).cells:
        if cell.cell_type == "code":
            source = cell.source
            continue
        if cell.source.startswith(("---", "#")):  # nothing is quoted
            source = None
            continue
        first = cell.source.partition("\n\n---")[0].partition("\n\n#")[0]
        blocks = re.findall(
            r"^(?:[^\n]*\b(MAPPO|IPPO)\b[^\n]*\n)?```\n(.*?)```", first, re.M | re.S
        )
        quoted = [block.splitlines() for name, block in blocks if name in ("", algorithm)]
        if quoted and source and "print(" in source:
            found[source] = quoted[0]
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["MAPPO", "IPPO"])
def printed(request, tmp_path_factory):
    """Run the lesson with the default sizes and little training; return what each cell printed."""
    space, found = {"__name__": "notebook"}, {}
    values = {"mappo": request.param, "device": "cpu", "n_iters": 1, "num_epochs": 1}
    values["run_folder"] = str(tmp_path_factory.mktemp("printed") / "run")
    for cell in read_cells():
        if cell.part == "engineering" or PICTURES in assigned_names(cell.source):
            continue
        source = cell.source
        if "mappo" in assigned_names(source):
            source = with_values(source, **values)
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(source, "cell", "exec"), space)
        found[cell.source] = [line for line in out.getvalue().splitlines() if line]
    return "MAPPO" if request.param else "IPPO", found


def shape_of(line):
    """Return a line with its decimal numbers replaced, and other words and whole numbers kept."""
    return re.sub(r"\s+", " ", NUMBER.sub("#", line)).replace(" #", "#").strip()


def test_quoted_outputs_are_what_the_cells_print(printed):
    """The same lines, words, whole numbers, and counts of decimal numbers."""
    algorithm, found = printed
    quoted = quoted_outputs(algorithm)
    assert len(quoted) >= {"MAPPO": 8, "IPPO": 7}[algorithm]
    for source, lines in quoted.items():
        real = found[source]
        if "value_slope" in assigned_names(source):
            real = [line.replace("1 iterations", "10 iterations") for line in real]
        assert [shape_of(line) for line in lines if line] == [shape_of(line) for line in real]


def test_quoted_signs_and_equal_columns_are_real(printed):
    """Values, rewards, advantages and losses before training are the same but for rounding."""
    algorithm, found = printed
    for source, lines in quoted_outputs(algorithm).items():
        if assigned_names(source) & {"evaluation", "value_slope"}:
            continue  # these depend on the training
        numbers = [float(one) for line in lines for one in NUMBER.findall(line)]
        real = [float(one) for line in found[source] for one in NUMBER.findall(line)]
        assert numbers == pytest.approx(real, rel=0.1, abs=0.005)
        distinct = [len(set(NUMBER.findall(line))) for line in lines]
        assert distinct == [len(set(NUMBER.findall(line))) for line in found[source]]


def test_one_situation_has_one_value_for_mappo_and_three_for_ippo(printed):
    """The lesson in one line: what the cell of Section 4 prints."""
    algorithm, found = printed
    [line] = [line for lines in found.values() for line in lines if line.startswith("values in")]
    assert len(set(NUMBER.findall(line))) == (1 if algorithm == "MAPPO" else 3)


def test_the_probe_shows_what_each_critic_can_predict(printed):
    _, found = printed
    lines = next(lines for lines in found.values() if lines and "own number" in lines[0])
    rows = [[float(number) for number in NUMBER.findall(line)] for line in lines[1:]]
    for row, expected in zip(rows, [(1 / 3, 1), (1, 1 / 3), (1, 1)], strict=True):
        assert row == pytest.approx(expected, abs=0.03)


def test_no_placeholder_is_left():
    assert "@@" not in SCRIPT.read_text("utf-8")
