"""Names of the Hugging Face hub in place of folders. The hub's client is replaced where it would use the network."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from moe_lm.common import hub
from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import MoeLm

ANSWER: Any = SimpleNamespace(status_code=403, headers={}, request=None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the hub, which has one repository, `owner/there`, and refuses others by their names."""
    calls = list[Any]()

    def snapshot_download(name: str, **how: Any) -> str:
        calls.append((name, how))
        refusals: dict[str, Exception] = {
            "owner/nothing": errors.RepositoryNotFoundError("404", response=ANSWER),
            "owner/gated": errors.GatedRepoError("403", response=ANSWER),
            "owner/broken": errors.HfHubHTTPError("500 Server Error\nfor url", response=ANSWER),
        }
        if name in refusals:
            raise refusals[name]
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **how: None)
    return calls


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (
            "owner/nothing",
            2,
            "owner/nothing is no folder here, and there is no repository owner/nothing on the hub, or it",
        ),
        ("owner/gated", 2, "owner/gated is gated: its owner must let you in"),
        ("owner/broken", 1, "the hub refused owner/broken: 500 Server Error"),
        ("owner/far@v2", 1, "the hub cannot be reached; fetch it where there is a network (hf download owner/far"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(
    name: str, code: int, said: str, asked: list[Any], moe_lm: MoeLm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = moe_lm("import", name)
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert said in done.err
    ((repository, how),) = asked
    assert repository == name.partition("@")[0]
    assert how["revision"] == (name.partition("@")[2] or None)
    assert "*.safetensors" in how["allow_patterns"]


@pytest.mark.parametrize("path", ["runs/x", "a/b/c", "/a/b", "word", "here/x", "tokenizer/x"])
def test_a_path_is_not_asked_for(path: str, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(hub.local_folder(Path(path), hub.MODEL_FILES)) == path
    assert asked == []


def test_a_tokenizer_of_the_hub_is_fetched_once(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its cache serves, also the many processes of `prepare` on machines without a network."""
    cache, asked = tmp_path / "cache", list[str]()

    def snapshot_download(name: str, allow_patterns: list[str], **how: Any) -> str:
        asked.append(name)
        assert "*.safetensors" not in allow_patterns
        tiny_tokenizer.save(cache)
        return str(cache)

    def try_to_load_from_cache(name: str, file: str, **how: Any) -> str | None:
        return str(cache / file) if (cache / file).exists() else None

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", try_to_load_from_cache)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert Tokenizer.load(Path("owner/there")).fingerprint == tiny_tokenizer.fingerprint
    assert asked == ["owner/there"]


def test_a_folder_of_the_cache_is_shown_by_its_name_on_the_hub() -> None:
    assert hub.shown(Path("/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de")) == "Qwen/Qwen3-0.6B"
    assert hub.shown(Path("/data/snapshots/mine")) == "mine"


def test_without_a_network_the_hub_is_given_up_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:  # bound, and it does not listen
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert not hub.is_reachable()
    asked: list[Any] = []
    answers = SimpleNamespace(head=lambda address, timeout: asked.append(timeout))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: answers)
    assert hub.is_reachable()
    assert asked == [hub.SECONDS]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.is_reachable()


USER = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}


def client(seen: list[Any], user: Callable[[], Any]) -> type:
    class Api:
        """What export uses of the hub's client."""

        endpoint = "https://hub.example"

        def whoami(self) -> Any:
            return user()

        def create_repo(self, name: str, **how: Any) -> None:
            seen.append((name, how))

        def upload_folder(self, repo_id: str, folder_path: Path, **how: Any) -> None:
            seen.append((repo_id, sorted(item.name for item in folder_path.iterdir())))

    return Api


def test_a_folder_is_pushed_to_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Any]()
    monkeypatch.setattr(huggingface_hub, "HfApi", client(seen, lambda: USER))
    (tmp_path / "config.json").touch()
    hub.check_can_push("me/mine")
    assert hub.push(tmp_path, "me/mine") == "https://hub.example/me/mine"
    assert seen == [("me/mine", {"private": True, "exist_ok": True}), ("me/mine", ["config.json"])]


def test_nobody_who_is_not_logged_in_waits_for_an_export(
    tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> Any:
        raise errors.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(huggingface_hub, "HfApi", client([], nobody))
    for name, said in (("me/mine", "no one is logged in to the hub; run hf auth login"), ("mine", "give OWNER/NAME")):
        done = moe_lm("export", tmp_path, tmp_path / "out", "--push", name)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err


@pytest.mark.parametrize(
    ("name", "role", "said"),
    [
        ("you/mine", "write", "--push you/mine is of another owner; who is logged in may write to me, us"),
        ("me/mine", "read", "this token of the hub only reads"),
        ("us/mine", "write", None),
        ("you/mine", "fineGrained", None),
    ],
)
def test_who_may_not_write_there_does_not_wait_for_an_export_either(
    name: str, role: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", client([], lambda: {**USER, "auth": {"accessToken": {"role": role}}}))
    if said is None:
        hub.check_can_push(name)
        return
    with pytest.raises(UsageError, match=said):
        hub.check_can_push(name)


def test_a_mistyped_folder_is_said_with_the_one_that_is_meant(
    asked: list[Any], moe_lm: MoeLm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what begins with ./ is no name."""
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    done = moe_lm("import", "modles/qwen")
    assert "modles/qwen is no folder here (did you mean models/qwen?), and the hub cannot be reached" in done.err
    asked.clear()
    done = moe_lm("import", "./modles/qwen")
    assert (done.code, asked) == (2, []), done
