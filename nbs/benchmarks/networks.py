"""Small digit networks for the attacks' benchmarks, each unlike the package's own; trained from a seed and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvi_nb.data import load_digits

FOLDER = Path(__file__).parent / "networks"


def tanh_lenet() -> nn.Module:
    """LeNet-5 with tanh and average pooling: smooth everywhere, saturating."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.one, self.two = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(into, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.two(self.second(F.relu(self.one(self.first(x))))))


def residual() -> nn.Module:
    """A residual network with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), Block(12, 12, 1), Block(12, 24, 2),
        Block(24, 48, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def relu6() -> nn.Module:
    """Depthwise-separable convolutions with ReLU6, as mobile networks have."""

    def separable(into: int, out: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(into, into, 3, stride, 1, groups=into, bias=False), nn.BatchNorm2d(into), nn.ReLU6(),
            nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6(),
        ]  # fmt: skip

    stem = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    return nn.Sequential(
        *stem, *separable(16, 32, 1), *separable(32, 64, 2), *separable(64, 96, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """A small ViT: 16 patches of 7×7, four layers of width 48."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 48, 7, 7)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.layers(tokens).mean(1)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tanh": tanh_lenet, "residual": residual, "relu6": relu6, "transformer": Transformer,
}  # fmt: skip
HIDING = {"distilled": residual}  # beside them: what `distil("residual", seed=1)` gave
EPOCHS = {"tanh": 15, "residual": 8, "relu6": 10, "transformer": 20}


def train(name: str, seed: int = 0, temperature: float = 1.0, teacher: nn.Module | None = None) -> nn.Module:
    """The network `name`, trained on the development digits, shifted by up to two pixels; under a minute.

    Logits are divided by `temperature` in training; with a `teacher`, so are its, and its probabilities are the labels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, digits = NETWORKS[name](), load_digits("development")
        x, y, batch = F.pad(digits.images, (2,) * 4), digits.labels, 64
        adam = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        total = EPOCHS[name] * (len(x) // batch)
        rate = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total)
        for _ in range(EPOCHS[name]):
            for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                i, j = torch.randint(0, 5, (2,)).tolist()
                seen = x[rows, :, i : i + 28, j : j + 28]
                with torch.no_grad():
                    wanted = y[rows] if teacher is None else (teacher(seen) / temperature).softmax(1)
                loss = F.cross_entropy(network(seen) / temperature, wanted)
                adam.zero_grad()
                loss.backward()
                adam.step()
                rate.step()
    return network.eval().requires_grad_(False)


def distil(name: str, seed: int = 0, temperature: float = 50.0) -> nn.Module:
    """The network `name` after defensive distillation (Papernot et al. 2016): its own student, at `temperature`."""
    return train(name, seed, temperature, train(name, seed, temperature))


def keep(name: str, network: nn.Module, folder: Path = FOLDER) -> None:
    """Write the weights, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file(halves, folder / f"{name}.safetensors")


def load(name: str, folder: Path = FOLDER) -> nn.Module:
    """The network `name` with the weights that were kept: the same numbers on every machine."""
    network, kept = (NETWORKS | HIDING)[name](), load_file(folder / f"{name}.safetensors")
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in kept.items()})
    return network.eval().requires_grad_(False)
