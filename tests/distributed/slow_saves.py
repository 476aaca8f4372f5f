"""`moe-lm` on a file system on which every save takes five seconds."""

from __future__ import annotations

import time
from typing import Any

from moe_lm.__main__ import main
from moe_lm.checkpoint import checkpoint

settle = checkpoint._settle


def settle_slowly(*arguments: Any) -> Any:
    time.sleep(5)
    return settle(*arguments)


checkpoint._settle = settle_slowly
main()
