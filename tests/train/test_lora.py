"""Fine-tuning adapters: what is trained and kept, going on to the bit, and which base they belong to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from moe_lm.checkpoint import checkpoint, lineage, read, write
from moe_lm.checkpoint.read import open_tensors
from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig
from moe_lm.engine.build import build_model
from moe_lm.generate.session import Session
from moe_lm.model import lora
from moe_lm.model.attention import PackedAttention
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel.topology import Topology
from tests.processes import metrics
from tests.runs import MoeLm, assert_resumes_to_the_bit, tensors

pytestmark = pytest.mark.usefixtures("one_thread")
RANK = 4


@pytest.fixture
def lora_config(finetune_config: Path) -> Path:
    values = yaml.safe_load(finetune_config.read_text())
    finetune_config.write_text(yaml.safe_dump(values | {"lora": {"rank": RANK, "alpha": 8.0}}))
    return finetune_config


def newest(run: Path) -> Path:
    return checkpoint.resolve(run)


def logits(model: LanguageModel) -> torch.Tensor:
    ids = torch.randint(1024, (1, 48), generator=torch.Generator().manual_seed(3))
    attend = PackedAttention(torch.tensor([0, 48]).int(), 48)
    with torch.no_grad():
        output: torch.Tensor = model(ids, torch.arange(48)[None], attend).logits
    return output


# What is trained, kept and said


def test_the_loss_falls_and_a_checkpoint_holds_what_was_trained(
    lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    done = moe_lm("finetune", lora_config, "train.steps=40")
    assert done.code == 0
    lines = metrics(tmp_path / "run")
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.3
    folder, base = newest(tmp_path / "run"), newest(pretrained)
    kept, whole = tensors(folder, "model"), tensors(base, "model")
    factors = {name for name in kept if lora.is_factor(name)}
    biases = {name for name in whole if name.endswith("e_score_correction_bias")}
    assert kept.keys() == factors | biases
    expected = {
        factor for name in whole if "self_attn" in name or ".mlp." in name for factor in lora.factors_of(name)
        if whole[name].ndim > 1 and ".gate." not in name
    }  # fmt: skip
    assert factors == expected
    moments = {
        f"{kind}.{name.removeprefix('model.')}" for name in factors for kind in ("exp_avg", "exp_avg_sq", "step")
    }
    assert tensors(folder, "optimizer").keys() == moments | {"random.cpu"}

    trained, total = sum(kept[name].numel() for name in factors), sum(t.numel() for t in whole.values())
    total += trained - sum(whole[name].numel() for name in biases)
    assert f"trained         {trained:,} of {total:,} parameters ({100 * trained / total:.3g}%)" in done.out
    assert "if all weights were trained" in done.out
    values = yaml.safe_load((folder / "adapter.yaml").read_text())
    assert values["base"] == str(base)
    assert values["fingerprint"] == lineage.fingerprint(base)
    assert values["lora"]["rank"] == RANK


def test_merged_is_unmerged_and_the_base_stays(
    lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    before = {name: tensor.clone() for name, tensor in tensors(newest(pretrained), "model").items()}
    assert moe_lm("finetune", lora_config).code == 0
    folder = newest(tmp_path / "run")
    session = Session.load(tmp_path / "run", device="cpu")
    config = load_config(FinetuneConfig, lora_config)
    built = build_model(session.model.config, config.parallel, Topology(), config.lora)
    read.load_weights(newest(pretrained), built.tensors())
    built.model.load_state_dict(
        {name.removeprefix("model."): t for name, t in tensors(folder, "model").items()}, strict=False
    )
    unmerged, merged, base = logits(built.model), logits(session.model), logits(Session.load(pretrained, "cpu").model)
    assert (merged - unmerged).abs().max() < 1e-5
    assert (merged - base).abs().max() > 0.1
    after = tensors(newest(pretrained), "model")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    exported, state = open_tensors(folder), session.model.state_dict()
    assert set(exported.names()) == {f"model.{name}" for name in state}
    for name, tensor in state.items():
        assert torch.equal(exported.rows(f"model.{name}", 0, len(tensor)), tensor)

    rounded = Session.load(tmp_path / "run", "cpu", dtype="bfloat16").model.state_dict()  # once, after merging
    assert all(torch.equal(rounded[name], tensor.to(rounded[name].dtype)) for name, tensor in state.items())


def test_a_dry_run_says_what_would_be_trained(
    lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    done = moe_lm("finetune", lora_config, "--dry-run", "--settings", "data.train=[nowhere.jsonl]")
    assert done.code == 0
    assert "rank: 4" in done.out
    shown = next(line for line in done.out.splitlines() if line.startswith("trained"))
    assert moe_lm("finetune", lora_config, "train.steps=1").code == 0
    assert shown in (tmp_path / "run" / "train.log").read_text()
    assert not (tmp_path / "run" / "checkpoints" / "step-00000012").exists()
    whole = moe_lm("finetune", lora_config, "--dry-run", "lora=null").out
    assert "if all weights were trained" not in whole
    assert "(100%)" in whole
    on_deepspeed = ("parallel.engine=deepspeed", "parallel.expert_parallel_size=2")
    assert "on each device of 2" in moe_lm("finetune", lora_config, "--dry-run", *on_deepspeed).out


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
def test_a_frozen_router_stays_and_so_does_its_bias_when_asked(
    lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm, optimizer: str
) -> None:
    settings = ("lora=null", "train.freeze_router=true", "train.balance.bias_update_rate=0", "train.steps=3")
    assert moe_lm("finetune", lora_config, *settings, f"train.optimizer.name={optimizer}").code == 0
    found, before = tensors(newest(tmp_path / "run"), "model"), tensors(newest(pretrained), "model")
    same = {name for name, tensor in found.items() if torch.equal(tensor, before[name])}
    assert found.keys() == before.keys()
    assert same == {name for name in found if ".gate." in name}
    moments = tensors(newest(tmp_path / "run"), "optimizer")
    assert not [name for name in moments if ".gate." in name]


def test_the_router_is_trained_beside_adapters_when_asked(
    lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    settings = ("train.freeze_router=false", "lora.targets=[attention]", "train.steps=3")
    assert moe_lm("finetune", lora_config, *settings).code == 0
    kept, before = tensors(newest(tmp_path / "run"), "model"), tensors(newest(pretrained), "model")
    routers = [name for name in kept if name.endswith("gate.weight")]
    assert len(routers) == 2
    loaded = Session.load(tmp_path / "run", "cpu").model.state_dict()
    for name in routers:
        assert not torch.equal(kept[name], before[name])
        assert torch.equal(loaded[name.removeprefix("model.")], kept[name])


@pytest.mark.slow
def test_adapters_can_begin_beside_adapters(lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm) -> None:
    """The second ones start from the first merged; so does fine-tuning of all weights."""
    first, second = tmp_path / "run", tmp_path / "second"
    assert moe_lm("finetune", lora_config, "train.steps=20").code == 0
    assert moe_lm("finetune", lora_config, f"start_from={first}", f"run_dir={second}", "lora.rank=2").code == 0
    assert metrics(second)[0]["val_loss"] == pytest.approx(metrics(first)[-1]["val_loss"], rel=1e-5)
    assert metrics(second)[-1]["val_loss"] < metrics(second)[0]["val_loss"]
    whole = tmp_path / "whole"
    assert moe_lm("finetune", lora_config, f"start_from={second}", f"run_dir={whole}", "lora=null").code == 0
    assert metrics(whole)[0]["val_loss"] == pytest.approx(metrics(second)[-1]["val_loss"], rel=1e-5)
    shutil.rmtree(second)
    assert moe_lm("sample", whole, "--prompt", "x", "--max-new-tokens", 2).code == 0


def test_the_recipe_is_one(tmp_path: Path, pretrained: Path, moe_lm: MoeLm) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "finetune" / "lora.yaml"
    done = moe_lm("finetune", recipe, f"start_from={pretrained}", f"run_dir={tmp_path / 'run'}", "--dry-run")
    assert done.code == 0
    assert "if all weights were trained" in done.out


# Going on


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("lora.dropout=0.3",), marks=pytest.mark.slow),
        ("train.freeze_router=false", "train.micro_batch_size=2"),
    ],
)
def test_a_killed_run_resumes_to_the_bit(
    lora_config: Path, tmp_path: Path, moe_lm: MoeLm, settings: tuple[str, ...]
) -> None:
    assert_resumes_to_the_bit(moe_lm, tmp_path, lora_config, *settings)


def test_it_goes_on_beside_the_base_it_began_with(
    lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    """Although the run of `start_from` has a newer checkpoint by now; and wherever the base has moved."""
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(pretrained, base)
    command = ("finetune", lora_config, "checkpoint.every=4", "checkpoint.keep=9")
    assert moe_lm(*command, f"start_from={base}").code == 0
    expected = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    another(base / "checkpoints" / "step-00000030", base / "checkpoints" / "step-00000031")
    assert moe_lm(*command, f"start_from={base}").code == 0
    assert [line["loss"] for line in metrics(tmp_path / "run")[1:]] == [line["loss"] for line in expected[1:]]

    base.rename(moved)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    place = moved / "checkpoints" / "step-00000030"
    assert moe_lm(*command, f"start_from={place}").code == 0
    assert [line["loss"] for line in metrics(tmp_path / "run")[1:]] == [line["loss"] for line in expected[1:]]
    assert lineage.base_of(newest(tmp_path / "run")) == place


# Which base


def test_the_base_of_adapters_is_not_cleaned_away(
    lora_config: Path, tmp_path: Path, pretrained: Path, tiny_pretrain: Path, moe_lm: MoeLm
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pretrained, base)
    assert moe_lm("finetune", lora_config, f"start_from={base}", "train.steps=2").code == 0
    more = ("train.steps=33", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.allow_changes=true")
    assert moe_lm("pretrain", tiny_pretrain, f"run_dir={base}", *more).code == 0
    kept = sorted(path.name for path in (base / "checkpoints").iterdir())
    assert kept == ["step-00000030", "step-00000033"]
    run_dir = yaml.safe_load(lora_config.read_text())["run_dir"]
    assert moe_lm("sample", run_dir, "--prompt", "x", "--max-new-tokens", 2).code == 0


def another(folder: Path, copy: Path) -> Path:
    """A checkpoint of the same shape with other weights."""
    state = {name: tensor + 0.001 for name, tensor in tensors(folder, "model").items()}
    files: dict[str, str | Path] = {
        name: folder / name for name in ("model.yaml", "config.yaml", "tokenizer", "trainer.json", "data.sha256")
    }
    return write.save(copy.parent, int(copy.name.removeprefix("step-")), state, files)


def test_a_base_that_has_moved_is_asked_for_and_another_one_refused(
    lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    base, moved, run = tmp_path / "base", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(pretrained, base)
    other = another(newest(base), tmp_path / "other" / "checkpoints" / "step-00000001")
    assert moe_lm("finetune", lora_config, f"start_from={base}", "train.steps=3", "checkpoint.every=2").code == 0
    (tmp_path / "text.txt").write_text("some text to score")
    verbs: list[tuple[object, ...]] = [
        ("sample", run, "--prompt", "x", "--max-new-tokens", 4, "--greedy"), ("eval", run, tmp_path / "text.txt"),
    ]  # fmt: skip
    expected = [moe_lm(*verb).out for verb in verbs]
    base.rename(moved)
    for verb, out in zip(verbs, expected, strict=True):
        lost = moe_lm(*verb)
        assert lost.code == 2
        assert f"need their base {base}/checkpoints/step-00000030 (fingerprint " in lost.err
        assert "which is not there; say where it is now with --base" in lost.err
        assert moe_lm(*verb, "--base", moved).out == out
        wrong = moe_lm(*verb, "--base", other)
        assert wrong.code == 2
        for place in (base / "checkpoints" / "step-00000030", newest(moved)):
            assert str(place) in wrong.err or place == newest(moved)
        assert f"(fingerprint {lineage.fingerprint(newest(moved))}), and {other} is another model" in wrong.err
        assert f"(fingerprint {lineage.fingerprint(other)})" in wrong.err
        assert wrong.err.count("\n") == 1
    wrong = moe_lm("finetune", lora_config, f"start_from={other}", "train.steps=3", "checkpoint.every=2")
    assert wrong.code == 2
    assert f"{other} is another model" in wrong.err
    whole = moe_lm("sample", moved, "--prompt", "x", "--base", other)
    assert whole.code == 2
    assert "holds a whole model, which needs no base" in whole.err


def test_a_base_that_was_changed_in_place_is_refused(
    lora_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(pretrained, base)
    assert moe_lm("finetune", lora_config, f"start_from={base}", "train.steps=1").code == 0
    another(newest(base), newest(base))
    assert "is another model" in moe_lm("sample", run, "--prompt", "x").err


# What cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.rank=0"], "lora.rank=0: input should be greater than 0"),
        (["lora.targets=[]"], "lora.targets is an empty list"),
        (["lora.targets=[embedding]"], "lora.targets.0='embedding': input should be 'attention', 'feed_forward' or"),
        (["lora.rnk=2"], "unknown key lora.rnk; did you mean lora.rank?"),
        (["train.optimizer.name=muon"], "train.optimizer.name=muon is made for whole matrices"),
        (["train.optimizer.name=lamb"], "train.optimizer.name=lamb is made for whole matrices"),
    ],
)
def test_wrong_settings_are_refused(lora_config: Path, moe_lm: MoeLm, settings: list[str], message: str) -> None:
    for extra in ([], ["--dry-run"]):
        done = moe_lm("finetune", lora_config, *settings, *extra)
        assert done.code == 2
        assert message in done.err
        assert done.err.count("\n") == 1


def test_experts_of_a_model_that_has_none_are_refused(
    lora_config: Path, tmp_path: Path, save_run: Callable[..., Path], moe_lm: MoeLm
) -> None:
    from moe_lm.config.model import ModelConfig

    config = ModelConfig(
        vocab_size=1024, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = LanguageModel(config)
    model.initialise(1)
    run_dir = save_run(model)
    command = ("finetune", lora_config, f"start_from={run_dir}", f"run_dir={tmp_path / 'new'}")
    for settings, message in (
        (["lora.targets=[experts]"], "lora.targets names experts, of which the model has none; choose among attention"),
        (["train.freeze_router=true"], "train.freeze_router=true, but the model has no routed experts"),
    ):
        for extra in ([], ["--dry-run"]):
            done = moe_lm(*command, *settings, *extra)
            assert done.code == 2
            assert message in done.err
            assert done.err.count("\n") == 1


@pytest.mark.parametrize("setting", ["lora.rank=8", "lora.alpha=9", "lora.targets=[attention]", "lora=null"])
def test_other_adapters_on_resume_are_refused(lora_config: Path, moe_lm: MoeLm, setting: str) -> None:
    command = ("finetune", lora_config, "train.steps=3", "checkpoint.every=2")
    assert moe_lm(*command).code == 0
    done = moe_lm(*command, setting)
    assert done.code == 2
    assert "holds a run with other settings (lora" in done.err
    assert done.err.count("\n") == 1
