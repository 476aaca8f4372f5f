"""Train a byte-level BPE tokenizer, and measure how well a tokenizer compresses a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from moe_lm.config.data import SourceConfig, TokenizerRecipe
from moe_lm.text.sources import Report, read_documents
from moe_lm.text.split import held_out
from moe_lm.tokenizer.chat.template import own_template
from moe_lm.tokenizer.tokenizer import Tokenizer, split_text

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
LONGEST_TOKEN = 16  # bytes
MEASURED_BYTES = 8 << 20  # of text that is measured after training: encoding all of it would take longer than training

# GPT-4's split (tiktoken's cl100k_base): contractions, words with the character before them, numbers by three digits,
# punctuation, indentation. A run is cut at 128 characters, which real text hardly reaches, because BPE training is
# quadratic in its length: the letter a a million times, as one word, took 486 s uncut and takes 1 s cut.
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}{1,128}|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]{1,128}[\r\n]{0,128}|\s{0,128}[\r\n]{1,128}|\s{1,128}(?!\S)|\s{1,128}"
)


def train_tokenizer(recipe: TokenizerRecipe, progress: Callable[[Report], None] | None = None) -> Tokenizer:
    """Build a byte-level BPE tokenizer; the same recipe and text give the same files to the byte.

    The text is streamed. Memory grows with the number of distinct words, so give large sources a `max_bytes`.
    `progress` is called after every document and at the end, with the counts of what was read and skipped so far.
    The vocabulary is smaller than asked for when the text has too few repeated pairs.
    Raises UsageError when a source does not exist or has no usable document.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # a letter for each byte
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _training_text(recipe, progress or (lambda report: None)),
        trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            min_frequency=2,  # a pair seen once is not worth an id
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=LONGEST_TOKEN + 1,  # the library's limit is exclusive
            show_progress=False,
        ),
    )
    # For other programs, which ask the tokenizer for special tokens around a text: a document begins with <|bos|>.
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", SPECIAL_TOKENS.index("<|bos|>"))]
    )
    template = own_template()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    return Tokenizer(backend, config)


def _training_text(recipe: TokenizerRecipe, progress: Callable[[Report], None]) -> Iterator[str]:
    report = Report()
    for source in recipe.sources:
        for document in read_documents(source, report):
            if not held_out(document.id, recipe.validation_fraction):
                yield from split_text(document.text)
            progress(report)
    progress(report)


@dataclass(frozen=True)
class SourceMeasure:
    """The measure of a tokenizer on one source, which is one language when the sources are divided by language."""

    name: str
    read: Report
    measured_bytes: int  # of text that was encoded: all that was read, or a sample
    tokens: int
    round_trip_failures: int  # documents that decode to another text

    @property
    def bytes_per_token(self) -> float:
        return self.measured_bytes / self.tokens


@dataclass(frozen=True)
class TokenizerMeasure:
    """The measure of a tokenizer on all sources."""

    vocab_size: int
    fingerprint: str
    sources: tuple[SourceMeasure, ...]
    longest_tokens: tuple[str, ...]  # longest first, by bytes
    unused_ids: int  # ids, without the special ones, that no document used

    def __str__(self) -> str:
        lines = [f"vocabulary {self.vocab_size:,}, fingerprint {self.fingerprint[:12]}"]
        is_sample = any(source.measured_bytes < source.read.text_bytes for source in self.sources)
        for source in self.sources:
            sample = f"in a sample of {source.measured_bytes:,}: " if is_sample else ""
            lines += [
                f"{source.name}: {source.read.documents:,} documents, {source.read.text_bytes:,} bytes, {sample}"
                f"{source.bytes_per_token:.3f} bytes per token, {source.round_trip_failures} inexact round trips",
                *(f"  {line}" for line in source.read.skipped_lines()),
            ]
        if self.sources:
            text = "the sample" if is_sample else "this text"
            lines.append(f"ids that {text} does not use: {self.unused_ids:,}")
        return "\n".join([*lines, "longest tokens: " + " ".join(map(repr, self.longest_tokens))])


def inspect(
    tokenizer: Tokenizer, sources: Sequence[SourceConfig], longest: int = 20, share: float = 1.0
) -> TokenizerMeasure:
    """Measure compression and round trips on each source, document by document, and list the longest tokens.

    `share` is that of the documents to encode, chosen by their hash; at least one of each source is.
    """
    used: set[int] = set()
    measures = []
    for source in sources:
        read = Report()
        measured = tokens = failures = 0
        for document in read_documents(source, read):
            if measured and share < 1 and not held_out(document.id, share):
                continue
            ids = tokenizer.encode(document.text)
            measured += len(document.text.encode())
            tokens += len(ids)
            failures += tokenizer.decode(ids) != document.text
            used.update(ids)
        measures.append(SourceMeasure(source.name, read, measured, tokens, failures))
    ordinary = set(range(tokenizer.vocab_size)) - set(tokenizer.special_tokens.values())
    texts = sorted((tokenizer.decode([id_]) for id_ in ordinary), key=lambda text: (-len(text.encode()), text))
    return TokenizerMeasure(
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        sources=tuple(measures),
        longest_tokens=tuple(texts[:longest]),
        unused_ids=len(ordinary - used),
    )
