"""What is shown of log-scores."""

import pytest
import torch
from torch import nn

from queryfoil.defenses.coarse import HighConfidence, LabelOnly, RoundedScores, TopK
from queryfoil.defenses.dld import DLD
from queryfoil.defenses.reverse_sigmoid import ReverseSigmoid
from queryfoil.defenses.rls import RLS
from queryfoil.defenses.scores import log_scores, show, single
from queryfoil.oracle import as_log_scores


@pytest.mark.parametrize("output", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_given_class_leads_and_all_else_stays(output, dtype):
    z = 3 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = torch.arange(200)[:, None] % 10
    shown = show(z, top, output, dtype)
    assert shown.dtype == dtype
    assert torch.equal(shown.argmax(1, keepdim=True), top)
    margin = as_log_scores(shown, output)
    others = margin.scatter(1, top, -torch.inf)
    already = z.gather(1, top) > z.scatter(1, top, -torch.inf).amax(1, keepdim=True)
    lead = (margin.gather(1, top) - others.amax(1, keepdim=True))[~already]
    torch.testing.assert_close(lead, torch.full_like(lead, 2e-5), atol=2e-6, rtol=0)
    gaps = others.sort(1, descending=True).values[:, :9].diff()
    torch.testing.assert_close(
        gaps.double(), z.scatter(1, top, -torch.inf).sort(1, descending=True).values[:, :9].diff(), atol=3e-6, rtol=0
    )


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_raises(wrong):
    z = torch.tensor([[0.0, wrong, 1.0]])
    for kind in (RLS, RoundedScores, TopK, LabelOnly, HighConfidence, ReverseSigmoid, DLD):
        with pytest.raises(ValueError, match="expected finite scores from the model"):
            kind(nn.Identity())(z)
    zeros = torch.tensor([[0.0, 1.0, 0.0]]).log()
    assert log_scores(zeros, "log_probs").exp().round().tolist() == [[0.0, 1.0, 0.0]]


def test_half_precision_is_shown_as_single():
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [single(t) for t in kinds] == [torch.float32] * 3 + [torch.float64]
    assert log_scores(torch.tensor([[0.25, 0.75]]).half(), "probs").exp().tolist() == [[0.25, 0.75]]
