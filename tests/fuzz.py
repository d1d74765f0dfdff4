"""One bad argument at a time, at every public door: `python tests/fuzz.py 10000` prints what happened to each case.

A case takes a call that works, puts a wrong or odd value in the place of one argument, and calls. What may come back is
a right result, or an error that names the argument (its name in backticks); nothing else, no NaN in a result that had
none, and no caller's tensor changed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PACKAGES = "statistics models clustering inference attack defence faithfulness robustness plot peers".split()


def network() -> nn.Module:
    """A smooth network of three classes for images (1, 12, 12): fast, never saturated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def values() -> dict[str, Any]:
    """Fresh arguments that work, by the name under which functions ask for them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 12, 12, generator=generator) * 0.8 + 0.1
    labels = network()(images).argmax(1)
    partition = (torch.arange(12)[:, None] // 4 * 3 + torch.arange(12) // 4).expand(2, 12, 12).contiguous()
    maps = torch.rand(2, 12, 12, generator=generator)
    masks = torch.zeros(2, 12, 12, dtype=torch.bool)
    masks[:, :6] = True
    return {
        "model": network(),
        "network": network(),
        "images": images,
        "labels": labels,
        "target": labels,
        "maps": maps,
        "masks": masks,
        "partition": partition,
        "image": images[:1],
        "eps": 0.1,
        "deviation": 0.2,
        "steps": 4,
        "explain": lambda model, images, target: images.mean(1),
        "methods": {"m": lambda model, images, target: images.mean(1)},
        "area": 0.25,
        "baseline": "grey",
        "sigma": 1.0,
        "inputs": images,
        "targets": labels,
        "budget": 16,
        "draws": 4,
        "a": [0.1, 0.4, 0.3],
        "b": [0.2, 0.1, 0.3],
        "p": [0.01, 0.2],
        "successes": 3,
        "n": 10,
        "more": 3,
        "less": 1,
        "differences": [0.1, -0.2, 0.3],
        "points": torch.rand(12, 2, generator=generator),
        "logits": torch.randn(2, 3),
        "distances": torch.tensor([0.1, 0.2]),
        "size": (12, 12),
        "heat": maps[0],
        "delta": images - 0.5,
        "norm": 2.0,
        "clusters": 9,
        "samples": 20,
        "X": np.random.default_rng(0).random((12, 2)),
    }


#: Doors that need other arguments than their names say, or smaller settings than their defaults.
SPECIAL: dict[str, dict[str, Any]] = {
    "statistics.bootstrap_mean": {"values": [0.1, 0.4, 0.3], "n": 50},
    "statistics.paired_bootstrap": {"n": 50},
    "statistics.compare": {"values": {"x": [0.1, 0.4, 0.3], "y": [0.2, 0.1, 0.5]}, "reference": "x", "n": 50},
    "models.class_mask": {"classes": 3},
    "models.mnist_cnn": {"classes": 3},
    "clustering.hierarchy": {"range_bandwidths": (4.0, 8.0)},
    "clustering.region_graph": {"labels": values()["partition"][0]},
    "clustering.mean_shift": {"bandwidth": 0.5},
    "inference.all_masks": {"clusters": 4},
    "inference.exact_posterior": {"partition": values()["partition"][0]},
    "inference.enumerate_evidence": {"partition": values()["partition"][0]},
    "inference.infer_modes": {"budget": 32},
    "inference.infer_noise": {"budget": 24},
    "inference.infer_presence": {"budget": 16},
    "inference.bernoulli_kl": {"log_odds": torch.zeros(3), "prior_log_odds": 0.5},
    "inference.paint": {"values": torch.rand(2, 9), "labels": values()["partition"][0]},
    "inference.merged_regions": {"labels": values()["partition"][0], "evidence": torch.rand(12, 12)},
    "inference.collect": {"labels": values()["partition"][0]},
    "models.get_evidence": {"evidence": "margin"},
    "defence.doubleback": {"lam": 1.0},
    "defence.insensitive": {"lam": 1.0},
    "defence.per_sample_lambda": {"lam": 1.0, "batch_size": 4},
    "defence.worst_in_ball": {"step_size": 0.05, "random_start": True},
    "faithfulness.overwritten": {"layers": ["1"]},
    "robustness.mean_interval": {"values": [0.1, 0.4, 0.3]},
    "robustness.accuracy_curve": {"eps": [0.1]},
    "inference.certify": {"samples": 20, "selection_samples": 10},
    "inference.smoothed_votes": {"samples": 20},
    "inference.stroke_partition": {"clusters": 4},
    "attack.carlini_wagner": {"steps": 4, "search_steps": 2, "warm_start": 0},
    "attack.sigma_zero": {"steps": 4},
    "attack.square": {"steps": 10},
    "attack.minimum_norm": {"steps": 9},
    "attack.jsma": {"max_pixels": 4},
    "attack.ensemble": {"eps": 0.1},
    "attack.targeted_cases": {"classes": 3, "steps": 4},
    "attack.cluster_support": {"clusters": [0, 1]},
    "defence.train": {"epochs": 1, "batch_size": 2},
    "defence.distill": {"teacher": network(), "epochs": 1, "batch_size": 2},
    "faithfulness.sensitivity_n": {"tile": 3, "draws": 4, "fractions": (0.25, 0.5)},
    "faithfulness.tile_degradation": {"tile": 4, "steps": 4},
    "faithfulness.attack_confined": {"maps": {"m": values()["maps"]}, "areas": (0.25,), "steps": 2, "norm_steps": 8},
    "faithfulness.evaluate_faithfulness": {"maps": {"m": values()["maps"]}, "metrics": ("deletion",)},
    "faithfulness.quality_against_budget": {
        "methods": {"m": lambda model, images, target, budget: images.mean(1)},
        "budgets": (2,),
        "tile": 4,
    },
    "faithfulness.infidelity": {"draws": 4},
    "faithfulness.max_sensitivity": {"draws": 2},
    "faithfulness.seed_agreement": {"explain": lambda model, images, target, seed: images.mean(1)},
    "faithfulness.mosaics": {"images": torch.rand(4, 1, 12, 12), "labels": torch.arange(4), "count": 1, "cells": 2},
    "faithfulness.impute": {"removed": values()["masks"]},
    "faithfulness.road": {"fractions": (0.25, 0.5)},
    "faithfulness.label_randomisation": {"randomised": network()},
    "robustness.transfer_matrix": {"models": {"a": network(), "b": network()}},
    "plot.heat_grid": {"maps": {"m": values()["maps"]}},
    "plot.overlay": {"image": values()["images"][0]},
    "plot.curves": {"x": [0, 1], "series": {"a": [0, 1]}, "xlabel": "x", "ylabel": "y"},
    "plot.bars_with_intervals": {"values": {"a": (0.2, 0.1, 0.3)}, "xlabel": "x"},
    "peers.smooth_grad": {"samples": 2},
    "peers.rise": {"masks": 8, "cells": 3},
    "peers.hsic": {"samples": 8, "cells": 3},
    "peers.sobol": {"designs": 2, "cells": 2},
    "peers.xrai": {"steps": 2},
    "peers.occlusion": {"window": 4, "stride": 4},
}

#: Public, and not fuzzed: what they are for is not numbers of a caller.
LEFT_OUT = {
    **dict.fromkeys(
        [
            "models.choose_device",
            "models.device_name",
            "models.load_classifier",
            "models.read_header",
            "models.save_classifier",
            "models.shipped_weights",
            "defence.load_defended",
            "plot.save_figure",
        ],
        "files and devices: tests/test_models.py, test_data.py, test_plot.py, test_device.py",
    ),
    **dict.fromkeys(
        [
            "attack.register_attack",
            "faithfulness.metric",
            "faithfulness.old_order",
            "peers.peer",
            "attack.Attack",
            "robustness.checks_frame",
        ],
        "registration, by whoever writes a chapter",
    ),
    **dict.fromkeys(
        [
            "attack.boundary_step",
            "inference.field_posterior",
            "inference.critical_regions",
            "attack.show_search",
            "attack.steepest",
            "attack.per_sample",
            "defence.squared_slope",
            "plot.blend",
            "plot.colour_of",
            "plot.letter_panels",
            "faithfulness.removal_path",
            "faithfulness.removal_ranks",
            "faithfulness.separable",
            "plot.luminance",
            "plot.heat_limit",
            "plot.outlines",
            "attack.norms",
            "attack.project",
            "models.frozen",
            "models.normalised",
            "inference.coarse_masks",
            "inference.draw_masks",
            "inference.refine",
            "inference.shifted_masks",
            "robustness.ask_all",
            "robustness.target_cases",
        ],
        "inside a chapter's own functions, whose doors are tested",
    ),
    **dict.fromkeys(
        [
            "attack.destruction_rate",
            "attack.destruction_rates",
            "inference.necessary_set",
            "inference.sufficient_set",
            "defence.recipe",
        ],
        "take a result of the package, not numbers",
    ),
    **dict.fromkeys(
        [
            "peers.grad_cam",
            "peers.grad_cam_plus_plus",
            "peers.information_bottleneck",
            "peers.feature_moments",
            "peers.kernel_shap",
            "peers.lime",
            "peers.shap_partition",
            "peers.explain_all",
        ],
        "other packages behind one shared check; need a convolutional network or seconds a call",
    ),
    **dict.fromkeys(
        ["robustness.evaluate_robustness", "robustness.trust_checks", "attack.ensemble"],
        "seconds a call: their doors are tested in test_robustness.py and test_attack.py",
    ),
}

#: Other arguments that an error may name, for they no longer fit: with two trials, three successes are wrong.
ALSO: dict[str, dict[str, tuple[str, ...]]] = {
    "faithfulness.grid_pointing_game": {"maps": ("masks",)},
    "faithfulness.pointing_game": {"maps": ("masks",)},
    "faithfulness.relevance_rank": {"maps": ("masks",)},
    "models.class_mask": {"n": ("target",)},
    "statistics.wilson": {"n": ("successes",)},
    "statistics.proportion": {"n": ("successes",)},
    "statistics.clopper_pearson": {"n": ("successes",)},
    "inference.quantus_explain": {"inputs": ("model",)},  # what the network says of images of another size
}
#: What goes with images one by one: of good images, but of another number or size, it may be named.
COMPANIONS = ("labels", "target", "targets", "partition", "maps", "masks", "deviation", "removed")


def odd() -> list[Any]:
    """Values that somebody has passed by mistake, or that are right in an unusual type."""
    images = values()["images"]
    return [
        None,
        True,
        False,
        "x",
        "",
        b"x",
        -1,
        0,
        1,
        2,
        3,
        10**20,
        -0.5,
        0.5,
        1.5,
        1e30,
        math.nan,
        math.inf,
        -math.inf,
        1j,
        [],
        (),
        {},
        [1],
        [1, 2],
        [0.5, math.nan],
        [[1, 2], [3]],
        "linf",
        object(),
        len,
        int,
        np.int32(2),
        np.float64(0.3),
        np.array(2),
        np.array([1, 2], dtype=np.int32),
        np.array(["a"]),
        torch.tensor(1),
        torch.tensor(0.2),
        torch.tensor([]),
        torch.tensor(math.nan),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([5, -1]),
        torch.tensor([[0], [1]]),
        images,
        images.numpy(),
        images.double(),
        images.half(),
        images * 255,
        images - 2,
        images[0],
        images[:1],
        images.byte(),
        images.flatten(1),
        images[..., :5],
        images * math.nan,
        images[:, 0],
        images[:, 0] * math.inf,
        torch.ones(2, 1, 12, 12, dtype=torch.bool),
        torch.zeros(2, 12, 12),
        torch.zeros(2, 12, 12, dtype=torch.int32),
        torch.zeros(2, 3),
        torch.zeros(0, 1, 12, 12),
        torch.rand(2, 3, 12, 12),
        images.clone().requires_grad_(),
        lambda x: x,
        lambda x: x.flatten(1)[:, :1],
        lambda x: x.flatten(1)[:, :3] * math.nan,
        lambda x: x.flatten(1)[:, :3].round(),
        lambda x: x.mean(),
        lambda x: None,
        lambda x: x.flatten(1)[:, :3].tolist(),
    ]


@dataclasses.dataclass(frozen=True)
class Door:
    """A public function and arguments with which it works."""

    name: str
    function: Callable[..., Any]

    def arguments(self) -> dict[str, Any]:
        special, known = SPECIAL.get(self.name, {}), values()
        parameters = inspect.signature(self.function).parameters.values()
        given = {p.name: known[p.name] for p in parameters if p.default is p.empty and p.name in known}
        small = {
            p.name: known[p.name] for p in parameters if p.name in ("steps", "budget", "draws") and p.name in known
        }
        return copied({**given, **small, **special})

    @property
    def complete(self) -> bool:
        """Whether every argument that must be given is known."""
        parameters = inspect.signature(self.function).parameters.values()
        must = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        return set(must) <= set(self.arguments())

    @property
    def names(self) -> list[str]:
        """Arguments to put odd values into."""
        parameters = inspect.signature(self.function).parameters.values()
        fixed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        quiet = {"ax", "name", "names", "facts", "progress", "title", "unit", "xlabel", "ylabel"}
        return [name for name in fixed if name not in quiet]


def copied(value: Any) -> Any:
    """Fresh tensors and containers, so that a case cannot spoil the next one."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value.copy() if isinstance(value, np.ndarray) else value


def posterior(
    model: Any,
    images: Any,
    target: Any = None,
    family: Any = "presence",
    partition: Any = "grid",
    baseline: Any = None,
    budget: Any = 16,
    temperature: Any = None,
    batch_size: Any = 16,
    seed: Any = 0,
    estimator: Any = "gradient",
    relaxation: Any = None,
    tolerance: Any = None,
    steps: Any = None,
    evidence: Any = None,
    smoothing: Any = None,
) -> Any:
    """What a user types first, as one function."""
    from cvi_nb.inference import CVI

    options = {
        "baseline": baseline,
        "temperature": temperature,
        "relaxation": relaxation,
        "tolerance": tolerance,
        "steps": steps,
        "evidence": evidence,
        "smoothing": smoothing,
    }
    options = {name: value for name, value in options.items() if value is not None}
    cvi = CVI(
        model,
        family=family,
        partition=partition,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        estimator=estimator,
        **options,
    )
    return cvi.infer(images, target)


def mean_shift(
    X: Any, bandwidth: Any = 0.5, seeds: Any = None, bin_seeding: Any = False, min_bin_freq: Any = 1, max_iter: Any = 50
) -> Any:
    """scikit-learn's interface, as one function."""
    from cvi_nb.clustering import MeanShift

    found = MeanShift(
        bandwidth=bandwidth, seeds=seeds, bin_seeding=bin_seeding, min_bin_freq=min_bin_freq, max_iter=max_iter
    )
    return found.fit(X).labels_


def doors() -> list[Door]:
    """Every public function of the package for which arguments are known."""
    found: dict[int, Door] = {0: Door("inference.CVI", posterior), 1: Door("clustering.MeanShift", mean_shift)}
    for package in PACKAGES:
        module = importlib.import_module(f"cvi_nb.{package}")
        for name in getattr(module, "__all__", []):
            function = getattr(module, name)
            label = f"{package}.{name}"
            if inspect.isfunction(function) and label not in LEFT_OUT and not name.startswith(("check_", "register")):
                found.setdefault(id(inspect.unwrap(function)), Door(label, function))
    return [door for door in found.values() if door.complete]


def numbers(result: Any, depth: int = 0) -> Iterator[Tensor]:
    """Floating tensors in a result, however deep."""
    if isinstance(result, Tensor | np.ndarray):
        tensor = torch.as_tensor(result) if not isinstance(result, np.ndarray) or result.dtype.kind in "fiub" else None
        if tensor is not None and tensor.is_floating_point():
            yield tensor.detach()
    elif isinstance(result, float):
        yield torch.tensor(result)
    elif isinstance(result, dict | list | tuple) and depth < 3:
        for item in result.values() if isinstance(result, dict) else result:
            yield from numbers(item, depth + 1)
    elif dataclasses.is_dataclass(result) and depth < 2:
        for field in dataclasses.fields(result):
            if field.name == "agreement":  # of a posterior's steps: NaN of a single one, and of constant maps
                continue
            yield from numbers(getattr(result, field.name, None), depth + 1)


def has_nan(result: Any) -> bool:
    return any(bool(tensor.isnan().any()) for tensor in numbers(result))


def run(door: Door, argument: str, value: Any) -> tuple[str, str]:
    """What happens: (verdict, detail); "error" and "result" are good, "unnamed", "deep", "nan", "changed" are not."""
    arguments = door.arguments() | {argument: copied(value)}
    if door.name == "defence.train" and argument == "checkpoint" and isinstance(value, str) and value:
        arguments[argument] = os.path.join(tempfile.mkdtemp(), value)  # it is written
    before = {name: given.clone() for name, given in arguments.items() if isinstance(given, Tensor)}
    verdict, detail = "result", ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = door.function(**arguments)
            # NaN where it is documented (a failed attack's distance) is there with good arguments, too.
            # So it is where a warning says that something is undefined (NaN).
            told = any("NaN" in str(warning.message) for warning in said) or undefined(door, argument)
            if has_nan(result) and not told and not has_nan(door.function(**door.arguments())):
                verdict, detail = "nan", "NaN in the result"
        except (ValueError, TypeError) as error:
            text = str(error)
            named = any(f"`{name}" in text for name in (argument, *other_names(door, argument, value)))
            inside = error.__traceback__
            while inside is not None and inside.tb_next is not None:
                inside = inside.tb_next
            ours = inside is not None and "cvi_nb" in inside.tb_frame.f_code.co_filename
            verdict = "error" if named else "unnamed" if ours else "deep"
            detail = f"{type(error).__name__}: {text[:160]}"
        except (ImportError, OSError) as error:
            verdict, detail = "error", str(error)[:80]
        except Exception as error:  # whatever else comes out of torch or NumPy is a fault
            verdict, detail = "deep", f"{type(error).__name__}: {str(error)[:160]}"
    for name, kept in before.items():
        same = (
            torch.equal(kept.nan_to_num(7.0), arguments[name].nan_to_num(7.0))
            if kept.is_floating_point()
            else torch.equal(kept, arguments[name])
        )
        if not same:
            return "changed", name
    return verdict, detail


def other_names(door: Door, argument: str, value: Any) -> tuple[str, ...]:
    """Arguments besides `argument` that an error about it may name."""
    others = ALSO.get(door.name, {}).get(argument, ())
    if argument in ("labels", "target"):
        others += ("labels", "target")
    if argument in ("images", "image", "inputs") and isinstance(value, Tensor) and value.ndim == 4:
        good = value.is_floating_point() and bool(((value >= 0) & (value <= 1)).all())
        others += COMPANIONS if good else ()
    return others


def undefined(door: Door, argument: str) -> bool:
    """Where a result may hold NaN by definition: distances of attacks that fail, scores of constant maps, no data."""
    return door.name.startswith(("attack.", "robustness.", "faithfulness.", "statistics.", "inference.certify")) and (
        argument not in ("images", "maps", "model") or door.name.startswith("attack.")
    )


def cases(count: int, seed: int = 0) -> Iterator[tuple[Door, str, int]]:
    """`count` different cases (door, argument, which odd value), spread evenly over doors and arguments."""
    generator = np.random.default_rng(seed)
    pairs = [(door, name) for door in doors() for name in door.names]
    every = [(door, name, k) for door, name in pairs for k in range(len(odd()))]
    order = generator.permutation(len(every))
    for i in order[:count]:
        yield every[i]


def main(count: int, seed: int = 0) -> None:
    verdicts: Counter[str] = Counter()
    for door, argument, k in cases(count, seed):
        value = odd()[k]
        verdict, detail = run(door, argument, value)
        verdicts[verdict] += 1
        if verdict not in ("error", "result"):
            print(f"{verdict:8} {door.name}({argument}={' '.join(repr(value).split())[:50]}): {detail}", flush=True)
    print(f"{sum(verdicts.values())} cases at {len(doors())} doors: {dict(verdicts)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
