"""Fine-tuning: the held-out loss falls, the assistant's words alone count, and where it may not start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig
from moe_lm.data.examples import ExampleRows, read_chat
from moe_lm.data.packing import RowBatches
from moe_lm.generate.session import Session
from moe_lm.model.attention import PackedAttention
from moe_lm.objective.training_loss import num_targets
from moe_lm.parallel.topology import Topology
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train import finetune
from tests.processes import metrics
from tests.runs import MoeLm, assert_resumes_to_the_bit, tensors

pytestmark = pytest.mark.usefixtures("one_thread")


def nll_of_answers(start: Path, messages: list[list[dict[str, str]]]) -> tuple[float, int]:
    """One conversation at a time, and of each the answer and the token that ends it, spelled out by hand."""
    session = Session.load(start, device="cpu")
    tokenizer, total, count = session.tokenizer, 0.0, 0
    for turns in messages:
        prompt = tokenizer.encode_chat(turns[:-1], add_generation_prompt=True)[0]
        answer = [*tokenizer.encode(turns[-1]["content"]), tokenizer.end_id]
        ids = torch.tensor([[*prompt, *answer]])[:, :-1]
        attend = PackedAttention(torch.tensor([0, ids.shape[1]], dtype=torch.int32), ids.shape[1])
        with torch.no_grad():
            logits = session.model(ids, torch.arange(ids.shape[1])[None], attend).logits[0, len(prompt) - 1 :]
        total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return total, count


def held_out_messages(finetune_config: Path, tokenizer: Tokenizer) -> list[list[dict[str, str]]]:
    """Read back from the tokens of the held-out conversations."""
    found = []
    for item in read_chat(load_config(FinetuneConfig, finetune_config).data, tokenizer).validation:
        text = tokenizer.decode(item.input_ids.tolist(), skip_special=False)
        asked, answer = text.removeprefix("<|bos|><|user|>").split("<|end|>")[:2]
        found.append(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answer.removeprefix("<|assistant|>")}]
        )
    return found


# What it computes


def test_the_held_out_loss_is_measured_before_and_falls(finetune_config: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    assert moe_lm("finetune", finetune_config, "train.steps=40").code == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(41))
    assert lines[0].keys() == {"step", "val_loss", "time", "tokens_so_far"}
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] / 2


def test_only_the_assistants_tokens_count(
    finetune_config: Path, tmp_path: Path, pretrained: Path, tiny_tokenizer: Tokenizer, moe_lm: MoeLm
) -> None:
    held_out = held_out_messages(finetune_config, tiny_tokenizer)
    assert 15 <= len(held_out) <= 45
    nll, tokens = nll_of_answers(pretrained, held_out)
    conversations = read_chat(load_config(FinetuneConfig, finetune_config).data, tiny_tokenizer).train
    rows = len(ExampleRows(conversations, 64, tiny_tokenizer.pad_id))
    assert moe_lm("finetune", finetune_config, "train.steps=2", f"train.global_batch_size={rows}").code == 0
    lines = metrics(tmp_path / "run")
    assert lines[0]["val_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    answers = [
        json.loads(line).get("output") or json.loads(line)["messages"][1]["content"]
        for line in (tmp_path / "chat.jsonl").read_text().splitlines()
    ]
    assert lines[1]["targets"] == sum(len(tiny_tokenizer.encode(answer)) + 1 for answer in answers) - tokens


def test_it_starts_from_the_weights_and_biases_of_a_run_or_one_of_its_checkpoints(
    finetune_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    (checkpoint,) = (pretrained / "checkpoints").iterdir()
    first = []
    for name, start in (("run", pretrained), ("checkpoint", checkpoint)):
        settings = (f"run_dir={tmp_path / name}", f"start_from={start}", "train.steps=1", "train.optimizer.lr=1e-30")
        assert moe_lm("finetune", finetune_config, *settings, "train.balance.bias_update_rate=0").code == 0
        first.append(metrics(tmp_path / name)[0]["val_loss"])
        (saved,) = (tmp_path / name / "checkpoints").iterdir()
        weights, start_weights = tensors(saved, "model"), tensors(checkpoint, "model")
        assert weights.keys() == start_weights.keys()
        assert [name for name in weights if not torch.equal(weights[name], start_weights[name])] == []
    assert first[0] == first[1]


@pytest.mark.parametrize(
    "settings",
    [pytest.param((), marks=pytest.mark.slow), ("train.scheduled_sampling={share: 0.5, ramp_steps: 8}",)],
)
def test_a_killed_fine_tuning_resumes_to_the_bit(
    finetune_config: Path, tmp_path: Path, moe_lm: MoeLm, settings: tuple[str, ...]
) -> None:
    assert_resumes_to_the_bit(moe_lm, tmp_path, finetune_config, *settings)


def test_it_goes_on_without_the_run_it_began_with(
    finetune_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    shutil.copytree(pretrained, tmp_path / "base")
    command = ("finetune", finetune_config, f"start_from={tmp_path / 'base'}", "train.steps=4", "checkpoint.every=2")
    assert moe_lm(*command, "checkpoint.keep=9").code == 0
    run_dir = Path(load_config(FinetuneConfig, finetune_config).run_dir)
    expected = metrics(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "base")
    done = moe_lm(*command)
    assert done.code == 0, done.err
    assert "going on after step 2 of 4" in done.out
    assert [line["loss"] for line in metrics(run_dir)[1:]] == [line["loss"] for line in expected[1:]]


def test_the_limit_of_an_evaluation_holds(finetune_config: Path, tiny_tokenizer: Tokenizer) -> None:
    for micro, limit, rows in (("null", "null", 16), ("null", 1, 8), (2, 1, 8)):
        overrides = [f"train.micro_batch_size={micro}", f"train.eval_batches={limit}"]
        config = load_config(FinetuneConfig, finetune_config, overrides)
        held_out = ExampleRows(read_chat(config.data, tiny_tokenizer).validation, 64, tiny_tokenizer.pad_id, True)
        batches = finetune.held_out_batches(config, held_out, Topology())
        assert sum(len(batch.input_ids) for batch in batches) == rows


def test_epochs_are_those_of_the_packed_rows(
    finetune_config: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, moe_lm: MoeLm
) -> None:
    """In a run as in a dry run, whose checkpoints must fit too."""
    config = load_config(FinetuneConfig, finetune_config, ["train.epochs=0.4"])
    rows = finetune.example_rows(config, tiny_tokenizer, read_chat(config.data, tiny_tokenizer).train)
    steps = -(-len(rows) * 4 // 80)
    assert (
        f"the run         {steps} steps" in moe_lm("finetune", finetune_config, "--train.epochs=0.4", "--dry-run").out
    )
    assert moe_lm("finetune", finetune_config, "train.epochs=0.4").code == 0
    assert metrics(tmp_path / "run")[-1]["step"] == steps > 1


def test_what_was_skipped_is_said(finetune_config: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "say much", "output": "word " * 200}) + "\n")
        file.write(json.dumps({"text": "no conversation"}) + "\n")
    done = moe_lm("finetune", finetune_config, "train.steps=1")
    assert done.code == 0
    assert "longer than sequence_length=64" in done.out
    assert "no messages, conversations, instruction with output, or prompt with completion" in done.out


def test_sources_are_mixed_by_their_weights(
    finetune_config: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, moe_lm: MoeLm
) -> None:
    long = {"prompt": "say much", "completion": "and " * 30}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    sources = f"[{{path: {tmp_path}/chat.jsonl, weight: 1}}, {{path: {tmp_path}/long.jsonl, weight: 3}}]"
    overrides = [f"data.train={sources}", "data.validation_fraction=0", "train.steps=3"]
    assert moe_lm("finetune", finetune_config, *overrides).code == 0
    config = load_config(FinetuneConfig, finetune_config, overrides)
    items = read_chat(config.data, tiny_tokenizer).train
    mixed, plain = (
        RowBatches(
            ExampleRows(items, 64, tiny_tokenizer.pad_id, by_source=bool(weights)), 8, config.train.seed, weights
        )
        for weights in ([1.0, 3.0], None)
    )
    targets = [[num_targets(batches.batch(step, range(8))) for step in range(3)] for batches in (mixed, plain)]
    assert [line["targets"] for line in metrics(tmp_path / "run") if "targets" in line] == targets[0] != targets[1]


def test_preview_shows_what_would_be_trained_on_and_trains_nothing(
    finetune_config: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "say much", "output": "word " * 200}) + "\n")
    for arguments, shown in ((("--preview",), 3), (("--preview", "1"), 1), (("--preview", "train.steps=9"), 3)):
        done = moe_lm("finetune", finetune_config, *arguments)
        assert (done.code, done.err) == (0, "")
        assert done.out.count("<|assistant|>⟦you said ") == done.out.count(".<|end|>⟧\n") == shown
        assert "1 skipped: longer than sequence_length=64 (first: chat.jsonl:151)" in done.out
    assert not (tmp_path / "run").exists()
    assert moe_lm("finetune", finetune_config, "--preview", "0").code == 2


def test_preview_shows_pairs_when_some_answers_are_to_be_preferred(
    finetune_config: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    pair = {"prompt": "say", "chosen": "yes", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    done = moe_lm("finetune", finetune_config, "--preview", "preference={}", f"data.train=[{tmp_path}/pairs.jsonl]")
    assert (done.code, done.err) == (0, "")
    assert "pairs.jsonl:1, chosen" in done.out
    assert "<|assistant|>⟦no<|end|>⟧\n" in done.out
    assert not (tmp_path / "run").exists()


# Where it may not start


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start_from={tmp}/nowhere"], "there is no folder {tmp}/nowhere"),
        (["start_from={tmp}"], "{tmp} holds no complete checkpoint"),
        (["start_from={tmp}/damaged"], "step-00000030 is damaged"),
        (["start_from={tmp}/damaged/checkpoints/step-00000040"], "step-00000040 has no COMPLETE"),
        (["data.sequence_length=9000"], "data.sequence_length=9000 is longer than model.max_position_embeddings=4096"),
        (["data.train=[{tmp}/no.jsonl]"], "conversations {tmp}/no.jsonl do not exist"),
        (["data.train=[{tmp}/empty.jsonl]"], "has no usable conversation: the files are empty"),
        (["run_dir={pretrained}"], "{pretrained} holds a run with other settings"),
        (["data.validation_frction=0.1"], "did you mean data.validation_fraction?"),
    ],
)
def test_a_wrong_start_is_refused(
    finetune_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm, overrides: list[str], message: str
) -> None:
    damaged = tmp_path / "damaged" / "checkpoints"
    shutil.copytree(pretrained / "checkpoints", damaged)
    shutil.copytree(damaged / "step-00000030", damaged / "step-00000040")
    (damaged / "step-00000040" / "COMPLETE").unlink()
    weights = next((damaged / "step-00000030" / "model").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    (tmp_path / "empty.jsonl").write_text("")
    before = (pretrained / "metrics.jsonl").read_bytes()
    places = {"tmp": tmp_path, "pretrained": pretrained}
    done = moe_lm("finetune", finetune_config, *(override.format(**places) for override in overrides))
    assert done.code in (1, 2)
    assert message.format(**places) in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert (pretrained / "metrics.jsonl").read_bytes() == before
