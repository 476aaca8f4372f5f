"""The proof of a tokenizer: `AutoTokenizer` gives the same ids for texts and for conversations, or nothing is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import MoeLmError
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.models import compare_tokenizers
from tests.conftest import MoeLm
from tests.tokenizer.chat import foreign
from tests.tokenizer.test_added_tokens import KINDS, save

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = "AutoTokenizer gives the same ids and renders the same conversation"


@pytest.mark.parametrize("kind", [*KINDS, *foreign.STYLES])
def test_tokenizers_of_other_kinds_are_proven(kind: str, tmp_path: Path) -> None:
    folder = save(KINDS[kind], tmp_path / "hf") if kind in KINDS else foreign.save(foreign.STYLES[kind], tmp_path)
    assert compare_tokenizers(Tokenizer.load(folder), folder) == (SAME, "")


def test_template_that_tells_the_day_is_proven(tmp_path: Path) -> None:
    """Here it is always the same day, which is given to `transformers` too."""
    save(KINDS["qwen3"], tmp_path / "hf")
    template = (tmp_path / "hf" / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}\n" + template)
    assert compare_tokenizers(Tokenizer.load(tmp_path / "hf"), tmp_path / "hf") == (SAME, "")


def test_template_without_an_end_of_turn_is_said_not_to_be_compared(tmp_path: Path) -> None:
    save(KINDS["qwen3"], tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    said, why = compare_tokenizers(Tokenizer.load(tmp_path / "hf"), tmp_path / "hf")
    assert said.startswith("AutoTokenizer gives the same ids; no conversation was compared (the tokenizer's chat templ")
    assert why == ""


def test_conversation_with_other_ids_is_refused(tmp_path: Path, hf_folder: Any, moe_lm: MoeLm) -> None:
    """The template writes a token that tokenizer_config.json alone declares, so that here it is text."""
    folder = shutil.copytree(hf_folder("dots1"), tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("<|assistant|>", "<|answer|>")
    config["extra_special_tokens"] = ["<|answer|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    done = moe_lm("import", folder, "--run-dir", tmp_path / "run", "--proof-memory", 0)
    assert (done.code, done.out) == (1, "")
    assert "the proof failed: AutoTokenizer gives the ids [1024] where this program gives [" in done.err
    assert "of the conversation '<|bos|><|user|>1 < 2?<|end|><|assistant|>Yes.<|end|><|answer|>'" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_text_with_other_ids_is_refused(tmp_path: Path, hf_folder: Any, moe_lm: MoeLm) -> None:
    """An added token that tokenizer_config.json alone declares."""
    folder = shutil.copytree(hf_folder("dots1"), tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"1024": {"content": "<think>", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    done = moe_lm("import", folder, "--run-dir", tmp_path / "run", "--proof-memory", 0)
    assert (done.code, done.out) == (1, "")
    assert "the proof failed: AutoTokenizer gives other ids than this program for" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_template_that_never_ends_in_the_library_alone_ends_the_proof(tmp_path: Path) -> None:
    """It recognises this program by its day, which is always the same."""
    save(KINDS["qwen3"], tmp_path / "hf")
    template = (tmp_path / "hf" / "chat_template.jinja").read_text(encoding="utf-8")
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    elsewhere = "{% if strftime_now('%Y' ~ '') != '2024' %}" + endless + "{% endif %}"
    (tmp_path / "hf" / "chat_template.jinja").write_text(elsewhere + template)
    with pytest.raises(MoeLmError, match="template fails in AutoTokenizer: it takes more than 1 s of processor time"):
        compare_tokenizers(Tokenizer.load(tmp_path / "hf"), tmp_path / "hf")
