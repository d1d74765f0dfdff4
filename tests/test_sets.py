"""Sufficient and necessary sets of clusters, against enumeration of small games."""

import pytest
import torch

from cvi_nb.inference import all_masks, infer_modes
from cvi_nb.inference.sets import necessary_set, sufficient_set
from cvi_nb.models import as_classifier

LABELS = torch.arange(6).view(2, 3)
WHITE = torch.ones(1, 1, 2, 3)
CUBE = all_masks(6).bool()


def decided(score):
    """A model of two classes: the first where `score` (B, 6) -> (B,) is positive."""

    def model(images):
        value = 8 * score(images.flatten(1))
        return torch.stack([value, torch.zeros_like(value)], 1)

    return model


either = decided(lambda z: z[:, 0] + z[:, 4] - 0.5)


def inferred(model, **options):
    return infer_modes(model, WHITE, 0, partition=LABELS, baseline=0.0, budget=48, **options)


def test_either_of_two():
    posterior = inferred(either)
    enough, needed = sufficient_set(posterior), necessary_set(posterior)
    assert enough.verified and len(enough) == 1 and bool(enough.clusters[0] | enough.clusters[4])
    assert needed.verified and needed.clusters.nonzero()[:, 0].tolist() == [0, 4]
    assert enough.kept == enough.draws and needed.kept == 0
    assert enough.area == pytest.approx(1 / 6) and needed.mask.sum() == 2


@pytest.mark.parametrize("seed", range(4))
def test_against_all_sets(seed):
    weights = torch.randn(6, generator=torch.Generator().manual_seed(seed)) + 0.5
    model = decided(lambda z: z @ weights.to(z) - 0.6 * weights.sum().to(z))
    kept = model(CUBE.float().view(64, 1, 2, 3)).argmax(1) == 0
    assert bool(kept[-1]) and not bool(kept[0])
    inside = (CUBE[None] | ~CUBE[:, None]).all(2)  # (set, mask): the mask shows the whole set
    chance = (inside.double() * kept).sum(1) / inside.sum(1)
    smallest, fewest = int(CUBE[chance >= 0.9].sum(1).min()), int((~CUBE[~kept]).sum(1).min())

    posterior = inferred(model)
    enough, needed = sufficient_set(posterior, budget=1024), necessary_set(posterior)
    which = int((enough.clusters.long() << torch.arange(6)).sum())
    assert enough.verified and float(chance[which]) >= 0.9 and enough.probability <= float(chance[which])
    assert len(enough) <= smallest + 1
    assert needed.verified and len(needed) == fewest
    assert not bool(kept[int((~needed.clusters).long() @ 2 ** torch.arange(6))])


def test_what_cannot_be_verified_says_so():
    constant = inferred(decided(lambda z: 0 * z[:, 0] + 1))
    assert len(sufficient_set(constant)) == 0
    nothing = necessary_set(constant)
    assert not nothing.verified and len(nothing) == 6 and nothing.kept == nothing.draws == 1
    chance = inferred(decided(lambda z: z.sum(1) - 5.5))  # all six are needed
    short = sufficient_set(chance, budget=64)
    assert len(short) == 6 or not short.verified


def test_cost_batches_and_classes():
    model = as_classifier(either)
    posterior = inferred(model)
    for find in (sufficient_set, necessary_set):
        before = model.evaluations.forward
        found = find(posterior, budget=128)
        assert model.evaluations.forward - before == found.evaluations.forward <= 128
        assert torch.equal(found.clusters, find(posterior, budget=128, batch_size=3).clusters)
    both = infer_modes(model, WHITE, torch.tensor([[True, True]]), partition=LABELS, baseline=0.0, budget=48)
    assert len(sufficient_set(both)) == 0 and not necessary_set(both).verified
    assert len(found.to_frame()) == 6 and found.plot() is not None and "necessary" in repr(found)


@pytest.mark.parametrize(
    ("find", "name", "value"),
    [(sufficient_set, "alpha", 0), (sufficient_set, "confidence", 1.0), (sufficient_set, "budget", 63),
     (sufficient_set, "image", 1), (necessary_set, "width", 0), (necessary_set, "batch_size", 0)],
    ids=["alpha", "confidence", "budget", "image", "width", "batch_size"],
)  # fmt: skip
def test_errors_name_the_argument(find, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        find(inferred(either), **{name: value})
