"""A scorer as a model of lm-eval, which this file imports: the extra `eval` brings it.

Texts become ids exactly as lm-eval's own model for `transformers` does it with the exported tokenizer, so that a run
has the same numbers here as its export has there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tokenizers
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe_lm.common.errors import UsageError
from moe_lm.config.generation import SamplingConfig
from moe_lm.evaluate.scoring import Request, Score, Scorer
from moe_lm.generate.decode import Settings
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task does not say


class HubTokenizer:
    """The tokenizer as `transformers` loads it: text may spell special tokens, and the post-processor adds its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"])
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bos: str = self._backend.decode([tokenizer.bos_id], skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of a text; None: with the post-processor's special tokens, unless the text begins with bos."""
        add = not text.startswith(self._bos) if add_special_tokens is None else add_special_tokens
        ids: list[int] = self._backend.encode(text, add_special_tokens=add).ids
        return ids


class HarnessModel(TemplateLM):
    """A model that lm-eval can ask; it is asked within `aloud()`, where the terminal is there again."""

    def __init__(
        self, scorer: Scorer, aloud: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:
        super().__init__()
        self._scorer, self._words, self._aloud = scorer, scorer.tokenizer, aloud
        self._hub = HubTokenizer(scorer.tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none."""
        return self._words.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._hub.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([Request(context, continuation) for _, context, continuation in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self._scorer.max_length, context_len=1)
            windows += [Request(*make_disjoint_window(window)) for window in rolling]
            owners += [owner] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._score(windows), strict=True):
            sums[owner] += score.log_likelihood
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[tuple[Settings, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(_settings(request.args[1]), []).append(number)
        for (settings, stop), numbers in alike.items():
            room = self._scorer.max_length - settings.max_new_tokens
            if room < 1:
                raise UsageError(
                    f"a task writes up to {settings.max_new_tokens} tokens, and the model has "
                    f"{self._scorer.max_length} positions; choose tasks that write less"
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            with self._aloud():
                written = self._scorer.write(prompts, settings, stop)
            for number, text in zip(numbers, written, strict=True):
                texts[number] = text
        return texts

    def _score(self, requests: Sequence[Request]) -> list[Score]:
        with self._aloud():
            return self._scorer.score(requests)

    @property
    def tokenizer_name(self) -> str:
        return self._words.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the template: lm-eval keeps it beside the results."""
        return "the run's" if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Any], add_generation_prompt: bool = True) -> str:
        text = self._words.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = str(chat_history[-1]["content"])  # a message to be continued: nothing comes after it
        return text[: text.rindex(begun.strip()) + len(begun.strip())]


def _settings(wanted: Mapping[str, Any]) -> tuple[Settings, tuple[str, ...]]:
    """The settings of a task's text, and its stop strings. Raises UsageError for one that is unknown here."""
    options = dict(normalize_gen_kwargs(dict(wanted), MAX_NEW_TOKENS))
    until, new_tokens = options.pop("until", []), options.pop("max_gen_toks")
    samples = options.pop("do_sample", False)
    known = {name: options.pop(name) for name in SamplingConfig.model_fields if name in options}
    if options:
        raise UsageError(f"a task asks for {', '.join(options)} in its generation_kwargs, which is not known here")
    sampling = Sampling(**known) if samples else GREEDY
    return Settings(new_tokens, sampling), tuple(stop for stop in until if stop)
