"""Peers against slow reference loops and closed forms, with their cost."""

import functools
import inspect

import numpy as np
import pytest
import torch
from skimage.segmentation import slic
from torch import nn

from cvi_nb.models import Classifier, Evaluations
from cvi_nb.peers import (
    PEERS,
    explain_all,
    feature_moments,
    grad_cam,
    grad_cam_plus_plus,
    hsic,
    information_bottleneck,
    integrated_gradients,
    kernel_shap,
    lime,
    occlusion,
    peer,
    rise,
    saliency,
    shap_partition,
    smooth_grad,
    sobol,
    xrai,
)

SMALL = {
    "SmoothGrad": {"samples": 10, "batch_size": 4},
    "LIME": {"samples": 40},
    "SHAP Partition": {"samples": 40, "batch_size": 8},
    "IBA": {"steps": 4, "copies": 3},
    "Integrated gradients": {"steps": 8},
    "Occlusion": {"window": 8, "stride": 4},
    "KernelSHAP": {"samples": 40, "segments": 6},
    "RISE": {"masks": 40, "cells": 4},
    "HSIC": {"samples": 40, "cells": 3},
    "Sobol": {"designs": 4, "cells": 3},
    "XRAI": {"steps": 6, "batch_size": 4},
}
METHODS = {name: functools.partial(method, **SMALL.get(name, {})) for name, method in PEERS.items()}


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU(),
                               nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 4))
    for p in layers.parameters():
        p.data *= 2
    return layers.eval()


def batch(n=2, h=22, w=18):
    """Patches of colour, so that SLIC finds segments."""
    patches = torch.rand(n, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(patches, (h, w)), torch.arange(n) % 4


@pytest.mark.parametrize("name", PEERS)
def test_shape_determinism_batching_and_the_global_generators(name):
    model, (x, y) = Classifier(network()), batch()
    kept, torch_state, numpy_state = x.clone(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    maps = METHODS[name](model, x, y)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state[1], np.random.get_state()[1])  # noqa: NPY002
    assert maps.shape == (2, 22, 18) and maps.dtype == torch.float32 and maps.isfinite().all() and maps.std() > 0
    assert torch.equal(x, kept) and not x.requires_grad
    torch.manual_seed(123)
    assert torch.equal(METHODS[name](model, x, y), maps)
    assert torch.allclose(METHODS[name](model, x[1:], y[1:])[0], maps[1], atol=1e-5)
    assert not maps.requires_grad


@pytest.mark.parametrize("name", ["RISE", "KernelSHAP", "LIME", "SmoothGrad", "IBA", "HSIC", "Sobol"])
def test_seeds_and_batch_size(name):
    model, (x, y) = Classifier(network()), batch(1)
    assert not torch.equal(METHODS[name](model, x, y, seed=0), METHODS[name](model, x, y, seed=1))
    if name in ("KernelSHAP", "LIME", "HSIC", "Sobol"):
        assert torch.allclose(METHODS[name](model, x, y, batch_size=3), METHODS[name](model, x, y), atol=1e-5)


@pytest.mark.parametrize("count, size", [(1, 16), (24, 16), (21, 8), (8, 8)])
def test_rise_against_a_loop_over_masks_and_pixels(count, size):
    """Masks of the RISE paper, eq. 6: weighted by the probability of the class, divided by N p."""
    model, (x, y), cells, keep = Classifier(network()), batch(1, 13, 10), 3, 0.4
    found = rise(model, x, y, masks=count, cells=cells, keep=keep, batch_size=size, seed=5)[0]
    generator = torch.Generator().manual_seed(5)
    step_y, step_x = 5, 4  # ⌈13/3⌉, ⌈10/3⌉
    expected = np.zeros((13, 10))
    for start in range(0, count, size):
        n = min(size, count - start)
        nodes = (torch.rand(n, 1, cells + 1, cells + 1, generator=generator) < keep).double().numpy()[:, 0]
        tops = torch.randint(step_y, (n,), generator=generator).tolist()
        lefts = torch.randint(step_x, (n,), generator=generator).tolist()
        for grid, top, left in zip(nodes, tops, lefts, strict=True):
            mask = np.empty((13, 10))
            for i in range(13):
                for j in range(10):
                    v = np.clip((i + top + 0.5) / step_y - 0.5, 0, cells)
                    u = np.clip((j + left + 0.5) / step_x - 0.5, 0, cells)
                    a, b = min(int(v), cells - 1), min(int(u), cells - 1)
                    s, t = v - a, u - b
                    mask[i, j] = ((1 - s) * (1 - t) * grid[a, b] + (1 - s) * t * grid[a, b + 1]
                                  + s * (1 - t) * grid[a + 1, b] + s * t * grid[a + 1, b + 1])
            shown = torch.tensor(mask).float() * x[0] + (1 - torch.tensor(mask).float()) * 0.5
            expected += model.logits(shown[None]).softmax(1)[0, y[0]].item() * mask
    assert np.allclose(found.numpy(), expected / (count * keep), atol=1e-5)


def test_rise_finds_the_one_pixel_block_that_matters():
    def model(images):
        seen = images[:, :, 4:8, 8:12].mean((1, 2, 3)) - 0.5
        return torch.stack([10 * seen, -10 * seen], 1)

    x = torch.full((1, 3, 16, 16), 0.9)
    maps = rise(Classifier(model), x, torch.tensor([0]), masks=600, cells=4)
    top = maps[0].flatten().argmax().item()
    assert 3 <= top // 16 <= 8 and 7 <= top % 16 <= 12


def test_integrated_gradients_are_complete_and_exact_on_a_linear_model():
    net, (x, y) = network(), batch()
    model = Classifier(net)
    total = integrated_gradients(model, x, y, steps=300, batch_size=64).sum((1, 2))
    rise_of_logit = (model.logits(x) - model.logits(torch.zeros_like(x))).gather(1, y[:, None])[:, 0]
    assert torch.allclose(total, rise_of_logit, atol=0.02 * rise_of_logit.abs().max().item())
    weights = torch.randn(3 * 22 * 18, 4, generator=torch.Generator().manual_seed(0))
    linear = Classifier(lambda images: images.flatten(1) @ weights)
    expected = (x * weights.T[y].view_as(x)).sum(1)
    assert torch.allclose(integrated_gradients(linear, x, y, steps=5), expected, atol=1e-4)


def test_saliency_is_the_strongest_absolute_slope_of_the_logit():
    net, (x, y) = network(), batch()
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(leaf).gather(1, y[:, None]).sum(), leaf)
    assert torch.allclose(saliency(Classifier(net), x, y), slope.abs().amax(1), atol=1e-6)


def test_grad_cam_against_its_definition():
    net, (x, y) = network(), batch()
    features = net[:4](x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(net[4:](features).gather(1, y[:, None]).sum(), features)
    expected = (slope.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu().detach()
    expected = nn.functional.interpolate(expected, (22, 18), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(grad_cam(Classifier(net), x, y), expected, atol=1e-5)


def test_grad_cam_needs_a_convolution():
    x, y = batch()
    plain = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 22 * 18, 4)), name="plain")
    for model in (plain, Classifier(lambda images: images.mean((2, 3)))):
        for method in (grad_cam, grad_cam_plus_plus, information_bottleneck):
            with pytest.raises(ValueError, match="`model` must have a convolution for this method, got "):
                method(model, x, y)


def test_grad_cam_plus_plus_against_its_equation_19_and_leaves_the_mode_alone():
    net, (x, y) = network(), batch()
    features = net[:4](x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(net[4:](features).gather(1, y[:, None]).sum(), features)
    features = features.detach()
    alpha = slope**2 / (2 * slope**2 + features.sum((2, 3), keepdim=True) * slope**3 + 1e-6)
    weights = (torch.where(slope != 0, alpha, 0) * slope.relu()).sum((2, 3), keepdim=True)
    expected = (weights * features).sum(1).relu()
    expected = nn.functional.interpolate(expected[:, None], (22, 18), mode="bilinear", align_corners=False)[:, 0]
    net.train()
    net[0].eval()
    found = grad_cam_plus_plus(Classifier(net), x, y)
    assert net.training and not net[0].training and net[3].training
    for one, wanted in zip(found, expected, strict=True):  # the package scales each map to [0, 1]
        assert np.corrcoef(one.flatten(), wanted.flatten())[0, 1] > 0.999


def test_smooth_grad_is_the_mean_slope_of_noisy_copies():
    net, (x, y) = network(), batch(1)
    assert torch.allclose(smooth_grad(Classifier(net), x, y, samples=3, spread=0.0), saliency(Classifier(net), x, y))
    square = Classifier(lambda images: torch.stack([(images**2).sum((1, 2, 3)), images.sum((1, 2, 3))], 1))
    found = smooth_grad(square, x, torch.tensor([0]), samples=4000, spread=0.15, batch_size=500)
    tolerance = 5 * 2 * 0.15 / 4000**0.5 + 0.02  # the mean of 2(x + noise), then the strongest channel
    assert (found - 2 * x.abs().amax(1)).abs().max() < tolerance


def test_lime_is_the_package_s_own_explanation():
    from lime.lime_image import LimeImageExplainer
    from skimage.segmentation import quickshift

    net, y = network(), torch.tensor([1])
    x = nn.functional.interpolate(torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(1)), (60, 60))
    pixels = x[0].permute(1, 2, 0).double().numpy()
    segments = quickshift(pixels, kernel_size=4, max_dist=200, ratio=0.2, rng=3)
    assert segments.max() >= 2

    def probabilities(images):
        return net(torch.from_numpy(images).float().permute(0, 3, 1, 2)).softmax(1).detach().double().numpy()

    explained = LimeImageExplainer(random_state=np.random.RandomState(3)).explain_instance(
        pixels, probabilities, labels=(int(y),), top_labels=None, num_samples=60, random_seed=0,
        segmentation_fn=lambda _: segments)
    weights = dict(explained.local_exp[int(y)])
    expected = np.vectorize(weights.get)(segments)
    assert np.allclose(lime(Classifier(net), x, y, samples=60, seed=3)[0], expected, atol=1e-5)


def test_shap_partition_of_an_additive_model_gives_the_pixels_their_own_share():
    import cv2

    x = batch(1, 4, 4)[0]
    weights = torch.rand(4, 4, generator=torch.Generator().manual_seed(2)) / 100

    def model(images):
        p = 0.2 + (images * weights).sum((1, 2, 3))
        return torch.stack([p, 1 - p], 1).log()

    found = shap_partition(Classifier(model), x, torch.tensor([0]), samples=20_000)[0]
    hidden = torch.from_numpy(cv2.blur(x[0].permute(1, 2, 0).numpy(), (128, 128))).permute(2, 0, 1)
    assert torch.allclose(found, ((x[0] - hidden) * weights).sum(0), atol=1e-5)


def test_the_bottleneck_lets_the_block_that_matters_through():
    """Class 0 is told by 3×3 features in one corner; a large β closes everything else."""

    class Corner(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 1, stride=2, bias=False)
            self.one.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[..., None, None]
            self.two.weight.data = torch.eye(2)[..., None, None]

        def forward(self, images):
            seen = self.two(self.one(images))[:, 0, :3, :3].mean((1, 2))
            return torch.stack([20 * (seen - 0.5), 20 * (0.5 - seen)], 1)

    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:, 0, :6, :6] = 0.9
    model = Classifier(Corner())
    bits = information_bottleneck(model, x, torch.tensor([0]))[0]
    assert bits[:6, :6].mean() > 2 * bits[8:, 8:].mean() and (bits >= -1e-4).all()
    few = information_bottleneck(model, x, torch.tensor([0]), beta=100.0)[0]
    assert few.sum() < bits.sum()
    moments = feature_moments(model, torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    assert moments[0].shape == (2, 16, 16) and (moments[0] - 0.5).abs().mean() < 0.1
    assert (moments[1] - 12**-0.5).abs().mean() < 0.05
    assert not torch.equal(information_bottleneck(model, x, torch.tensor([0]), reference=moments)[0], bits)


def test_occlusion_where_the_fall_is_known():
    """p(class 0) is the mean of one 4×4 block; hiding k of its 16 white pixels costs k/32."""

    def model(images):
        p = images[:, 0, 8:12, 4:8].mean((1, 2))
        return torch.stack([p, 1 - p], 1).clamp_min(1e-9).log()

    x = torch.ones(1, 1, 16, 16)
    maps = occlusion(Classifier(model), x, torch.tensor([0]), window=4, stride=4)[0]
    expected = torch.zeros(16, 16)
    expected[8:12, 4:8] = 0.5
    assert torch.allclose(maps, expected, atol=1e-6)
    overlapping = occlusion(Classifier(model), x, torch.tensor([0]), window=4, stride=2)[0]
    total, times = torch.zeros(16, 16), torch.zeros(16, 16)
    for top in range(0, 13, 2):
        for left in range(0, 13, 2):
            hidden = max(0, min(top + 4, 12) - max(top, 8)) * max(0, min(left + 4, 8) - max(left, 4))
            total[top : top + 4, left : left + 4] += hidden / 32
            times[top : top + 4, left : left + 4] += 1
    assert torch.allclose(overlapping, total / times, atol=1e-6)


def test_kernel_shap_gives_the_segments_of_an_additive_model_their_own_share():
    """The Shapley values of an additive game are its terms."""
    x = batch(1, 16, 16)[0]
    weights = torch.rand(16, 16, generator=torch.Generator().manual_seed(2)) / 300

    def model(images):
        p = 0.2 + ((images - 0.5) * weights).sum((1, 2, 3))
        return torch.stack([p, 1 - p], 1).log()

    labels = torch.from_numpy(slic(x[0].permute(1, 2, 0).double().numpy(), 9, compactness=10, start_label=0)).long()
    assert labels.unique().numel() >= 4
    maps = kernel_shap(Classifier(model), x, torch.tensor([0]), samples=300, segments=9)[0]
    share = ((x[0] - 0.5) * weights).sum(0)
    for k in labels.unique():
        assert maps[labels == k].sum().item() == pytest.approx(share[labels == k].sum().item(), abs=2e-3)
        assert maps[labels == k].std() < 1e-6


def gates_model(values, seen):
    """The probability of class 0 of a 2×2 image is `values` of its pixels, which are kept in `seen`."""

    def model(images):
        seen.append(images.flatten(1))
        p = values(images.flatten(1).double())
        return torch.stack([p, 1 - p], 1).log().float()

    return Classifier(model)


@pytest.mark.parametrize("count", [60, 61])
def test_hsic_is_the_double_sum_over_its_own_masks(count):
    """The V-statistic of Gretton et al. (2005), eq. 4 and 9, term by term, over the images that the model was shown."""
    seen = []
    model = gates_model(lambda u: 0.1 + 0.5 * u[:, 0] + 0.2 * u[:, 1] * u[:, 2], seen)
    found = hsic(model, torch.ones(1, 1, 2, 2), torch.tensor([0]), samples=count, cells=2, baseline=0.0, seed=3)[0]
    gates = torch.cat(seen).double().numpy()
    assert gates.shape == (count, 4) and set(gates.flatten()) == {0, 1}
    assert (abs(gates.sum(0) - count / 2) <= 0.5).all()  # a Latin hypercube
    p = 0.1 + 0.5 * gates[:, 0] + 0.2 * gates[:, 1] * gates[:, 2]
    width = np.sort(p)[(count - 1) // 2]
    for i in range(4):
        k = [[float(a == b) for b in gates[:, i]] for a in gates[:, i]]
        like = [[np.exp(-((a - b) ** 2) / (2 * width**2)) for b in p] for a in p]
        both = sum(k[a][b] * like[a][b] for a in range(count) for b in range(count)) / count**2
        rows = sum(sum(k[a]) * sum(like[a]) for a in range(count)) / count**3
        value = both + np.mean(k) * np.mean(like) - 2 * rows
        assert found.flatten()[i].item() == pytest.approx(value * count**2 / (count - 1) ** 2, rel=1e-3, abs=1e-6), i
    assert found[0, 0] > 3 * found[0, 1] and found[1, 1] < 0.1 * found[0, 0]


def test_sobol_on_a_function_whose_total_indices_are_known():
    """(u₁ + u₂u₃)/2: V = (1/12 + 7/144)/4, so the totals are 12/19, 4/19, 4/19, 0; more than 1 in all."""
    seen = []
    model = gates_model(lambda u: (u[:, 0] + u[:, 1] * u[:, 2]) / 2 * 0.98 + 0.01, seen)
    x, y = torch.ones(1, 1, 2, 2), torch.tensor([0])
    found = sobol(model, x, y, designs=1024, cells=2, baseline=0.0, batch_size=1024)[0].flatten()
    assert sum(map(len, seen)) == 1024 * 5
    assert torch.allclose(found, torch.tensor([12.0, 4, 4, 0]) / 19, atol=0.01)
    steady = Classifier(lambda images: torch.zeros(len(images), 2))
    assert not sobol(steady, x, y, designs=4, cells=2).any()
    assert hsic(steady, x, y, samples=9, cells=2).abs().max() < 1e-9


def test_xrai_is_the_greedy_order_of_dilated_segments():
    """Integrated gradients of a linear model are exact: w(x − ½) from both ends; then loops over sets of pixels."""
    from skimage.morphology import dilation, disk
    from skimage.segmentation import felzenszwalb

    x = nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(3)), (64, 64))
    weights = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)) + 2 * (x[0, :1] > 0.6)
    model = Classifier(lambda images: torch.stack([(images * weights).sum((1, 2, 3)), images.sum((1, 2, 3))], 1))
    values = (weights * (x[0] - 0.5)).sum(0).numpy()
    pixels = x[0].permute(1, 2, 0).double().numpy()
    pixels = 2 * (pixels - pixels.min()) / (pixels.max() - pixels.min()) - 1
    regions = []
    for scale in (50, 100, 150, 250, 500, 1200):  # 64 × 64 pixels are .082 of 224 × 224
        labels = felzenszwalb(pixels, scale=scale, sigma=0.8, min_size=12)
        regions += [dilation(labels == k, disk(1)) for k in range(labels.max() + 1)]
    expected, free = np.zeros((64, 64)), np.ones((64, 64), bool)
    while True:
        new = [region & free for region in regions]
        means = [values[one].mean() if one.sum() >= 4 else -np.inf for one in new]
        best = int(np.argmax(means))
        if means[best] == -np.inf:
            break
        expected[new[best]] = means[best]
        free &= ~new[best]
    assert len(np.unique(expected)) > 5
    if free.any():
        expected[free] = values[free].mean()
    assert np.allclose(xrai(model, x, torch.tensor([0]), steps=3)[0], expected, atol=1e-4)


def test_what_hides_may_be_black():
    """On a white image a model of the brightness sees more of it, the less is hidden; black hides all of it."""

    def model(images):
        p = images.mean((1, 2, 3)).clamp(0.001, 0.999)
        return torch.stack([p, 1 - p], 1).log()

    x, y = torch.ones(1, 1, 16, 16), torch.tensor([0])
    few = {rise: {"masks": 30}, hsic: {"samples": 30}, sobol: {"designs": 4}, shap_partition: {}}
    for method, options in few.items():
        seen = []
        watched = Classifier(lambda images, seen=seen: (seen.append(images.min().item()), model(images))[1])
        method(watched, x, y, baseline=0.0, **options)
        assert min(seen) < 0.05, method
        with pytest.raises(ValueError, match="`baseline` must be a finite number in"):
            method(watched, x, y, baseline=1.5, **options)
    wanted = torch.full((16, 16), 0.999 / 256)  # additive: every pixel has its own share
    assert torch.allclose(shap_partition(Classifier(model), x, y, samples=2000, baseline=0.0)[0], wanted, atol=1e-4)


def test_evaluations_are_counted_per_image():
    model, (x, y) = Classifier(network()), batch(2, 32, 32)
    found = explain_all(model, x, y, METHODS.items())
    assert list(found) == list(PEERS)
    windows = ((32 - 8) // 4 + 1) ** 2
    expected = {"Saliency": (1, 1), "Integrated gradients": (8, 8), "Grad-CAM": (1, 1), "Occlusion": (windows + 1, 0),
                "RISE": (40, 0), "SmoothGrad": (10, 10), "Grad-CAM++": (1, 1), "LIME": (40, 0), "IBA": (13, 12),
                "HSIC": (40, 0), "Sobol": (40, 0), "XRAI": (12, 12)}
    for name, (forward, backward) in expected.items():
        assert found[name].evaluations == Evaluations(forward, backward), name
    shap = found["KernelSHAP"].evaluations
    assert 40 <= shap.forward <= 42 and shap.backward == 0
    partition = found["SHAP Partition"].evaluations
    assert 30 <= partition.forward <= 60 and partition.backward == 0
    assert all(e.seconds > 0 and e.maps.shape == (2, 32, 32) and not e.maps.requires_grad for e in found.values())


@pytest.mark.parametrize("name", PEERS)
def test_the_door(name):
    """Networks that are no `Classifier`, classes of any kind; what is wrong is named, and nothing is computed."""
    net, (x, y) = network(), batch()
    usual = METHODS[name](Classifier(net), x, y)
    assert torch.equal(METHODS[name](net, x, y.int().numpy()), usual)
    for wrong, error in (({"target": [0, 1, 2]}, ValueError), ({"target": 4}, ValueError), ({"colour": 3}, TypeError),
                         ({"images": x * 255}, ValueError), ({"target": torch.eye(4).bool()[:2]}, TypeError)):
        with pytest.raises(error, match=f"`{next(iter(wrong))}` must"):
            METHODS[name](**({"model": net, "images": x, "target": y} | wrong))
    counts = {"samples", "steps", "masks", "window", "batch_size"}
    for option in counts & set(inspect.signature(PEERS[name]).parameters):
        with pytest.raises(ValueError, match=f"`{option}` must be an integer of at least 1, got 0"):
            PEERS[name](net, x, y, **{option: 0})


def test_one_output_has_no_probability_to_explain():
    x, _ = batch()
    one = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
    for name in ("Occlusion", "KernelSHAP", "LIME", "SHAP Partition", "RISE", "IBA", "HSIC", "Sobol"):
        with pytest.raises(ValueError, match=r"`model` must give logits of at least 2 classes, got 1.*torch\.cat"):
            METHODS[name](one, x, 0)
    for name in ("Saliency", "SmoothGrad", "Integrated gradients", "Grad-CAM", "XRAI"):  # its logit can be explained
        assert METHODS[name](one, x, 0).isfinite().all()


def test_a_peer_is_registered_once_and_keeps_its_signature():
    before = dict(PEERS)
    try:
        @peer("grey")
        def grey(model, images, target, weight: float = 1.0):
            """Brightness."""
            return weight * images.mean(1)

        x, y = batch()
        assert PEERS["grey"] is grey and grey.__doc__ == "Brightness."
        assert list(inspect.signature(grey).parameters) == ["model", "images", "target", "weight"]
        assert torch.equal(grey(network(), x, y, np.float32(2)), 2 * x.mean(1))
        with pytest.raises(ValueError, match="`weight` must be a finite number of at least 0"):
            grey(network(), x, y, weight=float("nan"))
    finally:
        PEERS.clear()
        PEERS.update(before)


def test_a_frozen_network_is_enough():
    net, (x, y) = network().requires_grad_(False), batch()
    for name, method in METHODS.items():
        assert torch.allclose(method(Classifier(net), x, y), method(Classifier(network()), x, y), atol=1e-5), name
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
