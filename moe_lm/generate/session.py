"""Text in, text out: a checkpoint's model with its tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_lm.checkpoint import checkpoint, read
from moe_lm.common.errors import UsageError
from moe_lm.config.generation import LoadConfig
from moe_lm.config.model import check_vocabulary
from moe_lm.generate.decode import SLOTS, Decoder, Settings
from moe_lm.generate.forward import capacity_for, room
from moe_lm.generate.text import Delta, Row
from moe_lm.kernels import huge_pages, kernels
from moe_lm.kernels.device import DTYPES, pick_device, pick_dtype
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel.spread import Spread, spread_over_devices
from moe_lm.tokenizer.tokenizer import Message, Tokenizer

COMPILED_FOR = 256  # positions, or a multiple: prompts of other lengths run the same compiled program
RANDOM_VALUES = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_}  # what torch's layers begin with


@dataclass(frozen=True)
class Session:
    """A model that is ready to write, with `compiled` steps (compiled.py) or without.

    Each `write` makes a decoder, and each new size of one is compiled anew.
    """

    checkpoint: Path
    model: LanguageModel
    tokenizer: Tokenizer
    compiled: bool = False

    @classmethod
    def load(
        cls,
        run: Path,
        device: str = "auto",
        base: Path | None = None,
        spread: Spread | None = None,
        compiled: bool = False,
        dtype: str = "float32",
        decoding: bool = True,
    ) -> Session:
        """Load the newest checkpoint of a run folder, or one checkpoint; adapters are merged into their base.

        `base` is where that base is when it has moved. With `spread` a model that is too large for one device lies on
        all of them, in the host's memory and on the disk; it is never held whole. `dtype` is "float32" or "bfloat16",
        for weights and cache, or "auto" for that of the stored weights if the device is fast at it; weights are rounded
        as they are read, adapters merged before. A model that only scores text needs no kernel for `decoding`.

        Raises UsageError when there is no complete checkpoint, no such base or no such device, MoeLmError naming a
        file that is damaged.
        """
        folder, target = checkpoint.resolve(run), pick_device(device)
        tokenizer = Tokenizer.load(checkpoint.verified_path(folder, "tokenizer"))
        # Without a capacity experts take every token that chose them. Which tokens are dropped would depend on the
        # texts beside them and, token by token, on tokens not yet written.
        config = read.read_model_config(folder, capacity_factor=None)
        check_vocabulary(config, tokenizer.vocab_size)
        number_format = _stored_dtype(folder, base, target) if dtype == "auto" else DTYPES[dtype]
        with target if spread is None else torch.device("meta"), _default_dtype(number_format), _NoInitialValues():
            model = LanguageModel(config).eval()
        if spread is None:
            _fill(model, folder, base)
            kernels.apply(model, kernels.choose(model.device, decoding))
        else:
            _fill_spread(model, folder, base, spread)
        return cls(folder, model, tokenizer, compiled)

    @classmethod
    def open(cls, run: Path, config: LoadConfig, compiled: bool = False) -> Session:
        """Load a run as `config` says; see `load`."""
        spread = None
        if config.device_map is not None:
            spread = Spread(dict(item.partition("=")[::2] for item in config.max_memory), config.offload_folder)
        return cls.load(run, config.device, config.base, spread, compiled, config.dtype)

    def decoder(self, slots: int, capacity: int) -> Decoder:
        """A decoder for up to `slots` texts at a time, each of up to `capacity` positions with its prompt."""
        return Decoder(self.model, slots, capacity, self.tokenizer.vocab_size, compiled=self.compiled)

    def capacity_for(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
        """The number of positions that a cache needs for these prompts, rounded up where each number is compiled."""
        capacity = capacity_for(self.model.config, [len(prompt) for prompt in prompts], new_tokens)
        return capacity + -capacity % COMPILED_FOR if self.compiled else capacity

    def complete(
        self, prompt: str, settings: Settings, stop: Sequence[str] = (), truncate: bool = False
    ) -> Iterator[Delta]:
        """The text that follows `prompt`, which begins a document and may be empty; `truncate` as in `prompt_ids`."""
        return self.write([self.prompt_ids(prompt, settings.max_new_tokens, truncate)], settings, stop)

    def chat(self, messages: Sequence[Message], settings: Settings) -> Iterator[Delta]:
        """The assistant's next message."""
        return self.write([self._chat_prompt(messages)], settings)

    def write(
        self, prompts: Sequence[Sequence[int]], settings: Settings, stop: Sequence[str] = (), num: int = 1
    ) -> Iterator[Delta]:
        """`num` texts after each prompt, written side by side.

        Text j of prompt i is row `i * num + j`, and draws with `seed + row`. A row ends before the first string of
        `stop`. Raises UsageError, before the first token, for an empty stop string or a prompt that does not fit.
        """
        rows = [Row(index, self.tokenizer.decode, stop) for index in range(len(prompts) * num)]
        decoder = self.decoder(min(SLOTS, len(rows)), self.capacity_for(prompts, settings.max_new_tokens))
        for row in rows:
            decoder.add(prompts[row.index // num], settings.of_row(row.index), self.tokenizer.stop_ids)
        return _deltas(decoder, rows)

    def prompt_ids(self, prompt: str, wanted: int, truncate: bool = False) -> list[int]:
        """The ids of a prompt that begins a document.

        `truncate` drops the beginning of a prompt that leaves no room for `wanted` tokens, or for half of the model's
        positions if that is less. Without it, raises UsageError for a prompt that is too long for the model.
        """
        ids = self.tokenizer.encode(prompt)
        positions = self.model.config.max_position_embeddings
        if truncate:
            kept = positions - min(wanted - 1, positions // 2) - 1
            ids = ids[max(0, len(ids) - kept) :]
        elif len(ids) >= positions:
            raise UsageError(
                f"the prompt has {len(ids) + 1} tokens, more than the model's max_position_embeddings={positions}; "
                "shorten it, or drop its beginning with --truncate left"
            )
        return [self.tokenizer.bos_id, *ids]

    def chat_room(self, messages: Sequence[Message]) -> int:
        """The number of tokens that the assistant's next message can have, below 1 for a conversation too long."""
        return room(self.model.config, self._chat_prompt(messages))

    def _chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.encode_chat(messages, add_generation_prompt=True)[0]


def _deltas(decoder: Decoder, rows: Sequence[Row]) -> Iterator[Delta]:
    """The text of every step, until all rows have ended."""
    while decoder.busy:
        for step in decoder.step():
            delta = rows[step.request].take(step)
            if delta.finish and not step.finish:  # at a stop string
                decoder.cancel(step.request)
            yield delta


def _stored_dtype(folder: Path, base: Path | None, device: torch.device) -> torch.dtype:
    """bfloat16 if the weights, or those under adapters, are stored so and the device is fast at it; else float32."""
    stored = read.stored_dtype(folder, base)
    return stored if stored == pick_dtype("auto", device) else torch.float32


def _fill(model: LanguageModel, folder: Path, base: Path | None) -> None:
    """Give a model on one device the weights of a checkpoint."""
    if model.device.type == "cpu":
        huge_pages.move(model)
    read.load_weights(folder, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, base)


def _fill_spread(model: LanguageModel, folder: Path, base: Path | None, spread: Spread) -> None:
    """Give a model on the meta device the weights of a checkpoint, each layer where there is room for it."""
    source = read.open_tensors(folder, base)
    read.check_fits({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, source, whole=True)
    spread_over_devices(model, lambda name: read.pieces(source, f"model.{name}"), spread)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build layers in a data type. Buffers that name their own keep it, such as the router's bias."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _NoInitialValues(TorchFunctionMode):
    """Spares new layers the random values that the checkpoint's replace; a meta device would import a compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func in RANDOM_VALUES else func(*args, **kwargs or {})
