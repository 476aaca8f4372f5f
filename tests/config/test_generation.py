"""The settings of using a model: each value has one check, whose words name the field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.generation import GenerationConfig, LoadConfig, SampleConfig, SamplingConfig, ServeConfig
from moe_lm.config.reading import build_config
from moe_lm.config.section import Section


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        *((SamplingConfig, {"temperature": value}, f"temperature={value}") for value in (-0.1, math.nan, math.inf)),
        *((SamplingConfig, {"top_k": value}, f"top_k={value}") for value in (0, -3)),
        *(
            (SamplingConfig, {name: value}, f"{name}={value}")
            for name in ("top_p", "min_p", "typical_p")
            for value in (-0.1, 1.1, math.nan)
        ),
        (SamplingConfig, {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        (SamplingConfig, {"repetition_penalty": math.inf}, "repetition_penalty=inf"),
        (SamplingConfig, {"presence_penalty": math.nan}, "presence_penalty=nan"),
        (SamplingConfig, {"frequency_penalty": math.inf}, "frequency_penalty=inf"),
        (SamplingConfig, {"no_repeat_ngram": 0}, "no_repeat_ngram=0"),
        (SamplingConfig, {"logit_bias": ((-1, 1.0),)}, "logit_bias: -1=1.0 is not an id with a number below infinity"),
        (SamplingConfig, {"logit_bias": ((1, math.nan),)}, "logit_bias: 1=nan"),
        (SamplingConfig, {"logit_bias": ((1, math.inf),)}, "logit_bias: 1=inf"),
        (SamplingConfig, {"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias: an id is named twice"),
        (SamplingConfig, {"logit_bias": ["x=1"]}, "logit_bias: expected ID=BIAS"),
        (GenerationConfig, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (GenerationConfig, {"max_new_tokens": 8, "min_new_tokens": 9}, "min_new_tokens=9 is more than"),
        *((GenerationConfig, {"seed": value}, f"seed={value}") for value in (-1, 1 << 32)),
        (SampleConfig, {"logprobs": -1}, "logprobs=-1"),
        (SampleConfig, {"beams": 0}, "beams=0"),
        (SampleConfig, {"beams": 2, "num": 3}, "num=3 is more than beams=2"),
        (SampleConfig, {"beams": 2, "length_penalty": math.nan}, "length_penalty=nan"),
        (SampleConfig, {"greedy": True, "temperature": 0.9}, "temperature=0.9 draws and --greedy never does"),
        (LoadConfig, {"dtype": "float16"}, "dtype='float16'"),
        (ServeConfig, {"port": 65536}, "port=65536"),
        (ServeConfig, {"timeout": 0}, "timeout=0"),
    ],
)
def test_values_without_a_meaning_are_refused(kind: type[Section], values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_config(kind, values, "x")
    assert said in str(caught.value)


def test_a_bias_is_read_from_pairs_and_from_texts() -> None:
    assert SamplingConfig(logit_bias=["3=1.5", "7=-inf"]).logit_bias == ((3, 1.5), (7, -math.inf))  # type: ignore[arg-type]
    assert SamplingConfig(logit_bias=((3, 1.5),)).logit_bias == ((3, 1.5),)


def test_greedy_is_temperature_0() -> None:
    assert SampleConfig(greedy=True).temperature == 0
    assert (SampleConfig().temperature, SamplingConfig().temperature) == (0.8, 1)
