"""The door of every judgement: orders, kinds and precisions of arguments; and the registry behind it."""

import inspect
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import cvi_nb.faithfulness as faithfulness
from cvi_nb.data import load_digits
from cvi_nb.faithfulness import (
    METRICS,
    Bench,
    Scores,
    attack_confined,
    critical_support,
    deletion,
    evaluate_faithfulness,
    label_randomisation,
    max_sensitivity,
    metric,
    seed_agreement,
)
from cvi_nb.models import Classifier

JUDGES = {
    "deletion": {"steps": 3}, "insertion": {"steps": 3}, "tile_degradation": {"tile": 7}, "sufficiency": {},
    "necessity": {}, "road": {"fractions": (0.3,)}, "infidelity": {"draws": 4},
    "sensitivity_n": {"draws": 4, "fractions": (0.5,)},
}
NAMES = {"tile_degradation": "degradation", "sensitivity_n": "sensitivity-n"}


def network(classes=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
                               nn.Linear(54, classes))
    for p in layers.parameters():
        p.data *= 5
    return layers.eval()


def scene():
    images = load_digits("development")[::1000].images
    maps = images[:, 0] + 0.01 * torch.rand(images[:, 0].shape, generator=torch.Generator().manual_seed(0))
    return images, network()(images).argmax(1), maps


def value(judge, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return getattr(faithfulness, judge)(*args, **JUDGES[judge], **kwargs).value


# ---------------------------------------------------------------- one order of arguments

@pytest.mark.parametrize("judge", JUDGES)
def test_maps_follow_the_target_and_the_older_order_is_warned_of(judge):
    images, target, maps = scene()
    new = value(judge, network(), images, target, maps)
    for given in ((images, maps, target), (images, maps.numpy(), target.tolist())):
        with pytest.warns(DeprecationWarning, match=rf"`{judge}` takes \(model, images, target, maps, …\) now"):
            old = value(judge, network(), *given)
        torch.testing.assert_close(old, new, equal_nan=True)
    signature = inspect.signature(getattr(faithfulness, judge))
    assert list(signature.parameters)[:4] == ["model", "images", "target", "maps"]
    assert {"batch_size", "ties", "seed"} < set(signature.parameters)
    mask = torch.nn.functional.one_hot(target, 4).bool()
    torch.testing.assert_close(value(judge, network(), images, mask, maps), new, equal_nan=True)


def test_explanations_follow_the_target_and_the_older_order_is_warned_of():
    (images, target, _), model = scene(), Classifier(network())

    def explain(model, x, y, seed=0):
        return x[:, 0] + 0.1 * torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(seed))

    for judge in (max_sensitivity, seed_agreement):
        new = judge(model, images, target, explain).value
        with pytest.warns(DeprecationWarning, match=r"\(model, images, target, explain, …\)"):
            assert torch.equal(judge(explain, model, images, target).value, new)
    with pytest.warns(DeprecationWarning, match="randomised"):
        label_randomisation(model, model, images, target, {"x": explain})
    options = {"areas": (0.3,), "steps": 2, "norm_steps": None, "eps": 0.1}
    maps = {"x": images[:, 0]}
    new = attack_confined(model, images, target, maps, **options).frame
    for args, extra in (((images, maps, target), {}), ((images, maps), {"labels": target})):
        with pytest.warns(DeprecationWarning, match="target"):
            found = attack_confined(model, *args, **extra, **options).frame
        assert found.equals(new)


# ---------------------------------------------------------------- what is refused, and by which name

@pytest.mark.parametrize("judge", JUDGES)
def test_networks_with_one_output_are_told_the_remedy(judge):
    images, _, maps = scene()
    for one in (nn.Sequential(nn.Flatten(), nn.Linear(784, 1)), lambda x: x.mean((1, 2, 3))[:, None]):
        with pytest.raises(ValueError, match=r"`model` must .* 2 classes, got 1.*torch\.cat\(\[-z, z\], 1\)"):
            value(judge, one, images, 0, maps)
        both = Classifier(lambda x, one=one: torch.cat([-one(x), one(x)], 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            value(judge, both, images, both.predict(images), maps)


def test_one_output_is_refused_wherever_a_network_is_read():
    images, _, maps = scene()
    one = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
    explain = lambda m, x, y: x[:, 0]  # noqa: E731
    for call in (lambda: evaluate_faithfulness(one, images, 0, {"x": maps}, "sparseness"),
                 lambda: attack_confined(one, images, 0, {"x": maps}),
                 lambda: faithfulness.model_randomisation(one, images, 0, {"x": explain}),
                 lambda: faithfulness.target_randomisation(one, images, 0, {"x": explain}),
                 lambda: label_randomisation(one, images, 0, {"x": explain}, network()),
                 lambda: label_randomisation(network(), images, 0, {"x": explain}, one),
                 lambda: max_sensitivity(one, images, 0, explain), lambda: seed_agreement(one, images, 0, explain)):
        with pytest.raises(ValueError, match=r"`(model|randomised)` must .* 2 classes, got 1"):
            call()


@pytest.mark.parametrize("judge", [*JUDGES, "sparseness", "complexity"])
def test_maps_of_nan_are_refused_and_constant_ones_said_to_be(judge):
    (images, target, maps), nan = scene(), torch.full((4, 28, 28), math.nan)
    alone = judge in ("sparseness", "complexity")
    call = lambda m: getattr(faithfulness, judge)(  # noqa: E731
        *([m] if alone else [network(), images, target, m]), **JUDGES.get(judge, {}))
    with pytest.raises(ValueError, match="`maps` must be finite, got NaN or infinite"):
        call(nan)
    with pytest.raises(ValueError, match=r"map\(s\) 2$"):
        call(maps + torch.tensor([0, 0, math.inf, 0])[:, None, None])
    with pytest.warns(UserWarning, match=r"map\(s\) 1 .*(constant|zero throughout)"):
        call(maps * torch.tensor([1, 0, 1, 1])[:, None, None])


def test_constant_and_broken_maps_elsewhere():
    images, _, maps = scene()
    with pytest.warns(UserWarning, match="`maps`: map.s. 0, 1, 2, 3 are constant"):
        critical_support(0 * maps, 0.2)
    with pytest.raises(ValueError, match="`maps` must be finite"):
        critical_support(maps * math.nan, 0.2)
    with pytest.warns(UserWarning, match="constant for some seed"):
        assert seed_agreement(network(), images, 0, lambda m, x, y, seed: 0 * x[:, 0]).value.isnan().all()


def test_options_that_nobody_has_are_refused():
    images, target, maps = scene()
    with pytest.raises(TypeError, match="step"):
        deletion(network(), images, target, maps, step=3)
    with pytest.raises(TypeError, match=r"`step` must be an option of .*did you mean `steps`"):
        evaluate_faithfulness(network(), images, target, {"x": maps}, step=3)
    with pytest.raises(TypeError, match="`areas` must be a finite number"):
        attack_confined(network(), images, target, {"x": maps}, areas=("all",))


# ---------------------------------------------------------------- kinds that are the same

@pytest.mark.parametrize("judge", JUDGES)
def test_scalars_and_targets_of_every_kind(judge):
    images, target, maps = scene()
    usual = value(judge, network(), images, target, maps)
    for same in (target.int(), target.byte(), target.numpy().astype(np.int32), target.tolist(), target[:, None]):
        assert torch.equal(value(judge, network(), images, same, maps).nan_to_num(9), usual.nan_to_num(9))
    again = value(judge, network(), images, target, maps, batch_size=np.int64(32), seed=torch.tensor(0))
    assert torch.equal(again.nan_to_num(9), usual.nan_to_num(9))
    single = value(judge, network(), images[:1], int(target[0]), maps[:1])
    torch.testing.assert_close(single, usual[:1], rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_judged_in_single(judge, dtype):
    images, target, maps = scene()
    found = value(judge, network(), images.to(dtype), target, maps.to(dtype))
    single = value(judge, network(), images.to(dtype).float(), target, maps.to(dtype).float())
    assert found.dtype == torch.float32 and torch.equal(found.nan_to_num(9), single.nan_to_num(9))


# ---------------------------------------------------------------- the registry

def test_a_new_metric_is_in_the_table_once_it_is_registered():
    images, target, maps = scene()
    before = dict(METRICS)
    try:
        @metric("brightness", better="lower", undefined="nothing is there")
        def brightness(bench, maps, baseline="grey", power=1):
            filled = bench.fill(baseline)[1]
            value = (bench.images - filled).abs().flatten(1).mean(1) ** power
            return Scores("brightness", value, "lower")

        result = evaluate_faithfulness(network(), images, target, {"x": maps}, ("brightness", "sparseness"), power=2)
        rows = result.frame.query("method == 'x' and metric == 'brightness' and baseline == 'grey'")["value"]
        np.testing.assert_allclose(rows, brightness(network(), images, target, maps, power=2).value)
        assert set(result.summary(n=50)["better"]) == {"lower", "higher"}
        with pytest.warns(UserWarning, match="brightness is undefined .* 0: nothing is there"):
            brightness(network(), images[:1], target[:1], maps[:1], power=math.nan)
    finally:
        METRICS.clear()
        METRICS.update(before)


def test_metrics_are_one_definition_each():
    assert list(METRICS) and all(m.better in ("higher", "lower") for m in METRICS.values())
    for judge in JUDGES:
        public = getattr(faithfulness, judge)
        assert inspect.unwrap(public) is inspect.unwrap(METRICS[NAMES.get(judge, judge)].judge)
    images, target, maps = scene()
    bench, kept = Bench(network(), images, target), {}
    for name, entry in METRICS.items():
        if entry.baseline != "none":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                kept[name] = entry.judge(bench, bench.maps(maps), **entry.table)
            assert kept[name].metric == name and kept[name].better == entry.better and len(kept[name].value) == 4
    assert bench.fill("blur")[1] is bench.fill("blur")[1]
    frame = kept["deletion"].to_frame()
    np.testing.assert_allclose(frame["value"], kept["deletion"].area)


def test_costs_are_those_of_a_call_whatever_other_threads_ask() -> None:
    """A network shared by threads: each score says what its own call asked."""
    images, target = torch.rand(4, 1, 12, 12), torch.zeros(4, dtype=torch.long)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)))
    maps, found = torch.rand(4, 12, 12), []
    alone = faithfulness.deletion(model, images, target, maps, steps=6).evaluations
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(faithfulness.deletion, model, images, target, maps, steps=6) for _ in range(40)]
        found = [job.result().evaluations for job in jobs]
    assert set(found) == {alone} and alone.forward >= 4 * 6
