"""Alarms that name the disease and the cure: the symptoms that a run shows, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lm.train.past import Past, Plan, Record
from moe_lm.train.symptoms import SYMPTOMS, Figures, Symptom

REMIND = 500  # steps until a symptom that stays is named again
SHOWN = 3  # places that the sentence names; the event has all


@dataclass(frozen=True)
class Alarm:
    """A symptom that shows in a run after `step`."""

    symptom: Symptom
    step: int
    found: Sequence[Figures]

    @property
    def said(self) -> str:
        """What was found, without the name of the symptom and its cure."""
        said = [self.symptom.says.format(**figures) for figures in self.found[:SHOWN]]
        more = len(self.found) - SHOWN
        return f"{'; '.join(said)}{f'; and {more} more' if more > 0 else ''}"

    @property
    def text(self) -> str:
        return f"{self.symptom.name}: {self.said}. {self.symptom.cure}"


class Alarms:
    """Looks for the table's symptoms in memory that does not grow; what stays is named again after REMIND steps."""

    def __init__(self, plan: Plan) -> None:
        self._past = Past(plan)
        self._said: dict[tuple[str, Any], int] = {}  # the last step at which a symptom was named, by its place

    def at_start(self, step: int = 0) -> list[Alarm]:
        """The symptoms of the settings of a run that begins after this step."""
        return self._look("start", step)

    def after(self, record: Record) -> list[Alarm]:
        """The symptoms that show with this record."""
        alarms = []
        if "loss" in record and self._past.add(record):  # the evaluation before the first step has none
            alarms += self._look("window", record["step"])
        if "val_loss" in record:
            self._past.evaluated(record)
            alarms += self._look("evaluation", record["step"])
        return alarms

    def _look(self, when: str, step: int) -> list[Alarm]:
        found = [(symptom, tuple(self._not_said(symptom, step))) for symptom in SYMPTOMS if symptom.look == when]
        return [Alarm(symptom, step, figures) for symptom, figures in found if figures]

    def _not_said(self, symptom: Symptom, step: int) -> Iterator[Figures]:
        for figures in symptom.test(self._past):
            place = symptom.name, figures.get("layer", figures.get("source"))
            said = self._said.get(place)
            if said is None or not said <= step < said + REMIND:
                self._said[place] = step
                yield figures
