"""A small run that saves and goes on in the way each library's own documentation shows.

    python worker.py dcp|deepspeed|trainer FOLDER STEPS

A perceptron of a million weights, AdamW, a checkpoint every 5 steps; every step's loss is a line of
FOLDER/losses.jsonl. POISON=first-last makes the inputs of these steps NaN, SPIKE=n multiplies those of step n by 1000,
WIDTH changes the model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EVERY = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    width = int(os.environ.get("WIDTH", "1024"))
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 64))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The inputs and targets of a step, counted from 1."""
    draw = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 64, generator=draw)
    targets = inputs.flip(1)
    first, _, last = os.environ.get("POISON", "0-0").partition("-")
    if int(first) <= step <= int(last or first):
        inputs = inputs * torch.nan
    if step == int(os.environ.get("SPIKE", "0")):
        inputs = inputs * 1000
    return inputs, targets


def note(folder: Path, step: int, loss: float) -> None:
    with (folder / "losses.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def dcp(folder: Path, steps: int) -> None:
    """torch.distributed.checkpoint, after PyTorch's recipe: `dcp.save` and `dcp.load` of a Stateful."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.stateful import Stateful

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    class App(Stateful):
        step = 0

        def state_dict(self) -> dict[str, Any]:
            weights, moments = get_state_dict(model, optimizer)
            return {"model": weights, "optimizer": moments, "step": self.step}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            self.step = state["step"]

    app = App()
    there = [path for path in folder.glob("step-*") if (path / ".metadata").exists()]
    if there:
        checkpoint.load({"app": app}, checkpoint_id=max(there, key=lambda path: int(path.name[5:])))
    for step in range(app.step + 1, steps + 1):
        inputs, targets = batch(step)
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        note(folder, step, loss.item())
        app.step = step
        if step % EVERY == 0:
            checkpoint.save({"app": app}, checkpoint_id=folder / f"step-{step}")


def deepspeed(folder: Path, steps: int) -> None:
    """DeepSpeed's engine: `save_checkpoint` and `load_checkpoint`, ZeRO 1."""
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    import deepspeed as library
    import deepspeed.comm

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # minutes of compiling
    settings = {
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0,
    }
    model = network()
    engine, *_ = library.initialize(model=model, model_parameters=model.parameters(), config=settings)
    _, client = engine.load_checkpoint(str(folder))
    for step in range((client or {}).get("step", 0) + 1, steps + 1):
        inputs, targets = batch(step)
        loss = nn.functional.mse_loss(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        note(folder, step, loss.item())
        if step % EVERY == 0:
            engine.save_checkpoint(str(folder), tag=f"step-{step}", client_state={"step": step})


def trainer(folder: Path, steps: int) -> None:
    """Hugging Face's Trainer: `resume_from_checkpoint` with the last checkpoint of the folder."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.mse_loss(self.network(inputs), labels)}

    class Steps(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 16 * 1000

        def __getitem__(self, number: int) -> dict[str, Tensor]:
            inputs, targets = batch(number // 16 + 1)
            return {"inputs": inputs[number % 16], "labels": targets[number % 16]}

    class Note(TrainerCallback):
        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                note(folder, state.global_step, float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Steps())

    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=EVERY, save_total_limit=2, logging_steps=1, use_cpu=True,
        per_device_train_batch_size=16, learning_rate=1e-3, lr_scheduler_type="constant", report_to=[],
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    run = InOrder(model=Model(), args=settings, train_dataset=Steps(), callbacks=[Note()])
    run.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)


if __name__ == "__main__":
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    {"dcp": dcp, "deepspeed": deepspeed, "trainer": trainer}[sys.argv[1]](place, int(sys.argv[3]))
