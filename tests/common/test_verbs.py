"""Which verb a command line names, before anything is parsed."""

from __future__ import annotations

import pytest

from moe_lm.common.verbs import verb_of


@pytest.mark.parametrize(
    ("typed", "verb"),
    [
        ("pretrain a.yaml train.steps=3", "pretrain"),
        ("--debug finetune a.yaml", "finetune"),
        ("--local_rank=3 pretrain a.yaml", "pretrain"),
        ("--local_rank 3 pretrain a.yaml", "pretrain"),
        ("--local-rank 3 --debug pretrain", "pretrain"),
        ("--version", ""),
        ("", ""),
    ],
)
def test_the_verb_is_the_first_word_that_is_no_option(typed: str, verb: str) -> None:
    assert verb_of(typed.split()) == verb
