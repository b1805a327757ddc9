"""teaching/explore.html in headless Chromium: its numbers, its switches, its layout."""

import json
import re
import runpy
import shutil

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from vmas import make_env

from cells import SCRIPT

TEACHING = SCRIPT.parent / "teaching"
PAGE = TEACHING / "explore.html"
MAKER = runpy.run_path(str(TEACHING / "make_explorer.py"))
NAMES = [f"{algorithm}-{iterations}" for algorithm in ("mappo", "ippo") for iterations in (10, 15)]
CRITICS = {name: MAKER["load"](*name.split("-"))[1] for name in NAMES}
LASTING = 0.99 * (1 - 0.9) / (1 - 0.99 * 0.9)  # gamma (1 - lmbda) / (1 - gamma lmbda)
SHIFT = torch.zeros(2, 18)  # what a step along x, and one along y, adds to an observation
SHIFT[[0, 0, 1, 1], [0, 4, 1, 5]] = 1.0
MOVERS = {"one": [0], "others": [1, 2], "all": [0, 1, 2]}  # "who moves?"
START = torch.tensor(
    [
        [-0.2, -0.3, 0, 0, 0, 0.15],
        [-0.8, 0.05, 0, 0, 0.6, 0.75],
        [-0.8, -0.75, 0, 0, 0.45, -0.3],
    ]
)

BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), ""
)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium or Chrome, and chromedriver, on the PATH"
)
OPTIONS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
OPTIONS += " disable-component-update disable-sync"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a browser; all tests share it."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in OPTIONS.split():
        options.add_argument(f"--{option}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def page(browser, request):
    """Return the browser with the page just opened; the console must stay empty."""
    width, height = request.param
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(PAGE.as_uri())
    settle(browser)
    yield browser
    assert browser.get_log("browser") == []


def settle(page):
    """Wait until the page has drawn everything."""
    page.execute_async_script(
        "const done = arguments[0];"
        "(function check() { waiting ? requestAnimationFrame(check) : done(); })();"
    )


def find(page, selector):
    """Return the first element that the CSS selector finds."""
    return page.find_element(By.CSS_SELECTOR, selector)


def scene(page):
    """Return the robots as a tensor of shape (robots, 6): position, velocity, goal."""
    rows = page.execute_script(
        "return robots.map((one) => [one.x, one.y, one.vx, one.vy, one.goalX, one.goalY])"
    )
    return torch.tensor(rows)


def observe(scenes):
    """Return what VMAS lets the robots observe, (scenes, robots, 18)."""
    env = make_env("navigation", num_envs=len(scenes), n_agents=3, seed=0)
    for index, agent in enumerate(env.agents):
        position, velocity, goal = scenes[:, index].split(2, dim=-1)
        agent.set_pos(position, batch_index=None)
        agent.set_vel(velocity, batch_index=None)
        agent.goal.set_pos(goal, batch_index=None)
    return torch.stack([env.scenario.observation(agent) for agent in env.agents], dim=1)


def value(name, seen):
    """Return the value of robot 1."""
    return CRITICS[name](seen)[..., 0, 0]


def step(name, robots, movers):
    """Return the reward of a step, its lasting change in value as GAE weights it, and their sum."""
    seen = observe(robots[None])
    way = robots[:, 4:] - robots[:, :2]
    length = torch.zeros(3, 1)
    length[MOVERS[movers]] = way.norm(dim=-1, keepdim=True).clamp(max=0.05)[MOVERS[movers]]
    after = seen + (length * torch.nn.functional.normalize(way, dim=-1)) @ SHIFT
    with torch.no_grad():
        change = LASTING * (value(name, after) - value(name, seen)).item()
    reward = length.sum().item()
    return [reward, change, reward + change]


def arrows(name, robots, places):
    """Return the gradient of -distance + 0.91 V with respect to robot 1's position, at places."""
    scenes = robots.repeat(len(places), 1, 1)
    scenes[:, 0, :2] = places
    seen = observe(scenes)
    moved = torch.zeros(len(places), 2, requires_grad=True)
    seen = torch.cat([seen[:, :1] + (moved @ SHIFT)[:, None], seen[:, 1:]], dim=1)
    distance = (places + moved - robots[0, 4:]).norm(dim=-1)
    return torch.autograd.grad((LASTING * value(name, seen) - distance).sum(), moved)[0]


def assert_shown(page):
    """Compare the numbers of the step that the page shows with PyTorch's."""
    settle(page)
    robots = scene(page)
    iterations = find(page, "[name=iterations]:checked").get_attribute("value")
    movers = find(page, "[name=movers]:checked").get_attribute("value")
    for algorithm in ("mappo", "ippo"):
        terms = page.find_elements(By.CSS_SELECTOR, f"#step-{algorithm} .number")
        shown = [float(term.text.replace("−", "-")) for term in terms]
        expected = step(f"{algorithm}-{iterations}", robots, movers)
        assert shown == pytest.approx(expected, abs=1e-3)
        what = "Waiting" if movers == "others" else "Coming closer"
        word = "gain" if shown[2] > 0 else "loss"
        verdict = find(page, f"#step-{algorithm} [role=status]").get_attribute("textContent")
        assert verdict == f"{algorithm.upper()}: {what} looks like a {word}."


def put(page, robots):
    """Put the robots where the tensor of shape (robots, 6) says."""
    page.execute_script(
        "robots = arguments[0].map(([x, y, vx, vy, goalX, goalY]) =>"
        "  ({x, y, vx, vy, goalX, goalY}));"
        "draw()",
        robots.tolist(),
    )
    settle(page)


def choose(page, name, choice):
    """Press the choice of this name."""
    find(page, f"[name={name}][value='{choice}']").click()
    settle(page)


def shapes(page, algorithm):
    """Return the arrows drawn in a map as a set."""
    paths = page.execute_script(
        f"return [...document.querySelectorAll('#map-{algorithm} path')]"
        ".map((one) => one.getAttribute('d'))"
    )
    return set(re.findall(r"M[^M]*L[^M]*L[^M]*Z|M[^M]*M[^M]*", "".join(paths)))


def press(page, *keys):
    """Press these keys, one after the other."""
    ActionChains(page).send_keys(*keys).perform()
    settle(page)


def drag(page, selector, right, down, kind="mouse"):
    """Drag an element by this many pixels, with the mouse or a finger."""
    box = find(page, selector).rect
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    y -= page.execute_script("return scrollY")
    actions = ActionBuilder(page, mouse=PointerInput(kind, kind), duration=20)
    pointer = actions.pointer_action
    pointer.move_to_location(round(x), round(y)).pointer_down()
    for part in range(1, 5):
        pointer.move_to_location(round(x + right * part / 4), round(y + down * part / 4))
    pointer.pointer_up()
    actions.perform()
    settle(page)


def world_units(page, pixels):
    """Return a distance on the screen in units of the square."""
    return pixels * 2.3 / find(page, "#world").rect["width"]


def test_page_is_up_to_date():
    """The committed page is what make_explorer.py makes, stands alone and is small."""
    pattern = re.compile(r'(<script type="application/json" id="data">)(.*?)(</script>)', re.DOTALL)
    made, committed = MAKER["make_page"](), PAGE.read_text("utf-8")
    again = "run python teaching/make_explorer.py"
    assert pattern.sub("", made) == pattern.sub("", committed), again
    made, committed = (json.loads(pattern.search(text)[2]) for text in (made, committed))
    assert made["weights"] == committed["weights"], again
    for name in NAMES:  # other processors round differently
        episodes = torch.tensor(made["episodes"][name]), torch.tensor(committed["episodes"][name])
        torch.testing.assert_close(*episodes, rtol=0, atol=0.01, msg=again)
        last = episodes[1][-1]
        arrived = (last[:, :2] - last[:, 4:]).norm(dim=-1) < 0.1
        assert not arrived.any() if name == "ippo-15" else arrived.all()  # as the page says

    text = PAGE.read_text("utf-8")
    assert len(text) < 3e6
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\((?!#)|fetch\(', text)


@needs_browser
@pytest.mark.parametrize("page", [(1280, 800)], indirect=True)
def test_same_numbers_as_pytorch(page):
    """In random scenes, observations are VMAS's, and values, arrows and steps PyTorch's."""
    torch.manual_seed(0)
    scenes = []
    while len(scenes) < 10:
        robots = torch.rand(3, 6) * 2 - 1
        if torch.pdist(robots[:, :2]).min() > 0.2:
            scenes.append(robots)
    scenes[0][1, :2] = scenes[0][0, :2] + torch.tensor([0.25, 0.05])  # well within lidar range
    for robots in scenes:
        put(page, robots)
        found = page.execute_script(
            "const seen = observe(robots), result = {seen};"
            "for (const [name, critic] of Object.entries(critics)) result[name] = {"
            "  value: evaluate(critic, [seen]).values[0], map: arrowMap(critic, robots),"
            "  one: oneStep(critic, robots, 'one'), all: oneStep(critic, robots, 'all'),"
            "  others: oneStep(critic, robots, 'others'), home: wayHome(critic, robots, 'one', 2)};"
            "return result"
        )
        seen = observe(robots[None])
        close = {"rtol": 0, "atol": 1e-3}
        torch.testing.assert_close(torch.tensor(found["seen"]), seen.flatten(), rtol=0, atol=1e-4)
        for name in NAMES:
            one = found[name]
            assert one["value"] == pytest.approx(value(name, seen).item(), abs=1e-3)
            for movers in MOVERS:
                expected = step(name, robots, movers)
                shown = [one[movers][key] for key in ("reward", "change", "advantage")]
                assert shown == pytest.approx(expected, abs=1e-3)
            drawn = torch.tensor(one["map"], dtype=torch.float32)
            expected = arrows(name, robots, drawn[:, :2])
            torch.testing.assert_close(drawn[:, 2:4], expected, **close)
            toward = (expected * (robots[0, 4:] - drawn[:, :2])).sum(-1) > 0
            assert (drawn[:, 4].bool() == toward).float().mean() > 0.99  # but for rounding
            assert 90 < len(drawn) <= 121

            way, (length, at_goal, _) = robots[0, 4:] - robots[0, :2], one["home"][0]
            home = seen.clone()
            home[0, 0] += way @ SHIFT
            assert length == 0
            assert at_goal == pytest.approx(value(name, home).item(), abs=1e-3)


def test_waiting_beats_driving_under_ippo():
    """At the start, the advantages of waiting and driving are the numbers that answer 2 quotes."""
    text = " ".join(PAGE.read_text("utf-8").split())
    advantage = {
        (algorithm, movers): step(f"{algorithm}-15", START, movers)[2]
        for algorithm in ("mappo", "ippo")
        for movers in ("others", "all")
    }
    assert advantage["ippo", "others"] > advantage["ippo", "all"]
    assert advantage["mappo", "others"] < advantage["mappo", "all"]
    quoted = {key: f"{number:+.3f}" for key, number in advantage.items()}
    assert (
        f"robot 1's advantage is {quoted['ippo', 'others']} if it waits and only"
        f" {quoted['ippo', 'all']} if it drives, too. So IPPO teaches it to wait. Under MAPPO, it"
        f" is {quoted['mappo', 'others']} if it waits and {quoted['mappo', 'all']} if it drives."
    ) in text


def test_others_at_their_goals():
    """More than half of MAPPO's arrows can point away then, and they are short, as Limits says."""
    robots = START.clone()
    robots[1:, :2] = robots[1:, 4:]
    places = torch.cartesian_prod(torch.linspace(-1, 1, 11), torch.linspace(-1, 1, 11))
    others = torch.cdist(places, robots[1:, :2]).min(dim=1).values
    to_goal = robots[0, 4:] - places
    places = places[(others > 0.2) & (to_goal.norm(dim=-1) > 0.1)]
    length, away = {}, {}
    for name, scene_shown in (("mappo-15", robots), ("ippo-15", START)):
        push = arrows(name, scene_shown, places)
        is_away = (push * (robots[0, 4:] - places)).sum(dim=-1) < 0
        away[name] = is_away.float().mean()
        length[name] = push[is_away].norm(dim=-1).mean()
    assert away["mappo-15"] > 0.5
    assert length["mappo-15"] < length["ippo-15"] / 2


@needs_browser
def test_drag_with_the_mouse(page):
    """Robots and goals follow the mouse; only MAPPO's map depends on a robot that is far away."""
    assert_shown(page)
    before = scene(page)
    drag(page, "#world .robot.one .disc", 30, 40)
    after = scene(page)
    moved = world_units(page, torch.tensor([30.0, -40.0]))
    torch.testing.assert_close(after[0, :2] - before[0, :2], moved, rtol=0, atol=0.03)
    torch.testing.assert_close(after[1:], before[1:])
    assert_shown(page)

    maps = {algorithm: shapes(page, algorithm) for algorithm in ("mappo", "ippo")}
    drag(page, "#world .robot.two .disc", 20, -20)
    kept = {one: len(maps[one] & shapes(page, one)) / len(maps[one]) for one in maps}
    assert kept["mappo"] < 0.1
    assert kept["ippo"] > 0.7
    assert_shown(page)

    drag(page, "#world .goal.one .disc", -25, -10)
    assert not torch.equal(scene(page)[0, 4:], before[0, 4:])
    assert_shown(page)

    drag(page, "#world .robot.three .disc", -35, 45)  # out of the square
    assert scene(page)[2, :2].tolist() == [-1, -1]
    page.execute_script("scrollTo(0, 300)")
    drag(page, "#map-ippo .robot.three .disc", 20, -10)  # in a map, but not where touches scroll
    is_phone = page.execute_script("return innerWidth") < 500
    assert (scene(page)[2, 0] == -1) == is_phone

    page.execute_script("scrollTo(0, 0); byId('time').value = 10; showFrame()")
    assert (scene(page)[:, 2:4] != 0).all()
    drag(page, "#world .robot.one .disc", 5, 5)
    assert (scene(page)[:, 2:4] == 0).all()  # velocities
    assert_shown(page)
    find(page, "#reset").click()
    settle(page)
    torch.testing.assert_close(scene(page), before)


@needs_browser
@pytest.mark.parametrize("page", [(390, 844)], indirect=True)
def test_drag_with_a_finger(page):
    """A finger moves a robot without scrolling; robots do not overlap."""
    before = scene(page)
    drag(page, "#world .robot.one .disc", 20, -50, kind="touch")
    assert page.execute_script("return scrollY") == 0
    moved = world_units(page, torch.tensor([20.0, 50.0]))
    torch.testing.assert_close(scene(page)[0, :2] - before[0, :2], moved, rtol=0, atol=0.03)
    drag(page, "#world .robot.two .disc", 0, 45, kind="touch")  # onto robot 3
    assert torch.pdist(scene(page)[:, :2]).min() > 0.2 - 1e-6
    assert_shown(page)
    catches = "return getComputedStyle(document.querySelector(arguments[0])).pointerEvents"
    assert page.execute_script(catches, "#world .robot") == "auto"
    for square in ("#map-mappo", "#map-ippo"):  # a swipe over a map scrolls
        assert page.execute_script(catches, f"{square} .robot") == "none"
    for target in page.find_elements(By.CSS_SELECTOR, "#world .reach, .choice label, button"):
        assert min(target.rect["width"], target.rect["height"]) > 28  # large enough for a finger


@needs_browser
def test_every_switch(page):
    """All combinations of the switches show PyTorch's numbers, and reset restores the first."""
    first = find(page, "main").text
    for movers in ("all", "others", "one"):
        for iterations in ("10", "15"):
            choose(page, "movers", movers)
            choose(page, "iterations", iterations)
            assert_shown(page)
    choose(page, "movers", "all")
    for details in page.find_elements(By.TAG_NAME, "summary"):
        details.click()
        assert len(find(page, "details[open] p").text) > 50
        details.click()
    for driver, arrives in (("mappo", True), ("ippo", False)):
        find(page, f"[name=driver][value={driver}]").click()
        settle(page)
        page.execute_script(
            "byId('time').value = 100; byId('time').dispatchEvent(new Event('input'))"
        )
        settle(page)
        robots = scene(page)
        assert ((robots[:, :2] - robots[:, 4:]).norm(dim=-1) < 0.1).all() == arrives
        text = "All robots have arrived" if arrives else "Time runs out"
        assert text in find(page, "#film-caption").text
    assert_shown(page)
    find(page, "#reset").click()
    settle(page)
    assert find(page, "main").text == first


@needs_browser
@pytest.mark.parametrize("page", [(1280, 800)], indirect=True)
def test_box_explains_what_is_shown(page):
    """The box says why the bars are what they are, in every case."""
    far, parked = START.clone(), START.clone()
    far[0, :2] = torch.tensor([1.0, -1.0])
    far[0, 4:] = torch.tensor([-0.9, 0.9])
    parked[1:, :2] = parked[1:, 4:]
    cases = (
        (
            START,
            [True, False],
            "But they have not moved.",
            "MAPPO favors driving, and IPPO waiting.",
        ),
        (far, [True, True], "neither critic lowers V by more than", "So both favor driving."),
        (parked, [False, False], "but it is not perfect.", "So both favor waiting."),
    )
    for robots, mappo_and_ippo, alone, waits in cases:
        put(page, robots)
        advantages = {
            movers: [step(f"{one}-15", robots, movers)[2] for one in ("mappo", "ippo")]
            for movers in MOVERS
        }
        choose(page, "movers", "one")
        assert [advantage > 0 for advantage in advantages["one"]] == mappo_and_ippo
        assert_shown(page)
        assert alone in find(page, ".why").text
        choose(page, "movers", "others")
        pairs = zip(advantages["all"], advantages["others"], strict=True)
        assert [if_it_drives > if_it_waits for if_it_drives, if_it_waits in pairs] == mappo_and_ippo
        quoted = "would be {:+.3f} under MAPPO and {:+.3f} under IPPO".format(*advantages["all"])
        assert quoted.replace("-", "−") in find(page, ".why").text
        assert find(page, ".why").text.endswith(waits)
        choose(page, "movers", "all")
        assert "the reward is the progress of all three" in find(page, ".why").text


@needs_browser
@pytest.mark.parametrize("page", [(1280, 800)], indirect=True)
def test_arrow_inside_robot_1(page):
    """In each map, it points where the critic pushes robot 1, until robot 1 has arrived."""
    for algorithm, way, tip, tail in (("mappo", "toward", 1, 0), ("ippo", "away", 0, 2)):
        push = arrows(f"{algorithm}-15", START, START[:1, :2])[0]
        assert ((push * (START[0, 4:] - START[0, :2])).sum() > 0) == (way == "toward")
        drawn = find(page, f"#map-{algorithm} .own.{way}").get_attribute("d")
        points = torch.tensor([float(number) for number in re.findall(r"[-\d.]+", drawn)])
        points = points.view(-1, 2) * torch.tensor([1.0, -1.0])
        assert torch.cosine_similarity(points[tip] - points[tail], push, dim=0) > 0.99
    robots = START.clone()
    robots[0, :2] = robots[0, 4:]
    put(page, robots)
    for own in page.find_elements(By.CSS_SELECTOR, ".own"):
        assert own.get_attribute("d") is None


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", [(1280, 800)], indirect=True)
def test_contrast_of_goals(page, scheme):
    """Goals stand out from the squares, with at least the contrast of 3 that WCAG asks for."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    colors = page.execute_script(
        "return [...document.querySelectorAll('.square .goal')].map((goal) => ["
        "  getComputedStyle(goal.querySelector('.disc')).stroke,"
        "  getComputedStyle(goal.closest('svg')).backgroundColor, getComputedStyle(goal).opacity])"
    )
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(colors) == 4 * 3
    for stroke, background, opacity in colors:
        assert opacity == "1"
        light = []
        for color in (stroke, background):  # relative luminance, as WCAG defines it
            rgb = torch.tensor([int(number) / 255 for number in re.findall(r"\d+", color)[:3]])
            linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
            light.append((linear @ torch.tensor([0.2126, 0.7152, 0.0722])).item() + 0.05)
        assert max(light) / min(light) > 3


@needs_browser
def test_film(page):
    """Where the square scrolls out of view, the robots are drawn beside the episode, too."""
    shown = page.execute_script("return getComputedStyle(byId('film-world')).display") != "none"
    sticky = page.execute_script(
        "return getComputedStyle(document.querySelector('.world')).position === 'sticky'"
    )
    assert shown != sticky
    page.execute_script("byId('time').value = 20; byId('time').dispatchEvent(new Event('input'))")
    settle(page)
    expected = page.execute_script("return DATA.episodes['ippo-15'][20]")
    for index, name in enumerate(("one", "two", "three")):
        drawn = find(page, f"#film-world .robot.{name}").get_attribute("transform")
        x, y = map(float, re.findall(r"[-\d.]+", drawn))
        assert [x, -y] == expected[index][:2]
    assert not find(page, "#film-world").find_elements(By.CSS_SELECTOR, "[tabindex]")


@needs_browser
def test_keyboard_alone(page):
    """Everything can be reached with Tab, in the order of the page, and used with keys."""
    before = scene(page)
    press(page, Keys.TAB)  # robot 1
    press(page, Keys.ARROW_UP, Keys.ARROW_UP)
    assert scene(page)[0, 1] == pytest.approx(before[0, 1] + 0.1)
    said = [
        page.switch_to.active_element.get_attribute(f"aria-{one}")
        for one in ("label", "valuenow", "valuetext")
    ]
    assert said == ["Robot 1", "-0.20", "x -0.20, y -0.20"]
    press(page, *[Keys.TAB] * 3)  # goal 1
    press(page, Keys.ARROW_RIGHT)
    assert scene(page)[0, 4] == pytest.approx(before[0, 4] + 0.05)
    assert page.switch_to.active_element.get_attribute("aria-label") == "Goal 1"
    assert_shown(page)
    press(page, *[Keys.TAB] * 3)  # who moves?
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    press(page, Keys.TAB)  # iterations
    press(page, Keys.ARROW_LEFT)
    assert find(page, "[name=movers]:checked").get_attribute("value") == "all"
    assert find(page, "[name=iterations]:checked").get_attribute("value") == "10"
    assert_shown(page)
    press(page, Keys.TAB)
    press(page, Keys.ENTER)  # reset
    torch.testing.assert_close(scene(page), before)
    for _ in range(3):
        press(page, Keys.TAB)
        press(page, Keys.ENTER)  # an answer, which closes the one before
        assert len(page.find_elements(By.CSS_SELECTOR, "details[open]")) == 1
    press(page, Keys.TAB)  # who drives?
    press(page, Keys.ARROW_LEFT)
    assert find(page, "[name=driver]:checked").get_attribute("value") == "mappo"
    press(page, Keys.TAB)
    press(page, Keys.SPACE)  # play
    assert find(page, "#play").text == "Pause"
    press(page, Keys.SPACE)
    assert find(page, "#play").text == "Play"
    press(page, Keys.TAB)
    press(page, Keys.HOME, Keys.ARROW_RIGHT)  # the first step of the episode
    expected = page.execute_script("return DATA.episodes['mappo-15'][1]")
    torch.testing.assert_close(scene(page), torch.tensor(expected))
    press(page, Keys.TAB)
    press(page, Keys.ENTER)  # the notes
    assert len(page.find_elements(By.CSS_SELECTOR, "details[open]")) == 2


@needs_browser
def test_layout(page):
    """Nothing is cut off at the right, and on a phone the square stays in view."""
    width = page.execute_script("return innerWidth")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    if width < 500:
        tops = [find(page, part).rect["y"] for part in (".maps", ".questions", ".steps")]
        assert tops == sorted(tops)  # the questions come before the bars and their cause
        for part in ("#count-ippo", "#curve-ippo", ".questions", "#time"):
            page.execute_script(
                f"document.querySelector('{part}').scrollIntoView({{block: 'end'}})"
            )
            top = page.execute_script("return byId('world').getBoundingClientRect().top")
            assert 0 <= top < 300
