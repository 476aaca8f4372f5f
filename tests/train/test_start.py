"""The start of continued pretraining: what it gives to a run, and what does not fit it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_lm.cli.build import read_run
from moe_lm.cli.train import read_pretraining
from moe_lm.config.model import ModelConfig, RopeScaling
from moe_lm.config.run import PretrainConfig
from moe_lm.data.shards import read_manifest
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train.finetune import trained_model
from tests.processes import metrics
from tests.runs import last_checkpoint, tensors
from tests.tiny import SHAPE, tiny_model, write_run

pytestmark = pytest.mark.usefixtures("one_thread")
MoeLm = Callable[..., Any]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def config(pretrained: Path, tiny_pretrain: Path, tmp_path: Path) -> Path:
    """A config that starts from a finished run and says nothing of model and tokenizer."""
    values = yaml.safe_load(tiny_pretrain.read_text())
    del values["model"], values["data"]["tokenizer"]
    values |= {"run_dir": str(tmp_path / "run"), "start_from": str(pretrained)}
    values["train"] |= {"steps": 1, "eval_batches": 1, "schedule": {"name": "constant", "warmup_steps": 0}}
    file = tmp_path / "continue.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


# What it gives


def test_the_moments_of_the_start_are_taken_along_when_asked(
    config: Path, pretrained: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    before = tensors(last_checkpoint(pretrained), "optimizer")
    runs = {}
    for asked in (True, False):
        run = tmp_path / str(asked)
        done = moe_lm("pretrain", config, f"run_dir={run}", f"start_with_optimizer={asked}")
        assert (done.code, done.err) == (0, "")
        assert ("with the moments of its optimizer" in done.out) is asked
        runs[asked] = tensors(last_checkpoint(run), "optimizer")
    for name in [name for name in before if name.startswith("step.")]:
        assert (float(runs[True][name]), float(runs[False][name])) == (31.0, 1.0)
    # exp_avg = 0.9 * that of the start + 0.1 * a gradient that was clipped to a norm of 1
    moments = [name for name in before if name.startswith("exp_avg.")]
    gradient = torch.cat([(runs[True][name] - 0.9 * before[name]).flatten() for name in moments])
    assert 0.01 < float(gradient.norm()) <= 0.1 + 1e-6
    fresh = torch.cat([runs[False][name].flatten() for name in moments])
    torch.testing.assert_close(gradient, fresh, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_adapters_are_merged_and_have_no_moments_to_give(
    config: Path, finetune_config: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    adapters = tmp_path / "adapters"
    assert moe_lm("finetune", finetune_config, f"run_dir={adapters}", "lora={rank: 2}", "train.steps=2").code == 0
    refused = moe_lm("pretrain", config, f"start_from={adapters}", "start_with_optimizer=true")
    assert refused.code == 2
    assert f"start_from={adapters} has those of adapters alone; take start_with_optimizer away" in refused.err
    assert moe_lm("pretrain", config, f"start_from={adapters}").code == 0
    assert moe_lm("pretrain", config, f"run_dir={tmp_path / 'plain'}").code == 0
    merged, plain = (metrics(tmp_path / name)[0]["val_loss"] for name in ("run", "plain"))
    assert merged != plain
    names = tensors(last_checkpoint(tmp_path / "run"), "model").keys()
    assert names == tensors(last_checkpoint(tmp_path / "plain"), "model").keys()  # no factor among them


def test_prepare_and_every_reader_take_a_config_without_a_model(
    config: Path, tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    prepared = moe_lm("prepare", config, f"data.shards={tmp_path / 'shards'}")
    assert prepared.code == 0, prepared.err
    given = yaml.safe_load(tiny_pretrain.read_text())
    assert read_manifest(tmp_path / "shards" / "text") == read_manifest(Path(given["data"]["shards"]) / "text")
    assert trained_model(read_run(config, [])) == ModelConfig(**given["model"])


@pytest.mark.slow
def test_what_goes_on_is_planned_verified_and_adapted(
    config: Path, finetune_config: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    for done in (
        moe_lm("plan", config, "--gpus", "1", "--gpu", "h100"),
        moe_lm("verify", config, "--quick", "--world-sizes", "1", "--only", "accumulation"),
        moe_lm("pretrain", config),
        moe_lm("finetune", finetune_config, f"start_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'ft'}", "lora={}"),
    ):
        assert done.code == 0, done.err


def test_the_recipe_is_whole(pretrained: Path) -> None:
    recipe = CONFIGS / "pretrain" / "continue.yaml"
    longer = ["data.sequence_length=16384", "model.max_position_embeddings=16384"]
    yarn = "model.rope_parameters={rope_type: yarn, factor: 4.0}"
    model = read_pretraining(recipe, [f"start_from={pretrained}", *longer, yarn]).model
    assert (model.hidden_size, model.max_position_embeddings) == (32, 16384)
    assert model.rope_scaling == RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096)


def test_the_recipe_of_longer_contexts_is_whole(pretrained: Path, moe_lm: MoeLm) -> None:
    """For the 16B model it is written for, whose weights are not here, and from a small start on a dry run."""
    recipe = CONFIGS / "pretrain" / "long-context.yaml"
    values = yaml.safe_load(recipe.read_text())
    shape = yaml.safe_load((CONFIGS / "model" / "deepseekmoe-16b.yaml").read_text())
    rope = {**values["model"].pop("rope_parameters"), "original_max_position_embeddings": 4096}
    del values["start_from"]
    values["data"]["tokenizer"] = "runs/tokenizer"
    large = PretrainConfig.model_validate(values | {"model": {**shape, **values["model"], "rope_scaling": rope}})
    assert large.model.num_attention_heads % large.parallel.sequence_parallel_size == 0
    assert large.model.max_position_embeddings == large.data.sequence_length == 16 * 4096

    sizes = ["parallel.expert_parallel_size=2", "parallel.sequence_parallel_size=2"]
    small = [*sizes, "data.sequence_length=128", "model.max_position_embeddings=128"]
    yarn = "model.rope_parameters={rope_type: yarn, factor: 2, original_max_position_embeddings: 64}"
    done = moe_lm("pretrain", recipe, f"start_from={pretrained}", *small, yarn, "--dry-run")
    assert (done.code, done.err) == (0, "")


def test_a_run_goes_on_without_its_start(config: Path, pretrained: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    """The start was moved, then deleted; the tokenizer that the run's config names went with an old checkpoint."""
    start, moved, run = tmp_path / "start", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(pretrained, start)
    assert moe_lm("pretrain", config, f"start_from={start}").code == 0
    start.rename(moved)
    done = moe_lm("pretrain", config, f"start_from={moved}", "train.steps=2", "checkpoint.keep=1")
    assert (done.code, done.err) == (0, "")
    evaluated = moe_lm("eval", run)
    assert (evaluated.code, evaluated.err) == (0, "")
    assert f"held-out text of {run}" in evaluated.out
    assert f"next: moe-lm sample {run} --prompt TEXT, moe-lm eval {run}, moe-lm export {run} OUT" in done.out
    kept = yaml.safe_load((last_checkpoint(run) / "start.yaml").read_text())
    assert kept["origin"] == str(start / "checkpoints" / "step-00000030")
    assert kept["positions"] == {"max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0}
    shutil.rmtree(moved)
    again = read_pretraining(run / "config.yaml", [])
    assert again.data.tokenizer == last_checkpoint(run) / "tokenizer"
    assert again.model == read_pretraining(config, []).model


def test_a_dry_run_names_the_start_the_layout_and_the_rates(config: Path, pretrained: Path, moe_lm: MoeLm) -> None:
    layout = ("parallel.engine=deepspeed", "parallel.expert_parallel_size=2", "--processes", "2")
    rates = ("train.optimizer={name: muon, lr: 1e-3}", "train.steps=10", "train.schedule.warmup_steps=8")
    done = moe_lm("pretrain", config, "--dry-run", *layout, *rates)
    assert done.code == 0, done.err
    for line in (
        f"start           {last_checkpoint(pretrained)} (fingerprint ",
        "start           train.optimizer.muon_lr=0.02 is a rate for fresh weights",
        "layout          2 processes, DeepSpeed with ZeRO 1, experts over 2 processes\n",
        "optimizer       muon: muon_lr=0.02 for hidden matrices; adamw: lr=0.001 for all else\n",
        "alarm           warm-up too long: the warm-up takes 8 of 10 steps",
    ):
        assert f"\n{line}" in done.out


@pytest.mark.parametrize(
    ("balance", "said"),
    [
        ("{bias_update: quantile}", "bias_update=quantile moves router biases, which no Hugging Face family with a "
         "softmax router has; take it away and set train.balance.bias_update_rate to 0 if"),
        ("{bias_update_rate: 0.01}", "bias_update_rate=0.01 moves router biases, which no Hugging Face family with a "
         "softmax router has; set it to 0 if"),
    ],
)  # fmt: skip
def test_biases_that_a_softmax_router_is_given_are_told_and_the_same_command_goes_on(
    balance: str, said: str, config: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, moe_lm: MoeLm
) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size, scoring_func="softmax")
    start = write_run(tmp_path / "start", model, tiny_tokenizer, config="{}\n")
    command = ("pretrain", config, f"start_from={start}", f"train.balance={balance}")
    done = moe_lm(*command)
    assert (done.code, done.err) == (0, "")
    assert f"train.balance.{said} the model is to be exported" in done.out
    done = moe_lm(*command)
    assert (done.code, "this run is finished" in done.out) == (0, True), done.err


# What does not fit


def test_a_start_that_comes_after_the_beginning_is_refused(
    config: Path, pretrained: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    """Its weights never were in the run, which would name it as its start from then on."""
    run = shutil.copytree(pretrained, tmp_path / "run")
    done = moe_lm("pretrain", config, "train.steps=31", "checkpoint.allow_changes=true")
    assert (done.code, done.out) == (2, "")
    assert f"start_from={pretrained}: {run} has begun with fresh weights, and goes on from its own" in done.err
    assert not (last_checkpoint(run) / "start.yaml").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.hidden_size=64"], "model.hidden_size=64 is not that of start_from={start}, 32; take it away"),
        (["model.vocab_size=2048"], "model.vocab_size=2048 is not that of start_from={start}, 1024"),
        (["model={{n_routed_experts: 4}}"], "only rope_theta, rope_scaling, max_position_embeddings may differ"),
        (["data.tokenizer={tmp}/other"], "is another tokenizer than that of start_from={start} ("),
        (
            ["data.tokenizer={tmp}/none"],
            "data.tokenizer={tmp}/none: there is no such folder; leave it out: the tokenizer is",
        ),
        (["data.shards={tmp}/other-shards"], "was made with tokenizer "),
        (["start_from={tmp}/nothing"], "there is no folder {tmp}/nothing; give a run folder"),
        (["run_dir={start}"], "start_from={start} is run_dir itself, where a run goes on without it"),
        (
            ["train.optimizer.name=muon", "start_with_optimizer=true"],
            "start_from={start} has those of adamw, and train.optimizer.name=muon; take start_with_optimizer away",
        ),
        (
            ["model.max_position_embeddings=32"],
            "data.sequence_length=64 is longer than model.max_position_embeddings=32",
        ),
        (
            ["data.sequence_length=8192"],
            "data.sequence_length=8192 is longer than the 4096 positions of the start's model; choose at most 4096, or "
            'stretch the positions: model.max_position_embeddings=8192 "model.rope_parameters={{rope_type: yarn, '
            'factor: 2}}" (docs/continuing.md)',
        ),
        (
            ["data.phases=[{{share: 0.5}},{{share: 0.5,sequence_length: 16384}}]"],
            "sequence_length=16384 of phase 2 of data.phases is longer than the 4096 positions of the start's model",
        ),
        (["model.rope_parameters={{factor: 2}}"], "rope_parameters has factor and no rope_type; set it"),
        (["model.rope_scaling={{rope_type: yarn}}"], "model.rope_scaling.factor is missing; set it"),
    ],
)
def test_what_does_not_fit_a_start_is_refused_before_anything_is_built(
    settings: list[str], message: str, config: Path, pretrained: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    if "other" in settings[0]:
        write_another_tokenizer(config, pretrained, tmp_path)
    places = {"tmp": tmp_path, "start": pretrained}
    done = moe_lm("pretrain", config, *(setting.format(**places) for setting in settings))
    assert (done.code, done.out) == (2, "")
    assert message.format(**places) in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def write_another_tokenizer(config: Path, pretrained: Path, folder: Path) -> None:
    """`other`, a tokenizer with a merge less, and shards of which the manifest names it."""
    other = shutil.copytree(last_checkpoint(pretrained) / "tokenizer", folder / "other")
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shards = shutil.copytree(yaml.safe_load(config.read_text())["data"]["shards"], folder / "other-shards")
    manifest = json.loads((shards / "text" / "manifest.json").read_text())
    (shards / "text" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "0" * 64}))


# Positions as transformers 5 writes them


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 1e4, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": None},
            1e4,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_rope_parameters_are_rope_theta_and_rope_scaling(
    rope: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    expected = ModelConfig(**SHAPE, rope_theta=theta, rope_scaling=scaling)
    assert ModelConfig(**SHAPE, rope_parameters=rope) == expected
    assert ModelConfig(**SHAPE, rope_parameters=rope, rope_theta=theta) == expected
    with pytest.raises(ValueError, match=r"rope_theta=7.0 is not that of rope_parameters"):
        ModelConfig(**SHAPE, rope_parameters=rope | {"rope_theta": theta}, rope_theta=7.0)
