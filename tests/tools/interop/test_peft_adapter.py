"""Adapters in peft's format: what is written peft computes with, what peft wrote is read, and what it cannot hold is
refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lm.checkpoint import checkpoint, lineage, write
from moe_lm.checkpoint.read import CheckpointTensors, read_model_config
from moe_lm.config.model import LoraConfig
from moe_lm.config.reading import dump_config
from moe_lm.generate.session import Session
from moe_lm.model import lora
from moe_lm.model.size import on_meta
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.hf_tensors import ROUTER_BIAS
from moe_lm.tools.interop.peft_adapter import import_adapter
from tests.conftest import MoeLm
from tests.tiny import logits_of

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]
AdapterRun = Callable[..., Path]
THEIRS: dict[str, Any] = {
    "dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"
}  # fmt: skip
IDS = torch.randint(1024, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapter_run(imported_run: Folder, tiny_tokenizer: Tokenizer, tmp_path: Path) -> AdapterRun:
    """Makes a run of adapters beside a variant's model, as training leaves it."""

    def make(variant: str, settings: LoraConfig, disturbed: str = "") -> Path:
        base = checkpoint.resolve(imported_run(variant))
        model = read_model_config(base)
        built = on_meta(model)
        lora.add_adapters(built, settings)
        draw = torch.Generator().manual_seed(2)
        state = {
            f"model.{name}": torch.randn(factor.shape, generator=draw) * 0.1
            for name, factor in built.named_parameters()
            if lora.is_factor(name)
        }
        beneath = CheckpointTensors(base)
        for name in beneath.names():
            if name.endswith(ROUTER_BIAS) or name == disturbed:
                state[name] = beneath.rows(name, 0, beneath.shape(name)[0]) + (name == disturbed)
        files: dict[str, write.Content] = {
            "model.yaml": dump_config(model),
            "tokenizer": tiny_tokenizer.save,
            lineage.ADAPTER: lineage.describe_adapter(base, settings),
        }
        write.save(tmp_path / "adapters" / "checkpoints", 1, state, files)
        return tmp_path / "adapters"

    return make


def our_logits(run: Path) -> Tensor:
    with torch.no_grad():
        return logits_of(Session.load(run, "cpu").model, IDS[0].tolist())


def their_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **THEIRS)


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("llama", None),
        ("dots1", ("attention", "experts")),
        ("deepseek_v3", ("attention", "experts")),
        ("qwen2_moe", ("attention",)),
        ("qwen3_moe some dense", ("experts",)),
        ("mixtral", None),
    ],
)
def test_peft_computes_what_we_do_and_it_comes_back(
    adapter_run: AdapterRun,
    imported_run: Folder,
    hf_folder: Folder,
    tmp_path: Path,
    moe_lm: MoeLm,
    variant: str,
    targets: tuple[str, ...] | None,
) -> None:
    from peft import AutoPeftModelForCausalLM

    settings = LoraConfig.model_validate({"rank": 4, "alpha": 12.0, "targets": targets})
    run, out, back = adapter_run(variant, settings), tmp_path / "out", tmp_path / "back"
    done = moe_lm("export", run, out, "--format", "peft", "--base-name", hf_folder(variant))
    assert done.code == 0
    assert "adapters of rank 4 in the names of" in done.out
    theirs = AutoPeftModelForCausalLM.from_pretrained(str(out), **THEIRS).eval()  # finds the base by its name
    with torch.no_grad():
        found = theirs(input_ids=IDS).logits
    ours, plain = our_logits(run), our_logits(imported_run(variant))
    assert (found - ours).abs().max() < 1e-5
    assert (ours - plain).abs().max() > 0.05

    assert moe_lm("import", out, "--base", imported_run(variant), "--run-dir", back).code == 0
    assert torch.equal(our_logits(back), ours)
    assert moe_lm("sample", back, "--prompt", "x", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_what_peft_wrote_is_read(
    imported_run: Folder, hf_folder: Folder, tmp_path: Path, rank_stabilised: bool
) -> None:
    """Adapters of only two layers of an attention block, as peft's defaults are for llama."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    theirs = get_peft_model(
        their_model(hf_folder("llama")),
        PeftConfig(
            r=3, lora_alpha=7, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian",
            task_type="CAUSAL_LM", use_rslora=rank_stabilised,
        ),
    ).eval()  # fmt: skip
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:  # A too, which peft draws from whatever was drawn before
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    said = import_adapter(tmp_path / "theirs", imported_run("llama"), tmp_path / "run")
    assert said.startswith("adapters of rank 3 for 6 of 21 layers, beside ")
    assert (our_logits(tmp_path / "run") - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("variant", "targets", "disturbed", "message"),
    [
        ("dots1", None, "", "has adapters of dense layers or shared experts, whose names peft takes for routed"),
        ("qwen2_moe", ("experts",), "", "has adapters of routed experts, which peft does not find in a qwen2_moe"),
        ("dots1", ("attention",), f"model.model.layers.1.mlp.gate.{ROUTER_BIAS}", "bias_update_rate=0, or leave"),
        ("dots1", ("attention",), "model.model.layers.2.mlp.gate.weight", "with train.freeze_router=true, or leave"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(
    adapter_run: AdapterRun,
    tmp_path: Path,
    moe_lm: MoeLm,
    variant: str,
    targets: tuple[str, ...] | None,
    disturbed: str,
    message: str,
) -> None:
    run = adapter_run(variant, LoraConfig.model_validate({"rank": 2, "targets": targets}), disturbed)
    done = moe_lm("export", run, tmp_path / "out", "--format", "peft")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_and_runs_without_meaning_are_refused(
    imported_run: Folder, hf_folder: Folder, tmp_path: Path, moe_lm: MoeLm
) -> None:
    whole, out = imported_run("llama"), tmp_path / "out"
    for arguments, message in (
        (("export", whole, out, "--format", "peft"), "holds a whole model and no adapters"),
        (("export", whole, out, "--format", "peft", "--dtype", "bfloat16"), "--dtype bfloat16 has no meaning for"),
        (("import", hf_folder("llama"), "--run-dir", out, "--base", whole), "so it needs no --base"),
    ):
        done = moe_lm(*arguments)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert message in done.err
        assert not out.exists()


def change_settings(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: change_settings(folder, peft_type="LOHA"), "peft_type='LOHA', expected 'LORA'"),
        (lambda folder: change_settings(folder, use_dora=True), "use_dora=True has no meaning here"),
        (lambda folder: change_settings(folder, rank_pattern={"q_proj": 8}), "rank_pattern={'q_proj': 8} has no"),
        (lambda folder: change_settings(folder, init_lora_weights="pissa"), "init_lora_weights='pissa' has no meaning"),
        (lambda folder: change_settings(folder, r=0), "adapter_config.json: rank=0"),
        (lambda folder: change_settings(folder, r=3), "mlp.down_proj.lora_A.weight is [2, 48], expected [3, 48]"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
        (lambda folder: shorten(folder / "adapter_model.safetensors"), "adapter_model.safetensors"),
        (lambda folder: change_tensors(folder, lambda t: t.pop(FIRST)), f"without {FIRST}; it is not whole"),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({"x": torch.zeros(1)})),
            "holds 1 tensors that belong to no layer of",
        ),
    ],
)
def test_a_damaged_or_foreign_adapter_is_refused(
    adapter_run: AdapterRun,
    imported_run: Folder,
    tmp_path: Path,
    moe_lm: MoeLm,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    assert moe_lm("export", adapter_run("llama", LoraConfig(rank=2)), out, "--format", "peft").code == 0
    damage(out)
    done = moe_lm("import", out, "--base", imported_run("llama"), "--run-dir", run)
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not run.exists()


def test_an_adapter_for_another_base_is_refused(
    adapter_run: AdapterRun, imported_run: Folder, tmp_path: Path, moe_lm: MoeLm
) -> None:
    out = tmp_path / "out"
    run = adapter_run("llama", LoraConfig(rank=2))
    assert moe_lm("export", run, out, "--format", "peft").code == 0
    shutil.rmtree(run)
    other = adapter_run("qwen3", LoraConfig(rank=2))
    done = moe_lm("import", out, "--base", other, "--run-dir", tmp_path / "run")
    assert done.code == 2
    for base in (imported_run("llama"), other):
        assert f"fingerprint {lineage.fingerprint(checkpoint.resolve(base))}" in done.err
    assert "say with --base which run" in moe_lm("import", out, "--run-dir", tmp_path / "run").err
