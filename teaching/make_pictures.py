"""Draw the pictures of the class kit from trained/.

    python teaching/make_pictures.py [NAME ...]

| name | what it shows |
|---|---|
| task | the test episode at its start: the robots and their goals |
| arrow-maps | where the advantage pushes a robot, for both algorithms after 15 iterations |
| value-curves | the value of a robot over its distance to its goal, the others at three distances |
| bars | one unit of progress by robot 1, by all, or by the others, as two ideal critics see it |
| bars-measured | the same for the trained critics and a step of 0.05 |
| clipping | the clipped objective over the ratios of one more update of MAPPO |
| film | both algorithms after 15 iterations, on the same test episode, as a GIF |

Without names it draws all of them into pictures/, in about a minute.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image, ImageDraw, ImageFont

TEACHING = Path(__file__).resolve().parent
sys.path.insert(0, str(TEACHING / "student"))
import kit  # noqa: E402

PICTURES = TEACHING / "pictures"
EPISODE = 78  # of the 200 test episodes; all but IPPO after 15 iterations succeed in it
ROBOTS = (("tab:blue", "-"), ("tab:orange", "--"), ("tab:green", ":"))  # color and line of each
BOTH = {"mappo": ("tab:blue", "-", "MAPPO"), "ippo": ("tab:orange", "--", "IPPO")}
STEP = 0.05  # how far a robot moves in the bars
MOVERS = {  # the robots that move closer to their goals, and the title of their bars
    (0,): "Only robot 1 drives",
    (0, 1, 2): "All three drive",
    (1, 2): "The others drive, robot 1 waits",
}


def save(name, figure, dpi=110):
    """Save a figure as a PNG of a few colors, which keeps it small."""
    path = PICTURES / f"{name}.png"
    figure.savefig(path, dpi=dpi)
    image = Image.open(path).convert("RGB")
    image.quantize(48, dither=Image.Dither.NONE).save(path, optimize=True)


def play(names):
    """Play the test episodes; return positions and goals in the chosen one, up to its end.

    Positions have the shape (steps + 1, n_agents, 2), goals (n_agents, 2).
    """
    exploration = names["set_exploration_type"], names["ExplorationType"]
    env = names["make_env"](200, names["cfg"].evaluation_seed)
    with torch.no_grad(), exploration[0](exploration[1].DETERMINISTIC):
        played = env.rollout(100, names["policy"], break_when_all_done=True)[EPISODE]
    seen = torch.cat([played["agents", "observation"][:1], played["next", "agents", "observation"]])
    done = played["next", "done"][:, 0].nonzero().flatten().tolist()
    end = done[0] + 1 if done else len(played)
    goals = seen[0, :, 0:2] - seen[0, :, 4:6]
    return seen[: end + 1, :, 0:2], goals, bool(played["next", "terminated"][end - 1, 0])


def draw_square(axes, goals):
    """Draw the goals as pale discs with a number, on axes that show where the robots drive."""
    for robot, (color, _) in enumerate(ROBOTS):
        goal = goals[robot].tolist()
        axes.add_patch(Circle(goal, 0.1, color=color, alpha=0.3))
        axes.text(*goal, robot + 1, ha="center", va="center")
    axes.set(aspect="equal", xlim=(-0.95, 0.95), ylim=(-0.85, 0.55), xticks=[], yticks=[])


def draw_task():
    """Draw the first frame of the chosen episode, each robot with a dotted line to its goal."""
    positions, goals, _ = play(kit.load_trained("mappo", 15))
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    draw_square(axes, goals)
    axes.set_xlim(-1, 1)
    for robot, (color, _) in enumerate(ROBOTS):
        axes.plot(*torch.stack([positions[0, robot], goals[robot]]).T, ":", color=color)
        place = positions[0, robot].tolist()
        axes.add_patch(Circle(place, 0.1, color=color))
        axes.text(*place, robot + 1, color="white", ha="center", va="center", weight="bold")
    axes.set_title("Three robots, each with its own goal (pale disc)")
    save("task", figure)


def draw_arrow_maps():
    """Draw the arrow maps of both algorithms after 15 iterations side by side."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, algorithm in zip(panels, BOTH, strict=True):
        away = kit.draw_arrow_map(axes, kit.load_trained(algorithm, 15))
        axes.set_title(f"{BOTH[algorithm][2]}: {away:.0%} point away", fontsize=24, pad=12)
        axes.tick_params(labelsize=16)
    save("arrow-maps", figure)


def values_at(names, distances, others):
    """Return V of robot 1 at some distances from its goal, the others at one distance.

    The mean is over the starts of 60 episodes. Robots are put on the line between start and goal.
    """
    names["env"].set_seed(0)
    observation = names["env"].reset()["agents", "observation"]  # (60, 3, 18)
    found = []
    for distance in distances:
        moved = observation.clone()
        for robot, far in enumerate((distance, others, others)):
            from_goal = observation[:, robot, 4:6]
            goal = observation[:, robot, 0:2] - from_goal
            moved[:, robot, 4:6] = torch.nn.functional.normalize(from_goal, dim=-1) * far
            moved[:, robot, 0:2] = goal + moved[:, robot, 4:6]
            moved[:, robot, 2:4] = 0.0  # no robot moves
            moved[:, robot, 6:] = 0.0  # and no other is near
        with torch.no_grad():
            found.append(names["critic_network"](moved)[:, 0].mean().item())
    return found


def draw_value_curves():
    """Draw the value curves of all four critics beside a line of the slope 1."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    distances = torch.linspace(0.05, 1.5, 30)
    places = [(name, iterations) for name in BOTH for iterations in (10, 15)]
    looks = {1.2: ("black", ":"), 0.6: ("tab:blue", "--"), 0.1: ("tab:orange", "-")}
    for axes, (name, iterations) in zip(panels, places, strict=True):
        names = kit.load_trained(name, iterations)
        for others, (color, line) in looks.items():
            width = 2.5 if name == "mappo" else {1.2: 2, 0.6: 4, 0.1: 7}[others]
            shade = 1 if name == "mappo" else {1.2: 1, 0.6: 0.8, 0.1: 0.4}[others]
            axes.plot(
                distances,
                values_at(names, distances, others),
                line,
                color=color,
                linewidth=width,
                alpha=shade,
                label=f"others at {others}",
                zorder=-others if name == "mappo" else others,
            )
        axes.plot([0.05, 1.5], [0.05, 1.5], color="gray", linewidth=1, label="slope 1", zorder=0)
        axes.set(xlabel="distance of robot 1 to its goal", ylim=(0, 2.9))
        axes.set_title(f"{BOTH[name][2]}, {iterations} iterations", fontsize=14)
    panels[0].set_ylabel("V of robot 1")
    panels[0].legend(loc="upper left", fontsize=10)
    save("value-curves", figure)


def one_step(names, movers, distance=0.3):
    """Return reward and change of V of robot 1 when some robots move STEP closer to their goals.

    All robots begin at the same distance. The mean is over the starts of 60 episodes.
    """
    names["env"].set_seed(0)
    observation = names["env"].reset()["agents", "observation"]
    values = []
    for moved in ((), movers):
        seen = observation.clone()
        for robot in range(3):
            from_goal = observation[:, robot, 4:6]
            goal = observation[:, robot, 0:2] - from_goal
            far = distance - (STEP if robot in moved else 0)
            seen[:, robot, 4:6] = torch.nn.functional.normalize(from_goal, dim=-1) * far
            seen[:, robot, 0:2] = goal + seen[:, robot, 4:6]
            seen[:, robot, 2:4] = 0.0
            seen[:, robot, 6:] = 0.0
        with torch.no_grad():
            values.append(names["critic_network"](seen)[:, 0].mean().item())
    return STEP * len(movers), values[1] - values[0]


def draw_bars(name, heights, change_of_v, digits):
    """Draw reward, change of V and advantage for both critics, in a panel for each of MOVERS.

    `heights` is {(algorithm, robots that move): (reward, change of V)}, and `change_of_v` the name
    of the latter.
    """
    figure = Figure(figsize=(14, 5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    largest = max(abs(x) for pair in heights.values() for x in pair)
    for axes, (movers, title) in zip(panels, MOVERS.items(), strict=True):
        for place, algorithm in enumerate(BOTH):
            reward, change = heights[algorithm, movers]
            advantage = reward + change
            sign = "tab:red" if advantage < -1e-6 else "tab:green"
            colors = ("lightgray", "darkgray", sign)
            for position, height in enumerate((reward, change, advantage)):
                where = position + 4 * place
                hatch = "//" if height < 0 else None
                look = {"color": colors[position], "edgecolor": "black", "hatch": hatch}
                axes.bar(where, height, 0.85, **look)
                gap = 0.02 * largest if height >= 0 else -0.02 * largest
                side = "bottom" if height >= 0 else "top"
                text = f"{height:+.{digits}f}" if abs(height) > 1e-6 else "0"
                axes.text(where, height + gap, text, ha="center", va=side, fontsize=18)
        axes.axhline(0, color="black", linewidth=1)
        axes.axvline(3, color="black", linewidth=0.5, linestyle=":")
        axes.set_xticks([0, 1, 2, 4, 5, 6], 2 * ["r", change_of_v, "A"], fontsize=20)
        axes.set_title(title, fontsize=20, pad=10)
        for place, algorithm in enumerate(BOTH):
            middle, top = 1 + 4 * place, 1.22 * largest
            axes.text(middle, top, BOTH[algorithm][2], ha="center", weight="bold", fontsize=18)
    panels[0].set_ylim(-1.25 * largest, 1.4 * largest)
    panels[0].set_yticks([])
    save(name, figure)


def draw_ideal_bars():
    """Draw one unit of progress where all distances are equal, without discounting."""
    slopes = {"mappo": 1, "ippo": 3}
    heights = {}
    for name, slope in slopes.items():
        heights[name, (0,)] = (1, -slope)
        heights[name, (0, 1, 2)] = (3, -3)  # the team is 3 closer, and both critics know it
        heights[name, (1, 2)] = (2, slope - 3)  # MAPPO's V_1 falls by 2, IPPO's stays
    draw_bars("bars", heights, "ΔV", 0)


def draw_measured_bars():
    """Draw a small step for the critics trained for 15 iterations, with the lesson's c."""
    heights = {}
    for name in BOTH:
        names = kit.load_trained(name, 15)
        for movers in MOVERS:
            reward, change = one_step(names, movers)
            heights[name, movers] = (reward, names["c"] * change)
    draw_bars("bars-measured", heights, "cΔV", 2)


def ratios_after_an_update():
    """Return the ratios and advantages at the end of one more update of MAPPO, as vectors."""
    names = kit.load_trained("mappo", 15)
    cells = kit.lesson_cells()
    for name in ("collector", "gae", "loss"):
        exec(cells[name], names)
    names["policy"].load_state_dict(names["untrained_policy"].state_dict())
    names["env"].set_seed(1)
    torch.manual_seed(1)
    batch = names["collector"].next()
    names["estimate_advantages"](batch)
    frames = batch.reshape(-1)
    names["replay_buffer"].extend(
        frames.select(
            ("agents", "observation"),
            ("agents", "action"),
            ("agents", "action_log_prob"),
            "advantage",
            "value_target",
        )
    )
    for _ in range(5):
        for minibatch in names["replay_buffer"]:
            losses = names["loss_module"](minibatch)
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            names["optimizer"].zero_grad()
            loss.backward()
            names["optimizer"].step()
    with torch.no_grad():
        new = names["policy"].get_dist(frames).log_prob(frames["agents", "action"])
    ratio = (new - frames["agents", "action_log_prob"]).exp()
    return ratio.flatten(), frames["advantage"].flatten()


def draw_clipping():
    """Draw the objective over the ratio for both signs of A, and the ratios below it."""
    ratios, advantages = ratios_after_an_update()
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, height_ratios=(2, 1))
    line = torch.linspace(0.4, 1.6, 241)
    for column, sign in enumerate((1, -1)):
        axes, below = panels[:, column]
        clipped = line.clamp(0.8, 1.2)
        objective = torch.minimum(sign * line, sign * clipped)
        flat = objective == sign * clipped
        flat &= line != clipped
        axes.plot(line, sign * line, "--", color="gray", label="ratio × A")
        axes.plot(line, objective, color="tab:blue", linewidth=3, label="objective")
        axes.plot(line[flat], objective[flat], color="tab:red", linewidth=6, label="no gradient")
        axes.axvspan(0.8, 1.2, color="lightgray", alpha=0.5)
        axes.set_title(f"A {'>' if sign > 0 else '<'} 0: a {'good' if sign > 0 else 'bad'} action")
        chosen = ratios[advantages * sign > 0]
        below.hist(chosen.numpy(), bins=60, range=(0.4, 1.6), color="dimgray")
        below.axvspan(0.8, 1.2, color="lightgray", alpha=0.5, zorder=0)
        stopped = (chosen > 1.2 if sign > 0 else chosen < 0.8).float().mean().item()
        below.set(xlabel="ratio", yticks=[])
        below.set_title(f"after 5 epochs, {stopped:.0%} get no gradient", fontsize=11)
        axes.legend(loc="upper left" if sign > 0 else "upper right")
    panels[0, 0].set_ylabel("objective of one sample")
    panels[1, 0].set_ylabel("ratios of a batch")
    save("clipping", figure)


def draw_film():
    """Film the chosen episode under both policies side by side, from a last pause on its end."""
    size, scale, center = 300, 135, 150
    tracks = [(*play(kit.load_trained(name, 15)), BOTH[name][2]) for name in BOTH]
    longest = max(len(positions) for positions, *_ in tracks)
    colors = [tuple(int(255 * x) for x in matplotlib.colors.to_rgb(one)) for one, _ in ROBOTS]
    images = []
    font = ImageFont.load_default(18)

    def box(place, radius):
        x, y = center + scale * place[0], center + 10 - scale * place[1]
        return [2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius)]

    for step in [*range(0, longest, 2), *[longest - 1] * 12]:
        image = Image.new("RGB", (2 * size + 8, size + 10), "white")
        for panel, (positions, goals, success, name) in enumerate(tracks):
            half = Image.new("RGB", (2 * size, 2 * size), (245, 245, 245))
            draw = ImageDraw.Draw(half)
            now = min(step, len(positions) - 1)
            for goal, color in zip(goals.tolist(), colors, strict=True):
                pale = tuple((2 * 255 + x) // 3 for x in color)
                draw.ellipse(box(goal, 0.1 * scale), fill=pale, outline=color, width=3)
            for robot, color in enumerate(colors):
                trail = [box(place, 0)[:2] for place in positions[: now + 1, robot].tolist()]
                if len(trail) > 1:
                    draw.line([tuple(point) for point in trail], fill=color, width=4)
                place = positions[now, robot].tolist()
                draw.ellipse(box(place, 0.05 * scale), fill=color, outline="black", width=2)
            half = half.resize((size, size), Image.Resampling.LANCZOS)
            draw = ImageDraw.Draw(half)
            over = now == len(positions) - 1
            said = ("all at their goals" if success else "time is up") if over else f"step {now}"
            draw.text((8, 5), f"{name}: {said}", fill="black", font=font)
            image.paste(half, (panel * (size + 8), 5))
        images.append(image.quantize(64, dither=Image.Dither.NONE))
    path = PICTURES / "mappo-vs-ippo.gif"
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=100, loop=0, optimize=True
    )


DRAWERS = {
    "task": draw_task,
    "arrow-maps": draw_arrow_maps,
    "value-curves": draw_value_curves,
    "bars": draw_ideal_bars,
    "bars-measured": draw_measured_bars,
    "clipping": draw_clipping,
    "film": draw_film,
}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(DRAWERS)
    unknown = [name for name in chosen if name not in DRAWERS]
    if unknown:
        print(f"no picture {', '.join(unknown)}; there are {', '.join(DRAWERS)}", file=sys.stderr)
        sys.exit(2)
    PICTURES.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    with matplotlib.rc_context({"text.usetex": False, "font.size": 12}):
        for name in chosen:
            DRAWERS[name]()
            print(name)
