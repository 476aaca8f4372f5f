"""A checkpoint becomes text; what is no checkpoint is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import Sampling
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.generate.conftest import MakeRun
from tests.texts import text_of
from tests.tokenizer.chat.foreign import STYLES, save

VARIED = Settings(30, Sampling(temperature=1.5), seed=3)
QUESTION = [{"role": "user", "content": "What is <|end|>?"}]


def favour(name: str) -> Callable[[LanguageModel], None]:
    """A change of the model that makes it always choose this token."""

    def change(model: LanguageModel) -> None:
        with torch.no_grad():
            model.lm_head.bias[{"eos": 1, "end": 6}[name]] = 1e4

    return change


def test_complete_continues_a_document_that_begins_with_the_prompt(session: Session) -> None:
    tokenizer = session.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode("def main():")]
    [ids] = generate(session.model, [prompt], VARIED, {tokenizer.eos_id, tokenizer.end_id}, tokenizer.vocab_size)
    deltas = list(session.complete("def main():", VARIED))
    assert text_of(deltas) == tokenizer.decode(ids).removesuffix("\ufffd")
    assert [delta.step.token for delta in deltas] == ids
    assert len(ids) > 10


def test_an_empty_prompt_starts_from_bos(session: Session) -> None:
    [ids] = generate(session.model, [[session.tokenizer.bos_id]], Settings(10), vocab_size=1024)
    assert text_of(session.complete("", Settings(10))) == session.tokenizer.decode(ids).removesuffix("\ufffd")


def test_the_same_seed_gives_the_same_text(session: Session) -> None:
    texts = [text_of(session.complete("import ", Settings(20, Sampling(temperature=2.0), seed))) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_complete_ends_before_a_stop_string(session: Session) -> None:
    free = text_of(session.complete("import ", VARIED))
    stop = free[5:8]
    assert text_of(session.complete("import ", VARIED, [stop])) == free[: free.index(stop)]


def test_chat_answers_the_rendered_conversation(session: Session) -> None:
    prompt, _ = session.tokenizer.encode_chat(QUESTION, add_generation_prompt=True)
    [ids] = generate(session.model, [prompt], VARIED, {1, 6}, session.tokenizer.vocab_size)
    assert text_of(session.chat(QUESTION, VARIED)) == session.tokenizer.decode(ids).removesuffix("\ufffd")
    assert session.chat_room(QUESTION) == 64 - len(prompt) + 1


@pytest.mark.parametrize("token", ["eos", "end"])
def test_an_answer_ends_at_eos_and_at_the_end_of_a_turn(make_run: MakeRun, token: str) -> None:
    [delta] = Session.load(make_run(favour(token))).chat(QUESTION, Settings(5))
    assert (delta.text, delta.step.token, delta.finish) == ("", None, "stop")


def test_another_models_answer_ends_where_its_template_ends_a_turn(session: Session, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(STYLES["glm"], tmp_path / "glm"))
    foreign = Session(session.checkpoint, session.model, tokenizer)
    for token, tokens in (("<|user|>", 0), ("<|observation|>", 0), ("<|endoftext|>", 0), ("<sop>", 5)):
        with torch.no_grad():
            session.model.lm_head.bias.zero_()[tokenizer.special_tokens[token]] = 1e4
        deltas = list(foreign.chat(QUESTION, Settings(5)))
        assert text_of(deltas) == ""
        assert sum(delta.step.token is not None for delta in deltas) == tokens


def test_text_is_written_without_a_chat_template_or_with_one_that_fails(session: Session) -> None:
    files = session.tokenizer.files()
    config = json.loads(files["tokenizer_config.json"])
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    for template in (None, "{% for %}", "{{ messages[0].content }}"):
        tokenizer = Tokenizer(backend, config | {"chat_template": template})
        assert tokenizer.stop_ids == {tokenizer.eos_id}
        deltas = Session(session.checkpoint, session.model, tokenizer).complete("import", Settings(3))
        assert len(list(deltas)) <= 3


@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"n_routed_experts": 0}])
def test_load_gives_the_saved_weights(make_run: MakeRun, settings: dict[str, int]) -> None:
    saved: dict[str, torch.Tensor] = {}
    run = make_run(lambda model: saved.update(model.state_dict()), **settings)
    model = Session.load(run).model
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == ("tie_word_embeddings" in settings)


def test_no_token_is_dropped_while_writing(make_run: MakeRun) -> None:
    session = Session.load(make_run(capacity_factor=0.5))
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7]]
    assert generate(session.model, prompts, Settings(8)) == [
        generate(session.model, [prompt], Settings(8))[0] for prompt in prompts
    ]


def test_a_checkpoint_in_the_run_folder_is_taken_too(run: Path) -> None:
    assert Session.load(run / "checkpoints" / "step-00000001").checkpoint == Session.load(run).checkpoint


@pytest.mark.parametrize(
    ("name", "said"), [("nowhere", r"there is no folder .*nowhere"), (".", "holds no complete checkpoint")]
)
def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Session.load(tmp_path / name)


def test_a_checkpoint_without_complete_is_refused(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000001"
    (folder / "COMPLETE").unlink()
    with pytest.raises(UsageError, match="step-00000001 has no COMPLETE"):
        Session.load(folder)


def test_a_damaged_checkpoint_is_refused(run: Path) -> None:
    [weights] = run.glob("checkpoints/*/model/*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(MoeLmError, match=f"is damaged: model/{weights.name}"):
        Session.load(run)


def test_a_model_with_too_few_ids_for_its_tokenizer_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="vocab_size=1000 is smaller than the tokenizer's 1024 ids"):
        Session.load(make_run(vocab_size=1000))


def test_an_unknown_device_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="device 'abacus' is not available on this machine; choose one of auto"):
        Session.load(run, device="abacus")


@pytest.mark.parametrize(
    ("prompt", "said"), [("\udce4", "surrogate"), ("1 2 3 4 5 6 7 8 9 " * 20, "max_position_embeddings=64")]
)
def test_a_prompt_that_cannot_be_continued_is_refused(session: Session, prompt: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        session.complete(prompt, VARIED)
