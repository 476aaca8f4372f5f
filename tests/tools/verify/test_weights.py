"""The steps that layouts are compared on are hard ones: for any seed and routing one expert is full, one is empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import ParallelConfig, PretrainConfig
from moe_lm.parallel.topology import Topology
from moe_lm.tools.verify import worker
from moe_lm.tools.verify.deviation import read_steps
from moe_lm.tools.verify.layouts import Layout, Plan
from moe_lm.tools.verify.parity import easy_steps
from moe_lm.tools.verify.scale import small_model, training
from tests.processes import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
ROUTINGS = [
    {"scoring_func": "sigmoid", "num_experts_per_tok": 3},
    {"scoring_func": "sigmoid", "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1},
    {"scoring_func": "sigmoid", "num_experts_per_tok": 1},
    {"scoring_func": "softmax", "num_experts_per_tok": 3},
    {"scoring_func": "softmax", "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2},
]


def plan_of(seed: int, routing: dict[str, object]) -> Plan:
    config = load_config(PretrainConfig, ROOT / "configs" / "pretrain" / "deepseekmoe-2b.yaml", [f"train.seed={seed}"])
    plain: dict[str, object] = {"n_routed_experts": 64, "n_group": 1, "topk_group": 1}
    model = small_model(ModelConfig.model_validate(config.model.model_dump() | plain | routing))
    reference = Layout(name="one process", world_size=1, like=None)
    return Plan(model=model, train=training(config), parallel=ParallelConfig(device="cpu"), layouts=[reference])


def easy(plan: Plan, folder: Path, steps: int) -> list[str]:
    """What `easy_steps` says about the first steps of the reference."""
    with pytest.MonkeyPatch.context() as fewer:
        fewer.setattr(Layout, "steps", property(lambda layout: range(steps)))
        worker.run(plan.layouts[0], plan, Topology(), folder, folder / "0", worker.biases_of(plan))
    return list(easy_steps(read_steps(folder / "0"), plan))


@pytest.mark.parametrize("routing", ROUTINGS[1::3])
def test_the_first_step_is_hard(routing: dict[str, object], tmp_path: Path) -> None:
    assert easy(plan_of(12, routing), tmp_path, steps=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("seed", range(11, 21))
def test_every_step_is_hard_whatever_the_seed(seed: int, routing: dict[str, object], tmp_path: Path) -> None:
    assert easy(plan_of(seed, routing), tmp_path, steps=5) == []


def test_an_easy_step_is_named(tmp_path: Path) -> None:
    """Said, and no failure: there are configs that cannot be unbalanced."""
    plan = plan_of(12, ROUTINGS[0])
    even = {"step": 3, "gradient norm": 0.1, "expert counts": [[9, 9, 9, 9, 9, 9, 0, 9], [9, 40, 1, 1, 1, 1, 1, 1]]}
    assert list(easy_steps([even], plan)) == [
        "the gradient of step 3, of norm 0.1, is not clipped",
        "MoE layer 0 is loaded evenly in step 3: [9, 9, 9, 9, 9, 9, 0, 9]",
        "no expert of MoE layer 1 is without a token in step 3: [9, 40, 1, 1, 1, 1, 1, 1]",
    ]
