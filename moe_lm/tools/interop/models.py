"""The two models of a proof: ours from a checkpoint, theirs through `transformers`. One is in memory at a time."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.checkpoint.checkpoint import MODEL_PREFIX
from moe_lm.checkpoint.read import TensorSource, fill
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.kernels import kernels
from moe_lm.model.attention import PackedAttention
from moe_lm.model.size import count_parameters, on_meta
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.chat.environment import TODAY
from moe_lm.tokenizer.chat.sandbox import SandboxError, forked
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.fp8 import FP8Folder
from moe_lm.tools.interop.hf_folder import HFFolder
from moe_lm.tools.interop.hf_tensors import ROUTER_BIAS
from moe_lm.tools.interop.logits import ForwardPass, with_noise

FLOAT32 = torch.float32.itemsize
TOKENS = 512
LONGEST_ROW = 128
DISTURBANCE = 1e-7  # relative: about one rounding in float32
CONTAINER = Path("/sys/fs/cgroup")
OVERHEAD = 1.5  # of weights, for activations and for tensors while they are put together
CODE = "def f(x):\n    if x:\n\t\treturn x  # 1 < 2\n"
DAY = re.compile(r"""strftime_now\((['"])(.*?)\1\)""")
CONVERSATION = [{"role": "user", "content": "1 < 2?"}, {"role": "assistant", "content": "Yes."}]


def find_transformers(model_type: str) -> tuple[str | None, str]:
    """Name and version of the library that knows the family; else None and the reason."""
    if importlib.util.find_spec("transformers") is None:
        return None, "transformers is not installed (pip install transformers)"
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return None, f"transformers {transformers.__version__} does not know {model_type}"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return f"transformers {transformers.__version__}", ""


def layers_that_fit(config: ModelConfig, max_bytes: int | None) -> tuple[int, str]:
    """The number of first layers to compare within `max_bytes`, and what stays unproven if that is not all of them.

    0 when not even the first layer with experts fits.
    """
    limit = max_bytes if max_bytes is not None else _free_bytes() // 2
    needed = 1 + (config.moe_layers[0] if config.moe_layers else 0)
    for layers in range(config.num_hidden_layers, needed - 1, -1):
        if bytes_to_compare(config, layers) <= limit:
            if layers == config.num_hidden_layers:
                return layers, ""
            whole = f"{bytes_to_compare(config, config.num_hidden_layers) / 2**30:.1f}"
            there = f"{limit / 2**30:.1f}"
            return layers, f"logits after layer {layers}: the whole model needs {whole} GiB, {there} are there"
    return 0, (
        f"logits and experts: the first {needed} layers need more than the {limit / 2**30:.1f} GiB that are there; "
        "every tensor was compared"
    )


def bytes_to_compare(config: ModelConfig, layers: int) -> int:
    """Memory for one model of this many layers in float32, and for the logits of both."""
    weights = FLOAT32 * count_parameters(_first_layers(config, layers)).total
    return int(OVERHEAD * weights) + 6 * FLOAT32 * TOKENS * config.vocab_size


def token_batches(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Rows of TOKENS random tokens and of TOKENS real ones, the source of one of Python's own modules."""
    length = min(LONGEST_ROW, config.max_position_embeddings, TOKENS)
    count = TOKENS // length * length
    random = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    source = importlib.util.find_spec("argparse")
    assert source is not None
    assert source.origin is not None
    text = Path(source.origin).read_text(encoding="utf-8")
    real = torch.tensor(tokenizer.encode(text[: 32 * TOKENS])[:count])
    count = len(real) // length * length
    return {"random": random.view(-1, length), "real": real[:count].view(-1, length)}


@torch.no_grad()  # not in inference mode, whose tensors no other thread may fill
def our_model(
    config: ModelConfig, layers: int, tensors: TensorSource, rounded_to: Mapping[str, torch.dtype] | None = None
) -> LanguageModel:
    """The first `layers` layers of a checkpoint, in float32; tensors in `rounded_to` are rounded to that dtype."""
    model = on_meta(_first_layers(config, layers))
    model.materialise(torch.device("cpu"))
    ours = {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    fill(ours, tensors)
    for name, dtype in (rounded_to or {}).items():
        if name in ours:
            ours[name].copy_(ours[name].to(dtype))
    kernels.apply(model, kernels.choose(model.device, decoding=True))
    return model.eval()


@torch.inference_mode()
def run_ours(model: LanguageModel, texts: Mapping[str, Tensor]) -> dict[str, ForwardPass]:
    """Our model's forward pass over each text, with its noise."""
    passes = {}
    for name, tokens in texts.items():
        once = _forward_pass(model, tokens)
        with _disturbed(model):
            passes[name] = with_noise(once, _forward_pass(model, tokens))
    return passes


def _forward_pass(model: LanguageModel, tokens: Tensor) -> ForwardPass:
    rows, positions = tokens.shape
    attend = PackedAttention(torch.arange(rows + 1, dtype=torch.int32) * positions, positions)
    output = model(tokens, torch.arange(positions).expand(rows, -1), attend)
    biases = [layer.gate.e_score_correction_bias for layer in model.moe_layers]
    return ForwardPass(
        output.logits,
        [routing.experts.unflatten(0, tokens.shape) for routing in output.routings],
        [(r.scores + bias).unflatten(0, tokens.shape) for r, bias in zip(output.routings, biases, strict=True)],
    )


@contextmanager
def running(library: str, known_limit: str | None) -> Iterator[None]:
    """Say of an error within `library` that it cannot run the model, and why where that is known. Raises MoeLmError."""
    try:
        yield
    except MoeLmError:
        raise
    except Exception as error:  # of any kind: it finds out where it fails
        why = known_limit or f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise MoeLmError(
            f"{library} cannot run this model: {why}; nothing was kept (--proof-memory 0 compares the tensors alone)"
        ) from error


@torch.inference_mode()
def run_theirs(
    folder: HFFolder, layers: int, routers: int, texts: Mapping[str, Tensor], rounded_to: torch.dtype | None = None
) -> dict[str, ForwardPass]:
    """The forward pass of their first `layers` layers over each text, after the rounding that our weights went through.

    Raises MoeLmError when the library finds tensors missing, or does not show the choices of all `routers` routers.
    """
    model = _their_model(folder, layers)
    if rounded_to is not None:
        for name, parameter in model.named_parameters():
            if not name.endswith(ROUTER_BIAS):
                parameter.copy_(parameter.to(rounded_to))
    chosen: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("router"):
            module.register_forward_hook(lambda _, __, out: chosen.append(out[-1]))
    passes = {}
    for name, tokens in texts.items():
        chosen.clear()
        logits = model(input_ids=tokens, use_cache=False).logits
        if len(chosen) != routers:
            raise MoeLmError(
                f"the proof failed: transformers shows what {len(chosen)} of {routers} routers chose; its version is "
                "not one that can be compared with, install 5.23"
            )
        passes[name] = ForwardPass(logits, [experts.view(*tokens.shape, -1) for experts in chosen], [])
    return passes


def compare_tokenizers(ours: Tokenizer, folder: Path) -> tuple[str, str]:
    """A sentence saying that `AutoTokenizer` agrees, and the reason if it cannot be asked; one of them is empty.

    Raises MoeLmError when it gives other ids, for a text or for a conversation, or renders another conversation.
    """
    import transformers

    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library raises almost anything
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):  # it advises to run the code
            why = "its class is code in the folder, which is never run"
        return "", f"tokenizer: {why}"
    if isinstance(theirs.chat_template, str):  # here it is always the same day
        theirs.chat_template = DAY.sub(lambda call: repr(TODAY.strftime(call[2])), theirs.chat_template)
    plain = [token.content for token in theirs.added_tokens_decoder.values() if not token.special]
    text = f"{CODE} naïve 中文 🙂 {' a '.join(plain)}\n"
    if theirs.encode(text, add_special_tokens=False) != ours.encode(text):
        raise MoeLmError(f"the proof failed: AutoTokenizer gives other ids than this program for {text!r:.200}")
    try:
        _compare_conversation(ours, theirs, CONVERSATION)
    except UsageError as error:
        return f"AutoTokenizer gives the same ids; no conversation was compared ({error})", ""
    answered = [*CONVERSATION[:1], {"role": "assistant", "content": CODE}]
    asked = [*CONVERSATION, {"role": "user", "content": text}]
    for messages in (answered, asked, [{"role": "system", "content": "Be  brief.\n"}, *asked]):
        with suppress(UsageError):  # a template may refuse a system role, say
            _compare_conversation(ours, theirs, messages)
    return "AutoTokenizer gives the same ids and renders the same conversation", ""


def _compare_conversation(ours: Tokenizer, theirs: Any, messages: list[dict[str, str]]) -> None:
    """Raise MoeLmError when `theirs` writes a conversation in other text or ids, UsageError when `ours` cannot."""
    for prompt in (False, True):
        rendered = ours.render_chat(messages, add_generation_prompt=prompt)
        ids, _ = ours.encode_chat(messages, add_generation_prompt=prompt)
        render = partial(theirs.apply_chat_template, messages, add_generation_prompt=prompt, tokenize=False)
        try:
            text = forked(render)  # the template may be a stranger's, and there it has no limits
        except SandboxError as error:
            raise MoeLmError(f"the proof failed: the chat template fails in AutoTokenizer: {error}") from error
        if text != rendered:
            raise MoeLmError("the proof failed: the chat template renders another conversation in AutoTokenizer")
        expected = theirs.encode(text, add_special_tokens=False)
        if ids != expected:
            pairs = enumerate(zip(ids, expected, strict=False))
            place = next((place for place, (one, other) in pairs if one != other), min(len(ids), len(expected)))
            raise MoeLmError(
                f"the proof failed: AutoTokenizer gives the ids {expected[place : place + 5]} where this program gives "
                f"{ids[place : place + 5]}, from token {place} of the conversation {rendered!r:.200}"
            )


def _their_model(folder: HFFolder, layers: int) -> Any:
    import transformers

    safely = {"trust_remote_code": False, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(folder.path, **safely)
    config.num_hidden_layers = layers
    # Youtu's class zeroes the padding token's embedding once it has loaded it (transformers 5.23), and with it, where
    # the output layer is tied, that token's logit.
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    options = safely | {
        "config": config, "dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager",
        "use_safetensors": True, "output_loading_info": True,
    }  # fmt: skip
    if isinstance(folder, FP8Folder):  # blocks that an edge cuts it cannot read on a CPU, so it gets our reading
        del config.quantization_config
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, found = kind.from_pretrained(None, state_dict=folder.first_layers(layers), **options)
    else:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(folder.path, **options)
    for kind in ("missing_keys", "mismatched_keys"):
        if found[kind]:
            raise MoeLmError(f"the proof failed: transformers reports {kind} {sorted(map(str, found[kind]))[:5]}")
    return model.eval()


@contextmanager
def _disturbed(model: LanguageModel) -> Iterator[None]:
    """Disturb the input of every layer by about one rounding, to measure how far that moves the logits."""
    generator = torch.Generator().manual_seed(1)

    def disturb(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        return x * (1 + DISTURBANCE * torch.randn(x.shape, generator=generator)), *others

    handles = [layer.register_forward_pre_hook(disturb) for layer in (*model.model.layers, model.model.norm)]
    yield
    for handle in handles:
        handle.remove()


def _first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    dense = tuple(layer for layer in config.mlp_only_layers if layer < layers)
    return config.model_copy(update={"num_hidden_layers": layers, "mlp_only_layers": dense, "capacity_factor": None})


def _free_bytes() -> int:
    """Memory that the system, or the container around this process, can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, limit - used))
    return free
