"""What a new user types in the first hour, with the words of the answer, and the folders that lie there."""

from __future__ import annotations

from pathlib import Path

from tests.config.test_run import FINETUNE, MODEL, PRETRAIN, write
from tests.processes import ROOT

TINY = ROOT / "tokenizer" / "tiny"
RECIPE = {"output": "tok", "vocab_size": 300, "sources": [{"name": "a", "path": "a.txt"}]}

INPUTS = [
    line.strip()
    for line in """
    pretrain x.yaml train.learning_rate=1e-4 | unknown key train.learning_rate; it is train.optimizer.lr here
    pretrain x.yaml --learning_rate 1e-4 | there is no option --learning_rate; it is train.optimizer.lr here
    pretrain x.yaml --max-steps=100 | there is no option --max-steps; it is train.steps here
    pretrain x.yaml --resume | a run resumes by itself
    pretrain x.yaml train.max_grad_norm=1 | it is train.clip_norm here
    pretrain x.yaml gradient_accumulation_steps=4 | train.global_batch_size over train.micro_batch_size
    pretrain x.yaml model.num_local_experts=8 | it is model.n_routed_experts here
    pretrain x.yaml model.n_layer=8 | it is model.num_hidden_layers here
    pretrain x.yaml batch_size=8 | it is train.global_batch_size here
    pretrain x.yaml block_size=8 | data.sequence_length
    pretrain x.yaml save_steps=8 | it is checkpoint.every here
    pretrain x.yaml bf16=true | it is train.precision=bfloat16 here
    pretrain x.yaml parallel.fsdp=full_shard | parallel.engine=deepspeed and parallel.zero_stage=3
    pretrain x.yaml parallel.tp=2 | there is no tensor parallelism
    pretrain x.yaml log.wandb=true | it is log.trackers=[wandb] here
    finetune ft.yaml lora.r=8 | it is lora.rank here
    finetune ft.yaml lora.target_modules=[q_proj] | it is lora.targets here
    pretrain ft.yaml | ft.yaml is a fine-tuning config (it has data.train): moe-lm finetune ft.yaml
    finetune x.yaml | x.yaml is a pretraining config | moe-lm pretrain x.yaml
    prepare tok.yaml | tok.yaml is the recipe of a tokenizer | moe-lm tokenizer train tok.yaml
    tokenizer train x.yaml | x.yaml is a pretraining config
    verify tok.yaml | tok.yaml is the recipe of a tokenizer
    pretrain model.yaml | model.yaml is a model, not a run
    pretrain runs/all/pretrain | runs/all/pretrain is a folder; its config is runs/all/pretrain/config.yaml
    pretrain y.yaml | cannot read the config y.yaml | did you mean x.yaml?
    pretrain x.yaml train.optimizer=muon | train.optimizer is a section; set its keys, like train.optimizer.name
    pretrain x.yaml data.sources=a.txt | is not a list
    pretrain x.yaml data.sources.weight=2 | name an entry by its number, from 0 to 0
    sample runs/all -p x | runs/all holds no complete checkpoint but the runs in it do | runs/all/pretrain
    eval runs/all/pretrain/checkpoints | give the run, runs/all/pretrain,
    sample runs/al -p x | there is no folder runs/al; did you mean runs/all?
    sample hf -p x | it is a Hugging Face folder: moe-lm import hf
    sample Qwen/Qwen3-0.6B -p x | for a model of the Hugging Face hub: moe-lm import Qwen/Qwen3-0.6B
    finetune ft.yaml --preview --dry-run | --preview and --dry-run both show something and stop
    sample runs/all/pretrain -p x --num 3 --greedy | --num 3 texts would be equal, as nothing is drawn
    sample runs/all/pretrain -p x --beams 2 --temperature 1 | --temperature 1.0 has no meaning with --beams
    import Qwen/Qwen3-0.6B | Qwen/Qwen3-0.6B is no folder here, and the hub cannot be reached
    prepare x.yaml data.tokenizer=Qwen/Qwen3-0.6B | the hub cannot be reached | hf download Qwen/Qwen3-0.6B
    prepare x.yaml "data.sources=[{name: a, path: memory://b/c}]" data.tokenizer=TINY | memory://b/c
    export runs/all/pretrain out --push mine | --push mine is not a name of the hub; give OWNER/NAME
    pretrain x.yaml --gpus all | --gpus all: there is no GPU here | --processes 2
    pretrain x.yaml --gpus 8 --processes 8 | both say how many; give one of them
    generate runs/all/pretrain | there is no verb generate; did you mean sample?
    train x.yaml | there is no verb train; did you mean pretrain or finetune?
    """.replace("TINY", str(TINY)).splitlines()
    if line.strip()
]


def folders(place: Path) -> None:
    """A config of each kind, two runs in a folder, and a model from the hub, as empty as their answers allow."""
    for name, values in (("x", PRETRAIN), ("ft", FINETUNE), ("tok", RECIPE), ("model", MODEL)):
        write(place / f"{name}.yaml", values)
    for run in ("pretrain", "finetune"):
        step = place / "runs" / "all" / run / "checkpoints" / "step-00000001"
        step.mkdir(parents=True)
        (step / "COMPLETE").touch()
        (step.parents[1] / "config.yaml").touch()
    (place / "hf").mkdir()
    (place / "hf" / "config.json").write_text("{}")
