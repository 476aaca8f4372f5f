"""Save and load: what comes back, which checkpoint is taken, what another model is told (FAULTS rows 8, 29, 33)."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pickletools
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from moe_lm.checkpoint import checkpoint, read, retain, write
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.run import CheckpointConfig


def make_state(seed: int) -> dict[str, Tensor]:
    """One tensor of every kind that a trainer keeps."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 5, generator=generator)
    return {
        "model.embed.weight": weight,
        "model.head.weight": weight,  # tied: the same memory under two names
        "model.transposed": torch.randn(4, 3, generator=generator).T,
        "model.half": torch.randn(7, generator=generator).bfloat16(),
        "model.bias": torch.randn(8, generator=generator)[2:5],  # a view into larger memory
        "exp_avg.embed.weight": torch.randn(6, 5, generator=generator),
        "step.embed.weight": torch.tensor(float(seed)),
        "random.cpu": torch.randint(0, 256, (16,), dtype=torch.uint8, generator=generator),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
    }


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder of two checkpoints, of steps 500 and 1000."""
    for step in (500, 1000):
        write.save(tmp_path / "checkpoints", step, make_state(step), {"config.yaml": f"step: {step}\n"})
    return tmp_path / "checkpoints"


# What a user gets back


def test_load_returns_every_tensor_bitwise(newest: Path) -> None:
    loaded = blank(make_state(1000))
    read.load(newest, loaded)
    assert_equal(loaded, make_state(1000))


def test_load_fills_in_place_and_converts_the_dtype(newest: Path) -> None:
    state = blank(make_state(1000))
    parameter = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.bfloat16))
    state["model.embed.weight"] = parameter
    read.load(newest, state)
    assert torch.equal(parameter.detach(), make_state(1000)["model.embed.weight"].bfloat16())


def test_files_come_back_as_text_and_as_folders(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "vocabulary.txt").write_text("字 ü", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("a: 1")
    files: dict[str, str | Path] = {
        "config.yaml": "b: é\n",
        "tokenizer": source,
        "kept/recipe.yaml": tmp_path / "recipe.yaml",
    }
    folder = write.save(tmp_path / "checkpoints", 1, make_state(1), files)
    assert checkpoint.read_text(folder, "config.yaml") == "b: é\n"
    assert checkpoint.read_text(folder, "kept/recipe.yaml") == "a: 1"
    path = checkpoint.verified_path(folder, "tokenizer")
    assert (path / "sub" / "vocabulary.txt").read_text(encoding="utf-8") == "字 ü"
    with pytest.raises(MoeLmError, match=r"has no absent\.txt"):
        checkpoint.read_text(folder, "absent.txt")


def test_the_manifest_gives_the_checksum_of_every_file(newest: Path) -> None:
    manifest = json.loads((newest / "manifest.json").read_text())
    present = {p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()}
    assert present == {*manifest, "manifest.json", "COMPLETE"}
    for name, entry in manifest.items():
        content = (newest / name).read_bytes()
        assert entry == {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    assert (newest / "COMPLETE").read_text().strip() == hashlib.sha256(
        (newest / "manifest.json").read_bytes()
    ).hexdigest()


def test_large_states_are_cut_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 100)
    folder = write.save(tmp_path, 1, make_state(3), {})
    assert len(list(folder.glob("model/*.safetensors"))) > 1
    loaded = blank(make_state(3))
    read.load(folder, loaded)
    assert_equal(loaded, make_state(3))


def test_a_tensor_that_an_older_version_did_not_save_may_be_0(newest: Path) -> None:
    state = blank(make_state(1000)) | {"load": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(MoeLmError, match="has no tensor load"):
        read.load(newest, state)
    read.load(newest, state, zero_if_absent=("load",))
    assert_equal(state, {**make_state(1000), "load": torch.zeros(2, 3, dtype=torch.int64)})


def test_weights_load_without_the_optimizer(newest: Path) -> None:
    shutil.rmtree(newest / "optimizer")
    expected = {name: tensor for name, tensor in make_state(1000).items() if name.startswith("model.")}
    loaded = blank(expected)
    read.load_weights(newest, loaded)
    assert_equal(loaded, expected)
    with pytest.raises(MoeLmError, match=r"optimizer/.* is missing"):
        read.load(newest, blank(make_state(1000)))


def test_only_weights_load_without_the_optimizer(newest: Path) -> None:
    with pytest.raises(MoeLmError, match=r"has no tensor exp_avg\.embed\.weight"):
        read.load_weights(newest, {"exp_avg.embed.weight": torch.zeros(6, 5)})


def test_no_pickle_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    folder = write.save(tmp_path, 1, make_state(1), {"config.yaml": "a: 1\n"})
    read.load(folder, blank(make_state(1)))
    monkeypatch.undo()
    names = [path for path in folder.rglob("*") if path.is_file()]
    assert len(names) == 7
    for path in names:
        assert not is_pickle(path.read_bytes()), path


def is_pickle(content: bytes) -> bool:
    """Whether the bytes are a zip (as of `torch.save`) or begin with a stream of pickle opcodes up to its STOP."""
    if content.startswith(b"PK"):
        return True
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(io.BytesIO(content)))
    except ValueError:
        return False


def test_is_pickle_knows_one() -> None:
    assert is_pickle(pickle.dumps({"a": 1}))
    assert not is_pickle(b'{"a": 1}')


# Which checkpoint


def test_latest_is_the_newest_complete_one(checkpoints: Path, newest: Path) -> None:
    (checkpoints / "step-00002000.tmp").mkdir()
    (checkpoints / "step-00003000").mkdir()
    (checkpoints / "notes").mkdir()
    assert checkpoint.latest(checkpoints) == newest
    assert checkpoint.latest(checkpoints / "absent") is None


def test_latest_orders_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write.save(tmp_path, step, {"model.a": torch.zeros(1)}, {})
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100000000"


def test_resolve_takes_a_run_folder_or_a_checkpoint(checkpoints: Path, newest: Path) -> None:
    assert checkpoint.resolve(checkpoints.parent) == newest
    assert checkpoint.resolve(checkpoints / "step-00000500") == checkpoints / "step-00000500"


def test_resolve_refuses_a_checkpoint_without_complete_and_names_the_newest(checkpoints: Path, newest: Path) -> None:
    (checkpoints / "step-00000500" / "COMPLETE").unlink()
    with pytest.raises(UsageError, match=f"has no COMPLETE.*use {newest}"):
        checkpoint.resolve(checkpoints / "step-00000500")
    (newest / "COMPLETE").unlink()
    with pytest.raises(UsageError, match="no complete checkpoint is beside it"):
        checkpoint.resolve(newest)
    with pytest.raises(UsageError, match="holds no complete checkpoint"):
        checkpoint.resolve(checkpoints.parent)
    with pytest.raises(UsageError, match="has no COMPLETE"):
        read.load(newest, {})


def test_resolve_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        checkpoint.resolve(tmp_path / "absent")
    with pytest.raises(UsageError, match="train first"):
        checkpoint.resolve(tmp_path)


def test_clean_keeps_the_newest_and_removes_leftovers(checkpoints: Path) -> None:
    write.save(checkpoints, 1500, make_state(1), {})
    (checkpoints / "step-00001500.tmp" / "model").mkdir(parents=True)
    (checkpoints / "step-00001200.replaced.tmp").mkdir()
    (checkpoints / "by-hand").mkdir()
    retain.clean(checkpoints, CheckpointConfig(keep=2))
    assert sorted(p.name for p in checkpoints.iterdir()) == ["by-hand", "step-00001000", "step-00001500"]


def test_saving_a_step_again_replaces_it(checkpoints: Path, newest: Path) -> None:
    write.save(checkpoints, 1000, make_state(7), {})
    loaded = blank(make_state(7))
    read.load(newest, loaded)
    assert_equal(loaded, make_state(7))
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000500", "step-00001000"]


# Another model


def test_a_missing_tensor_is_named_before_any_is_touched(newest: Path) -> None:
    state = blank(make_state(0)) | {"exp_avg.other": torch.zeros(2)}
    with pytest.raises(MoeLmError, match=r"has no tensor exp_avg\.other"):
        read.load(newest, state)
    assert_equal(state, blank(make_state(0)) | {"exp_avg.other": torch.zeros(2)})


def test_another_shape_is_named_before_any_tensor_is_touched(newest: Path) -> None:
    state = blank(make_state(0)) | {"exp_avg.embed.weight": torch.zeros(5, 6)}
    with pytest.raises(MoeLmError, match=r"exp_avg\.embed\.weight is \[6, 5\] in .* expected \[5, 6\]"):
        read.load(newest, state)
    assert not any(tensor.any() for tensor in state.values())


def test_a_weight_that_the_model_lacks_is_named(newest: Path) -> None:
    state = blank(make_state(0))
    del state["model.half"]
    with pytest.raises(MoeLmError, match=r"has the tensor model\.half, which this model lacks"):
        read.load(newest, state)
