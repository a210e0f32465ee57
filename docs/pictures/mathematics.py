"""Pictures of the page on mathematics: ``python docs/pictures/mathematics.py`` (seconds on a core).

Every curve is computed by the function of ``iql_torchrl.functional`` that the page names.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import torch

from iql_torchrl import functional as F

HERE = Path(__file__).parent
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa7700")
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def picture(name: str, panels: int = 1, height: float = 3.0, **kwargs):
    """A figure of 760 pixels, and a function that writes it."""
    figure, axes = plt.subplots(1, panels, figsize=(7.6, height), layout="constrained", **kwargs)

    def save() -> None:
        figure.savefig(HERE / f"mathematics_{name}.png", dpi=100, facecolor="white")
        plt.close(figure)

    return axes, save


def losses_of_v() -> None:
    """Both losses over the error, for three levels."""
    axes, save = picture("losses", 2, sharey=True)
    error = torch.linspace(-2, 2, 201)
    for colour, level in zip(COLOURS, (0.5, 0.7, 0.9), strict=False):
        expectile = F.expectile_loss(error, expectile=level)
        quantile = F.quantile_loss(error, quantile=level)
        axes[0].plot(error, expectile, color=colour, label=f"expectile = {level}")
        axes[1].plot(error, quantile, color=colour, label=f"quantile = {level}")
    for axis, title in zip(axes, ("expectile_loss", "quantile_loss"), strict=True):
        axis.set(title=title, xlabel="target - prediction")
        axis.legend(frameon=False)
    axes[0].set_ylabel("loss of one sample")
    save()


def minimum(values: torch.Tensor, loss) -> float:
    """The prediction with the smallest mean loss, by search."""
    grid = torch.linspace(float(values.min()), float(values.max()), 2001)
    means = torch.stack([loss(values - point).mean() for point in grid])
    return float(grid[means.argmin()])


def expectiles_and_quantiles() -> None:
    """Where both losses put V, for values of logged actions that are skewed."""
    torch.manual_seed(0)
    bad, good = torch.randn(3200) * 0.6, 3 + torch.randn(800) * 0.4
    values = torch.cat([bad, good])  # one action in five is good
    axes, save = picture("minima", 2, 3.5, sharey=True, sharex=True)
    kinds = {
        "expectile_loss": lambda level: lambda e: F.expectile_loss(e, expectile=level),
        "quantile_loss": lambda level: lambda e: F.quantile_loss(e, quantile=level),
    }
    for axis, (title, kind) in zip(axes, kinds.items(), strict=True):
        axis.hist(values, bins=70, density=True, color="0.85")
        for colour, level in zip(COLOURS, (0.5, 0.7, 0.9, 0.99), strict=True):
            place = minimum(values, kind(level))
            axis.axvline(place, color=colour, label=f"{level}: V = {place:.2f}")
        axis.set(title=title, xlabel="Q of the logged actions in one state", ylim=(0, 1))
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    axes[0].set_ylabel("density")
    save()


def losses_with_alpha() -> None:
    """The losses of ``sparse`` and ``gumbel`` over the error, and where they put V, over alpha."""
    axes, save = picture("alpha", 2)
    error = torch.linspace(-4, 3, 281)
    kinds = {
        "sparse_loss": F.sparse_loss,
        "gumbel_loss": lambda e, alpha: F.gumbel_loss(e, alpha=alpha, largest=e.new_zeros(())),
    }
    torch.manual_seed(0)
    values = torch.cat([torch.randn(800) * 0.6, 3 + torch.randn(200) * 0.4])
    alphas = torch.logspace(-1, 2, 25).tolist()
    for colour, (name, loss) in zip(COLOURS, kinds.items(), strict=False):
        axes[0].plot(error, loss(error, alpha=1.0), color=colour, label=f"{name}, alpha 1")
        places = [minimum(values, lambda e, f=loss, a=alpha: f(e, alpha=a)) for alpha in alphas]
        axes[1].plot(alphas, places, color=colour, label=name)
    for level, name in ((float(values.max()), "maximum"), (float(values.mean()), "mean")):
        axes[1].axhline(level, color="0.6", linestyle="--", linewidth=0.8)
        axes[1].text(alphas[0], level + 0.05, name, color="0.4", fontsize=9)
    axes[0].set(xlabel="target - prediction", ylabel="loss of one sample", ylim=(0, 6))
    axes[1].set(xlabel="alpha", xscale="log", ylabel="V")
    for axis in axes:
        axis.legend(frameon=False, fontsize=9)
    save()


def ends_of_episodes() -> None:
    """Values that the targets of the critics settle at, by the end of the episode."""
    axis, save = picture("ends")
    steps, gamma, reward = 60, 0.95, torch.ones(60)
    for colour, end in zip(COLOURS, ("terminated", "truncated"), strict=False):
        last = torch.zeros(steps, dtype=torch.bool)
        last[-1] = end == "terminated"
        value = torch.zeros(steps)
        for _ in range(1000):
            after = torch.cat([value[1:], value[-1:]])  # the state after the last step is like it
            value = F.td_target(reward, after, last, gamma=gamma)
        axis.plot(range(steps), value, color=colour, label=f"the last step is {end}")
    axis.set(xlabel="step of the episode", ylabel="value", ylim=(0, 22))
    axis.set_title("reward 1 in each step, discount 0.95: the value without an end is 20")
    axis.legend(frameon=False, loc="lower left")
    save()


def distances() -> None:
    axis, save = picture("distances")
    error = torch.linspace(-3, 3, 301)
    for colour, name in zip(COLOURS, ("l2", "smooth_l1", "l1"), strict=False):
        loss = F.regression_loss(torch.zeros_like(error), error, loss_function=name)
        axis.plot(error, loss, color=colour, label=name)
    axis.set(xlabel="target - Q", ylabel="loss of one sample", ylim=(0, 5), title="regression_loss")
    axis.legend(frameon=False)
    save()


def weights() -> None:
    """The weight over the advantage, and the samples that count, over the temperature."""
    axes, save = picture("weights", 2, 3.2)
    advantage = torch.linspace(-3, 3, 601)
    for colour, temperature in zip(COLOURS, (0.0, 1.0, 3.0, 10.0), strict=True):
        weight = F.exponential_weight(advantage, temperature=temperature, max_weight=100.0)
        axes[0].plot(advantage, weight, color=colour, label=f"temperature {temperature:g}")
    axes[0].set(yscale="log", ylim=(1e-3, 300), xlabel="advantage", title="exponential_weight")
    axes[0].set_ylabel("weight in the policy's loss")
    axes[0].legend(frameon=False, loc="lower right", fontsize=9)
    torch.manual_seed(0)
    samples = torch.randn(100_000)
    temperatures = torch.linspace(0, 10, 81)
    for colour, spread in zip(COLOURS, (0.1, 0.5, 1.0), strict=False):
        counts = [
            F.effective_sample_size(
                F.exponential_weight(spread * samples, temperature=float(t), max_weight=100.0)
            )
            for t in temperatures
        ]
        share = 256 * torch.stack(counts) / len(samples)
        axes[1].plot(temperatures, share, color=colour, label=f"standard deviation {spread:g}")
    axes[1].set(
        xlabel="temperature",
        ylim=(0, 330),
        yticks=(0, 64, 128, 192, 256),
        title="effective_sample_size",
    )
    axes[1].set_ylabel("of a batch of 256")
    axes[1].legend(frameon=False, title="of the advantages", fontsize=9, loc="upper right")
    save()


def cloning_and_q() -> None:
    """The loss of ``ddpg_bc`` over the policy's action, for three weights of the cloning error."""
    axes, save = picture("ddpg_bc", 2)
    action = torch.linspace(-1, 1, 401)
    logged, value = -0.5, torch.exp(-((action - 0.4) ** 2) / 0.18)
    axes[0].plot(action, value, color="0.3", label="Q(s, a) of a critic")
    axes[0].axvline(logged, color="0.6", linestyle="--", label="the logged action")
    axes[0].set(xlabel="action", title="one state")
    axes[0].set_ylim(-0.05, 1.5)
    axes[0].legend(frameon=False, loc="upper right", fontsize=9)
    for colour, weight in zip(COLOURS, (0.3, 1.0, 3.0), strict=False):
        loss = -value / value.abs().mean() + weight * (action - logged) ** 2
        place = action[loss.argmin()]
        axes[1].plot(action, loss, color=colour, label=f"bc_weight {weight:g}: a = {place:.2f}")
        axes[1].plot(place, loss.min(), "o", color=colour)
    axes[1].set(xlabel="action of the policy", title="loss and its minimum", ylim=(-3, 6))
    axes[1].legend(frameon=False, loc="upper left", fontsize=9)
    save()


def flow() -> None:
    """Straight lines from noise to the actions of a dataset with two modes."""
    axes, save = picture("flow", 2, 3.2)
    torch.manual_seed(1)
    noise, side = torch.randn(60, 1), torch.randint(0, 2, (60, 1)) * 2.0 - 1
    action = 0.7 * side + 0.08 * torch.randn(60, 1)
    times = torch.linspace(0, 1, 21)
    lines = torch.stack([F.flow_path(noise, action, time=t.expand(60))[0] for t in times])
    axes[0].plot(times, lines.squeeze(-1), color=COLOURS[0], alpha=0.35, linewidth=0.8)
    axes[0].set(xlabel="time", ylabel="point on the line", title="flow_path: from noise to actions")
    # the mean velocity at each point is what a network learns; Euler steps along it give actions
    many, mode = torch.randn(40_000, 1), torch.randint(0, 2, (40_000, 1)) * 2.0 - 1
    target = 0.7 * mode + 0.08 * torch.randn(40_000, 1)
    point, steps = torch.randn(60, 1), [torch.linspace(0, 1, 21)]
    path = [point]
    for t in steps[0][:-1]:
        here, velocity = F.flow_path(many, target, time=t.expand(len(many)))
        near = torch.exp(-((point - here.T) ** 2) / (2 * 0.05**2)) + 1e-9
        path.append(point := point + (near @ velocity) / near.sum(1, keepdim=True) / 20)
    axes[1].plot(times, torch.stack(path).squeeze(-1), color=COLOURS[1], alpha=0.5, linewidth=0.8)
    axes[1].set(xlabel="time", title="20 Euler steps along the mean velocity")
    save()


def rates() -> None:
    axis, save = picture("rates", height=2.6)
    updates = range(1001)
    for colour, intervals in zip(COLOURS, (1000, 10, 0), strict=False):
        factor = [F.cosine_factor(u, updates=1000, intervals=intervals) for u in updates]
        axis.plot(updates, factor, color=colour, label=f"intervals = {intervals}")
    axis.set(xlabel="update, of 1,000", ylabel="factor of the rate", title="cosine_factor")
    axis.legend(frameon=False)
    save()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for draw in (losses_of_v, expectiles_and_quantiles, losses_with_alpha, ends_of_episodes, distances,
                 weights, cloning_and_q, flow, rates):  # fmt: skip
        draw()
