"""CVI inside Captum and Quantus, with both real packages."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import NoiseTunnel, visualization
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from cvi_nb.inference import CVI, infer_noise
from cvi_nb.inference.interfaces import CVIAttribution, quantus_explain
from cvi_nb.models import Classifier


def cnn(channels):
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.ReLU6(inplace=True),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(54, 5),
    )


def transformer(channels):
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(net.heads.head.weight)
    return net


def timm_transformer(channels):
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, num_classes=5)


CASES = [(cnn, 1), (cnn, 3), (transformer, 3), (timm_transformer, 3)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def case(request):
    """A network with frozen parameters, two images and their classes."""
    make, channels = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make(channels).eval().requires_grad_(False)
        coarse = torch.rand(2, channels, 4, 4)
    return net, nn.functional.interpolate(coarse, (32, 32), mode="bilinear"), torch.tensor([1, 3])


def test_captum(case):
    net, x, y = case
    method = CVIAttribution(net, budget=12, batch_size=8)
    found = method.attribute(x, target=y)
    assert found.shape == x.shape and found.isfinite().all() and found.std() > 0
    assert torch.equal(found, CVI(net, budget=12, batch_size=8).attribute(x, y))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        smooth = NoiseTunnel(method).attribute(x, nt_samples=2, stdevs=0.05, target=y)
        change = sensitivity_max(method.attribute, x, target=y, n_perturb_samples=2)

        def drop(inputs):
            gone = (torch.rand_like(inputs[:, :1]) < 0.3) * inputs
            return gone, inputs - gone

        faults = infidelity(net, drop, x, found, target=y, n_perturb_samples=4)
    assert smooth.shape == x.shape and smooth.isfinite().all()
    assert change.shape == faults.shape == (2,) and change.isfinite().all() and faults.isfinite().all()


def test_captum_shows_it():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = cnn(3).eval(), torch.rand(1, 3, 32, 32)
    found = CVIAttribution(net, budget=12).attribute((x,), target=2)
    assert isinstance(found, tuple)
    figure, _ = visualization.visualize_image_attr(
        found[0][0].permute(1, 2, 0).numpy(), x[0].permute(1, 2, 0).numpy(), "heat_map", sign="all", use_pyplot=False
    )
    assert figure.axes
    with torch.random.fork_rng(devices=[]):
        tunnel = NoiseTunnel(CVIAttribution(net, budget=12)).attribute(x, nt_samples=2, target=torch.tensor([2]))
    assert tunnel.shape == x.shape
    with pytest.raises(TypeError, match="`attribute` takes `inputs` and `target`, got"):
        CVIAttribution(net).attribute(x, target=2, baselines=0)


def test_quantus(case):
    quantus = pytest.importorskip("quantus")
    net, x, y = case
    options = {"budget": 12, "batch_size": 8}
    found = quantus_explain(net, x.numpy(), y.numpy(), **options)
    assert found.shape == (2, 1, 32, 32) and found.dtype == np.float32 and np.isfinite(found).all()
    assert np.array_equal(found, quantus_explain(net, x, y, **options))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 (the generator that Quantus draws from)
        common = {"x_batch": x.numpy(), "y_batch": y.numpy(), "device": "cpu"}
        sparse = quantus.Sparseness(disable_warnings=True)(model=net, a_batch=found, **common)
        moved = quantus.MaxSensitivity(nr_samples=2, disable_warnings=True)(
            model=net, a_batch=None, explain_func=quantus_explain, explain_func_kwargs=options, **common
        )
    assert len(sparse) == len(moved) == 2 and np.isfinite(sparse).all() and np.isfinite(moved).all()


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_half_precision(case, how):
    """bfloat16 on the CPU stands in for half precision on a GPU: finite float32 maps, nearly those of float32."""
    net, x, y = case
    options = {"budget": 24, "batch_size": 8, "partition": "grid"}
    if how == "autocast":
        half = Classifier(net, autocast=torch.bfloat16)
    else:
        low = copy.deepcopy(net).to(torch.bfloat16)

        def half(images):
            return low(images.to(torch.bfloat16)).float()

    whole, rough = CVI(net, **options).attribute(x, y), CVI(half, **options).attribute(x, y)
    assert rough.dtype == torch.float32 and rough.isfinite().all()
    alike = torch.corrcoef(torch.stack([whole.flatten(), rough.flatten()]))[0, 1]
    assert float(alike) > 0.9
    noise = infer_noise(half, x, y, budget=24)
    assert noise.width.isfinite().all() and noise.deviation.dtype == torch.float32


def test_a_thousand_classes_and_batches_of_different_clusters(case):
    """The map of an image does not depend on its company, whatever number of clusters that has."""
    net, x, _ = case
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wide = nn.Sequential(net, nn.Linear(5, 1000)).requires_grad_(False)
    flat = torch.cat([x, torch.full_like(x[:1], 0.4)])  # a flat image is a single cluster
    method, classes = CVIAttribution(wide, budget=12, batch_size=5), torch.tensor([3, 999, 500])
    together = method.attribute(flat, target=classes)
    assert len(set(method.cvi.infer(flat, classes).clusters.tolist())) > 1
    for i in range(3):
        alone = method.attribute(flat[i : i + 1], target=classes[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-6, rtol=1e-4)
