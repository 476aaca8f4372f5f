"""The table of symptoms: how a run that goes wrong shows it, the disease that this is, and the cure.

A test sees the past of a run (past.py), made of the same records as `metrics.jsonl`. docs/faults.md shows the table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import and_
from typing import Any, Literal

from moe_lm.optim.groups import schedule_factor
from moe_lm.train.past import ROW, WINDOW, Lows, Past, Plan, Record, number

EARLY = 200  # steps of fresh routers, which are uneven until the balance has spread their tokens
LASTING = 500  # steps

# What is healthy, at most or at least
COLLAPSED, COLLAPSED_EARLY = 0.15, 0.02  # of the experts beyond those of one token, as exp(entropy) counts experts
JUDGED = 8  # tokens of an expert in a step, on average; fewer are uneven by chance
DEAD, DEAD_IN_FINETUNING = 0.125, 0.4  # of a layer's experts; text of one kind leaves the experts of others alone
MISSED = 100  # tokens of an even share that a dead expert did not get; fewer pass it by chance
WORSE, WORSE_BY = 1.25, 0.5  # loss over the first one, as a factor and in nats
MOVED = 0.02  # of a weight's initial size; what smaller rates add up to is not seen in the loss
LOSS_MOVED = 0.01  # of the first loss
FORGOT, LEARNED = 0.02, 0.02  # of the loss, on held-out and on training text
EPOCHS, EPOCHS_IN_FINETUNING = 4, 10  # of a source; up to 4, text is nearly as good as new (arXiv 2305.16264)
WAITING, WAITING_SECONDS = 0.3, 5e-3  # of the step; and seconds of a step, as a busy machine adds some to anything
CREPT, CREPT_BYTES = 0.1, 128 * 2**20  # of the memory held before; and bytes, which caches of kernels may take

Figures = dict[str, Any]


@dataclass(frozen=True)
class Symptom:
    """A disease, how it shows, and what is said: `says` is filled with the figures that the test found."""

    name: str
    look: Literal["start", "window", "evaluation"]  # before the first step, every WINDOW steps, after an evaluation
    test: Callable[[Past], Iterator[Figures]]  # figures of each place (a layer, a source) where the symptom shows
    when: str  # the test in words
    says: str
    cure: str


# The settings


def short_of_the_peak(past: Past) -> Iterator[Figures]:
    """The warm-up takes more than half of the run, or ends where the rate has fallen to 90% of its peak already."""
    train, schedule = past.plan.train, past.plan.train.schedule
    if warmup := schedule.warmup_steps:
        reached = schedule_factor(min(warmup, train.steps - 1), train.steps, schedule)
        if warmup > train.steps / 2 or reached < 0.9:
            yield {"warmup": warmup, "steps": train.steps, "reached": reached}


def repeated_data(past: Past) -> Iterator[Figures]:
    """The run reads a source more than EPOCHS times, fine-tuning more than EPOCHS_IN_FINETUNING times."""
    most = EPOCHS_IN_FINETUNING if past.plan.finetuning else EPOCHS
    for source, epochs in past.plan.epochs.items():
        if epochs > most:
            yield {"source": source, "epochs": epochs, "most": most}


# The experts


def collapsed_router(past: Past) -> Iterator[Figures]:
    """Layers that use hardly more experts than a single token does, in each of ROW steps."""
    experts, per_token = past.plan.model.n_routed_experts, past.plan.model.num_experts_per_tok
    if experts <= per_token or not past.has_a_row_of_steps():
        return
    if min(record["tokens"] for record in past.records) * per_token < JUDGED * experts:
        return
    beyond = COLLAPSED_EARLY if is_early(past) else COLLAPSED
    limit = math.log(per_token + beyond * (experts - per_token), experts)
    for place, layer in enumerate(past.layers):
        newest = past.records[-1]["experts"][place]
        if all(record["experts"][place]["entropy"] < limit for record in reversed(past.records)):
            figures = {name: newest[name] for name in ("max_violation", "entropy")}
            yield {"layer": layer, "used": experts ** newest["entropy"], "experts": experts, "steps": ROW, **figures}


def dead_experts(past: Past) -> Iterator[Figures]:
    """Layers with experts that had no token: many of them for ROW steps, or any for LASTING steps."""
    model, fresh = past.plan.model, past.plan.fresh
    if not any(past.windows[-1].dead) or is_early(past) or not past.has_a_row_of_steps():
        return
    collapsed = {figures["layer"] for figures in collapsed_router(past)}
    spans = [(ROW, model.n_routed_experts * (DEAD if fresh else DEAD_IN_FINETUNING))]
    if fresh:
        spans.append((LASTING, 0))
    for steps, most in spans:
        windows = past.newest_windows(steps)
        share = sum(window.tokens for window in windows) * model.num_experts_per_tok / model.n_routed_experts
        if len(windows) * WINDOW < steps or share < MISSED:
            continue
        for place, layer in enumerate(past.layers):
            if not windows[-1].dead[place]:
                continue
            dead = reduce(and_, (window.dead[place] for window in windows))
            if dead.bit_count() > most and layer not in collapsed:
                collapsed.add(layer)  # once is enough
                those = [expert for expert in range(model.n_routed_experts) if dead >> expert & 1]
                yield {
                    "layer": layer, "dead": those, "number": len(those), "experts": model.n_routed_experts,
                    "steps": steps, "named": listed(those),
                }  # fmt: skip


# The learning rate and the loss


def rate_too_high(past: Past) -> Iterator[Figures]:
    """The loss is worse than at the start: for ROW steps, or while steps are skipped that are not finite."""
    if past.first_loss is None:
        return
    limit = max(WORSE * past.first_loss, past.first_loss + WORSE_BY)
    losses = [loss for record in past.records if math.isfinite(loss := number(record["loss"]))]
    loss = statistics.median(losses) if losses else math.nan
    skipped = [record for record in past.records if record["skipped"]]
    lasts = len(past.records) == ROW and loss > limit
    broke = max(losses, default=0.0) > limit and not all(map(is_finite, skipped))
    if lasts or broke or (2 * len(skipped) >= len(past.records) and not loss <= past.first_loss):
        yield {
            "loss": loss, "first": past.first_loss, "skipped": len(skipped), "steps": len(past.records),
            "lr": past.records[-1]["lr"],
        }  # fmt: skip


def rate_too_low(past: Past) -> Iterator[Figures]:
    """Neither has the loss moved, nor could such rates have moved the weights, although there are gradients."""
    steps, recent = past.step, [window.loss for window in past.newest_windows(EARLY // 2)]
    if past.start != 1 or steps < past.plan.train.schedule.warmup_steps + EARLY or not past.has_a_row_of_steps():
        return
    if (moved := past.rate_sum * peak_move(past.plan)) >= MOVED:
        return
    first, loss = statistics.fmean(past.opening), statistics.fmean(recent)
    noise = statistics.stdev(recent) * math.sqrt(1 / len(past.opening) + 1 / len(recent))
    still = abs(loss - first) < max(LOSS_MOVED * first, 2 * noise)
    if still and any(record["grad_norm"] for record in past.records):
        yield {"loss": loss, "first": first, "steps": steps, "moved": moved, "lr": past.records[-1]["lr"]}


def not_finite(past: Past) -> Iterator[Figures]:
    """Steps are skipped among others that are as good as before."""
    steps = [record["step"] for record in past.records if record["skipped"] and not is_finite(record)]
    if 0 < len(steps) < len(past.records) and past.step - steps[-1] < WINDOW and not any(rate_too_high(past)):
        yield {"skipped": steps, "number": len(steps), "named": listed(steps)}


def loss_spike(past: Past) -> Iterator[Figures]:
    """A loss is far outside its recent range, as the guards judge it, while most are not."""
    if past.spikes and not any(rate_too_high(past)):
        steps = [record["step"] for record in past.spikes]
        yield {
            "spikes": steps, "named": listed(steps), "loss": max(record["loss"] for record in past.spikes),
            "median": statistics.median(past.usual), "limit": past.loss_limit,
        }  # fmt: skip


def memorising(past: Past) -> Iterator[Figures]:
    """Two evaluations in a row are worse than the best one, and the training loss is better than it was then."""
    best, since = past.best, past.since_best
    if best is None or len(since) < 2:
        return
    before = past.first_loss if math.isnan(best.training) else best.training
    now = since[-1]
    forgot = all(evaluation.held_out > (1 + FORGOT) * best.held_out for evaluation in since)
    if forgot and before is not None and now.training < (1 - LEARNED) * before:
        yield {
            "best_step": best.step, "best": best.held_out, "held_out": now.held_out,
            "before": before, "training": now.training,
        }  # fmt: skip


# The machine


def waiting_for_data(past: Past) -> Iterator[Figures]:
    """Reading the batch takes a large share of ROW steps, WINDOW by WINDOW."""
    windows = past.newest_windows(ROW)
    shares = [window.data_seconds / window.seconds for window in windows]
    seconds = sum(window.data_seconds for window in windows) / ROW
    if len(windows) * WINDOW == ROW and min(shares) > WAITING and seconds > WAITING_SECONDS:
        yield {"share": sum(shares) / len(shares), "seconds": seconds, "steps": ROW}


def creeping_memory(past: Past) -> Iterator[Figures]:
    """The lows of memory rise steadily over four fifths of the run; the first fifth warms up."""
    for name, lows in past.memory.items():
        fifth = len(lows.values) // 5
        if fifth < lows.COUNT // 5:
            continue
        newest = lows.values[-5 * fifth :]
        levels = [min(newest[start : start + fifth]) for start in range(fifth, 5 * fifth, fifth)]
        rises = [after - before for before, after in pairwise(levels)]
        crept = levels[-1] - levels[0]
        mean = crept / len(rises)
        steady = min(rises) > 0.5 * mean and rises[-1] > 0.75 * mean
        if steady and crept > max(CREPT * levels[0], CREPT_BYTES):
            steps = 3 * fifth * lows.windows * WINDOW
            yield {
                "source": name, "whose": WHOSE[name], "before": levels[0] / 2**20, "now": levels[-1] / 2**20,
                "steps": steps, "bytes_a_step": crept / steps,
            }  # fmt: skip


WHOSE = {"host_bytes": "this process", "device_bytes": "tensors on the device"}


def is_finite(record: Record) -> bool:
    return all(math.isfinite(number(record[name])) for name in ("loss", "grad_norm"))


def is_early(past: Past) -> bool:
    return past.plan.fresh and past.step <= EARLY


def peak_move(plan: Plan) -> float:
    """The most that a step at the peak rate changes a weight, as a share of its initial size."""
    optimizer = plan.train.optimizer
    if optimizer.name == "lamb":
        return optimizer.lr  # times the norm of the weights themselves
    rate = max(optimizer.lr, optimizer.muon_lr) if optimizer.name == "muon" else optimizer.lr
    return rate / plan.model.initializer_range


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


SYMPTOMS = (
    Symptom(
        name="warm-up too long",
        look="start",
        test=short_of_the_peak,
        when="the warm-up takes more than half of the run, or ends when the rate has to be below 90% of its peak again",
        says="the warm-up takes {warmup} of {steps} steps, after which the rate is at {reached:.0%} of its peak",
        cure="Make train.schedule.warmup_steps a few percent of train.steps, and let the decay begin after it.",
    ),
    Symptom(
        name="repeated data",
        look="start",
        test=repeated_data,
        when=f"the run reads a source more than {EPOCHS} times, or fine-tuning more than {EPOCHS_IN_FINETUNING} times",
        says="{source} is read {epochs:.1f} times over the run; beyond {most} times it teaches little that is new",
        cure="Add text, lower the source's weight, or train fewer steps; watch the held-out loss (train.eval_every).",
    ),
    Symptom(
        name="collapsed router",
        look="window",
        test=collapsed_router,
        when=f"for {ROW} steps a layer's load lies on hardly more experts than one token uses: less than "
        f"{COLLAPSED:.0%} of the others ({COLLAPSED_EARLY:.0%} in the first {EARLY} steps of fresh weights), as exp of "
        f"the entropy counts them; not judged below {JUDGED} tokens an expert",
        says="layer {layer} uses {used:.1f} of its {experts} experts (MaxVio {max_violation:.2f}, entropy of the load "
        "{entropy:.2f}) for {steps} steps",
        cure="Raise train.balance.bias_update_rate, or add train.balance.batch_loss=0.01; if it began with a jump of "
        "the loss, lower train.optimizer.lr.",
    ),
    Symptom(
        name="dead experts",
        look="window",
        test=dead_experts,
        when=f"more than {DEAD:.1%} of a layer's experts have no token for {ROW} steps (fine-tuning: "
        f"{DEAD_IN_FINETUNING:.0%}), or any expert has none for {LASTING} steps (not in fine-tuning); fresh weights "
        f"have {EARLY} steps for a start",
        says="layer {layer} has {number} of {experts} experts without a token for {steps} steps (experts {named})",
        cure="Raise train.balance.bias_update_rate, or add train.balance.batch_loss=0.01; experts that stay dead are "
        "memory for nothing, so fewer of them (model.n_routed_experts) is the other way.",
    ),
    Symptom(
        name="learning rate too high",
        look="window",
        test=rate_too_high,
        when=f"for {ROW} steps the median loss is more than {WORSE:g} times the first one; or one loss is, and others "
        "are not finite; or half of the steps are skipped, and the losses are worse than the first or not finite",
        says="the loss is {loss:.4g} after {first:.4g} at the start, and {skipped} of the last {steps} steps were "
        "skipped, at a rate of {lr:.3g}",
        cure="Begin again with train.optimizer.lr at a third or a tenth, or with a longer train.schedule.warmup_steps.",
    ),
    Symptom(
        name="learning rate too low",
        look="window",
        test=rate_too_low,
        when=f"{EARLY} steps after the warm-up, the loss has not moved and the rates so far add up to less than "
        f"{MOVED:.0%} of the initial weights, though there are gradients",
        says="the loss was {first:.4g} and is {loss:.4g} after {steps} steps: the rates so far, now {lr:.3g}, can have "
        "moved weights by {moved:.1e} of their size at most",
        cure="Raise train.optimizer.lr, ten times at once (3e-4 is usual for AdamW, a tenth of it for fine-tuning).",
    ),
    Symptom(
        name="not finite",
        look="window",
        test=not_finite,
        when="steps are skipped among others whose loss is as good as before",
        says="{number} of the recent steps were skipped (step {named}), because loss or gradient were not finite, "
        "while the others are as good as before",
        cure="Look for what is special in the rows of these steps: broken text or ids, or a weight that they alone "
        "use; prepare the data again, or import the weights again.",
    ),
    Symptom(
        name="loss spike",
        look="window",
        test=loss_spike,
        when="a loss is above the range of the last 100, by train.guards.spike_threshold",
        says="the loss jumps to {loss:.4g} in step {named}, far above its recent range (median {median:.4g}, limit "
        "{limit:.4g})",
        cure="Look at the data of that step; if jumps come again or the loss stays up, go back to a checkpoint before, "
        "with train.guards.on_spike=skip or a lower train.optimizer.lr or train.clip_norm.",
    ),
    Symptom(
        name="memorising",
        look="evaluation",
        test=memorising,
        when=f"two evaluations in a row are {FORGOT:.0%} worse than the best one, while the training loss is "
        f"{LEARNED:.0%} better than it was then",
        says="the held-out loss was best after step {best_step} ({best:.4g}) and is {held_out:.4g}, while the training "
        "loss fell from {before:.4g} to {training:.4g}",
        cure="Take the checkpoint of the best step, and train on more text, for fewer steps or at a lower rate.",
    ),
    Symptom(
        name="waiting for data",
        look="window",
        test=waiting_for_data,
        when=f"for {ROW} steps, waiting for the batch takes more than {WAITING:.0%} of the time",
        says="waiting for data takes {share:.0%} of a step ({seconds:.3g} s) over {steps} steps",
        cure="Copy data.shards to a local disk, and see what else reads from it and what else runs on these cores.",
    ),
    Symptom(
        name="creeping memory",
        look="window",
        test=creeping_memory,
        when=f"over {3 * Lows.COUNT * WINDOW // 5} steps or more, after a start of two thirds as many, the lows of "
        f"memory rise steadily, by {CREPT:.0%} and {CREPT_BYTES // 2**20} MiB at least",
        says="memory of {whose} rose from {before:,.0f} to {now:,.0f} MiB over {steps} steps, without levelling off",
        cure="Something keeps what it should let go: a tracker (log.trackers), or code of your own. Until it is found, "
        "stop before memory is full, and start the same command again, which goes on from the checkpoint.",
    ),
)
