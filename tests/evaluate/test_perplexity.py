"""Scores against their definition, token by token with the context of its window; refusals; baselines."""

from __future__ import annotations

import itertools
import lzma
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.data import ChatDataConfig, DataConfig, SourceConfig
from moe_lm.config.reading import dump_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.prepare import prepare
from moe_lm.evaluate.perplexity import (
    context_scores,
    evaluate,
    score_by_context,
    score_documents,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)
from moe_lm.kernels.native import build
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import MoeLm, SaveRun
from tests.processes import ROOT
from tests.tiny import logits_of, tiny_model

WINDOW = 12
BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(vocab_size=1024, max_position_embeddings=32)


def random_documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 1024, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def nll(model: LanguageModel, context: Sequence[int], token: int) -> float:
    """Negative log-likelihood of one token after a context, in nats."""
    return -float(logits_of(model, context)[-1].log_softmax(-1)[token])


def by_definition(model: LanguageModel, ids: list[int], window: int, stride: int) -> float:
    """Sum over every token but the first, each after its context in the window that scores it."""
    total = 0.0
    for place in range(1, len(ids)):
        steps = max(0, -(-(place - window) // stride))  # strides until a window reaches this token
        window_end = min(len(ids) - 1, window + steps * stride)
        total += nll(model, ids[max(0, window_end - window) : place], ids[place])
    return total


def test_a_document_in_one_window_is_scored_with_its_whole_context(model: LanguageModel) -> None:
    documents = random_documents(WINDOW + 1, 5, 2)
    expected = sum(nll(model, ids[:place], ids[place]) for ids in documents for place in range(1, len(ids)))
    nll_sum, tokens = score_documents(model, documents, WINDOW)
    assert nll_sum == pytest.approx(expected, rel=1e-5)
    assert tokens == WINDOW + 4 + 1


@pytest.mark.parametrize("stride", [1, 5, WINDOW])
@pytest.mark.parametrize("length", [WINDOW + 1, WINDOW + 2, 2 * WINDOW + 1, 31])
def test_every_token_is_scored_once_in_the_window_that_reaches_it(
    model: LanguageModel, length: int, stride: int
) -> None:
    [ids] = random_documents(length)
    nll_sum, tokens = score_documents(model, [ids], WINDOW, stride)
    assert tokens == length - 1
    assert nll_sum == pytest.approx(by_definition(model, ids, WINDOW, stride), rel=1e-5)


def test_half_a_window_is_the_default_stride(model: LanguageModel) -> None:
    documents = random_documents(40)
    assert score_documents(model, documents, WINDOW) == score_documents(model, documents, WINDOW, WINDOW // 2)


def test_batches_change_nothing(model: LanguageModel) -> None:
    documents = random_documents(1, 30, 0, 3, 13, 14, 60, 2)
    one_by_one = [score_documents(model, [ids], WINDOW) for ids in documents]
    nll_sum, tokens = map(sum, zip(*one_by_one, strict=True))
    for batch_rows in (1, 3, 100):
        scored = score_documents(model, documents, WINDOW, batch_rows=batch_rows)
        assert scored == (pytest.approx(nll_sum, rel=1e-6), tokens)


def test_loss_by_position_is_that_of_tokens_with_so_many_before_them(model: LanguageModel) -> None:
    """A document's windows lie behind each other, the last one at its end."""
    documents = random_documents(2 * WINDOW + 6, 4)
    found, counts = score_by_context(model, documents, WINDOW, WINDOW)
    expected = torch.zeros(WINDOW + 1, dtype=torch.float64)
    tokens = [0] * (WINDOW + 1)
    for ids in documents:
        for place in range(1, len(ids)):
            before = (place - 1) % WINDOW + 1
            if place > 2 * WINDOW:  # in the window that ends with the document
                before = WINDOW - (len(ids) - 1 - place)
            expected[before] += nll(model, ids[place - before : place], ids[place])
            tokens[before] += 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert counts.tolist() == tokens


def test_context_is_told_in_buckets_that_double() -> None:
    losses, counts = torch.arange(129.0, dtype=torch.float64), torch.ones(129, dtype=torch.int64)
    counts[0] = 0
    counts[33:65] = 0
    found = context_scores(losses * counts, counts)
    assert [(score.context, score.tokens, score.nll) for score in found] == [
        (range(1, 33), 32, 16.5), (range(65, 129), 64, 96.5),
    ]  # fmt: skip
    assert str(found[1]).split() == ["65", "to", "128", "64", "96.5000", f"{math.exp(96.5):.3f}"]


def test_nothing_to_score_is_zero_tokens(model: LanguageModel) -> None:
    assert score_documents(model, [], WINDOW) == (0.0, 0)


def test_bfloat16_is_near_float32_and_not_equal(model: LanguageModel) -> None:
    documents = random_documents(60, 60)
    exact, _ = score_documents(model, documents, WINDOW)
    rounded, _ = score_documents(model, documents, WINDOW, dtype=torch.bfloat16)
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact


@pytest.mark.parametrize("stride", [0, WINDOW + 1])
def test_a_stride_that_repeats_or_skips_tokens_is_refused(model: LanguageModel, stride: int) -> None:
    with pytest.raises(UsageError, match=f"stride={stride} does not fit windows of 12 tokens; give 1 to 12"):
        score_documents(model, random_documents(40), WINDOW, stride)


def changed(model: LanguageModel, head: Tensor) -> LanguageModel:
    """A copy of the model with another head."""
    other = LanguageModel(model.config)
    other.load_state_dict(model.state_dict() | {"lm_head.weight": head})
    return other


def test_a_uniform_model_needs_log2_of_the_vocabulary(model: LanguageModel, tmp_path: Path, save_run: SaveRun) -> None:
    run = save_run(changed(model, torch.zeros(1024, 32)), dump_config(pretrain_config(tmp_path, model)))
    (tmp_path / "text.txt").write_text("The same text.\n" * 30)
    result = evaluate(run, [tmp_path / "text.txt"])
    assert result.nll / math.log(2) == pytest.approx(10, rel=1e-6)
    assert result.perplexity == pytest.approx(1024, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(10 * result.tokens / result.text_bytes, rel=1e-6)


def pretrain_config(tmp_path: Path, model: LanguageModel, **data: object) -> PretrainConfig:
    values: dict[str, object] = {
        "sources": (SourceConfig(name="a", path=str(tmp_path / "a")), SourceConfig(name="b", path=str(tmp_path / "b"))),
        "tokenizer": ROOT / "tokenizer" / "tiny",
        "shards": tmp_path / "shards",
        "validation_fraction": 0.3,
        "sequence_length": WINDOW,
        "workers": 1,
    }
    return PretrainConfig(
        run_dir=tmp_path / "run",
        model=model.config,
        data=DataConfig.model_validate(values | data),
        train=TrainConfig(steps=1, global_batch_size=1, precision="float32"),
    )


@pytest.fixture
def run(tmp_path: Path, model: LanguageModel, save_run: SaveRun) -> Path:
    """A run without prepared shards."""
    return save_run(model, dump_config(pretrain_config(tmp_path, model)))


def test_windows_beyond_those_of_the_training_are_scored_by_position(
    tmp_path: Path, model: LanguageModel, run: Path, save_run: SaveRun, moe_lm: MoeLm
) -> None:
    """40 tokens of context are more than the 12 of a row and the 32 positions that the model knows."""
    (tmp_path / "text.txt").write_text("The same text, and no other.\n" * 30)
    result = evaluate(run, [tmp_path / "text.txt"], window=40, by_position=True)
    assert [score.context for score in result.by_context] == [range(1, 21), range(21, 41)]
    assert sum(score.tokens for score in result.by_context) == result.tokens
    assert sum(score.tokens * score.nll for score in result.by_context) == pytest.approx(result.tokens * result.nll)
    done = moe_lm("eval", run, tmp_path / "text.txt", "--by-position", "--window", 40)
    assert done.out.splitlines()[3].split() == ["tokens", "of", "context", "tokens", "loss", "perplexity"]
    assert [line.split()[:3] for line in done.out.splitlines()[4:]] == [["1", "to", "20"], ["21", "to", "40"]]
    done = moe_lm("eval", run, tmp_path / "text.txt", "--by-position", "--stride", 4)
    assert (done.code, "--stride 4 has no meaning for --by-position" in done.err) == (2, True)
    learned = tiny_model(vocab_size=1024, max_position_embeddings=32, position_embedding="learned")
    other = save_run(learned, dump_config(pretrain_config(tmp_path, learned)))
    with pytest.raises(UsageError, match="--window 40 is longer than the 32 positions"):
        evaluate(other, [tmp_path / "text.txt"], window=40)


def write_sources(tmp_path: Path) -> None:
    for source in ("a", "b"):
        (tmp_path / source).mkdir()
        for number in range(10):
            (tmp_path / source / f"{number}.txt").write_text(f"Source {source}, text {number}.\n" * (number + 1))


def test_without_files_the_held_out_text_of_every_source_is_scored(
    tmp_path: Path, model: LanguageModel, run: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_sources(tmp_path)
    manifests = prepare(pretrain_config(tmp_path, model).data).manifests.values()
    held_out = [shard for manifest in manifests for shard in manifest.validation]
    result = evaluate(run, stride=3)
    assert result.documents == sum(shard.documents for shard in held_out) > 2
    assert result.text_bytes == sum(shard.text_bytes for shard in held_out)
    assert result.tokens == sum(shard.tokens for shard in held_out) - result.documents

    files = [file for name in "ab" for file in sorted((tmp_path / "shards" / name).glob("validation-*.bin"))]
    stream = [token for file in files for token in np.fromfile(file, "<u2").tolist()]
    ends = [0, *(place + 1 for place, token in enumerate(stream) if token == EOS)]
    documents = [stream[start:stop] for start, stop in itertools.pairwise(ends)]
    expected = sum(by_definition(model, ids, WINDOW, 3) for ids in documents)
    assert result.nll * result.tokens == pytest.approx(expected, rel=1e-5)


def test_every_source_and_every_file_has_a_line_and_all_together_the_last(
    tmp_path: Path, model: LanguageModel, run: Path, moe_lm: MoeLm
) -> None:
    write_sources(tmp_path)
    prepare(pretrain_config(tmp_path, model).data)
    told: list[tuple[int, int]] = []
    result = evaluate(run, tell=lambda done, total: told.append((done, total)))
    assert [part.text for part in result.parts] == ["a", "b"]
    assert told == sorted(told)
    assert told[-1] == (result.tokens, result.tokens)

    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for number, file in enumerate(files, 1):
        file.write_text("A text of some words.\n" * number)
    alone = [evaluate(run, [file]) for file in files]
    assert alone[0].parts == ()
    both = evaluate(run, files)
    assert [(part.text, part.tokens, part.nll) for part in both.parts] == [
        (item.text, item.tokens, pytest.approx(item.nll, rel=1e-6)) for item in alone
    ]
    assert both.text_bytes == 3 * 22
    assert both.nll * both.tokens == pytest.approx(sum(item.nll * item.tokens for item in alone), rel=1e-6)
    lines = moe_lm("eval", run, *files).out.splitlines()
    assert lines == [
        f"{files[0]}: {alone[0].figures} (22 bytes)", f"{files[1]}: {alone[1].figures} (44 bytes)",
        f"{files[0]}, {files[1]}: 2 documents, 66 bytes, {both.tokens} tokens", both.figures,
    ]  # fmt: skip


def test_a_text_file_is_one_document_with_its_end(
    tmp_path: Path, model: LanguageModel, run: Path, tiny_tokenizer: Tokenizer
) -> None:
    text = "Größe, 大小, and size\r\n" * 4
    (tmp_path / "plain.txt").write_bytes(text.encode())
    ids = [BOS, *tiny_tokenizer.encode(text), EOS]
    result = evaluate(run, [tmp_path / "plain.txt"])
    assert (result.documents, result.tokens, result.text_bytes) == (1, len(ids) - 1, len(text.encode()))
    nll_sum = by_definition(model, ids, WINDOW, WINDOW // 2)
    assert result.nll == pytest.approx(nll_sum / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll_sum / result.tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nll_sum / math.log(2) / len(text.encode()), rel=1e-5)
    assert f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte" in str(result)


def test_files_are_decompressed_and_rows_are_documents(tmp_path: Path, run: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt.xz").write_bytes(lzma.compress(b"two"))
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    plain = evaluate(run, [tmp_path / "one.txt", tmp_path / "two.txt.xz"])
    rows = evaluate(run, [tmp_path / "rows.jsonl"])
    assert plain.documents == rows.documents == 2
    assert (plain.text_bytes, plain.tokens) == (rows.text_bytes, rows.tokens)
    assert plain.nll == pytest.approx(rows.nll, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty.txt is empty; there is nothing to score"),
        ("latin.txt", b"caf\xe9 au lait", r"latin.txt is not UTF-8 text: .* at byte 3; convert it first"),
        ("cut.txt.xz", lzma.compress(b"text")[:-8], r"cannot read .*cut.txt.xz: "),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', r"bad.jsonl has rows that cannot be scored: .*bad.jsonl:2"),
        ("empty.jsonl", b"", r"empty.jsonl.* has no usable document: it is empty"),
        ("folder/missing.txt", None, r"there is no file .*missing.txt"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    tmp_path: Path, run: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        evaluate(run, [tmp_path / name])


def test_a_run_without_prepared_text_is_told_what_to_do(run: Path) -> None:
    with pytest.raises(UsageError, match=r"there are no shards in .* yet; run moe-lm prepare with the run's config"):
        evaluate(run)


def test_a_run_that_held_nothing_out_is_told_what_to_do(
    tmp_path: Path, model: LanguageModel, save_run: SaveRun
) -> None:
    write_sources(tmp_path)
    config = pretrain_config(tmp_path, model, validation_fraction=0.0)
    prepare(config.data)
    with pytest.raises(UsageError, match=r"have no held-out text \(validation_fraction=0.0\); give text files"):
        evaluate(save_run(model, dump_config(config)))


def test_a_fine_tuned_run_scores_files_and_names_its_base(
    tmp_path: Path, model: LanguageModel, save_run: SaveRun
) -> None:
    config = FinetuneConfig(
        run_dir=tmp_path / "run",
        start_from=Path("runs/base"),
        data=ChatDataConfig(train=(Path("chat.jsonl"),), sequence_length=WINDOW),
        train=TrainConfig(steps=1, global_batch_size=1, precision="float32"),
    )
    run = save_run(model, dump_config(config))
    (tmp_path / "text.txt").write_text("text")
    assert evaluate(run, [tmp_path / "text.txt"]).documents == 1
    with pytest.raises(UsageError, match=r"run was fine-tuned on conversations .*started from, runs/base"):
        evaluate(run)


def test_scoring_does_not_compile_the_cpp_of_decoding(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(build, "library", lambda: compiled.append("few_rows"))
    (tmp_path / "text.txt").write_text("text")
    evaluate(run, [tmp_path / "text.txt"])
    assert not compiled


def test_damaged_weights_are_a_clear_error(tmp_path: Path, model: LanguageModel, save_run: SaveRun) -> None:
    broken = changed(model, torch.full((1024, 32), torch.nan))
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(MoeLmError, match=r"the loss of .*step-00000001 is nan"):
        evaluate(save_run(broken, dump_config(pretrain_config(tmp_path, model))), [tmp_path / "text.txt"])


def test_xz_baseline_is_the_size_of_the_compressed_text() -> None:
    noise = np.random.default_rng(0).bytes(5000)
    assert xz_bits_per_byte(noise) == pytest.approx(8 * len(lzma.compress(noise, preset=9)) / 5000)
    assert xz_bits_per_byte(b"a" * 5000) < 0.2


def test_unigram_baseline_is_the_smoothed_frequency() -> None:
    counts = np.array([0, 3, 1, 0])  # of 4 tokens; smoothed 1/8, 4/8, 2/8, 1/8
    assert unigram_bits_per_byte(counts, np.array([1, 1, 2, 3]), text_bytes=10) == pytest.approx((1 + 1 + 2 + 3) / 10)
