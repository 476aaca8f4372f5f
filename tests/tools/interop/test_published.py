"""Published checkpoints (published.py): their config.json is read, and gives as many parameters as they say.

The weights are too large to have here; the names and shapes of the tensors are in `hf_tensors.py` what they are for the
small models of the other tests.
"""

from __future__ import annotations

import math

import pytest

from moe_lm.model.size import count_parameters
from moe_lm.tools.interop.families import family_of
from moe_lm.tools.interop.fitting import effective
from moe_lm.tools.interop.hf_config import read_config, write_config
from moe_lm.tools.interop.hf_tensors import tensor_pairs
from tests.tools.interop.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name: str) -> None:
    parameters, hf = PUBLISHED[name]
    family, config, unused = read_config(hf, f"{name}/config.json")
    biases = config.n_routed_experts * len(config.moe_layers)
    assert count_parameters(config).total + (biases if family.router_bias else 0) == parameters
    assert unused == []
    assert family == family_of(hf["model_type"])
    written = write_config(config, family)
    assert effective(read_config(written, "config.json").config) == effective(config)
    pairs = tensor_pairs(config, family)
    assert sum(math.prod(part.shape) for pair in pairs for part in pair.parts if not pair.copied) == parameters
