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

from moe_lm.common.signals import STOP_SIGNALS, ended_by_exception
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop import importing
from tests.conftest import MoeLm
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
def refused(moe_lm: MoeLm, tmp_path: Path) -> Callable[..., str]:
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


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def set_tensor(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / MODEL, lambda tensors: tensors.update({name: tensor}))


def set_config(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def set_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def fifo(name: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def link(name: str, target: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def holes(name: str, size: int) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return make


def special_tokens(count: int, first: int = 0) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        form = '{"id": %d, "content": "<%d>", "special": true}'
        tokens = ", ".join(form % (number, number) for number in range(first, first + count))
        text = f'{{"added_tokens": [{tokens}], "model": {{"type": "BPE", "vocab": {{}}, "merges": []}}}}'
        (folder / "tokenizer.json").write_text(text)

    return change


BROKEN: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a pickle under the name of a safetensors file": (
        lambda folder: torch.save({"a": torch.zeros(3)}, folder / MODEL), 1, "is not a sound safetensors file",
    ),
    "only a pickle": (
        lambda folder: (folder / MODEL).rename(folder / "pytorch_model.bin"), 2, "a pickle, which can run code",
    ),
    "no weights": (
        lambda folder: (folder / MODEL).unlink(), 2, "holds no weights; expected model.safetensors",
    ),
    "more experts than the config says": (  # elsewhere they are dropped, and the import is called a success
        set_config(n_routed_experts=6, n_group=1, topk_group=1), 1, "is [8, 32], expected [6, 32]",
    ),
    "an unexpected tensor": (
        set_tensor("extra", torch.ones(3)), 1, "holds 1 tensors that its config.json does not explain: extra",
    ),
    "another shape": (
        set_tensor(NORM, torch.ones(33)), 1, f"hf/{MODEL}: tensor {NORM} is [33], expected [32]",
    ),
    "integers": (
        set_tensor(NORM, torch.ones(32, dtype=torch.int32)), 1,
        f"hf/{MODEL}: tensor {NORM} has dtype I32, expected one of F32",
    ),
    "8 bits": (set_tensor(NORM, torch.ones(32).to(torch.float8_e4m3fn)), 1, "has dtype F8_E4M3"),
    "half a config": (set_text("config.json", "{"), 2, "hf/config.json is not valid JSON"),
    "a config of another form": (set_text("config.json", "[]"), 2, "hf/config.json holds list, expected a JSON object"),
    "a config that is text": (set_text("config.json", "nothing"), 2, "hf/config.json is not valid JSON"),
    "more ids than embeddings": (
        set_config(vocab_size=1000), 2, "has 1024 ids, but the model embeddings for only 1000",
    ),
    "a size that is text": (
        set_config(hidden_size="64"), 2, "hidden_size='64', expected a whole number from 0 to",
    ),
    "absurdly many layers": (
        set_config(num_hidden_layers=10**9), 2, "num_hidden_layers=1000000000, expected a whole number from 0 to 4096",
    ),
    "absurdly many experts": (set_config(n_routed_experts=10**9), 2, "less than or equal to 65536"),
    "experts for which there are no tensors": (
        set_config(num_hidden_layers=4096, n_routed_experts=65536), 1, "and 65536 experts of its config.json promise",
    ),
    "layer types that are no list": (set_config(layer_types=3), 2, "layer_types=3, expected a list of str"),
    "a FIFO for a config": (fifo("config.json"), 2, "hf/config.json: it is not a regular file"),
    "a FIFO for an index": (fifo(INDEX), 2, f"hf/{INDEX}: it is not a regular file"),
    "a FIFO for weights": (fifo(MODEL), 2, f"hf/{MODEL}: it is not a regular file"),
    "a FIFO that transformers would read": (fifo("added_tokens.json"), 2, "is not a regular file"),
    "a tokenizer that is a link": (link("tokenizer.json", "/etc/hostname"), 2, "tokenizer.json is a symbolic link"),
    "a template that is a device": (link("chat_template.jinja", "/dev/zero"), 2, "jinja is a symbolic link"),
    "a template that is a file of the user": (link("chat_template.jinja", "/etc/hostname"), 2, "is a symbolic link"),
    "a template that is nowhere": (link("chat_template.jinja", "nowhere"), 2, "chat_template.jinja is a symbolic link"),
    "a config of 6 GB": (holes("config.json", 6 << 30), 2, "config.json has 6442450944 bytes, expected at most"),
    "a tokenizer of 6 GB": (holes("tokenizer.json", 6 << 30), 2, "tokenizer.json has 6442450944 bytes, expected at"),
    "a template of 6 GB": (holes("chat_template.jinja", 6 << 30), 2, "template.jinja has 6442450944 bytes, expected"),
    "200,000 special tokens": (
        special_tokens(200_000), 2, "tokenizer.json is broken: it has 200000 added tokens, expected at most",
    ),
    "more special tokens than embeddings": (special_tokens(10_000), 2, "has 10000 ids, but the model embeddings for"),
    "a token with an absurd id": (special_tokens(1, first=4_000_000_000), 2, "its ids end at 4000000000, expected at"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folder(folder: Path, refused: Any, what: str) -> None:
    damage, code, said = BROKEN[what]
    damage(folder)
    assert said in refused(folder, code=code)


def place(name: str) -> Callable[[Path, dict[str, str]], object]:
    return lambda shards, places: places.update({NORM: name})


def lose_a_shard(shards: Path, places: dict[str, str]) -> None:
    (shards / places[QUERY]).unlink()


def exchange(shards: Path, places: dict[str, str]) -> None:
    places[NORM] = next(name for name in places.values() if name != places[NORM])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lose_a_shard, ".safetensors, which is missing; copy it again"),
        (exchange, f"promises tensor {NORM}"),
        *(
            (place(name), f"names the file {name!r}, expected a safetensors file in the same folder")
            for name in ("../elsewhere.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "weights.bin")
        ),
    ],
)
def test_index_that_does_not_fit_its_shards(shards: Path, refused: Any, change: Any, said: str) -> None:
    index = json.loads((shards / INDEX).read_text())
    change(shards, index["weight_map"])
    (shards / INDEX).write_text(json.dumps(index))
    assert said in refused(shards)


@pytest.mark.parametrize(("content", "code"), [("{", 2), ("[]", 2), ('{"weight_map": 3}', 1)])
def test_broken_index(shards: Path, refused: Any, content: str, code: int) -> None:
    (shards / INDEX).write_text(content)
    assert str(shards / INDEX) in refused(shards, code=code)


def test_no_folder(tmp_path: Path, refused: Any) -> None:
    assert "there is no folder" in refused(tmp_path / "nowhere", code=2)


@pytest.mark.parametrize("name", [MODEL, "config.json"])
def test_symbolic_link_is_not_followed(folder: Path, refused: Any, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused(folder, code=2)


def test_a_folder_in_a_cache_of_hugging_face_is_read_through_its_links(
    folder: Path, moe_lm: MoeLm, tmp_path: Path
) -> None:
    """Whose files are links from `snapshots/REVISION` into `blobs`, and no further."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert moe_lm("import", snapshot, "--run-dir", tmp_path / "run").code == 0
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    done = moe_lm("import", snapshot, "--run-dir", tmp_path / "other")
    assert done.code == 2
    assert "is a symbolic link, which is not followed" in done.err


def test_missing_and_unexpected_tensors_are_listed(folder: Path, refused: Any) -> None:
    expert = "model.layers.1.mlp.experts.{}.up_proj.weight"
    change_tensors(folder / MODEL, lambda tensors: [tensors.pop(expert.format(number)) for number in range(7)])
    error = refused(folder)
    assert "lacks 7 tensors that its config.json promises" in error
    assert expert.format(0) in error
    assert error.rstrip().endswith("and 2 more")


def test_known_extras_are_said(folder: Path, moe_lm: MoeLm, tmp_path: Path) -> None:
    extras = {
        "model.layers.3.eh_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    change_tensors(folder / MODEL, lambda tensors: tensors.update(extras))
    set_config(some_new_key=3, pretraining_tp=1)(folder)
    done = moe_lm("import", folder, "--run-dir", tmp_path / "run", "--proof-memory", 0)
    assert done.code == 0
    lines = done.out.splitlines()
    assert any("multi-token prediction" in line and "model.layers.3.eh_proj.weight" in line for line in lines)
    assert any("rotary frequencies" in line and "inv_freq" in line for line in lines)
    assert "not used: some_new_key=3 in config.json" in lines
    notes = json.loads((tmp_path / "run" / "proof.json").read_text())["notes"]
    assert all(note in lines for note in notes)
    assert len(notes) == 3


def test_tied_head_that_differs(hf_folder: Any, tmp_path: Path, refused: Any, moe_lm: MoeLm) -> None:
    folder = shutil.copytree(hf_folder("llama tied"), tmp_path / "hf")
    embedding = load_file(folder / MODEL)["model.embed_tokens.weight"]
    set_tensor("lm_head.weight", embedding + 1)(folder)
    assert "tie_word_embeddings=True, but lm_head.weight differs from model.embed_tokens.weight" in refused(folder)
    set_tensor("lm_head.weight", embedding.clone())(folder)
    assert moe_lm("import", folder, "--run-dir", tmp_path / "run", "--proof-memory", 0).code == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is unknown; expected one of dots1, glm4_moe"),
        ({"model_type": None}, "model_type=None is unknown"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method': 'fp8', 'fmt': "),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types=['sliding_attention'] cannot be expressed"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' cannot be expressed here, expected 'sigmoid'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 cannot be expressed"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": 3}, "rope_parameters=3 is not a table"),
        ({"hidden_size": None}, "has no hidden_size, which a model of type dots1 needs"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
    ],
)
def test_what_cannot_be_expressed_is_named_with_its_value(
    folder: Path, refused: Any, values: dict[str, Any], said: str
) -> None:
    set_config(**values)(folder)
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
    set_config(**values)(folder)
    assert f"{said} cannot be expressed here" in refused(folder, code=2)


def test_tokenizer_missing_and_given(folder: Path, refused: Any, moe_lm: MoeLm, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / "words" / name)
    assert "holds no tokenizer" in refused(folder, code=2)
    options = ("--run-dir", tmp_path / "run", "--proof-memory", 0, "--tokenizer", tmp_path / "words")
    assert moe_lm("import", folder, *options).code == 0


def test_run_folder_that_exists(folder: Path, moe_lm: MoeLm, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("kept")
    done = moe_lm("import", folder, "--run-dir", tmp_path / "run")
    assert done.code == 2
    assert "exists already" in done.err
    assert (tmp_path / "run" / "mine").read_text() == "kept"


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "Evil"])
def test_code_in_the_folder_is_never_run(tokenizer_class: str, folder: Path, moe_lm: MoeLm, tmp_path: Path) -> None:
    """With the whole proof, in which `transformers` reads the folder too."""
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: ...\n")
    set_config(auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil"))(folder)
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


def test_interrupt_leaves_nothing(folder: Path, moe_lm: MoeLm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        assert (tmp_path / "run.tmp" / "checkpoints" / "step-00000000" / "COMPLETE").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "prove", interrupt)
    done = moe_lm("import", folder, "--run-dir", tmp_path / "run")
    assert done.code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_leaves_nothing(
    folder: Path, moe_lm: MoeLm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """What a scheduler, `kill` or a terminal sends; the same command can be given again."""

    def end(*_: object) -> None:
        assert (tmp_path / "run.tmp").is_dir()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(importing, "prove", end)
    with ended_by_exception():  # as in moe_lm/__main__.py
        assert moe_lm("import", folder, "--run-dir", tmp_path / "run").code == 128 + number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_working_directory_as_the_new_folder(folder: Path, moe_lm: MoeLm, tmp_path: Path) -> None:
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
