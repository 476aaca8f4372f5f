"""The verb `explain`: a picture of a model's attention and of the experts that it chooses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_lm.common.errors import UsageError
from moe_lm.generate.session import Session
from moe_lm.tools.explain import picture
from moe_lm.tools.explain.recording import Recording, record

MOST_LAYERS, MOST_HEADS = 6, 8  # unless they are chosen
MOST_PANELS = 128


def explain(
    run: Path,
    prompt: str,
    out: Path,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    truncate: bool = False,
    base: Path | None = None,
) -> None:
    """Draw the attention of these layers and heads over the last tokens of `prompt`.

    By default at most MOST_LAYERS layers and MOST_HEADS heads, evenly spread, and fewer of a long prompt. Raises
    UsageError for impossible layers, heads, prompts or file names, MoeLmError when matplotlib is missing or the picture
    cannot be written.
    """
    picture.check_name(out)
    picture.need_matplotlib()
    session = Session.load(run, base=base)
    config = session.model.config
    ids = session.prompt_ids(prompt, 1, truncate)
    most_layers, most_heads = picture.readable(len(ids))
    layers = _chosen("layer", layers, config.num_hidden_layers, min(most_layers, MOST_LAYERS))
    heads = _chosen("head", heads, config.num_attention_heads, min(most_heads, MOST_HEADS))
    if len(layers) * len(heads) > MOST_PANELS:
        raise UsageError(
            f"{len(layers)} layers by {len(heads)} heads are more than the {MOST_PANELS} panels that a "
            "picture can hold; choose fewer with --layers and --heads"
        )
    recording = record(session.model, ids)
    if len(recording.ids) > picture.TOKENS:
        print(
            f"the prompt has {len(recording.ids)} tokens; the picture shows the last {picture.TOKENS}, and sums up the "
            "attention to earlier ones in one column",
            file=sys.stderr,
        )
    words = prompt if len(prompt) <= 60 else f"{prompt[:29]} … {prompt[-29:]}"
    title = f"{_name(run, session.checkpoint)}: {words!r}\n" + legend(recording, config.n_shared_experts)

    def decode(id_: int) -> str:
        return session.tokenizer.decode([id_], skip_special=False)

    picture.save(picture.draw(recording, decode, layers, heads, config.n_routed_experts, title), out)
    print(f"{out}: layers {', '.join(map(str, layers))}, heads {', '.join(map(str, heads))}", file=sys.stderr)


def legend(recording: Recording, shared: int) -> str:
    """What the colours mean."""
    first = "the first token" if len(recording.ids) <= picture.TOKENS else "earlier tokens"
    lines = [f"blue: what each token (a row) attends to (columns); grey: {first}, where attention rests"]
    if recording.routings:
        lines.append("orange: its routed experts, by weight")
        if shared:
            lines[-1] += (
                f"; {'the shared expert takes' if shared == 1 else f'{shared} shared experts take'} every token"
            )
    return "\n".join(lines)


def _name(run: Path, checkpoint: Path) -> str:
    """The names of the run and its checkpoint; a single name if `run` is the checkpoint."""
    return ", ".join(dict.fromkeys(filter(None, (run.resolve().name, checkpoint.resolve().name))))


def _chosen(kind: str, chosen: Sequence[int] | None, number: int, most: int) -> Sequence[int]:
    if chosen is None:
        shown = min(number, most)
        return [round(place * (number - 1) / max(shown - 1, 1)) for place in range(shown)]
    for place in chosen:
        if not 0 <= place < number:
            raise UsageError(f"--{kind}s names {kind} {place}; this model has {kind}s 0 to {number - 1}")
    return list(dict.fromkeys(chosen))
