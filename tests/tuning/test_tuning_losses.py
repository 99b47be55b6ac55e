"""The losses of fine-tuning against autograd, and the line that shows them."""

import math
import re
from typing import Any

import pytest
import torch

from fewbit.progress import progress_line
from fewbit.tuning.losses import Prediction, mean_loss, predict


def test_losses_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    logits, reference = torch.randn(300, 40), torch.randn(300, 40)
    targets = torch.randint(0, 40, (300,))
    top = predict(reference, 5)
    assert top.indices is not None
    log_p = torch.log_softmax(reference.double(), -1)

    def buckets(log: torch.Tensor) -> torch.Tensor:
        assert top.indices is not None
        kept = log.gather(1, top.indices.long())
        return torch.cat([kept, torch.log1p(-kept.exp().sum(1, keepdim=True))], dim=1)

    def expected(loss: str, prediction: Prediction | None, x: torch.Tensor) -> torch.Tensor:
        log_q = torch.log_softmax(x, -1)
        total = torch.zeros((), dtype=torch.float64)
        if "nll" in loss:
            total = total - log_q.gather(1, targets[:, None]).mean()
        if "kd" in loss:
            p, q = (log_p, log_q) if prediction is not top else (buckets(log_p), buckets(log_q))
            total = total + (p.exp() * (p - q)).sum(1).mean()
        return total

    for loss, prediction in [("nll", None), ("kd", predict(reference, 0)), ("kd", top), ("nll+kd", top)]:
        ours = logits.clone().requires_grad_()
        theirs = logits.double().requires_grad_()
        value, wanted = mean_loss(ours, targets, prediction, loss), expected(loss, prediction, theirs)
        (3 * value).backward()
        (3 * wanted).backward()
        assert math.isclose(value.item(), wanted.item(), rel_tol=1e-5)
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)


def test_few_kept_predictions_of_a_sure_student() -> None:
    torch.manual_seed(1)
    reference, logits = torch.randn(6, 5000), torch.randn(6, 5000)
    logits.scatter_(1, reference.topk(1).indices, 25.0)
    for top in (1, 8):
        prediction = predict(reference, top)
        assert prediction.indices is not None
        ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
        log_q = torch.log_softmax(theirs, -1)
        kept = prediction.indices.long()
        rest = log_q.scatter(1, kept, -math.inf).logsumexp(1)
        log_p = prediction.log_probabilities.double()
        share = 1 - log_p.exp().sum(1)
        wanted = ((log_p.exp() * (log_p - log_q.gather(1, kept))).sum(1) + share * (share.log() - rest)).mean()
        value = mean_loss(ours, torch.zeros(6, dtype=torch.int64), prediction, "kd")
        value.backward()
        wanted.backward()
        assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("first", [0, 401])
def test_the_time_left_is_that_of_this_run(first: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr("fewbit.progress.time.monotonic", lambda: clock[0])
    with progress_line("training") as show:
        for done in range(first or 1, 500):
            clock[0] += 0.5
            show(done, 500, "")
    lines = capsys.readouterr().err.splitlines()
    for line in lines:
        found = re.fullmatch(r"training: (\d+)%  (\d+) s left  ", line)
        assert found is not None
        assert abs(int(found[2]) - (500 - 5 * int(found[1])) * 0.5) <= 3
