"""The phases of a pretraining run: what a dry run and the log say of them, and the arithmetic of their rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping

from moe_lm.config.data import Phase
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import PretrainConfig, RunConfig
from moe_lm.data.shards import is_prepared, read_manifest
from moe_lm.model.size import flops_per_token
from moe_lm.train.log import RunLog


def phase_lines(config: PretrainConfig) -> Iterator[str]:
    """What `--dry-run` says of each phase; how often it reads each source, once they are prepared."""
    phases = config.phases if config.data.phases else ()
    ends = [*(phase.first_step for phase in phases[1:]), config.train.steps]
    for number, (phase, end) in enumerate(zip(phases, ends, strict=False), 1):
        steps, mix = end - phase.first_step, config.mix(phase)
        read = [
            f"{name} {share * steps * phase.rows / windows:.2f}" for name, share, windows in windows_in(config, phase)
        ]
        yield (
            f"phase {number:<10}steps {phase.first_step + 1:,} to {end:,}, "
            f"{steps * phase.rows * phase.sequence_length:,} tokens, {in_words(phase, mix)}"
            + (f"; epochs: {', '.join(read)}" if read else "")
        )


def windows_in(config: PretrainConfig, phase: Phase) -> Iterator[tuple[str, float, int]]:
    """Of each prepared source that a phase reads: its name, its share, and its windows."""
    for name, share in config.mix(phase).items():
        folder = config.data.shards / name
        if share and is_prepared(folder):
            tokens = sum(shard.tokens for shard in read_manifest(folder).train)
            yield name, share, max(1, (tokens - 1) // phase.sequence_length)


def flops_of_step(config: RunConfig, model: ModelConfig) -> Callable[[int], float]:
    """FLOPs to train on a token of a step, counted from 0, of which causal attention needs half."""
    phases = config.phases
    flops = [flops_per_token(model, phase.sequence_length, causal_half=True) for phase in phases]
    starts = [phase.first_step for phase in phases]
    return lambda step: flops[bisect_right(starts, step) - 1]


def tell_of_phases(config: RunConfig, log: RunLog) -> Callable[[int], None]:
    """Makes an event if a phase begins with a step, counted from 0, unless the run has only one."""
    phases = config.phases
    begins = {phase.first_step: number for number, phase in enumerate(phases, 1)} if len(phases) > 1 else {}

    def tell(step: int) -> None:
        if step in begins and isinstance(config, PretrainConfig):
            number = begins[step]
            phase = phases[number - 1]
            mix = config.mix(phase)
            log.event(
                "phase", step + 1, f"phase {number} of {len(phases)} begins: {in_words(phase, mix)}",
                phase=number, rows=phase.rows, sequence_length=phase.sequence_length, weights=mix,
            )  # fmt: skip

    return tell


def in_words(phase: Phase, mix: Mapping[str, float]) -> str:
    """`8 rows of 4,096 tokens, web 70%, code 30%`."""
    shares = [f"{name} {share:.3g}%" for name, share in ((name, 100 * share) for name, share in mix.items()) if share]
    return f"{phase.rows:,} rows of {phase.sequence_length:,} tokens, {', '.join(shares)}"
