"""The verbs that write text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moe_lm.common.errors import UsageError
from moe_lm.common.signals import ended_by_sigterm
from moe_lm.common.terminal import check_typed
from moe_lm.kernels.native import build as native

if TYPE_CHECKING:
    from moe_lm.generate.beams import BeamSettings
    from moe_lm.generate.penalties import Penalties
    from moe_lm.generate.sample import Prompt
    from moe_lm.parallel.spread import Spread


def _typed(prompt: str | None) -> str | None:
    if prompt is not None:
        check_typed("--prompt", prompt)
    return prompt


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint in it.")]
Base = Annotated[Path | None, typer.Option(help="Where the base of adapters is now, if it has moved.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="Below 1 more likely, above 1 more varied; 0 is greedy; without, 0.8.")
]
TopK = Annotated[int | None, typer.Option(min=1, help="Choose among this many likeliest tokens.")]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens that hold this probability.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")]
Truncate = Annotated[Literal["left"] | None, typer.Option(help="Drop the beginning of a prompt that is too long.")]
DeviceMap = Annotated[
    Literal["auto"] | None, typer.Option(help="auto: spread a model over devices, host memory and disk.")
]
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(metavar="DEVICE=SIZE", help="Like cpu=4GiB or 0=20GiB. Repeatable."),
]
OffloadFolder = Annotated[Path | None, typer.Option(help="Where the rest of --device-map lies on the disk.")]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="For GPUs: steps as one compiled program; its first tokens take tens of seconds. A CPU is slower so.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
DType = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(help="bfloat16: half the memory, on a CPU with C++ 1.3 times as fast at one row; logits are rounded."),
]
TEMPERATURE = 0.8


def add_to(app: typer.Typer) -> None:
    """Put the verbs behind those that are there."""
    app.command(rich_help_panel="Use")(ended_by_sigterm()(sample))
    app.command(rich_help_panel="Use")(ended_by_sigterm()(chat))  # what lies on the disk goes with the model
    app.command(rich_help_panel="Use")(explain)


def sample(
    run: RunPath,
    stdin: Annotated[str | None, typer.Argument(metavar="[-]", help="The prompt is what comes in on stdin.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", callback=_typed, help="Text to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='Prompts, a JSON line each: "text" or {"prompt": "text"}; - is stdin.')
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Samples of each prompt; with --beams the best ones.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here.")] = None,
    max_new_tokens: MaxNewTokens = 200,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="Do not end before this many tokens.")] = 0,
    temperature: Temperature = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Only tokens this share as likely as the likeliest.")
    ] = None,
    typical_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="The most typical tokens that hold this probability.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 against tokens of the text and prompt.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Off the logits of tokens that were written.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for every time that they were.")] = 0.0,
    no_repeat_ngram: Annotated[int | None, typer.Option(min=1, help="No so many tokens in a row come twice.")] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Onto a token's logit; -inf is never. Repeatable.")
    ] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="Search with this many beams instead of drawing.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beams; above 0 for longer texts. 1")] = None,
    early_stopping: Annotated[
        Literal["false", "true", "never"] | None, typer.Option(help="When beams stop, as in transformers. false")
    ] = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, metavar="[N]", help="Log-probability of every token, and of the N likeliest beside it."),
    ] = None,
    show_routing: Annotated[
        int | None,
        typer.Option(min=-1, metavar="[LAYER]", help="Colour tokens by their strongest expert, in the last layer."),
    ] = None,
    truncate: Truncate = None,
    device: Device = "auto",
    dtype: DType = "float32",
    compiled: Compile = False,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    base: Base = None,
) -> None:
    """Continue a prompt, streaming; many prompts or samples become JSON lines."""
    _one_source(stdin, prompt, file)
    spread = read_spread(device_map, max_memory, offload_folder, device)
    refuse_compile(compiled, spread, beams)
    heat = _temperature(temperature, greedy)
    penalties: dict[str, Any] = {
        "repetition": repetition_penalty,
        "presence": presence_penalty,
        "frequency": frequency_penalty,
        "no_repeat_ngram": no_repeat_ngram,
    }
    biases = tuple(_bias(item) for item in logit_bias or ())
    drawing: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "seed": seed, "min_p": min_p, "typical_p": typical_p}
    drawing |= {"logprobs": logprobs, "show_routing": show_routing}
    searching = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    if beams is None:
        _refuse(searching, "belongs to a beam search; give --beams too")
    else:
        _refuse(drawing | {"temperature": temperature, "greedy": greedy or None}, "draws nothing with --beams")

    native.start()
    from moe_lm.generate import commands
    from moe_lm.generate.penalties import Penalties
    from moe_lm.generate.sample import Prompt, write_samples
    from moe_lm.generate.session import Session

    texts = [Prompt(prompt)] if prompt is not None else _read(stdin, file)
    lengths: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    all_penalties = Penalties(**penalties, logit_bias=biases)
    drawing |= lengths | {"temperature": heat, "penalties": all_penalties}
    drawing |= {"routing": drawing.pop("show_routing") is not None}
    settings = (
        commands.settings_of(**drawing) if beams is None else _search(beams, num, searching, lengths, all_penalties)
    )
    one = len(texts) == 1 and num == 1 and file is None and out is None
    plain = one and beams is None and logprobs is None and (show_routing is None or sys.stdout.isatty())
    session = Session.load(run, device, base, spread, compiled, dtype)
    write_samples(session, texts, num, settings, stop or (), truncate is not None, out, show_routing, plain)


def chat(
    run: RunPath,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Remember what is typed, in ~/.local/state/moe-lm.")
    ] = True,
    device: Device = "auto",
    dtype: DType = "float32",
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    base: Base = None,
) -> None:
    """Talk to a fine-tuned run; /help there lists what it can do."""
    spread = read_spread(device_map, max_memory, offload_folder, device)

    native.start()
    from moe_lm.generate import commands
    from moe_lm.generate.chat import chat as talk

    heat = _temperature(temperature, greedy=False)
    settings = commands.settings_of(max_new_tokens, heat, top_k, top_p, seed)
    talk(run, settings, base, history, spread, device, dtype)


def explain(
    run: RunPath,
    prompt: Annotated[str, typer.Option("--prompt", "-p", callback=_typed, help="The text to look at.")],
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path("explain.png"),
    layers: Annotated[str | None, typer.Option(metavar="0,3", help="These alone; without, at most 6.")] = None,
    heads: Annotated[str | None, typer.Option(metavar="0,3", help="These alone; without, at most 8.")] = None,
    truncate: Truncate = None,
    base: Base = None,
) -> None:
    """One picture of what the model attends to, and which experts took each token."""
    chosen_layers, chosen_heads = _numbers("layers", layers), _numbers("heads", heads)

    from moe_lm.tools.explain.explain import explain as draw

    draw(run, prompt, out, chosen_layers, chosen_heads, truncate is not None, base)


def _numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{option} {text} is no list of numbers; give them like 0,3") from error


def read_spread(
    device_map: str | None, max_memory: list[str] | None, offload_folder: Path | None, device: str
) -> Spread | None:
    if device_map is None:
        for option, value in (("--max-memory", max_memory), ("--offload-folder", offload_folder)):
            if value:
                raise UsageError(f"{option} belongs to a model on several devices; give --device-map auto too")
        return None
    if device != "auto":
        raise UsageError(f"--device {device} names one device and --device-map takes all; give one of them")
    from moe_lm.parallel.spread import Spread

    return Spread(dict(item.partition("=")[::2] for item in max_memory or ()), offload_folder)


def refuse_compile(compiled: bool, spread: Spread | None, beams: int | None = None) -> None:
    """Raise UsageError for --compile beside what decodes in another way."""
    for option, value in (("--beams", beams), ("--device-map", spread)):
        if compiled and value is not None:
            raise UsageError(f"--compile and {option} do not go together; leave one of them out")


def _temperature(temperature: float | None, greedy: bool) -> float:
    if greedy and temperature is not None:
        raise UsageError(f"--temperature {temperature} draws and --greedy never does; give one of them")
    if greedy:
        return 0.0
    return TEMPERATURE if temperature is None else temperature


def _one_source(stdin: str | None, prompt: str | None, file: Path | None) -> None:
    given = [name for name, value in (("-", stdin), ("--prompt", prompt), ("--file", file)) if value is not None]
    if len(given) != 1:
        said = " and ".join(given) or "nothing"
        raise UsageError(f"{said} given to continue; expected one of --prompt TEXT, --file FILE and -")
    if stdin not in (None, "-"):
        raise UsageError(f"{stdin} is no source of a prompt; give --prompt TEXT, --file FILE or - for stdin")


def _read(stdin: str | None, file: Path | None) -> list[Prompt]:
    from moe_lm.generate.sample import Prompt, read_prompts, read_text

    if file is not None:
        return read_prompts(file)
    return [Prompt(read_text(Path(str(stdin))).removesuffix("\n"))]


def _bias(item: str) -> tuple[int, float]:
    token, _, value = item.partition("=")
    try:
        return int(token), float(value)
    except ValueError as error:
        raise UsageError(f"--logit-bias {item} is not ID=BIAS; give a token's id and a number, like 42=-inf") from error


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value is not None:
            shown = "" if value is True or value == -1 else f"{value} "
            raise UsageError(f"--{name.replace('_', '-')} {shown}{why}")


def _search(
    beams: int, num: int, searching: dict[str, Any], lengths: dict[str, Any], penalties: Penalties
) -> BeamSettings:
    from moe_lm.generate.beams import BeamSettings

    given = {name: value for name, value in searching.items() if value is not None}
    words: dict[str, Any] = {"true": True, "false": False, "never": "never"}
    if "early_stopping" in given:
        given["early_stopping"] = words[given["early_stopping"]]
    return BeamSettings(beams, num, **given, **lengths, penalties=penalties)
