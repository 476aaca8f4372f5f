"""Export: what is refused, what lies beside the tensors, and proofs that fail."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lm.common.errors import MoeLmError
from moe_lm.config.model import ModelConfig
from moe_lm.model.moe import all_logical
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop import families, fitting, models
from moe_lm.tools.interop.exporting import export_run
from moe_lm.tools.interop.importing import import_folder
from moe_lm.tools.interop.logits import ForwardPass, compare
from tests.conftest import MoeLm
from tests.tools.interop.conftest import Save
from tests.tools.interop.shapes import MOE, SHAPE, SOFTMAX

pytestmark = pytest.mark.usefixtures("one_thread")


def test_no_family_at_all_names_what_the_nearest_lacks(save: Save, tmp_path: Path, moe_lm: MoeLm) -> None:
    run = save({"norm_type": "layernorm"})
    done = moe_lm("export", run, tmp_path / "out")
    assert done.code == 2
    assert done.err == (
        "error: no family of Hugging Face holds this model; what stands in the way of the nearest: "
        "norm_type='layernorm' (qwen3)\n"
    )
    assert not list(tmp_path.glob("out*"))


def test_every_export_can_be_imported_again(save: Save, tmp_path: Path, moe_lm: MoeLm) -> None:
    run = save(change=lambda model: bias_of(model).normal_())
    exported = moe_lm("export", run, tmp_path / "out")
    assert (exported.code, exported.err) == (0, "")
    assert exported.out.splitlines()[0].startswith("export step-00000007 (dots1): ")
    assert exported.out.splitlines()[-1] == f"wrote {tmp_path / 'out'}"
    imported = moe_lm("import", tmp_path / "out", "--run-dir", tmp_path / "again")
    assert imported.code == 0
    greedy = ("-p", "def", "--greedy", "--max-new-tokens", 8)
    first, second = (moe_lm("sample", path, *greedy) for path in (run, tmp_path / "again"))
    assert first.out == second.out
    assert first.code == 0


def bias_of(model: LanguageModel) -> torch.Tensor:
    return model.moe_layers[0].gate.e_score_correction_bias


def test_capacity_of_training_is_said_to_be_left_out(save: Save, tmp_path: Path) -> None:
    run = save(MOE | {"capacity_factor": 1.25})
    proof = export_run(run, tmp_path / "out")
    assert all(comparison.equal for comparison in proof.logits)
    assert proof.notes == ["left out: capacity_factor=1.25; no expert drops tokens, as when sampling"]


def test_router_bias_is_not_dropped(save: Save, tmp_path: Path, moe_lm: MoeLm) -> None:
    run = save(SOFTMAX, lambda model: bias_of(model)[3].fill_(1e-3))
    done = moe_lm("export", run, tmp_path / "out")
    assert done.code == 2
    assert (
        "qwen3_moe has no router bias, but model.model.layers.0.mlp.gate.e_score_correction_bias is not zero"
        in done.err
    )
    assert not list(tmp_path.glob("out*"))


def test_what_lies_beside_the_tensors(save: Save, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = save()
    export_run(run, tmp_path / "out", proof_bytes=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "2 + 2?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == tiny_tokenizer.encode_chat(turns, add_generation_prompt=True)[0]
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert generation.eos_token_id == [tiny_tokenizer.eos_id, tiny_tokenizer.end_id]
    assert (generation.bos_token_id, generation.pad_token_id) == (tiny_tokenizer.bos_id, tiny_tokenizer.pad_id)


def test_generation_config_comes_through(tmp_path: Path, hf_folder: Any) -> None:
    folder = shutil.copytree(hf_folder("qwen3"), tmp_path / "hf")
    wanted = {"eos_token_id": [3, 5], "temperature": 0.6, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(wanted))
    import_folder(folder, tmp_path / "run", proof_bytes=0)
    export_run(tmp_path / "run", tmp_path / "out", proof_bytes=0)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == wanted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "gpt9"], "--format gpt9 is unknown; choose one of dots1"),
        (["--format", "llama"], "the family llama cannot hold a model with n_routed_experts=8"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_wrong_use(options: list[str], said: str, save: Save, tmp_path: Path, moe_lm: MoeLm) -> None:
    run = save()
    done = moe_lm("export", run, tmp_path / "out", *options)
    assert done.code == 2
    assert said in done.err
    assert not list(tmp_path.glob("out*"))


def test_folder_in_the_way_and_one_left_by_a_kill(save: Save, tmp_path: Path, moe_lm: MoeLm) -> None:
    run = save()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert "exists already" in moe_lm("export", run, tmp_path / "out").err
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    (tmp_path / "new.tmp").mkdir()
    assert "another process is writing" in moe_lm("export", run, tmp_path / "new").err
    (tmp_path / "empty").mkdir()
    assert moe_lm("export", run, tmp_path / "empty", "--proof-memory", 0).code == 0


def test_damaged_checkpoint(save: Save, tmp_path: Path, moe_lm: MoeLm) -> None:
    run = save()
    file = next((run / "checkpoints" / "step-00000007" / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    done = moe_lm("export", run, tmp_path / "out")
    assert done.code == 1
    assert "is damaged" in done.err
    assert not list(tmp_path.glob("out*"))


def test_wrong_table_of_a_family_does_not_pass_the_proof(
    save: Save, tmp_path: Path, hf_folder: Any, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up exchanged: every tensor is there in its shape and comes back equal; the model is another."""
    names = families.EACH_EXPERT
    swapped = {"gate_proj": names["up_proj"], "up_proj": names["gate_proj"], "down_proj": names["down_proj"]}
    wrong = [dataclasses.replace(family, expert_tensors=swapped) for family in families.FAMILIES]
    monkeypatch.setattr(families, "FAMILIES", wrong)
    monkeypatch.setattr(fitting, "FAMILIES", wrong)
    run = save()
    for arguments in (("export", run, tmp_path / "out"), ("import", hf_folder("dots1"), "--run-dir", tmp_path / "new")):
        done = moe_lm(*arguments)
        assert (done.code, done.out) == (1, "")
        assert "the proof failed: 512 random tokens: largest difference of logits" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_values_changed_on_the_way_do_not_pass_the_audit(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of one expert, in the last bit."""
    from moe_lm.tools.interop import exporting, transfer

    def spoilt(*arguments: Any) -> list[Any]:
        outputs = transfer.outputs_of_theirs(*arguments)
        place = next(index for index, output in enumerate(outputs) if "experts.5.down" in output.name)
        pieces = outputs[place].pieces

        def one_bit() -> Any:
            for piece in pieces():
                piece = piece.contiguous()
                piece.view(torch.int32)[0, 0] ^= 1
                yield piece

        outputs[place] = outputs[place]._replace(pieces=one_bit)
        return outputs

    monkeypatch.setattr(exporting, "outputs_of_theirs", spoilt)
    run = save()
    said = r"the audit failed: .* and model.layers.0.mlp.experts.5.down_proj.weight differ"
    with pytest.raises(MoeLmError, match=said):
        export_run(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_without_transformers_it_is_said(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    proof = export_run(save(), tmp_path / "out")
    assert proof.compared_with is None
    assert "not proven: logits and experts: transformers is not installed (pip install transformers)" in str(proof)
    assert "values equal" in str(proof)


def test_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free decides how many layers are compared."""
    config = ModelConfig(**SHAPE | MOE)
    monkeypatch.setattr(models, "CONTAINER", tmp_path)
    assert models.layers_that_fit(config, None) == (2, "")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert models.layers_that_fit(config, None) == (2, "")
    (tmp_path / "memory.max").write_text(f"{1000 + 2 * models.bytes_to_compare(config, 1)}\n")
    assert models.layers_that_fit(config, None)[0] == 1
    (tmp_path / "memory.max").write_text("1001\n")
    assert models.layers_that_fit(config, None)[0] == 0


def seen(experts: list[list[int]], logits: list[float], scores: list[float]) -> ForwardPass:
    """One row of one layer and vocabulary."""
    table = torch.tensor(scores).expand(len(experts), -1)
    return ForwardPass(torch.tensor(logits).view(1, -1, 1), [torch.tensor(experts)[None]], [table[None]], 0.0, [0.0])


def test_tie_between_experts_is_no_difference_but_what_follows_is_not_compared() -> None:
    ours = seen([[0, 1]] * 8, [0.0] * 8, [0.9, 0.5, 0.5, 0.1])
    tie = seen([[0, 1]] * 6 + [[2, 0]] + [[0, 1]], [0.0] * 6 + [9.0, 9.0], [])
    found = compare("random", ours, tie)
    assert found.equal
    assert (found.other_experts, found.ties, found.positions_after_ties) == (1, 1, 2)
    other = seen([[0, 1]] * 6 + [[3, 0]] + [[0, 1]], [0.0] * 8, [])
    assert not compare("random", ours, other).equal
    assert not compare("random", ours, seen([[0, 2]] * 8, [0.0] * 8, [])).equal  # too many to be chance
    assert not compare("random", ours, seen([[0, 1]] * 8, [2e-5] + [0.0] * 7, [])).equal
    assert not compare("random", ours, seen([[0, 1]] * 8, [float("nan")] + [0.0] * 7, [])).equal


SHAPE_OF_TIES: dict[str, Any] = SOFTMAX | {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 24, "num_attention_heads": 4, "intermediate_size": 48,
    "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 8, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize("seed", [18, 24, 93])
def test_model_whose_ties_a_rounding_breaks_is_still_told_from_another(seed: int) -> None:
    """So many choices of experts that some hang on the last bit, which moves logits by 0.1 and more."""

    def build(**settings: Any) -> LanguageModel:
        model = LanguageModel(ModelConfig(**SHAPE_OF_TIES | {"rms_norm_eps": 1e-6, "rope_theta": 1e4} | settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in all_logical(model.named_parameters()).items():
                noise = torch.randn(tensor.shape, generator=generator)
                width = tensor.shape[-2 if "experts" in name else -1]
                tensor.copy_(noise / width**0.5 if tensor.ndim > 1 else 1 + 0.2 * noise)
            for layer in model.moe_layers:
                layer.gate.e_score_correction_bias.zero_()
        return model.eval()

    texts = {"random": torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(0))}
    ours = models.run_ours(build(), texts)["random"]
    assert compare("random", ours, models.run_ours(build(), texts)["random"]).tolerance < 1e-4
    with models._disturbed(model := build()):  # the same model, rounded otherwise
        assert compare("random", ours, models.run_ours(model, texts)["random"]).equal
    for wrong in ({"rms_norm_eps": 2e-6}, {"rope_theta": 10005.0}):
        assert not compare("random", ours, models.run_ours(build(**wrong), texts)["random"]).equal
