"""Run by test_trained.py: fine-tunes every config file that it is given, each over two ranks.

The ranks are forked from this process, which has imported everything: that is what takes the time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed  # noqa: F401
import torch

from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig
from moe_lm.parallel.process_group import leave
from moe_lm.train import finetune
from tests.processes import free_port, rank_environment

WORLD_SIZE = 2


def main(configs: list[Path]) -> None:
    torch.set_num_threads(1)
    for config in configs:
        port = free_port()
        children = []
        for rank in range(WORLD_SIZE):
            child = os.fork()
            if child == 0:
                os.environ.update(rank_environment(rank, WORLD_SIZE, port))
                try:
                    finetune.run(load_config(FinetuneConfig, config))
                    leave()
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
                os._exit(0)
            children.append(child)
        ends = [os.waitpid(child, 0)[1] for child in children]
        if any(ends):
            sys.exit(f"a rank failed with {config}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
