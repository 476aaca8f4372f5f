"""`moe-lm explain`: the recording equals the model's own pass, and the picture labels every token."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from moe_lm.common.errors import MoeLmError
from moe_lm.config.model import ModelConfig
from moe_lm.model.transformer import LanguageModel
from moe_lm.tools.explain import explain as verb
from moe_lm.tools.explain import picture
from moe_lm.tools.explain.picture import apart, draw, fold, label
from moe_lm.tools.explain.recording import Recording, record, shares
from tests.conftest import MoeLm
from tests.tiny import LATENT, packed, tiny

SIZES = {"vocab_size": 1100, "initializer_range": 0.3}
GROUPED, MULTI_LATENT, DENSE = tiny(**SIZES), tiny(**SIZES | LATENT), tiny(**SIZES, n_routed_experts=0)


def built(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config)
    model.initialise(seed=3)
    return model.eval()


@pytest.mark.parametrize("config", [GROUPED, MULTI_LATENT], ids=["grouped-query", "latent"])
def test_the_recording_is_what_the_model_computes(config: ModelConfig) -> None:
    model, ids = built(config), list(range(7, 27))
    recording = record(model, ids)
    with torch.inference_mode():
        logits, routings = model(torch.tensor([ids]), *packed([len(ids)]))
    torch.testing.assert_close(recording.logits, logits[0], rtol=1e-4, atol=1e-4)
    assert list(recording.routings) == [1, 2]
    for ours, theirs in zip(recording.routings.values(), routings, strict=True):
        assert torch.equal(ours.experts, theirs.experts)
        share_SE = shares(ours, 8)
        torch.testing.assert_close(share_SE.sum(-1), torch.ones(len(ids)))
        assert torch.equal(share_SE > 0, torch.zeros(len(ids), 8).scatter(-1, theirs.experts, 1.0) > 0)
    assert list(recording.attention) == [0, 1, 2]
    for weights_HSS in recording.attention.values():
        assert weights_HSS.shape == (4, len(ids), len(ids))
        torch.testing.assert_close(weights_HSS.sum(-1), torch.ones(4, len(ids)))
        assert not weights_HSS.triu(1).any()


def test_tokens_that_are_not_drawn_are_added_up() -> None:
    weights = torch.rand(6, 6).tril()
    weights /= weights.sum(-1, keepdim=True)
    folded = fold(weights, 2)
    assert folded.shape == (4, 5)
    assert folded.sum(-1).tolist() == pytest.approx([1.0] * 4)
    assert folded[3, 0] == pytest.approx(float(weights[5, :2].sum()))
    assert folded.mask.sum() == 6  # what comes later


def test_attention_to_the_first_token_has_colours_of_its_own() -> None:
    first, others = apart(fold(torch.rand(5, 5).tril(), 0))
    assert first.mask.tolist() == [[False, *[True] * 4]] * 5
    assert [row.count() for row in others] == [0, 1, 2, 3, 4]


def test_each_map_has_a_bar_of_its_colours() -> None:
    for config, bars in ((GROUPED, ["Blues", "Oranges"]), (DENSE, ["Blues"])):
        figure = draw(record(built(config), [1, 2, 3]), str, [0], [0], config.n_routed_experts, "")
        drawn = figure.axes[-len(bars) :]
        assert [axes.get_ylabel().split(" ")[0] for axes in drawn] == ["attention", "share"][: len(bars)]
        assert [axes.collections[-1].cmap.name for axes in drawn] == bars


def test_a_picture_of_many_tokens_has_fewer_panels() -> None:
    assert picture.readable(4) == (13, 7)
    assert picture.readable(31) == (4, 2)
    assert picture.readable(500) == picture.readable(32)


def test_the_legend_names_shared_experts() -> None:
    recording = record(built(GROUPED), [1, 2])
    assert verb.legend(recording, 1).endswith("by weight; the shared expert takes every token")
    assert verb.legend(recording, 2).endswith("2 shared experts take every token")
    assert "orange" not in verb.legend(record(built(DENSE), [1, 2]), 1)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" the", "·the"),
        ("\n\t", "↵→"),
        ("$x^2$", "$x^2$"),
        ("\ufffd", "#7"),
        ("", "#7"),
        ("\x00", "#7"),
        ("\U0001faf8", "#7"),  # in no font of matplotlib's
        ("a" * 20, "aaaaaaaaaaa…"),
    ],
)
def test_a_token_has_a_name_that_can_be_drawn(text: str, name: str) -> None:
    assert label(7, text, ["DejaVu Sans"]) == name


def test_text_without_glyphs_is_spelled_out() -> None:
    assert picture.spelled("a\n你", ["DejaVu Sans"]) == "a\n\\u4f60"


def drawn(
    config: ModelConfig, tokens: int, layers: Sequence[int] = (0, 1), heads: Sequence[int] = (0, 3)
) -> tuple[Recording, list[list[str]]]:
    """A recording, and the texts of each panel: its title, then the labels of its rows and columns."""
    recording = record(built(config), list(range(10, 10 + tokens)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(recording, lambda id_: f"${id_}", layers, heads, config.n_routed_experts, "你 $a_b$")
    texts = []
    for axes in figure.axes:
        rows, columns = (
            [item.get_text() for item in side] for side in (axes.get_yticklabels(), axes.get_xticklabels())
        )
        texts.append([axes.get_title(loc="left"), *rows, *columns])
    return recording, texts


def test_a_panel_a_head_and_the_experts_of_each_layer() -> None:
    _, texts = drawn(GROUPED, 4)
    names = ["$10", "$11", "$12", "$13"]
    assert texts[0] == ["layer 0, head 0", *names]
    assert texts[1] == ["head 3"]
    assert texts[2][0] == ""  # a dense layer
    assert texts[3] == ["layer 1, head 0", *names, *names]
    assert texts[4] == ["head 3", *names]
    assert texts[5] == ["experts", *"01234567"]


def test_a_long_prompt_is_drawn_from_its_end() -> None:
    _, texts = drawn(MULTI_LATENT, 40, layers=[2], heads=[1])
    assert texts[0][:2] == ["layer 2, head 1", "$18"]
    assert texts[0][33:35] == ["8 before", "$18"]


def test_a_dense_model_has_no_experts_beside_it() -> None:
    _, texts = drawn(DENSE, 4)
    assert [text[0] for text in texts[:-1]] == ["layer 0, head 0", "head 3", "layer 1, head 0", "head 3"]


def test_by_default_layers_and_heads_are_spread() -> None:
    assert verb._chosen("layer", None, 12, 6) == [0, 2, 4, 7, 9, 11]
    assert verb._chosen("layer", None, 1, 6) == [0]
    assert verb._chosen("head", [3, 1, 3], 4, 6) == [3, 1]


def test_the_title_has_the_name_that_was_given(tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "moe", tmp_path / "moe/checkpoints/step-00000010"
    assert verb._name(run, checkpoint) == "moe, step-00000010"
    assert verb._name(checkpoint, checkpoint) == "step-00000010"
    assert verb._name(Path("/copied"), Path("/copied")) == "copied"


def test_the_verb_writes_a_picture(save_run: Callable[..., Path], moe_lm: MoeLm, tmp_path: Path) -> None:
    run = save_run(built(GROUPED))
    done = moe_lm(
        "explain", run, "-p", "$5 " * 12 + "世界", "--out", tmp_path / "a.png", "--layers", "0,2", "--heads", 1
    )
    assert (done.code, done.out) == (0, "")
    assert "the picture shows the last 32" in done.err
    assert done.err.endswith("a.png: layers 0, 2, heads 1\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for options, error in {
        ("--layers", "3"): "--layers names layer 3; this model has layers 0 to 2",
        ("--heads", "x"): "--heads x is not a list of numbers",
        ("--out", tmp_path / "a.doc"): "is not the name of a picture; expected one that ends in .png, .svg, .pdf",
        ("--prompt", "caf\udce9"): "--prompt is not UTF-8 text at character 3",
        ("--prompt", "1 2 3 " * 40): "max_position_embeddings=64; shorten it",
    }.items():
        done = moe_lm("explain", run, "-p", "a", *options)
        assert done.code == 2
        assert error in done.err
    assert moe_lm("explain", run, "-p", "1 2 3 " * 40, "--truncate", "left", "--out", tmp_path / "a.svg").code == 0
    done = moe_lm("explain", run, "-p", "a", "--out", tmp_path / "none" / "a.png")
    assert done.code == 1
    assert "cannot be written (No such file or directory)" in done.err


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MoeLmError, match=r"pip install .*\[plot\]"):
        picture.need_matplotlib()
