"""What is asked of a device is computed there: the library and the notebooks, through a device that only counts."""

import inspect
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counted import DEVICE, NAME, OnDevice, computes, run_cells

from cvi_nb.attack import ATTACKS, targeted_cases
from cvi_nb.clustering import mean_shift, segment
from cvi_nb.data import load_digits
from cvi_nb.defence import plain, train
from cvi_nb.faithfulness import attack_confined, evaluate_faithfulness
from cvi_nb.inference import CVI, certify, exact_posterior, infer_modes, infer_noise, stroke_partition
from cvi_nb.models import choose_device, device_name, load_classifier, mnist_cnn
from cvi_nb.paper import load_config, notebook_parameters
from cvi_nb.robustness import Threat, evaluate_robustness, transfer_matrix

ROOT = Path(__file__).resolve().parents[1]
#: Computed on the CPU by design, wherever the images are. All else of the size of an image is a mistake.
ON_THE_CPU = {
    "data": "images, before they are moved",
    "models": "weights, before they are moved",
    "validation": "arguments, where they came",
    "inference/draws": "draws, so that a seed gives the same ones on every device",
    "inference/noise": "draws",
    "attack/projected": "draws",
    "attack/square_search": "draws",
    "clustering/points": "modes of a few beliefs, in float64",
    "clustering/segmentation": "a graph of regions",
    "inference/perturbation": "a matrix that blurs, made once",
    "inference/modes": "beliefs over a dozen clusters, in float64",
    "inference/surrogate": "beliefs",
    "inference/densities": "beliefs",
    "inference/exact": "masks of a dozen clusters",
    "statistics": "numbers of results",
    "faithfulness/bench": "draws",
    "faithfulness/form": "numbers of maps, in float64",
    "faithfulness/localisation.py:mosaics": "which quarter is the truth",
    "faithfulness/sanity.py:max_sensitivity": "draws",
    "faithfulness/sanity.py:overwritten": "draws",
    "plot": "pictures",
    "report": "pictures",
    "peers": "other packages, and what they cluster",
}


@pytest.fixture(scope="module")
def here() -> Any:
    """Two digits and a network on the device that only counts."""
    with OnDevice():
        digits = load_digits("report")[[0, 350]].to(DEVICE)
        yield load_classifier("mnist_cnn", device=DEVICE), digits.images, digits.labels


def strangers(device: OnDevice) -> dict[str, int]:
    """What the package computed on the CPU and should not have."""
    known = tuple(ON_THE_CPU)
    return {place: count for place, count in device.astray.items() if not place.startswith(known)}


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors that a result holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    held = vars(value).values() if hasattr(value, "__dict__") else value if isinstance(value, list | tuple) else ()
    return [tensor for one in held for tensor in tensors(one)]


WORKS: dict[str, Callable[..., Any]] = {
    "presence": lambda m, x, y: CVI(m, budget=16, partition="grid").infer(x).criticality,
    "presence, forward": lambda m, x, y: CVI(m, budget=16, estimator="forward", partition="grid").infer(x).criticality,
    "noise": lambda m, x, y: infer_noise(m, x, budget=20, partition="grid").sensitivity,
    "modes": lambda m, x, y: infer_modes(m, x[:1], budget=40, partition=stroke_partition(x[:1], 6)).probability,
    "exact": lambda m, x, y: exact_posterior(m, x[0], stroke_partition(x, 6)[0], 0).probability,
    "certify": lambda m, x, y: certify(m, x, 0.5, samples=50, selection_samples=20).radius,
    "segment": lambda m, x, y: segment(x.expand(-1, 3, -1, -1), 8, 7)[0],
    "mean_shift": lambda m, x, y: mean_shift(x.flatten(1).T[300:400], 0.3).labels,
    "targeted": lambda m, x, y: targeted_cases(m, x, y, ATTACKS["ddn"], steps=3).distance,
}


@pytest.mark.parametrize("name", WORKS)
def test_the_library_computes_where_it_is_asked(name: str, here: Any) -> None:
    with OnDevice() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert WORKS[name](*here).device == DEVICE
    assert device.there > 0 and strangers(device) == {}


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"jsma", "carlini_wagner", "apgd_targeted"}))
def test_attacks_compute_where_they_are_asked(name: str, here: Any) -> None:
    model, images, labels = here
    accepted = inspect.signature(ATTACKS[name].function).parameters
    options = {key: value for key, value in {"eps": 0.1, "steps": 3}.items() if key in accepted}
    with OnDevice() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ATTACKS[name](model, images, labels, **options)
    assert {tensor.device for tensor in tensors(result)} == {DEVICE} and strangers(device) == {}


def test_training_computes_where_it_is_asked() -> None:
    digits = load_digits("development")[::400]
    with OnDevice() as device:
        result = train(mnist_cnn, digits.images, digits.labels, plain(), epochs=1, batch_size=5, device=DEVICE)
        assert result.classifier.device == DEVICE
    assert strangers(device) == {}
    again = train(mnist_cnn, digits.images, digits.labels, plain(), epochs=1, batch_size=5)
    for there, cpu in zip(result.classifier.parameters(), again.classifier.parameters(), strict=True):
        assert torch.equal(there.detach().raw, cpu.detach())  # type: ignore[attr-defined]


def test_judging_computes_where_it_is_asked(here: Any) -> None:
    model, images, labels = here
    with OnDevice() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = {"photo": images[:, 0], "CVI": CVI(model, budget=16, partition="grid").infer(images).criticality}
        judged = evaluate_faithfulness(model, images, labels, maps, steps=2, tile_steps=2, metrics=("deletion",))
        assert judged.frame["value"].notna().all()
        attack_confined(model, images, labels, maps, (0.2,), steps=2, norm_steps=2, progress=False)
        matrix = transfer_matrix({"a": model, "b": model}, images, labels, 0.1)
        assert matrix.to_frame().notna().all(axis=None)
    assert strangers(device) == {}


@pytest.mark.slow
def test_a_report_of_robustness_computes_where_it_is_asked(here: Any) -> None:
    model, images, labels = here
    threat = Threat.quick(images, linf=(0.1,), l2=(1.0,), targets=1, steps=10, targeted_steps=10)
    with OnDevice() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate_robustness(model, images, labels, threat, progress=False)
    assert found.accuracy == 1 and strangers(device) == {}


def test_the_same_numbers_as_on_the_cpu(here: Any) -> None:
    model, images, _labels = here
    network = load_classifier("mnist_cnn")
    cpu = CVI(network, budget=16, partition="grid").infer(images.raw).criticality
    with OnDevice():
        there = CVI(model, budget=16, partition="grid").infer(images).criticality
    assert torch.equal(there.raw, cpu)


def test_mistakes_are_seen(here: Any) -> None:
    """The device refuses what a card would, and counts what is computed elsewhere."""
    _, images, _ = here
    with OnDevice() as device:
        with pytest.raises(RuntimeError, match="same device"):
            images + torch.ones(28)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="indices"):
            torch.arange(2)[images[:, 0, 0, 0] < 2]
        with pytest.raises(TypeError, match="numpy"):
            images.numpy()
        CVI(load_classifier("mnist_cnn"), budget=16, partition="grid").infer(images.cpu())
    assert any(place.startswith("inference/game") for place in strangers(device))


# Notebooks

#: Less than smoke: that the code runs, on a device, is all that is asked here.
LITTLE: dict[str, dict[str, Any]] = {
    "00_setting": {"size": 64, "repeats": 1},
    "01_method": {"budget": 16},
    "02_gallery": {"photos": "coffee", "budget": 16, "rise_masks": 8, "samples": 8},
    "03_faithfulness": {"limit": 1, "budget": 16, "budgets": "", "masks": "", "rise_masks": 8, "samples": 8,
                        "gradient_steps": 2, "steps": 2, "tile_steps": 2, "moment_views": 1},
    "05_defences": {"networks": "plain,fgsm", "digits": 5, "strong_digits": 1, "radii": "0.2"},
    "06_attacks": {"networks": "plain", "attacks": "minimum_norm", "digits": 1, "error_digits": 5, "photos": 1,
                   "gradients": 12},
    "07_exactness": {"digits": 2, "clusters": 6, "budget": 40},
    "08_width": {"networks": "plain,fgsm", "digits": 4, "budget": 20, "samples": 50, "attack_steps": 4,
                 "resamples": 100},
    "09_robustness": {"networks": "plain,fgsm", "digits": 3, "linf": "0.2", "l2": "2", "targets": 1, "steps": 10,
                      "targeted_steps": 10},
    "10_confined": {"limit": 1, "budget": 16, "rise_masks": 8, "integration_steps": 2, "areas": "0.2", "steps": 2,
                    "norm_steps": 8, "resamples": 100},
    "11_sanity": {"limit": 1, "budget": 16, "rise_masks": 8, "integration_steps": 2, "stages": 1, "draws": 1,
                  "grids": 1},
}  # fmt: skip
NOTEBOOKS = [*sorted((ROOT / "nbs/paper").glob("*.ipynb")), *sorted((ROOT / "nbs/benchmarks").glob("*.ipynb"))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_notebook_takes_a_device(path: Path) -> None:
    """As a parameter, "auto" by default, chosen once, and stated by what it writes."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    if not computes(path):  # a table of what others have computed states the devices of these
        assert 'device = "auto"' not in code and ("frame.attrs" in code or '"device"' in code)
        return
    assert code.count('device = "auto"') == 1 and code.count("device = choose_device(device)") == 1
    assert "device_name(device)" in code and "cuda.is_available" not in code
    here = re.sub(r'(?s)PROBE = """.*?"""', "", code)  # the memory of a process on the CPU
    assert all("device=device" in call for call in re.findall(r"load_(?:classifier|defended)\(([^)]*)\)", here))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_papermill_reaches_the_parameters(path: Path) -> None:
    """A cell tagged so, which takes the value that is given, the device among them."""
    assert ("device" in notebook_parameters(path)) == computes(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LITTLE)
def test_the_notebooks_of_the_paper_compute_where_they_are_asked(name: str, tmp_path: Path) -> None:
    known = load_config("smoke", ROOT)["notebooks"][name]["parameters"]
    given = {key: value for key, value in known.items() if key == "training"} | LITTLE[name]
    with OnDevice() as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_cells(ROOT / "nbs/paper" / f"{name}.ipynb", given | {"device": NAME, "out_dir": str(tmp_path)})
    assert device.there > 0 and strangers(device) == {}
    stated = [json.loads(path.read_text())["device"] for path in tmp_path.glob("numbers/*.json")]
    assert stated or name == "03_faithfulness"
    assert set(stated) <= {NAME.upper()}


# Choosing


def test_a_device_is_chosen_or_refused() -> None:
    assert choose_device("auto").type in ("cuda", "mps", "cpu") and choose_device(torch.device("cpu")).type == "cpu"
    assert device_name("cpu") == "CPU" and device_name("auto")
    for wrong in ("meta", "gpu", "cuda:99", "", None, 1.5):
        with pytest.raises((TypeError, ValueError), match="`device` must be"):
            choose_device(wrong)  # type: ignore[arg-type]
