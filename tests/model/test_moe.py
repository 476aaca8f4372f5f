"""Router and MoE layer against a per-token NumPy reference, forward and gradients, for every routing variant.

The reference is written from the papers' equations, one token and one expert at a time in float64, and knows nothing
of torch: DeepSeekMoE (arXiv 2401.06066, equations 9 to 11), DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16),
Switch (arXiv 2101.03961, equations 1 to 3), GShard (arXiv 2006.16668, algorithm 1).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lm.config.model import ModelConfig
from moe_lm.kernels.kernels import EXPERTS
from moe_lm.model.moe import MoE, Routing, all_logical, expert_counts, route, within_capacity
from tests.tiny import gradients, tiny

ROWS, POSITIONS, HIDDEN = 3, 5, 8
Array = np.ndarray[Any, np.dtype[np.float64]]


def moe_config(**changes: Any) -> ModelConfig:
    """Eight experts of width 16, of which a token is sent to three."""
    return tiny(**{"hidden_size": HIDDEN, "n_shared_experts": 0} | changes)


# ---------------------------------------------------------------------------------------------- the reference


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def gaussian_cdf(z: Array) -> Array:
    return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def activate(kind: str, z: Array) -> tuple[Array, Array]:
    """The activation and its derivative."""
    if kind == "relu":
        return np.maximum(z, 0), (z > 0).astype(float)
    if kind == "gelu":
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return z * gaussian_cdf(z), gaussian_cdf(z) + z * density
    return z * sigmoid(z), sigmoid(z) * (1 + z * (1 - sigmoid(z)))


@dataclass
class FeedForward:
    """One expert: `down^T (act(gate^T x) * (up^T x))`, or `down^T act(up^T x)` without a gate. Weights `[in, out]`."""

    kind: str
    up: Array
    down: Array
    gate: Array | None
    grads: dict[str, Array] = field(default_factory=dict)

    def forward(self, x: Array) -> Array:
        up = self.up.T @ x
        hidden = activate(self.kind, up)[0] if self.gate is None else activate(self.kind, self.gate.T @ x)[0] * up
        return self.down.T @ hidden

    def backward(self, x: Array, grad: Array) -> Array:
        """Adds the weights' gradients to `grads`, returns the input's."""
        up = self.up.T @ x
        hidden_grad = self.down @ grad
        if self.gate is None:
            hidden, slope = activate(self.kind, up)
            up_grad, x_grad = hidden_grad * slope, np.zeros_like(x)
        else:
            gated, slope = activate(self.kind, self.gate.T @ x)
            hidden, up_grad, gate_grad = gated * up, hidden_grad * gated, hidden_grad * up * slope
            self._add("gate_proj", np.outer(x, gate_grad))
            x_grad = self.gate @ gate_grad
        self._add("up_proj", np.outer(x, up_grad))
        self._add("down_proj", np.outer(hidden, grad))
        return x_grad + self.up @ up_grad

    def _add(self, name: str, grad: Array) -> None:
        self.grads[name] = self.grads.get(name, np.zeros_like(grad)) + grad


def best(scores: Array, count: int) -> list[int]:
    """Indices of the `count` largest, largest first."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])[:count]


def choose(scores: Array, bias: Array, config: ModelConfig) -> list[int]:
    """The chosen experts of one token, best first: by biased score, in the best groups only."""
    biased = scores + bias
    size = config.n_routed_experts // config.n_group
    groups = [biased[start : start + size] for start in range(0, len(biased), size)]
    # DeepSeek-V3 ranks a group by the sum of its two best, DeepSeek-V2 (softmax) by its best one.
    strongest = 2 if config.scoring_func == "sigmoid" else 1
    group_scores = np.array([np.sort(group)[::-1][:strongest].sum() for group in groups])
    allowed = best(group_scores, config.topk_group)
    reachable = np.where([index // size in allowed for index in range(len(biased))], biased, -np.inf)
    return best(reachable, config.num_experts_per_tok)


def score(logits: Array, kind: str) -> Array:
    if kind == "sigmoid":
        return sigmoid(logits)
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def weigh(scores: Array, chosen: list[int], config: ModelConfig) -> Array:
    gates = scores[chosen]
    if config.norm_topk_prob:
        gates = gates / gates.sum()
    return gates * config.routed_scaling_factor


def weigh_backward(scores: Array, chosen: list[int], grad: Array, config: ModelConfig) -> Array:
    """Gradient of the scores `[E]` out of the gradient of the weights of the chosen experts."""
    grad = grad * config.routed_scaling_factor
    gates = scores[chosen]
    if config.norm_topk_prob:
        grad = (grad - (grad * gates).sum() / gates.sum()) / gates.sum()
    scores_grad = np.zeros_like(scores)
    scores_grad[chosen] = grad
    return scores_grad


def score_backward(scores: Array, grad: Array, kind: str) -> Array:
    if kind == "sigmoid":
        return grad * scores * (1 - scores)
    return scores * (grad - (grad * scores).sum())


def admit(chosen: list[list[int]], config: ModelConfig) -> list[list[bool]]:
    """Which choices of one row find room: all first choices in order, then all second ones, and so on."""
    if config.capacity_factor is None:
        return [[True] * len(experts) for experts in chosen]
    room = math.ceil(config.capacity_factor * config.num_experts_per_tok * len(chosen) / config.n_routed_experts)
    taken: Counter[int] = Counter()
    kept = [[False] * len(experts) for experts in chosen]
    for rank in range(config.num_experts_per_tok):
        for position, experts in enumerate(chosen):
            if taken[experts[rank]] < room:
                taken[experts[rank]] += 1
                kept[position][rank] = True
    return kept


@dataclass
class Reference:
    """The layer's equations, token by token; `backward` fills the gradients."""

    config: ModelConfig
    router: Array  # [E, D]
    bias: Array  # [E]
    experts: list[FeedForward]
    shared: FeedForward | None
    router_grad: Array = field(init=False)

    def forward(self, x: Array) -> Array:
        """`x [rows, positions, D]` -> the same shape; keeps the decisions."""
        self.x, self.out = x, np.zeros_like(x)
        self.scores = [[score(self.router @ token, self.config.scoring_func) for token in row] for row in x]
        self.chosen = [[choose(scores, self.bias, self.config) for scores in row] for row in self.scores]
        self.kept = [admit(row, self.config) for row in self.chosen]
        for row, position in np.ndindex(x.shape[:2]):
            token, chosen = x[row, position], self.chosen[row][position]
            weights = weigh(self.scores[row][position], chosen, self.config) * self.kept[row][position]
            for expert, weight in zip(chosen, weights, strict=True):
                self.out[row, position] += weight * self.experts[expert].forward(token)
            if self.shared is not None:
                self.out[row, position] += self.shared.forward(token)
        return self.out

    def backward(self, grad: Array) -> Array:
        """Gradient of the input; those of the weights are kept."""
        self.router_grad, x_grad = np.zeros_like(self.router), np.zeros_like(grad)
        for row, position in np.ndindex(grad.shape[:2]):
            token, out_grad = self.x[row, position], grad[row, position]
            chosen, scores = self.chosen[row][position], self.scores[row][position]
            kept = np.array(self.kept[row][position], dtype=float)
            weights = weigh(scores, chosen, self.config) * kept
            weights_grad = np.zeros(len(chosen))
            for slot, expert in enumerate(chosen):
                weights_grad[slot] = kept[slot] * (out_grad @ self.experts[expert].forward(token))
                x_grad[row, position] += self.experts[expert].backward(token, weights[slot] * out_grad)
            scores_grad = weigh_backward(scores, chosen, weights_grad, self.config)
            logits_grad = score_backward(scores, scores_grad, self.config.scoring_func)
            self.router_grad += np.outer(logits_grad, token)
            x_grad[row, position] += self.router.T @ logits_grad
            if self.shared is not None:
                x_grad[row, position] += self.shared.backward(token, out_grad)
        return x_grad


# ------------------------------------------------------------------------------------------- layer and reference


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def reference_of(layer: MoE, config: ModelConfig) -> Reference:
    """The reference with a copy of the layer's weights."""
    stacks = {name: array(weight) for name, weight in layer.experts.state_dict().items()}
    experts = [
        FeedForward(config.hidden_act, stacks["up_proj"][e], stacks["down_proj"][e], stacks["gate_proj"][e])
        if config.mlp_gated
        else FeedForward(config.hidden_act, stacks["up_proj"][e], stacks["down_proj"][e], None)
        for e in range(config.n_routed_experts)
    ]
    shared = None
    if layer.shared_experts is not None:
        mlp = layer.shared_experts
        gate = array(mlp.gate_proj.weight).T if config.mlp_gated else None
        shared = FeedForward(config.hidden_act, array(mlp.up_proj.weight).T, array(mlp.down_proj.weight).T, gate)
    bias = array(layer.gate.e_score_correction_bias)
    return Reference(config, array(layer.gate.weight), bias, experts, shared)


def random_layer(config: ModelConfig, bias: bool = False, seed: int = 0) -> MoE:
    generator = torch.Generator().manual_seed(seed)
    layer = MoE(config)
    with torch.no_grad():
        for weight in all_logical(layer.named_parameters()).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
        layer.gate.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=generator) * 0.3 * bias)
    return layer


def assert_close(actual: Tensor | None, expected: Array, what: str) -> None:
    assert actual is not None, f"{what} has no gradient"
    rounding = 5e-7 * max(10.0, np.abs(expected).max())
    np.testing.assert_allclose(array(actual), expected, rtol=1e-5, atol=rounding, err_msg=what)


def assert_layer_equals_reference(
    config: ModelConfig, bias: bool = False, kernel: str = "plain"
) -> tuple[Reference, Routing]:
    """Output, choice, and the gradients of input, router and every expert."""
    layer = random_layer(config, bias)
    layer.experts.grouped_mm = EXPERTS[kernel]
    reference = reference_of(layer, config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, POSITIONS, HIDDEN, generator=generator, requires_grad=True)
    grad = torch.randn(ROWS, POSITIONS, HIDDEN, generator=generator)

    out, routing = layer(x)
    out.backward(grad)
    expected = reference.forward(array(x))
    x_grad = reference.backward(array(grad))

    assert routing.experts.tolist() == [chosen for row in reference.chosen for chosen in row]
    assert_close(out, expected, "output")
    assert_close(x.grad, x_grad, "gradient of the input")
    assert_close(layer.gate.weight.grad, reference.router_grad, "gradient of the router")
    for name, stack_grad in gradients(layer.experts).items():
        zeros = np.zeros(stack_grad.shape[1:])
        expected_grad = np.stack([expert.grads.get(name, zeros) for expert in reference.experts])
        assert_close(stack_grad, expected_grad, f"gradient of the experts' {name}")
    if reference.shared is not None:
        assert layer.shared_experts is not None
        for name, grad_array in reference.shared.grads.items():
            weight_grad = layer.shared_experts.get_parameter(f"{name}.weight").grad
            assert_close(weight_grad, grad_array.T, f"gradient of the shared {name}")
    return reference, routing


SWITCHES = {
    "scoring_func": ("sigmoid", "softmax"),
    "norm_topk_prob": (False, True),
    "routed_scaling_factor": (1.0, 2.5),
    "n_group": (1, 4),
    "capacity_factor": (None, 0.7),
    "n_shared_experts": (0, 2),
    "mlp_gated": (True, False),
}
VARIANTS = [dict(zip(SWITCHES, values, strict=True)) for values in itertools.product(*SWITCHES.values())]


def variant_id(variant: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in variant.items())


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_moe_layer_equals_the_numpy_reference(variant: dict[str, Any], bias: bool) -> None:
    config = moe_config(topk_group=2 if variant["n_group"] > 1 else 1, **variant)
    assert_layer_equals_reference(config, bias)


LADDER: dict[str, dict[str, Any]] = {
    "every_expert": {"num_experts_per_tok": 8, "scoring_func": "softmax", "norm_topk_prob": False},
    "every_expert_sigmoid": {"num_experts_per_tok": 8},
    "switch": {
        "num_experts_per_tok": 1, "scoring_func": "softmax", "norm_topk_prob": False, "capacity_factor": 1.25,
    },
    "gshard": {"num_experts_per_tok": 2, "scoring_func": "softmax", "capacity_factor": 1.0},
    "deepseekmoe": {"scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 1},
    "deepseek_v3": {"num_experts_per_tok": 4, "n_shared_experts": 1, "n_group": 2, "routed_scaling_factor": 2.5},
    "one_expert_a_group": {"n_group": 8, "topk_group": 3},
    "relu_without_gate": {"hidden_act": "relu", "mlp_gated": False, "n_shared_experts": 1},
    "gelu_without_gate": {"hidden_act": "gelu", "mlp_gated": False, "n_shared_experts": 1},
    "gelu_gated": {"hidden_act": "gelu", "n_shared_experts": 1},
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["plain", "bucketed"])
@pytest.mark.parametrize("name", LADDER)
def test_every_step_of_the_ladder_equals_the_numpy_reference(name: str, kernel: str) -> None:
    assert_layer_equals_reference(moe_config(**LADDER[name]), bias=name == "deepseek_v3", kernel=kernel)


def test_capacity_drops_second_choices_before_first_ones() -> None:
    """Every token wants expert 0 first and expert 1 second; with room for two of a row, the two earliest get it."""
    config = moe_config(num_experts_per_tok=2, capacity_factor=1.0, n_shared_experts=1)  # room: ceil(2 * 5 / 8) = 2
    layer = random_layer(config)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.e_score_correction_bias.copy_(torch.tensor([2.0, 1.0, 0, 0, 0, 0, 0, 0]))
    x = torch.randn(ROWS, POSITIONS, HIDDEN, generator=torch.Generator().manual_seed(2))
    out, routing = layer(x)
    assert layer.shared_experts is not None
    assert routing.experts.tolist() == [[0, 1]] * (ROWS * POSITIONS)
    kept = routing.weights.view(ROWS, POSITIONS, 2) > 0
    assert kept.tolist() == [[[True, True]] * 2 + [[False, False]] * 3] * ROWS
    torch.testing.assert_close(out[:, 2:], layer.shared_experts(x)[:, 2:])  # the overflow sees the shared expert alone


def test_a_first_choice_takes_the_place_of_an_earlier_second_choice() -> None:
    config = moe_config(num_experts_per_tok=2, n_routed_experts=4, capacity_factor=0.5)  # room: ceil(0.5 * 2 * 2 / 4)
    kept = within_capacity(torch.tensor([[[1, 0], [0, 2]]]), config)
    assert kept.tolist() == [[[True, False], [True, True]]]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    config = moe_config(norm_topk_prob=False, num_experts_per_tok=1)
    logits = torch.tensor([[1.0, 0.5, 0, 0, 0, 0, 0, -1.0]])
    bias = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 5.0])
    routing = route(logits, bias, config)
    assert routing.experts.item() == 7
    assert routing.weights.item() == pytest.approx(1 / (1 + math.e), rel=1e-6)


def test_experts_without_a_token_have_zero_gradients() -> None:
    config = moe_config()
    layer = random_layer(config)
    with torch.no_grad():
        layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]))
    out, _ = layer(torch.randn(ROWS, POSITIONS, HIDDEN, generator=torch.Generator().manual_seed(3)))
    out.square().sum().backward()
    for weight in layer.experts.parameters():
        assert weight.grad is not None
        assert bool((weight.grad[3:] == 0).all())
        assert bool((weight.grad[:3] != 0).any())


def test_experts_take_no_rows_at_all() -> None:
    """As on a rank whose experts nobody chose: the result is empty and the gradients are zero, not None."""
    layer = random_layer(moe_config())
    rows = torch.zeros(0, HIDDEN, requires_grad=True)
    out = layer.experts(rows, torch.zeros(8, dtype=torch.int32), torch.zeros(0))
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    for weight in layer.experts.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


def test_the_router_stays_in_float32_under_autocast() -> None:
    config = moe_config(n_shared_experts=1)
    layer = random_layer(config)
    x = torch.randn(ROWS, POSITIONS, HIDDEN, generator=torch.Generator().manual_seed(4)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, routing = layer(x)
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    exact = x.flatten(0, 1).float() @ layer.gate.weight.T
    torch.testing.assert_close(routing.logits, exact)
    torch.testing.assert_close(out.float(), layer(x.float())[0], rtol=0.05, atol=0.05)


def test_expert_counts_leave_padding_out() -> None:
    experts = torch.tensor([[0, 1], [1, 2], [3, 1], [0, 2]])
    counted = torch.tensor([True, True, False, True])
    assert expert_counts(experts, 5).tolist() == [2, 3, 2, 1, 0]
    assert expert_counts(experts, 5, counted).tolist() == [2, 2, 2, 0, 0]
