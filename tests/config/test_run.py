"""The config: what is refused and with which words, overrides, sections in files, and the way back to YAML."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_lm.common.errors import UsageError
from moe_lm.config.model import LoraConfig, ModelConfig, check_vocabulary
from moe_lm.config.reading import build_config, dump_config, load_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.config.training import BalanceConfig
from tests.conftest import MoeLm

MODEL = yaml.safe_load("""
    {vocab_size: 512, hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 2,
    intermediate_size: 64, moe_intermediate_size: 16, max_position_embeddings: 128, n_routed_experts: 8,
    num_experts_per_tok: 2, first_k_dense_replace: 1}
""")
PRETRAIN: dict[str, Any] = {"run_dir": "runs/x", "model": MODEL} | yaml.safe_load("""
    data: {sources: [{name: stdlib, stdlib: true}], tokenizer: tokenizer/x, shards: shards/x, sequence_length: 64}
    train: {steps: 10, global_batch_size: 8}
""")
FINETUNE: dict[str, Any] = yaml.safe_load("""
    run_dir: runs/y
    start_from: runs/x
    data: {train: [chat.jsonl]}
    train: {steps: 10, global_batch_size: 8}
""")
LATENT = (
    "model.kv_lora_rank=16 model.qk_nope_head_dim=16 model.qk_rope_head_dim=8 model.v_head_dim=16 "
    "model.num_key_value_heads=null model.use_qk_norm=false"
)
LLAMA3 = "{rope_type: llama3, factor: 8, original_max_position_embeddings: 64, low_freq_factor: 4, high_freq_factor: 4}"

# Settings of a pretraining config (LATENT: with latent attention), and the words of their refusal.
REFUSALS = f"""
    model.num_experts_per_tok=9 | num_experts_per_tok=9 | n_routed_experts=8 | at most 8
    model.n_group=3 | n_group=3 | n_routed_experts=8 | divisor
    model.topk_group=2 | topk_group=2 | n_group=1
    model.n_group=4 ; model.num_experts_per_tok=3 | num_experts_per_tok=3 | choose at most 2
    model.first_k_dense_replace=4 | first_k_dense_replace=4 | num_hidden_layers=3
    model.hidden_size=33 | hidden_size=33 | num_attention_heads=4 | head_dim
    model.num_key_value_heads=3 | num_key_value_heads=3 | num_attention_heads=4
    model.head_dim=7 | head_dim=7 | even
    model.partial_rotary_factor=0.4 | partial_rotary_factor=0.4 | 3 of a head's 8 | even
    model.mlp_only_layers=[1, 3] | mlp_only_layers=[1, 3] | layer 3 | from 0 to 2
    model.rope_scaling={{rope_type: yarn, factor: 4}} | model.rope_scaling | original_max_position
    model.rope_scaling={{rope_type: linear, factor: 4, beta_fast: 32}} \
        | model.rope_scaling | beta_fast=32 | rope_type=linear
    model.rope_scaling={{rope_type: dynamic, factor: 4}} | rope_scaling.rope_type='dynamic' | llama3
    model.rope_scaling={{rope_type: linear, factor: 0.5}} | rope_scaling.factor=0.5 | equal to 1
    model.rope_scaling={LLAMA3} | high_freq_factor=4 | low_freq_factor=4
    model.vocab_size=0 | model.vocab_size=0 | greater than 0
    model.scoring_func=tanh | model.scoring_func='tanh' | sigmoid | softmax
    data.sequence_length=129 | data.sequence_length=129 | model.max_position_embeddings=128
    data.validation_fraction=1.0 | data.validation_fraction=1.0 | less than 1
    train.micro_batch_size=3 | micro_batch_size=3 | global_batch_size=8 | divisor
    train.steps=many | train.steps='many' | integer
    train.optimizer.name=sgd | train.optimizer.name='sgd' | adamw | muon | lamb
    parallel.sequence_parallel_size=3 | sequence_parallel_size=3 | model.num_attention_heads=4 | divisor
    parallel.sequence_parallel_size=4 ; data.sequence_length=34 | sequence_parallel_size=4 | data.sequence_length=34
    parallel.sequence_parallel_size=2 ; model.capacity_factor=1.5 | sequence_parallel_size=2 | model.capacity_factor
    parallel.sequence_parallel_size=2 ; train.scheduled_sampling.share=0.5 \
        | sequence_parallel_size=2 | train.scheduled_sampling | another
    parallel.device=tpu | parallel.device='tpu' | cuda
    log.trackers=[excel] | excel | wandb

    model.n_shared_experts=0 ; model.shared_expert_gate=true | shared_expert_gate=True | n_shared_experts
    model.n_shared_experts=0 ; model.shared_expert_intermediate_size=64 \
        | shared_expert_intermediate_size=64 | n_shared_experts
    model.use_qk_norm=false ; model.qk_norm_over=projection | qk_norm_over=projection | use_qk_norm=False
    model.q_lora_rank=24 | q_lora_rank=24 | needs kv_lora_rank
    model.qk_nope_head_dim=24 | qk_nope_head_dim=24 | needs kv_lora_rank
    model.qk_rope_head_dim=24 | qk_rope_head_dim=24 | needs kv_lora_rank
    model.v_head_dim=24 | v_head_dim=24 | needs kv_lora_rank
    LATENT ; model.qk_nope_head_dim=null | kv_lora_rank=16 | needs qk_nope_head_dim
    LATENT ; model.qk_rope_head_dim=null | kv_lora_rank=16 | needs qk_rope_head_dim
    LATENT ; model.v_head_dim=null | kv_lora_rank=16 | needs v_head_dim
    LATENT ; model.qk_rope_head_dim=7 | qk_rope_head_dim=7 | even
    LATENT ; model.head_dim=16 | head_dim=16 | kv_lora_rank=16 | remove it
    LATENT ; model.num_key_value_heads=2 | num_key_value_heads=2 | kv_lora_rank=16 | set it to 4
    LATENT ; model.use_qk_norm=true | use_qk_norm=True | kv_lora_rank=16 | set it to False
    LATENT ; model.partial_rotary_factor=0.5 | partial_rotary_factor=0.5 | kv_lora_rank=16
    LATENT ; model.position_embedding=learned | position_embedding=learned | kv_lora_rank=16
    model.position_embedding=learned ; model.rope_interleave=true | rope_interleave=True | position_embedding=learned
    model.position_embedding=sinusoidal ; model.rope_scaling={{rope_type: linear, factor: 2}} \
        | rope_scaling= | position_embedding=sinusoidal
    model.position_embedding=learned ; model.partial_rotary_factor=0.5 \
        | partial_rotary_factor=0.5 | position_embedding=learned

    model.num_expert_per_tok=1 | unknown key model.num_expert_per_tok; did you mean model.num_experts_per_tok?
    train.optimiser=1 | unknown key train.optimiser; did you mean train.optimizer?
    train.optimizer.learning=1 | unknown key train.optimizer.learning; remove it
    train.lr=1 | unknown key train.lr; did you mean train.optimizer.lr?
    trian=1 | unknown key trian; did you mean train?
    data.zzzzzz=1 | unknown key data.zzzzzz; remove it
    train={{}} | train.global_batch_size is missing
    train={{global_batch_size: 8}} | train: nothing says how long the run is; set one of steps, tokens, epochs
    train.steps=5 ; train.tokens=1e6 | train: steps=5 and tokens=1e+06 each say how long the run is; keep one of them
    train.epochs=0 | train.epochs=0 | greater than 0
    train.tokens=10Q | train.tokens='10Q' is not a number
    data.sources=[{{name: a, path: a.txt}}, {{name: a, path: b.txt}}] | source names must differ
    data.sources=[{{name: a}}] | source 'a' needs exactly one of path, dataset, stdlib
    data.sources=[{{name: a, path: a.txt, stdlib: true}}] | source 'a' needs exactly one of path, dataset, stdlib
    data.sources=[{{name: a, path: a, dataset: b}}] | source 'a' needs exactly one of path, dataset, stdlib

    data.phases=[{{share: 0.5}}, {{share: 0.4}}] | data: phases: their shares add up to 0.9, expected 1
    data.phases=[{{share: 1, weights: {{web: 1}}}}] | phase 1 reads 'web' | the sources are stdlib
    data.phases=[{{share: 1, weights: {{stdlib: 0}}}}] | phase 1 reads no source
    data.phases=[{{share: 1, weights: {{stdlib: -1}}}}] | data.phases.0.weights.stdlib=-1 | greater than or equal to 0
    data.sources=[{{name: a, path: a}}, {{name: b, path: b}}] ; data.phases=[{{share: 1, weights: {{a: 1}}}}] \
        | none reads source 'b'
    data.phases=[{{share: 1, sequence_length: 256}}] | sequence_length=256 of phase 1 | max_position_embeddings=128
    data.phases=[{{share: 1, sequence_length: 96}}] | sequence_length=96 of phase 1 | 512 tokens of a step | divisor
    data.phases=[{{share: 0.5}}, {{share: 0.5, sequence_length: 96}}] | sequence_length=64 of phase 1 | longest phase
    train.micro_batch_size=1 ; data.phases=[{{share: 1, sequence_length: 128}}] | 64 tokens of a micro-batch
    data.phases=[{{share: 0.99}}, {{share: 0.01}}] | phase 2 of data.phases has no step | train.steps=10 | larger share
    data.phases=[{{share: 1, weight: 1}}] | unknown key data.phases.0.weight; did you mean data.phases.weights?

    train.steps | not of the form section.key=value
    =3 | not of the form section.key=value
    train.steps.deep=3 | train.steps is not a section
    train.steps=[ | not valid YAML
    train.steps=-1 | train.steps=-1
"""


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `values` with `section.key` set."""
    result = copy.deepcopy(values)
    *parents, leaf = key.split(".")
    node = result
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return result


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("line", [line.strip() for line in REFUSALS.splitlines() if line.strip()])
def test_impossible_settings_are_refused_by_name(line: str, tmp_path: Path) -> None:
    """In one line that says what would be right."""
    settings, *words = (part.strip() for part in line.split(" | "))
    overrides = [*LATENT.split(), *settings.split(" ; ")[1:]] if "LATENT" in settings else settings.split(" ; ")
    path = write(tmp_path / "x.yaml", PRETRAIN)
    with pytest.raises(UsageError) as caught:
        load_config(PretrainConfig, path, overrides)
    message = str(caught.value)
    assert message.startswith((f"{path}: ", "override "))
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
    assert "unknown key" not in message or message.endswith(words[0])


def test_vocabulary_smaller_than_the_tokenizer() -> None:
    model = build_config(ModelConfig, MODEL, origin="x.yaml")
    check_vocabulary(model, 512)
    with pytest.raises(UsageError, match=r"model.vocab_size=512 .* tokenizer's 513 ids; .* at least 513"):
        check_vocabulary(model, 513)


@pytest.mark.parametrize(
    ("key", "default"), [("model.moe_layer_freq", 1), ("lora.rank_stabilised", False), ("parallel.deepspeed", {})]
)
def test_a_setting_that_is_gone_and_changed_nothing_is_passed_over(key: str, default: Any) -> None:
    kind: Any
    kind, values = (PretrainConfig, PRETRAIN) if key.startswith("model") else (FinetuneConfig, FINETUNE | {"lora": {}})
    assert build_config(kind, changed(values, key, default), "x.yaml") == build_config(kind, values, "x.yaml")


def test_activation_checkpointing_was_true_or_false_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", changed(PRETRAIN, "train.activation_checkpointing", True))
    assert load_config(PretrainConfig, path).train.activation_checkpointing == "full"
    for value in ("false", "False", "off", "0", "'no'"):
        override = f"train.activation_checkpointing={value}"
        assert load_config(PretrainConfig, path, [override]).train.activation_checkpointing == "none"
    for written in ("True", "'true'", "1", "on"):
        override = f"train.activation_checkpointing={written}"
        assert load_config(PretrainConfig, path, [override]).train.activation_checkpointing == "full"
    with pytest.raises(UsageError, match="'some': input should be 'none', 'selective' or 'full'"):
        load_config(PretrainConfig, path, ["train.activation_checkpointing=some"])


def test_a_setting_that_is_gone_is_said_in_the_settings_that_stay() -> None:
    old = MODEL | {"num_hidden_layers": 5, "mlp_only_layers": [2], "moe_layer_freq": 2}
    assert build_config(ModelConfig, old, "x.yaml").mlp_only_layers == (1, 2, 3)
    lora = build_config(LoraConfig, {"rank": 16, "alpha": 8.0, "rank_stabilised": True}, "x.yaml")
    assert lora.alpha / lora.rank == 8.0 / math.sqrt(16)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "parallel.deepspeed",
            {"dump_state": True},
            "parallel.deepspeed is not a setting any more; remove it, and",
        ),
        ("model.moe_layer_freq", 0, "model.moe_layer_freq is not a setting any more; remove it, and name"),
        ("model.moe_layer_freq", "x", "model.moe_layer_freq is not a setting any more; remove it, and name"),
        ("train.deepspeed", {}, "unknown key train.deepspeed"),
        ("start_with_optimizer", True, "start_with_optimizer=True needs start_from; set it, or take"),
        ("model.max_token_bytes", 16, "unknown key model.max_token_bytes"),
    ],
)
def test_a_setting_that_is_gone_is_refused_where_it_said_something_else(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        build_config(PretrainConfig, changed(PRETRAIN, key, value), "x.yaml")


def test_overrides_are_read_as_yaml_and_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", PRETRAIN)
    overrides = ["train.steps=20", "train.optimizer.lr=1e-3", "train.clip_norm=null", "log.trackers=[tensorboard]"]
    config = load_config(PretrainConfig, path, overrides)
    assert config.train.steps == 20
    assert config.train.optimizer.lr == 1e-3
    assert config.train.clip_norm is None
    assert config.log.trackers == ("tensorboard",)


@pytest.mark.parametrize(
    ("tokens", "steps"), [("10e3", 20), ("10240", 20), ("10241", 21), ("10k", 20), ("1.5M", 2930), ("2b", 3906250)]
)
def test_tokens_are_whole_steps(tokens: str, steps: int, tmp_path: Path) -> None:
    """Of 8 rows of 64 tokens. The command line replaces the file's length of the run, in whatever unit."""
    path = write(tmp_path / "x.yaml", PRETRAIN)
    train = load_config(PretrainConfig, path, [f"train.tokens={tokens}"]).train
    assert (train.steps, train.tokens, train.epochs) == (steps, None, None)
    by_tokens = write(tmp_path / "y.yaml", PRETRAIN | {"train": {"tokens": tokens, "global_batch_size": 8}})
    assert load_config(PretrainConfig, by_tokens).train == train
    assert load_config(PretrainConfig, by_tokens, ["train.steps=3"]).train.steps == 3


def test_epochs_are_steps_once_the_rows_are_counted() -> None:
    for kind, values in ((PretrainConfig, PRETRAIN), (FinetuneConfig, FINETUNE)):
        config = build_config(kind, values | {"train": {"epochs": 2.5, "global_batch_size": 8}}, "x.yaml")
        train = config.train.with_epochs_as_steps(lambda: 33)
        assert (train.steps, train.epochs) == (11, None)  # 82.5 rows
        assert build_config(kind, values, "x.yaml").train.with_epochs_as_steps(pytest.fail).steps == 10


def test_section_in_a_file_of_its_own_takes_overrides(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "pretrain").mkdir()
    write(tmp_path / "model" / "tiny.yaml", MODEL)
    path = write(tmp_path / "pretrain" / "x.yaml", changed(PRETRAIN, "model", "../model/tiny.yaml"))
    config = load_config(PretrainConfig, path, ["model.num_hidden_layers=5"])
    assert config.model == ModelConfig(**(MODEL | {"num_hidden_layers": 5}))


def test_missing_section_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", changed(PRETRAIN, "model", "nowhere.yaml"))
    with pytest.raises(UsageError, match=r"cannot read the config .*nowhere\.yaml: No such file"):
        load_config(PretrainConfig, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "is not valid YAML"),
        (b"run_dir: \xff\xfe", "is not valid YAML"),
        (b"- a\n- b\n", "holds a list"),
        (b"", "is empty"),
        (b"just words", "holds text"),
    ],
)
def test_file_that_is_not_a_config(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        load_config(PretrainConfig, tmp_path / "x.yaml")


def test_a_section_may_come_from_another_file_by_override(tmp_path: Path) -> None:
    path, other = write(tmp_path / "run.yaml", PRETRAIN), write(tmp_path / "other.yaml", MODEL | {"hidden_size": 64})
    config = load_config(PretrainConfig, path, [f"model={other}", "model.intermediate_size=24"])
    assert (config.model.hidden_size, config.model.intermediate_size) == (64, 24)


@pytest.mark.parametrize(("kind", "values"), [(PretrainConfig, PRETRAIN), (FinetuneConfig, FINETUNE)])
def test_dump_and_load_give_the_same_config(
    kind: type[PretrainConfig] | type[FinetuneConfig], values: dict[str, Any], tmp_path: Path
) -> None:
    config = build_config(kind, values, origin="x.yaml")
    path = write(tmp_path / "config.yaml", dump_config(config))
    assert load_config(kind, path) == config


def test_fine_tuning_leaves_router_biases_as_they_are_unless_told() -> None:
    assert FinetuneConfig.model_validate(FINETUNE).train.balance.bias_update_rate == 0
    asked = FINETUNE | {"train": FINETUNE["train"] | {"balance": {"bias_update_rate": 0.01, "z_loss": 0.1}}}
    assert FinetuneConfig.model_validate(asked).train.balance.bias_update_rate == 0.01
    other = FINETUNE | {"train": FINETUNE["train"] | {"balance": {"z_loss": 0.1}}}
    balance = FinetuneConfig.model_validate(other).train.balance
    assert (balance.bias_update_rate, balance.z_loss) == (0, 0.1)
    moved = FINETUNE | {"train": FINETUNE["train"] | {"balance": {"bias_update": "quantile"}}}
    assert FinetuneConfig.model_validate(moved).train.balance.moves_biases
    for rate in (0.0, 0.5):
        with pytest.raises(ValueError, match=rf"bias_update_rate={rate} is of bias_update=sign alone"):
            BalanceConfig(bias_update="quantile", bias_update_rate=rate)
    assert PretrainConfig.model_validate(PRETRAIN).train.balance.bias_update_rate == 1e-3


def test_moe_layers_are_neither_first_nor_named() -> None:
    model = ModelConfig(**(MODEL | {"num_hidden_layers": 6, "mlp_only_layers": (3, 5)}))
    assert model.moe_layers == [1, 2, 4]
    assert ModelConfig(**(MODEL | {"n_routed_experts": 0})).moe_layers == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["pretrain", "x.yaml", "model.num_experts_per_tok=9"], "choose at most 8"),
        (["prepare", "x.yaml", "data.sequence_lenght=9"], "did you mean data.sequence_length?"),
        (["finetune", "x.yaml"], "x.yaml is a pretraining config"),
        (["pretrain", "x.yaml", "--train.steps", "-1"], "train.steps=-1"),
        (["pretrain", "--train.steps=-1", "x.yaml", "--dry-run"], "train.steps=-1"),
        (["pretrain", "x.yaml", "--train.step", "3"], "did you mean train.steps?"),
        (["prepare", "x.yaml", "--data.workers"], "--data.workers has no value"),
    ],
)
def test_command_line_refuses_with_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.yaml", PRETRAIN)
    monkeypatch.chdir(tmp_path)
    done = moe_lm(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert words in done.err
