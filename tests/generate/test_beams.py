"""Beam search: token for token what transformers' `generate` gives on the exported model, and what is its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_lm.common.errors import UsageError
from moe_lm.config.generation import SampleConfig
from moe_lm.generate.beams import Beam, search
from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.exporting import export_run
from tests.generate.uncached import build, full_logits
from tests.tiny import LATENT, tiny_model, write_run

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {"grouped-query": {}, "latent": LATENT}
NEW = 12


class Both(NamedTuple):
    """One model, ours and theirs, the ids that end a text, and prompts."""

    ours: LanguageModel
    theirs: PreTrainedModel
    stops: list[int]
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=[*MODELS, "trained"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Both:
    folder, draw = tmp_path_factory.mktemp("both"), torch.Generator().manual_seed(7)
    if request.param == "trained":
        run = request.getfixturevalue("pretrained")
    else:
        sizes = {"vocab_size": 1024, "num_hidden_layers": 2, "initializer_range": 0.25}
        run = write_run(folder / "run", tiny_model(4, **sizes | MODELS[request.param]), tiny_tokenizer)
    export_run(run, folder / "exported", proof_bytes=0)
    ours = Session.load(run, device="cpu").model
    theirs = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32).eval()
    sizes = [1 + place % 9 for place in range(20)]
    prompts = [torch.randint(7, 1024, (size,), generator=draw).tolist() for size in sizes]
    # What texts of this model are full of ends them: a tenth of what greedy choice writes, so that beams do end.
    written = list(itertools.chain.from_iterable(generate(ours, prompts, Settings(NEW))))
    most_common = sorted(set(written), key=lambda token: (-written.count(token), token))
    return Both(ours, theirs, most_common[: 3 if request.param != "trained" else 1], prompts)


def transformers_beams(both: Both, prompt: list[int], best: int, **options: Any) -> list[tuple[list[int], float]]:
    """Texts without their stop token, and scores; one beam is greedy, which has none."""
    out = both.theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=NEW, eos_token_id=both.stops, pad_token_id=0, num_return_sequences=best,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    texts = []
    for ids in out.sequences[:, len(prompt) :].tolist():
        ends = [place for place, token in enumerate(ids) if token in both.stops]
        texts.append(ids[: ends[0]] if ends else ids)
    scores = out.sequences_scores.tolist() if "sequences_scores" in out else [math.nan] * len(texts)
    return list(zip(texts, scores, strict=True))


@pytest.mark.parametrize(
    ("beams", "options"),
    [
        (1, {}), (4, {}), (8, {}),
        (4, {"length_penalty": 0.0}), (4, {"length_penalty": -1.5}),
        (8, {"length_penalty": 2.0}), (8, {"length_penalty": 0.6}),
        (4, {"length_penalty": 2.0, "min_new_tokens": 5}),
    ],
)  # fmt: skip
def test_the_same_tokens_as_transformers(both: Both, beams: int, options: dict[str, Any]) -> None:
    """Every one of the best texts for 20 prompts, and their scores."""
    ended = 0
    for prompt in both.prompts:
        expected = transformers_beams(both, prompt, beams, num_beams=beams, **options)
        found = search(
            both.ours, prompt, SampleConfig(beams=beams, num=beams, max_new_tokens=NEW, **options), both.stops
        )
        assert [beam.ids for beam in found] == [ids for ids, _ in expected]
        if beams > 1:
            assert [beam.score for beam in found] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-4)
        ended += sum(beam.finish == "stop" for beam in found)
    assert ended > 0


def test_penalties_are_the_same_as_in_transformers(both: Both) -> None:
    config = SampleConfig(
        beams=4, num=3, max_new_tokens=NEW, repetition_penalty=1.4, no_repeat_ngram=2, logit_bias=((9, 2.0),)
    )
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "sequence_bias": {(9,): 2.0}}
    for prompt in both.prompts[:6]:
        expected = transformers_beams(both, prompt, 3, num_beams=4, **options)
        found = search(both.ours, prompt, config, both.stops)
        assert [beam.ids for beam in found] == [ids for ids, _ in expected]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build()


@torch.inference_mode()
def by_definition(model: LanguageModel, prompt: Sequence[int], width: int, new: int) -> list[tuple[list[int], float]]:
    """Beams without a cache and without stop tokens."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(new):
        options = []
        for ids, score in beams:
            log_p = full_logits(model, [*prompt, *ids])[-1].log_softmax(-1).tolist()
            options += [([*ids, token], score + value) for token, value in enumerate(log_p)]
        beams = sorted(options, key=lambda option: -option[1])[:width]
    return [(ids, score / new) for ids, score in beams]


@pytest.mark.parametrize("kind", ["grouped-query", "latent"])
@pytest.mark.parametrize("width", [2, 5])
def test_beams_follow_the_definition(kind: str, width: int) -> None:
    model, prompt = build(kind), [5, 6, 7]
    found = search(model, prompt, SampleConfig(beams=width, num=width, max_new_tokens=6))
    expected = by_definition(model, prompt, width, 6)
    assert [beam.ids for beam in found] == [ids for ids, _ in expected]
    assert [beam.score for beam in found] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-4)


def test_all_beams_are_every_text_there_is(model: LanguageModel) -> None:
    """With as many beams as texts of two tokens the search is exhaustive."""
    found = search(model, [5, 6], SampleConfig(beams=97, num=97, length_penalty=0.0, max_new_tokens=2), vocab_size=97)
    scores = {}
    for first in range(97):
        before = full_logits(model, [5, 6])[-1].log_softmax(-1)[first].item()
        after = full_logits(model, [5, 6, first])[-1].log_softmax(-1)
        scores |= {(first, second): before + value for second, value in enumerate(after.tolist())}
    best = sorted(scores, key=lambda ids: -scores[ids])[:97]
    assert [tuple(beam.ids) for beam in found][:20] == best[:20]


def test_a_text_ends_where_it_is_told_to(model: LanguageModel) -> None:
    free = search(model, [5], SampleConfig(beams=3, num=3, max_new_tokens=8))
    token = free[0].ids[2]
    ends: Callable[[Sequence[int]], bool] = lambda ids: ids[-1] == token  # noqa: E731
    found = search(model, [5], SampleConfig(beams=3, num=3, max_new_tokens=8), ends=ends)
    stopped = [beam for beam in found if beam.finish == "stop"]
    assert stopped
    assert all(beam.ids.index(token) == len(beam.ids) - 1 for beam in stopped)
    assert all(token not in beam.ids for beam in found if beam.finish == "length")


def test_one_beam_is_greedy_and_the_last_position_ends_it(model: LanguageModel) -> None:
    [beam] = search(model, [5] * 30, SampleConfig(beams=1, max_new_tokens=500))
    assert beam == Beam(generate(model, [[5] * 30], Settings(500))[0], beam.score, "length")
    assert len(beam.ids) == 11


def test_only_ids_of_the_tokenizer_are_chosen(model: LanguageModel) -> None:
    found = search(model, [5], SampleConfig(beams=4, num=4, max_new_tokens=10), vocab_size=30)
    assert max(max(beam.ids) for beam in found) < 30


def test_a_prompt_that_cannot_be_continued_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    for prompt, said in (([], "has no token"), ([1] * 41, "has 41 tokens"), ([97], "ids from 97 to 97")):
        with pytest.raises(UsageError, match=said):
            search(model, prompt, SampleConfig(beams=4))
