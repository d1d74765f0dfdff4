"""Enumeration: options and readings beside the comparisons with loops in test_inference."""

import inspect

import pytest
import torch

from cvi_nb.inference import all_masks, enumerate_evidence, exact_posterior

PIXELS = torch.arange(6).view(2, 3)
WHITE = torch.ones(1, 2, 3)
EFFECTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -0.7])


def additive(images):
    return torch.stack([images.flatten(1) @ EFFECTS, torch.zeros(len(images))], 1)


def test_evidence_is_in_the_order_of_all_masks():
    values = enumerate_evidence(additive, WHITE, PIXELS, 0, baseline=0.0, evidence="logit", batch_size=5)
    assert values.dtype == torch.float64 and torch.allclose(values, all_masks(6) @ EFFECTS.double(), atol=1e-5)


def test_one_enumeration_serves_all_temperatures_and_priors():
    options = {"baseline": 0.0, "evidence": "logit"}
    cold = exact_posterior(additive, WHITE, PIXELS, 0, **options).at(prior=0.2, temperature=0.5)
    again = exact_posterior(additive, WHITE, PIXELS, 0, prior=0.2, temperature=0.5, **options)
    assert torch.equal(cold.probability, again.probability) and cold.log_evidence == again.log_evidence
    assert torch.allclose(cold.banzhaf, EFFECTS.double(), atol=1e-5)


def test_options_are_those_of_the_enumeration_and_no_others():
    assert set(inspect.signature(exact_posterior).parameters) == {
        *inspect.signature(enumerate_evidence).parameters,
        "temperature",
        "prior",
    }
    with pytest.raises(TypeError, match="did you mean `batch_size`"):
        exact_posterior(additive, WHITE, PIXELS, 0, batchsize=3)


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"temperature": float("nan")}, {"prior": True}, {"feather": -1}])
def test_numbers_are_checked_by_name(bad):
    with pytest.raises((ValueError, TypeError), match=f"`{next(iter(bad))}` must be"):
        exact_posterior(additive, WHITE, PIXELS, 0, **bad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_enumeration_in_any_mode(mode):
    expected = exact_posterior(additive, WHITE, PIXELS, 0).probability
    with mode():
        assert torch.equal(exact_posterior(additive, WHITE.clone(), PIXELS.clone(), 0).probability, expected)
