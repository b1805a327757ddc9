"""The outputs quoted in the prose are what the cells print, number by number and sign by sign.

Those that stand before training are the same on every machine, but for rounding.
"""

import contextlib
import io
import re

import jupytext
import pytest

from cells import SCRIPT, read_cells, run_cells, sources

NUMBER = re.compile(r"-?\d+\.\d+")
BLOCK = re.compile(r"^(?:[^\n]*\b(MAPPO|IPPO)\b[^\n]*:\n)?```\n(.*?)```", re.M | re.S)
QUOTED = {"environment", "policy", "critic", "probe", "collector", "gae_check", "loss_check"}


def quoted_outputs(algorithm):
    """Return {id: lines} of what the prose quotes below the cells for an algorithm.

    The id is that of the last cell above the text that prints. A block below a line with the word
    MAPPO or IPPO is that of this algorithm, one at the beginning of the text is that of both.
    """
    found, above = {}, None
    for cell in jupytext.read(SCRIPT).cells:
        if cell.cell_type == "code":
            above = cell.metadata.get("id") if "print(" in cell.source else above
            continue
        for match in BLOCK.finditer(cell.source):
            if above and (match[1] == algorithm or (not match[1] and match.start() == 0)):
                found.setdefault(above, match[2].splitlines())
        above = None
    return found


def printed_by(source, space):
    """Return the lines that a cell prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_cells([source], space)
    return [line for line in out.getvalue().splitlines() if line]


@pytest.fixture(scope="module")
def printed():
    """Run the lesson up to the loop with the defaults, with each algorithm.

    Returns {algorithm: {id of a cell: lines}}, and of the evaluation that of the untrained policy.
    """
    names = [name for name in read_cells() if name != "engineering"]
    before, found = names[: names.index("loop")], {}
    for algorithm in ("MAPPO", "IPPO"):
        values = {"device": "cpu", "mappo": algorithm == "MAPPO"}
        cells = dict(zip(names, sources("engineering", **values), strict=True))
        space = {"__name__": "__main__"}
        found[algorithm] = {name: printed_by(cells[name], space) for name in before}
    untrained = space["evaluate"](space["untrained_policy"])
    found["MAPPO"]["evaluation"] = [f"{name} {x:.3f}" for name, x in untrained.items()]
    return found


@pytest.mark.parametrize("algorithm", ["MAPPO", "IPPO"])
def test_quoted_outputs_are_what_the_cells_print(printed, algorithm):
    """The same lines, words and numbers, up to a tenth and one unit in the last place quoted.

    So a number with the wrong sign is always found.
    """
    quoted = {name: lines for name, lines in quoted_outputs(algorithm).items() if name in QUOTED}
    expected = QUOTED if algorithm == "MAPPO" else QUOTED - {"loss_check"}
    assert {*quoted} == expected
    for name, lines in quoted.items():
        real = printed[algorithm][name]
        words = [[re.sub(r" *#", " #", NUMBER.sub("#", line)) for line in x] for x in (lines, real)]
        assert words[0] == words[1]
        for line, other in zip(lines, real, strict=True):
            pairs = [*zip(NUMBER.findall(line), NUMBER.findall(other), strict=True)]
            for one, two in pairs:
                unit = 10.0 ** -len(one.partition(".")[2])
                assert abs(float(one) - float(two)) <= 0.1 * abs(float(one)) + 1.01 * unit, line
            equal = [len({pair[side] for pair in pairs}) for side in (0, 1)]
            assert equal[0] == equal[1] or name == "probe", line  # columns that are equal


def test_the_quoted_evaluation_begins_with_the_untrained_policy(printed):
    """Its column of the table; that of the trained policy differs from machine to machine."""
    _, *lines = quoted_outputs("MAPPO")["evaluation"]
    for line, real in zip(lines, printed["MAPPO"]["evaluation"], strict=True):
        assert line.split()[0] == real.split()[0]
        assert float(line.split()[1]) == pytest.approx(float(real.split()[1]), rel=0.1, abs=0.001)


def test_one_situation_has_one_value_for_mappo_and_three_for_ippo(printed):
    """The lesson in one line: what the cell of Section 4 prints."""
    for algorithm, number in (("MAPPO", 1), ("IPPO", 3)):
        [line] = printed[algorithm]["critic"]
        assert len(set(NUMBER.findall(line))) == number


def test_the_probe_shows_what_each_critic_can_predict(printed):
    """With the formulas of the prose: explained variance and slope of both, for three agents."""
    table = [[float(x) for x in NUMBER.findall(line)] for line in printed["MAPPO"]["probe"][2:]]
    for rho, *found in table[:2]:
        assert found == pytest.approx([(1 + 2 * rho) / 3, 1 + 2 * rho, 1, 1], abs=0.05)
    for rho, *found in table[2:]:
        assert found == pytest.approx([1, 1, (1 + 2 * rho) / 3, 1 / 3], abs=0.05)


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]|\bMORE\b|\bSEEDS\b|TODO", SCRIPT.read_text("utf-8"))
