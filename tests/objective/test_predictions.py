"""What is measured of predictions chunk by chunk, against the logits of all positions at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_lm.data.batches import IGNORE
from moe_lm.model import layers
from moe_lm.model.layers import Head
from moe_lm.objective.training_loss import Predictions

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, POSITIONS, SIZE, VOCABULARY = 3, 25, 16, 40


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """75 tokens in chunks of at most 7."""
    monkeypatch.setitem(layers.CHUNK_ROWS, "cpu", 7)
    monkeypatch.setitem(layers.CHUNK_BYTES, "cpu", 4)


def a_head(dtype: torch.dtype = torch.float64, bias: bool = True, vocabulary: int = VOCABULARY) -> Head:
    torch.manual_seed(0)
    return Head(SIZE, vocabulary, bias=bias, dtype=dtype)


def a_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states with a gradient, and targets of which a third are left out."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, POSITIONS, SIZE, generator=draw, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCABULARY, (ROWS, POSITIONS), generator=draw)
    return hidden.requires_grad_(), targets.masked_fill(torch.rand(targets.shape, generator=draw) < 1 / 3, IGNORE)


def plain_nll(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, head.weight, head.bias).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none").view(targets.shape)


def weighted(nll_BS: Tensor) -> Tensor:
    """Something of which the gradient is another one at every token, as in preference tuning."""
    return F.softplus((nll_BS * torch.linspace(-1, 2, nll_BS.numel(), dtype=nll_BS.dtype).view_as(nll_BS)).mean())


MEASURES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "summed_nll": (lambda predicted, targets: 3 * predicted.summed_nll(targets), lambda nll: 3 * nll.sum()),
    "nll": (lambda predicted, targets: weighted(predicted.nll(targets)), weighted),
}


def gradients_of(total: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(total, [tensor for tensor in trained if tensor.requires_grad]))


@pytest.mark.parametrize("frozen", ["nothing", "head", "hidden states"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MEASURES)
def test_loss_and_gradients_are_those_of_all_logits_at_once(name: str, bias: bool, frozen: str) -> None:
    head, (hidden, targets) = a_head(bias=bias), a_batch()
    head.requires_grad_(frozen != "head")
    hidden.requires_grad_(frozen != "hidden states")
    measure, of_plain = MEASURES[name]
    found, expected = measure(Predictions(head, hidden), targets), of_plain(plain_nll(head, hidden, targets))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(gradients_of(found, hidden, head), gradients_of(expected, hidden, head), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", MEASURES)
def test_in_bfloat16_products_are_rounded_and_nothing_else(name: str) -> None:
    """Autocast of float32 weights: within its own rounding of float64, and the loss in float32."""
    (hidden, targets), measure, of_plain = a_batch(torch.float32), *MEASURES[name]
    head = a_head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(Predictions(head, hidden), targets)
        logits = F.linear(hidden, head.weight, head.bias).flatten(0, 1).float()
        nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none").view(targets.shape)
        expected = of_plain(nll)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for one, other in zip(gradients_of(found, hidden, head), gradients_of(expected, hidden, head), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 5e-3


def test_without_a_gradient_the_numbers_are_the_same() -> None:
    head, (hidden, targets) = a_head(), a_batch()
    nll = plain_nll(head, hidden, targets)
    with torch.no_grad():
        predicted = Predictions(head, hidden)
        torch.testing.assert_close(predicted.nll(targets), nll.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(predicted.summed_nll(targets), nll.detach().sum(), rtol=1e-12, atol=0)
        assert torch.equal(predicted.likeliest(), head(hidden).argmax(-1))


def test_a_target_of_every_token_left_out_is_0_and_so_are_its_gradients() -> None:
    head, (hidden, targets) = a_head(), a_batch()
    total = Predictions(head, hidden).summed_nll(targets.fill_(IGNORE))
    assert total.item() == 0
    assert all(not gradient.any() for gradient in gradients_of(total, hidden, head))


def test_a_second_backward_pass_is_refused() -> None:
    """The first one scales the gradients in place."""
    head, (hidden, targets) = a_head(), a_batch()
    total = Predictions(head, hidden).summed_nll(targets)
    total.backward(retain_graph=True)
    with pytest.raises(TypeError):
        total.backward()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize("name", [*MEASURES, "likeliest"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(name: str) -> None:
    """Of 75 tokens x 400 entries no more than 7 x 400 are in one tensor, in either pass."""
    head, (hidden, targets) = a_head(vocabulary=400), a_batch()
    with LargestTensor() as largest:
        if name == "likeliest":
            Predictions(head, hidden).likeliest()
        else:
            MEASURES[name][0](Predictions(head, hidden), targets).backward()
    assert largest.elements == max(7 * 400, head.weight.numel())
    with LargestTensor() as largest:
        plain_nll(head, hidden, targets).sum().backward()
    assert largest.elements == 75 * 400
