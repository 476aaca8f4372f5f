"""A model in bfloat16 gives the logits of float32, rounded, and every way of choosing takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lm.config.generation import LoadConfig, SampleConfig
from moe_lm.generate.beams import search
from moe_lm.generate.decode import Settings, Step
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.kernels.native import build
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel.spread import Spread
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import Done
from tests.generate.uncached import full_logits
from tests.texts import text_of
from tests.tiny import LATENT, tiny_model, write_run

MODELS: dict[str, dict[str, Any]] = {
    "moe": {},
    "tied": {"tie_word_embeddings": True},
    "latent": LATENT,
    "gpt": {"norm_type": "layernorm", "position_embedding": "learned", "n_routed_experts": 0, "use_qk_norm": False},
    "sinusoidal": {"position_embedding": "sinusoidal", "n_routed_experts": 0},
}
PROMPT = [1, 5, 6]


@pytest.fixture(params=[True, False], ids=["C++", "torch"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(build, "library", lambda: None)


def logits(model: LanguageModel) -> Tensor:
    return full_logits(model, range(5, 45)).float()


def written(session: Session, settings: Settings) -> list[Step]:
    decoder = session.decoder(1, 64)
    decoder.add(PROMPT, settings)
    return list(decoder.run())


@pytest.mark.parametrize(
    ("stored", "is_fast", "used"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float32, True, torch.float32),
    ],
)
def test_weights_keep_the_number_format_that_they_are_stored_in_where_the_device_is_fast_at_it(
    stored: torch.dtype, is_fast: bool, used: torch.dtype, tmp_path: Path, tiny_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = tiny_model(vocab_size=1024)
    model.to(stored)
    run = write_run(tmp_path / "run", model, tiny_tokenizer)
    for feature in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, feature, lambda: is_fast)
    loaded = Session.open(run, LoadConfig(device="cpu")).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {used}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_float32_rounded(make_run: Callable[..., Path], name: str) -> None:
    # Where rounding is magnified it says nothing: every expert takes every token, and attention is not nearly a choice.
    run = make_run(num_experts_per_tok=4, **{"initializer_range": 0.1} | MODELS[name])
    exact, rounded = Session.load(run, "cpu"), Session.load(run, "cpu", dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in rounded.model.buffers())
    saved = exact.model.state_dict()
    assert all(torch.equal(t, saved[name].to(t.dtype)) for name, t in rounded.model.state_dict().items())
    wanted, found = logits(exact.model), logits(rounded.model)
    assert not torch.equal(wanted, found)
    assert torch.cosine_similarity(wanted, found).min() > 0.999


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", ["moe", "latent"])
def test_every_way_of_choosing_takes_rounded_logits(make_run: Callable[..., Path], name: str) -> None:
    session = Session.load(make_run(**MODELS[name]), "cpu", dtype="bfloat16")
    steps = written(session, Settings(8, GREEDY, logprobs=1100))
    assert len(steps) == 8
    for step in steps:
        assert step.logprob == step.alternatives[0][1]
        probabilities = torch.tensor([log_p for _, log_p in step.alternatives], dtype=torch.float64).exp()
        assert abs(float(probabilities.sum()) - 1) < 1e-5  # in bfloat16 it would be off by more than 1e-3
    sampling = Sampling(
        temperature=1.2, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.2, presence_penalty=0.5,
        logit_bias=((7, 2.0),),
    )  # fmt: skip
    assert len(written(session, Settings(8, sampling, 3, routing=True))) == 8
    beams = search(session.model, PROMPT, SampleConfig(beams=3, num=2, max_new_tokens=6))
    assert [len(beam.ids) for beam in beams] == [6, 6]


def test_spread_over_memory_and_disk_it_writes_the_same(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(num_hidden_layers=3)
    whole = Session.load(run, "cpu", dtype="bfloat16")
    for cpu in ("0MiB", "1GiB"):
        spread = Session.load(run, spread=Spread({"cpu": cpu}, tmp_path), dtype="bfloat16")
        assert {parameter.dtype for parameter in spread.model.parameters()} == {torch.bfloat16}
        assert torch.equal(logits(spread.model), logits(whole.model))
        assert written(spread, Settings(8)) == written(whole, Settings(8))


def test_the_command_line_asks_for_it(run: Path, moe_lm: Callable[..., Done]) -> None:
    session = Session.load(run, "cpu", dtype="bfloat16")
    wanted = text_of(session.complete("def ", Settings(12)))
    options = ("-p", "def ", "--greedy", "--max-new-tokens", 12, "--device", "cpu", "--dtype", "bfloat16")
    assert moe_lm("sample", run, *options).out == wanted + "\n"
    assert wanted != text_of(Session.load(run, "cpu").complete("def ", Settings(12)))
    many = moe_lm("sample", run, *(option for option in options if option != "--greedy"), "--num", 2)
    assert many.code == 0, many.err
    assert moe_lm("sample", run, *options[:-1], "float8").code == 2
