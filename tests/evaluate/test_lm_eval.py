"""An exported model in lm-eval, on a task of eval/tasks: the log-likelihoods are those of this program."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch

from moe_lm.generate.session import Session
from moe_lm.tools.interop.exporting import export_run
from tests.processes import ROOT
from tests.tiny import logits_of

PAIRS = 40


def log_likelihood(session: Session, text: str) -> float:
    """Log-likelihood of a text after `<|bos|>`, in nats."""
    ids = [session.tokenizer.bos_id, *session.tokenizer.encode(text)]
    log_probs = logits_of(session.model, ids[:-1]).log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_exported_model_answers_in_lm_eval_as_it_does_here(
    pretrained: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'moe-lm[eval]'")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)  # the task's path begins there
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(tmp_path / "hub"))):
        monkeypatch.setenv(name, value)
    export_run(pretrained, tmp_path / "exported")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "exported"), "dtype": "float32"},
        tasks=["blimp_offline"],
        task_manager=TaskManager(include_path=str(ROOT / "eval/tasks"), include_defaults=False),
        device="cpu",
        batch_size=8,
        limit=PAIRS,
    )
    session = Session.load(pretrained, device="cpu")
    with lzma.open(shared_data / "eval/blimp-34x200.jsonl.xz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line, _ in zip(file, range(PAIRS), strict=False)]
    assert len(pairs) == len(found["samples"]["blimp_offline"]) == PAIRS
    with torch.inference_mode():
        for sample in found["samples"]["blimp_offline"]:
            sides = [sample["doc"][name] for name in ("sentence_good", "sentence_bad")]
            assert sample["doc"] in pairs
            theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
            assert theirs == pytest.approx([log_likelihood(session, f" {side}") for side in sides], abs=1e-3)
    right = [float(sample["acc"]) for sample in found["samples"]["blimp_offline"]]
    assert found["results"]["blimp_offline"]["acc,none"] == pytest.approx(sum(right) / PAIRS)
