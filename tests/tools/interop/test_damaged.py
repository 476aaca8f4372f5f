"""What is wrong with a folder is said in one sentence that names it, and nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lm.checkpoint.safetensors_file import Output, read_header, write_file
from moe_lm.common.errors import MoeLmError
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop import importing
from tests.tools.interop.folders import write_folder

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path, hf_folder: Callable[[str], Path]) -> Path:
    return shutil.copytree(hf_folder("dots1"), tmp_path / "hf")


@pytest.fixture
def shards(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    return write_folder(tmp_path / "shards", "dots1", tiny_tokenizer, max_shard_size="100KB")


@pytest.fixture
def refused(moe_lm: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """The one sentence that `moe-lm import` ends with; nothing may be left behind."""

    def run(folder: Path, *options: object, code: int = 1) -> str:
        before = sorted(tmp_path.iterdir())
        done = moe_lm("import", folder, "--run-dir", tmp_path / "run", "--proof-memory", 0, *options)
        assert (done.code, done.out) == (code, "")
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
        return str(done.err)

    return run


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write another header before the same bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NORM].update(values)


def overlap(header: dict[str, Any]) -> None:
    header[QUERY]["data_offsets"] = [place - 16 for place in header[QUERY]["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (overlap, "invalid offset for tensor"),
        (lambda header: header.pop(QUERY), "invalid offset for tensor"),  # a hole
        (entry(shape=[64]), "invalid shape, data type, or offset"),
        (entry(shape=[-8, -4]), "expected usize"),
        (entry(shape=[1 << 62, 1 << 62]), "overflow computing buffer size"),
        (entry(dtype="F31"), "unknown variant `F31`"),
        (lambda header: header[NORM].pop("data_offsets"), "missing field `data_offsets`"),
    ],
)  # fmt: skip
def test_header_that_contradicts_itself(folder: Path, refused: Any, change: Any, said: str) -> None:
    rewrite_header(folder / MODEL, change)
    error = refused(folder)
    assert f"{folder / MODEL} is not a sound safetensors file: " in error
    assert said in error


@pytest.mark.parametrize(
    ("length", "said"),
    [(1 << 62, "header too large"), (100_000_001, "header too large"), (1 << 20, "invalid header length")],
)
def test_absurd_header_length_allocates_nothing(folder: Path, refused: Any, length: int, said: str) -> None:
    raw = (folder / MODEL).read_bytes()
    with (folder / MODEL).open("wb") as file:
        file.write(length.to_bytes(8, "little") + raw[8:])
        if length < 1 << 40:
            file.truncate(max(len(raw), length // 2))
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda raw: raw[:-1], "file not fully covered"),
        (lambda raw: raw + b"x", "file not fully covered"),
        (lambda raw: raw[:40], "invalid header length"),
        (lambda raw: raw[:4], "header too small"),
        (lambda raw: b"", "header too small"),
    ],
)
def test_file_that_is_cut_off_or_goes_on(folder: Path, refused: Any, content: Any, said: str) -> None:
    (folder / MODEL).write_bytes(content((folder / MODEL).read_bytes()))
    assert said in refused(folder)


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"a":{},"a":{}}', b"[" * 100_000, b'{"__metadata__":{"a":1}}'])
def test_header_that_is_not_a_table(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MODEL).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(MoeLmError, match="is not a sound safetensors file"):
        read_header(tmp_path / MODEL)


def test_mislabelled_file(folder: Path, refused: Any) -> None:
    """A pickle under the name of a safetensors file."""
    torch.save({"a": torch.zeros(3)}, folder / MODEL)
    assert "is not a sound safetensors file" in refused(folder)


def test_pickle_alone_is_not_read(folder: Path, refused: Any) -> None:
    (folder / MODEL).rename(folder / "pytorch_model.bin")
    assert "a pickle, which can run code" in refused(folder, code=2)


def test_no_weights_at_all(folder: Path, refused: Any) -> None:
    (folder / MODEL).unlink()
    assert "holds no weights; expected model.safetensors" in refused(folder, code=2)


def test_no_folder(tmp_path: Path, refused: Any) -> None:
    assert "there is no folder" in refused(tmp_path / "nowhere", code=2)


def test_missing_shard(shards: Path, refused: Any) -> None:
    lost = sorted(shards.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"names {lost.name}, which is missing" in refused(shards)


@pytest.mark.parametrize(
    "place", ["../elsewhere.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "weights.bin"]
)
def test_index_that_points_out_of_the_folder(shards: Path, refused: Any, place: str) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][NORM] = place
    (shards / INDEX).write_text(json.dumps(index))
    assert f"names the file {place!r}, expected a safetensors file in the same folder" in refused(shards)


def test_index_and_shard_disagree(shards: Path, refused: Any) -> None:
    index = json.loads((shards / INDEX).read_text())
    places = index["weight_map"]
    places[NORM] = next(place for place in places.values() if place != places[NORM])
    (shards / INDEX).write_text(json.dumps(index))
    assert f"promises tensor {NORM}" in refused(shards)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_broken_index(shards: Path, refused: Any, content: str) -> None:
    (shards / INDEX).write_text(content)
    error = refused(shards, code=1 if "weight_map" in content else 2)
    assert str(shards / INDEX) in error


@pytest.mark.parametrize("name", [MODEL, "config.json"])
def test_symbolic_link_is_not_followed(folder: Path, refused: Any, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused(folder, code=1 if name == MODEL else 2)


def test_missing_and_unexpected_tensors_are_listed(folder: Path, refused: Any) -> None:
    expert = "model.layers.1.mlp.experts.{}.up_proj.weight"
    change_tensors(folder / MODEL, lambda tensors: [tensors.pop(expert.format(number)) for number in range(7)])
    error = refused(folder)
    assert "lacks 7 tensors that its config.json promises" in error
    assert expert.format(0) in error
    assert error.rstrip().endswith("and 2 more")


def test_more_experts_than_the_config_says(folder: Path, refused: Any) -> None:
    """The bug elsewhere: experts are dropped, and the import is called a success."""
    change_config(folder, n_routed_experts=6, n_group=1, topk_group=1)
    error = refused(folder)
    assert "is [8, 32], expected [6, 32]" in error or "does not explain" in error


def test_unexpected_tensor(folder: Path, refused: Any) -> None:
    change_tensors(folder / MODEL, lambda tensors: tensors.update(extra=torch.ones(3)))
    assert "holds 1 tensors that its config.json does not explain: extra" in refused(folder)


def test_wrong_shape_and_dtype_name_file_and_tensor(folder: Path, refused: Any) -> None:
    change_tensors(folder / MODEL, lambda tensors: tensors.update({NORM: torch.ones(33)}))
    assert f"{folder / MODEL}: tensor {NORM} is [33], expected [32]" in refused(folder)
    change_tensors(folder / MODEL, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int32)}))
    assert f"{folder / MODEL}: tensor {NORM} has dtype I32, expected one of F32" in refused(folder)
    eight_bits = torch.ones(32).to(torch.float8_e4m3fn)
    change_tensors(folder / MODEL, lambda tensors: tensors.update({NORM: eight_bits}))
    assert "has dtype F8_E4M3" in refused(folder)


def test_known_extras_are_said(folder: Path, moe_lm: Any, tmp_path: Path) -> None:
    extras = {
        "model.layers.3.eh_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    change_tensors(folder / MODEL, lambda tensors: tensors.update(extras))
    change_config(folder, some_new_key=3, pretraining_tp=1)
    done = moe_lm("import", folder, "--run-dir", tmp_path / "run", "--proof-memory", 0)
    assert done.code == 0
    lines = done.out.splitlines()
    assert any("multi-token prediction" in line and "model.layers.3.eh_proj.weight" in line for line in lines)
    assert any("rotary frequencies" in line and "inv_freq" in line for line in lines)
    assert "not used: some_new_key=3 in config.json" in lines
    notes = json.loads((tmp_path / "run" / "proof.json").read_text())["notes"]
    assert all(note in lines for note in notes)
    assert len(notes) == 3


def test_tied_head_that_differs(hf_folder: Any, tmp_path: Path, refused: Any, moe_lm: Any) -> None:
    folder = shutil.copytree(hf_folder("llama tied"), tmp_path / "hf")
    embedding = load_file(folder / MODEL)["model.embed_tokens.weight"]
    change_tensors(folder / MODEL, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    assert "tie_word_embeddings=True, but lm_head.weight differs from model.embed_tokens.weight" in refused(folder)
    change_tensors(folder / MODEL, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert moe_lm("import", folder, "--run-dir", tmp_path / "run", "--proof-memory", 0).code == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is unknown; expected one of dots1, glm4_moe"),
        ({"model_type": None}, "model_type=None is unknown"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method': 'fp8'}"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types=['sliding_attention'] cannot be expressed"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' cannot be expressed here, expected 'sigmoid'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 cannot be expressed"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": 3}, "rope_parameters=3 is no table"),
        ({"hidden_size": None}, "has no hidden_size, which a model of type dots1 needs"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
    ],
)
def test_what_cannot_be_expressed_is_named_with_its_value(
    folder: Path, refused: Any, values: dict[str, Any], said: str
) -> None:
    change_config(folder, **values)
    error = refused(folder, code=2)
    assert said in error
    assert str(folder / "config.json") in error


@pytest.mark.parametrize(
    ("variant", "values", "said"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"), ("mixtral", {"sliding_window": 64}, "sliding_window=64"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    ],
)  # fmt: skip
def test_what_a_family_alone_has(
    variant: str, values: dict[str, Any], said: str, hf_folder: Any, tmp_path: Path, refused: Any
) -> None:
    folder = shutil.copytree(hf_folder(variant), tmp_path / "hf")
    change_config(folder, **values)
    assert f"{said} cannot be expressed here" in refused(folder, code=2)


@pytest.mark.parametrize("content", ["{", "[]", "nothing"])
def test_broken_config(folder: Path, refused: Any, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in refused(folder, code=2)


def test_tokenizer_with_more_ids_than_embeddings(folder: Path, refused: Any) -> None:
    change_config(folder, vocab_size=1000)
    assert "has 1024 ids, but the model embeddings for only 1000" in refused(folder, code=2)


def test_tokenizer_missing_and_given(folder: Path, refused: Any, moe_lm: Any, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / "words" / name)
    assert "holds no tokenizer" in refused(folder, code=2)
    options = ("--run-dir", tmp_path / "run", "--proof-memory", 0, "--tokenizer", tmp_path / "words")
    assert moe_lm("import", folder, *options).code == 0


def test_run_folder_that_exists(folder: Path, moe_lm: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("kept")
    done = moe_lm("import", folder, "--run-dir", tmp_path / "run")
    assert done.code == 2
    assert "exists already" in done.err
    assert (tmp_path / "run" / "mine").read_text() == "kept"


def test_library_reads_what_is_written(tmp_path: Path) -> None:
    """Mixed data types, sizes that are no multiple of another, an empty tensor."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, generator=draw).bfloat16(), "b": torch.randn(5, 7, generator=draw),
        "c": torch.randn(1, generator=draw).half(), "d": torch.zeros(0, 4), "e": torch.randn(2, 2, 3, generator=draw),
    }  # fmt: skip
    outputs = [Output(name, tuple(t.shape), t.dtype, lambda t=t: iter(t.split(1))) for name, t in tensors.items()]
    write_file(tmp_path / MODEL, outputs, {"format": "pt"})
    found = load_file(tmp_path / MODEL)
    header = read_header(tmp_path / MODEL)
    assert found.keys() == tensors.keys() == header.tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(header.tensors[name].rows(0, len(tensor)), tensor)
        assert header.tensors[name].start % tensor.element_size() == 0


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "Evil"])
def test_code_in_the_folder_is_never_run(
    tokenizer_class: str, folder: Path, moe_lm: Callable[..., Any], tmp_path: Path
) -> None:
    """With the whole proof, in which `transformers` reads the folder too."""
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: ...\n")
    places = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    change_config(folder, auto_map=places)
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    imported = moe_lm("import", folder, "--run-dir", tmp_path / "run")
    assert (imported.code, imported.err) == (0, "")
    unproven = "not proven: tokenizer: its class is code in the folder, which is never run"
    assert (unproven in imported.out.splitlines()) == (tokenizer_class == "Evil")
    exported = moe_lm("export", tmp_path / "run", tmp_path / "out")
    assert exported.code == 0
    assert "AutoTokenizer gives the same ids and renders the same conversation" in exported.out.splitlines()
    assert not (tmp_path / "ran").exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "out" / name).read_text()


def test_interrupt_leaves_nothing(folder: Path, moe_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        assert (tmp_path / "run.tmp" / "checkpoints" / "step-00000000" / "COMPLETE").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "prove", interrupt)
    done = moe_lm("import", folder, "--run-dir", tmp_path / "run")
    assert done.code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_sigterm_leaves_nothing(folder: Path, moe_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scheduler or `kill` sends; the same command can be given again."""

    def end(*_: object) -> None:
        assert (tmp_path / "run.tmp").is_dir()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody took care of the signal"))
    try:
        monkeypatch.setattr(importing, "prove", end)
        assert moe_lm("import", folder, "--run-dir", tmp_path / "run").code == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_working_directory_as_the_new_folder(folder: Path, moe_lm: Any, tmp_path: Path) -> None:
    """Relative paths mean what they meant until the end."""
    (tmp_path / "here").mkdir()
    with contextlib.chdir(tmp_path / "here"):
        done = moe_lm("import", "../hf", "--run-dir", ".", "--proof-memory", 0)
    assert (done.code, done.err) == (0, "")
    with contextlib.chdir(tmp_path / "here"):
        done = moe_lm("export", ".", ".", "--proof-memory", 0)
    assert done.code == 2
    assert f"{tmp_path / 'here'} exists already" in done.err
    assert moe_lm("export", tmp_path / "here", "/", "--proof-memory", 0).code == 2
