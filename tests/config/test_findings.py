"""What is said of a wrong config: the key that other programs call so, the kind of file, and values in plain words."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.data import TokenizerRecipe
from moe_lm.config.findings import all_keys, hint
from moe_lm.config.reading import kind_of, load_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.config.section import Section
from moe_lm.config.synonyms import ADVICE, NAMES
from tests.config.test_run import FINETUNE, PRETRAIN, write

CONFIGS = (PretrainConfig, FinetuneConfig, TokenizerRecipe)
# Where a new user writes it, as others call it; and what must be named.
FOREIGN = """
    learning_rate train.optimizer.lr                          train.learning_rate train.optimizer.lr
    lr train.optimizer.lr                                     max_lr train.optimizer.lr
    train.max_grad_norm train.clip_norm                       grad_clip train.clip_norm
    gradient_accumulation_steps train.micro_batch_size        model.num_local_experts model.n_routed_experts
    model.num_experts model.n_routed_experts                  model.n_experts model.n_routed_experts
    model.top_k model.num_experts_per_tok                     moe_router_topk model.num_experts_per_tok
    n_layer model.num_hidden_layers                           model.num_layers model.num_hidden_layers
    n_embd model.hidden_size                                  n_head model.num_attention_heads
    model.num_heads model.num_attention_heads                 d_model model.hidden_size
    block_size data.sequence_length                           max_length data.sequence_length
    max_seq_length data.sequence_length                       batch_size train.global_batch_size
    per_device_train_batch_size train.micro_batch_size        max_iters train.steps
    max_steps train.steps                                     warmup_iters train.schedule.warmup_steps
    warmup_ratio train.schedule.warmup_steps                  min_lr train.schedule.min_ratio
    lr_scheduler_type train.schedule.name                     optimizer.type train.optimizer.name
    weight_decay train.optimizer.weight_decay                 save_steps checkpoint.every
    checkpoint.interval checkpoint.every                      save_total_limit checkpoint.keep
    eval_steps train.eval_every                               eval_iters train.eval_batches
    logging_steps log.every                                   report_to log.trackers
    log.wandb log.trackers                                    log.tensorboard log.trackers
    output_dir run_dir                                        bf16 train.precision=bfloat16
    dtype train.precision                                     gradient_checkpointing train.activation_checkpointing
    router_aux_loss_coef train.balance.batch_loss             parallel.ep parallel.expert_parallel_size
    parallel.tp parallel.expert_parallel_size                 parallel.dp --gpus
    world_size --gpus                                         parallel.fsdp parallel.zero_stage=3
    dropout lora.dropout                                      r lora.rank
    target_modules lora.targets                               rope_scaling_factor model.rope_scaling.factor
    checkpoint.best_metric remove                             tokens train.tokens
    num_epochs train.epochs                                         epochs train.epochs
    resume_from_checkpoint same                               attn_implementation parallel.attention_kernel
    --learning-rate train.optimizer.lr                        trian train
    model.hiden_size model.hidden_size
""".split()


@pytest.mark.parametrize(("foreign", "ours"), list(zip(FOREIGN[::2], FOREIGN[1::2], strict=True)))
def test_foreign_name_is_answered_with_ours(foreign: str, ours: str) -> None:
    """Whatever section it stands in; a hint never names a wrong key."""
    said = hint(PretrainConfig, foreign.lstrip("-").split("."), CONFIGS) or "remove it"
    assert ours in said


def test_fine_tuning_has_its_own_names() -> None:
    assert hint(FinetuneConfig, ["lora", "r"]) == "it is lora.rank here"
    assert hint(FinetuneConfig, ["lora", "target_modules"]) == "it is lora.targets here"
    assert hint(FinetuneConfig, ["data", "datasets"]) == "it is data.train here"
    told = hint(FinetuneConfig, ["num_local_experts"], [PretrainConfig])
    assert told == "it is model.n_routed_experts, which this kind of config does not have; remove it"


def test_the_table_names_keys_that_are_there() -> None:
    keys = {key for kind in CONFIGS for key in all_keys(kind)}
    ours = {name.partition("=")[0] for name in NAMES}
    assert ours - keys == set()


def test_no_name_of_the_table_is_a_key_in_its_own_place() -> None:
    """Nor is it advised on and named both."""
    foreign = {name: ours for ours, names in NAMES.items() for name in names.split()}
    keys = {key for kind in CONFIGS for key in all_keys(kind)}
    for name, ours in foreign.items():
        assert f"{ours.rpartition('.')[0]}.{name}".lstrip(".") not in keys
    advised = [name for names in ADVICE for name in names.split()]
    assert len(advised) == len(set(advised))
    assert [name for name in advised if name in foreign] == []


@pytest.mark.parametrize("key", ["checkpoint.best_metric", "zzz", "model.base", "train.warmth", "data.sharding"])
def test_no_hint_is_better_than_a_wrong_one(key: str) -> None:
    assert hint(PretrainConfig, key.split(".")) is None


def test_a_key_with_several_places_names_them() -> None:
    assert hint(PretrainConfig, ["every"]) == "did you mean checkpoint.every or log.every?"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.optimizer=muon", "train.optimizer='muon' is one value, and train.optimizer is a section; set its keys"),
        ("train=5", "train=5 is one value, and train is a section; set its keys, like train.steps"),
        ("train=", "train is empty; give it keys, like train.steps"),
        ("data.sources=books.txt", "data.sources='books.txt' is not a list; write [books.txt]"),
        ("train.steps=true", "train.steps: true is not a number; give one"),
        ("train.tokens=yes", "train.tokens: true is not a number; give one"),
        ("data.sources=[books.txt]", "data.sources.0='books.txt' is not a section; write its keys, like {name: ..."),
        ("data.sources=[]", "data.sources is an empty list"),
        ("data.sources=[{name: my books, path: x}]", "data.sources.0.name='my books' may only have letters, digits"),
        ("run_dir=", "run_dir is empty; give it a value"),
        ("train.steps=None", "train.steps='None' is not an integer"),
        ("train.steps=1.5", "train.steps=1.5 is not an integer"),
        ("train.steps=1e3", "train.steps='1e3' is not an integer; write 1000"),
        ("train.optimizer.lr=fast", "train.optimizer.lr='fast' is not a number"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas has too few values"),
        ("train.compile=maybe", "train.compile='maybe' is neither true nor false"),
        ("data.sources.0.name=7", "data.sources.0.name=7 is not text; put it in quotes"),
    ],
)
def test_a_wrong_value_is_said_once_and_in_plain_words(override: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", PRETRAIN)
    with pytest.raises(UsageError) as refused:
        load_config(PretrainConfig, path, [override])
    message = str(refused.value)
    assert message.startswith(f"{path}: {said}")
    assert not [word for word in ("pydantic", "<class", "instance of", "tuple", "; data") if word in message]


def test_an_entry_of_a_list_is_overridden_by_its_number(tmp_path: Path) -> None:
    values = {"data": PRETRAIN["data"] | {"sources": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]}}
    path = write(tmp_path / "x.yaml", PRETRAIN | values)
    config = load_config(PretrainConfig, path, ["data.sources.1.weight=2", "data.sources.0.path=c"])
    assert [(source.path, source.weight) for source in config.data.sources] == [("c", 1), ("b", 2)]
    path = write(tmp_path / "y.yaml", FINETUNE)
    assert load_config(FinetuneConfig, path, ["data.train.0=b.jsonl"]).data.train[0].path == "b.jsonl"
    for override, said in (
        ("data.train.1=b.jsonl", "data.train is a list; name an entry by its number, from 0 to 0"),
        (
            "data.train.path=b.jsonl",
            "data.train is a list; name an entry by its number, from 0 to 0, as in data.train.0.path",
        ),
        ("data.train.0.path=b.jsonl", "data.train.0 is not a section"),
    ):
        with pytest.raises(UsageError, match=said):
            load_config(FinetuneConfig, path, [override])


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (PretrainConfig, FINETUNE, "x.yaml is a fine-tuning config (it has data.train): moe-lm finetune"),
        (FinetuneConfig, PRETRAIN, "x.yaml is a pretraining config (it has model, data.sources, data.shards): moe-lm"),
        (PretrainConfig, {"output": "t", "vocab_size": 9, "sources": []}, "is the recipe of a tokenizer (it has outp"),
        (TokenizerRecipe, PRETRAIN, "is a pretraining config"),
    ],
)
def test_a_config_of_another_kind_says_what_it_is(
    kind: type[Section], values: object, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.yaml", values)
    with pytest.raises(UsageError) as refused:
        load_config(kind, path)
    assert said in str(refused.value)
    assert ";" not in str(refused.value)


def test_the_kind_of_a_run_is_told_by_its_keys(tmp_path: Path) -> None:
    assert kind_of(write(tmp_path / "x.yaml", PRETRAIN | {"start_from": "runs/x"})) is PretrainConfig
    write(tmp_path / "data.yaml", FINETUNE["data"])
    assert kind_of(write(tmp_path / "y.yaml", FINETUNE | {"data": "data.yaml"})) is FinetuneConfig


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  steps 3\n  lr: 2\n", "in line 3 ('lr: 2'); look there and at the line before"),
        ("train\n  steps: 3\n", "in line 2 ('steps: 3'); look there and at the line before"),
        ("train:\n\tsteps: 3\n", "in line 2 ('steps: 3'); indent with spaces"),
        ("run_dir: 'a\nb: 3\n", "look there and at line 1, which begins what does not end"),
        ("", "x.yaml is empty, expected `key: value` lines"),
    ],
)
def test_a_slip_in_the_yaml_is_shown_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        load_config(PretrainConfig, write(tmp_path / "x.yaml", text))
    assert said in str(refused.value)
    assert "<unicode string>" not in str(refused.value)
