"""`moe-lm prepare` beside `datasets.map` and datatrove's tokenization pipeline, in turns, on the same text and ids.

    python eval/bench/prepare.py TEXT.jsonl[.xz] TOKENIZER [--datatrove-python PYTHON] [--before FOLDER]
        [--output eval/results/prepare.json]

TEXT has a field `text` in every line; its documents are cut to about a page of the web each. TOKENIZER is a folder that
moe_lm reads. PYTHON is one that has datatrove, FOLDER another version of this repository, to compare with.
A program reads JSON Lines and leaves ids on the disk; `datasets` stops at its own Arrow file. Each works in processes
whose tokenizer has one thread. Counted is what the program does after its imports: seconds, and processor seconds of it
and all its processes, of which the busyness of the machine changes little. The ids of all must be as many.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import lzma
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

FILES = 8  # of the text, as datatrove's tasks divide files and not their lines
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl: processes whose parent has ended become ours, and so do their seconds
HOSTS, CORES_A_HOST, TOKENS = 16, 64, 10**12  # of the prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--datatrove-python", help="the Python of an environment that has datatrove")
    parser.add_argument("--before", type=Path, help="another version of this repository")
    parser.add_argument("--megabytes", type=float, default=30, help="of text to read")
    parser.add_argument("--document-characters", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    contenders = contenders_of(arguments.datatrove_python, arguments.before)
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    with TemporaryDirectory() as folder:
        room = Path(folder)
        text_bytes, documents = write_text(arguments, room / "text")
        save_tokenizer(arguments.tokenizer, room / "tokenizer")
        for number in range(arguments.rounds):
            for name, contender in contenders.items():
                runs[name].append(timed(contender, room, room / f"{number}-{name}"))
                print(name, runs[name][-1], file=sys.stderr, flush=True)
    result = summary(runs) | {
        "text": {"megabytes": round(text_bytes / 1e6, 1), "documents": documents},
        "rounds": arguments.rounds,
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class Contender(NamedTuple):
    """A program of `PROGRAMS` with the Python that runs it, its processes, and the code that it imports moe_lm from."""

    program: str
    workers: int
    python: str = sys.executable
    code: Path | None = None


class Run(NamedTuple):
    """Ids of the text, without those that mark documents; seconds; processor seconds; load at the end."""

    tokens: int
    seconds: float
    cpu_seconds: float
    load: float


def contenders_of(datatrove_python: str | None, before: Path | None) -> dict[str, Contender]:
    found = {
        "prepare, 1 worker": Contender("prepare", 1),
        "prepare, 2 workers": Contender("prepare", 2),
        "datasets.map, 2 processes": Contender("datasets", 2),
    }
    if datatrove_python is not None:
        found["datatrove, 2 tasks"] = Contender("datatrove", 2, datatrove_python)
    if before is not None:
        found["prepare before, 2 workers"] = Contender("prepare", 2, code=before.resolve())
    return found


def write_text(arguments: argparse.Namespace, folder: Path) -> tuple[int, int]:
    """Write the documents into FILES files, in turns. Returns their bytes of text and their number."""
    folder.mkdir()
    opened = [(folder / f"{number}.jsonl").open("w", encoding="utf-8") for number in range(FILES)]
    text_bytes = documents = 0
    for text in pages(arguments.text, arguments.document_characters):
        opened[documents % FILES].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        text_bytes, documents = text_bytes + len(text.encode()), documents + 1
        if text_bytes >= arguments.megabytes * 1e6:
            break
    for file in opened:
        file.close()
    return text_bytes, documents


def pages(path: Path, characters: int) -> Iterator[str]:
    """The texts of a file, cut behind the first line that ends after so many characters."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            page, length = list[str](), 0
            for part in json.loads(line)["text"].splitlines(keepends=True):
                page.append(part)
                length += len(part)
                if length >= characters:
                    yield "".join(page)
                    page, length = [], 0
            if "".join(page).strip():
                yield "".join(page)


def save_tokenizer(path: Path, folder: Path) -> None:
    from moe_lm.tokenizer.tokenizer import Tokenizer

    Tokenizer.load(path).save(folder)


def timed(contender: Contender, room: Path, out: Path) -> Run:
    """Run a program, wait for all processes that it began, and count theirs with its own."""
    out.mkdir()
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if contender.code is not None:
        environment["PYTHONPATH"] = str(contender.code)
    before = cpu_seconds(resource.RUSAGE_CHILDREN)
    # -P: the files beside this one hide no module of theirs
    command = [contender.python, "-P", __file__, "--run", contender.program, room, out, str(contender.workers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{contender} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    told = json.loads(done.stdout.splitlines()[-1])
    spent = cpu_seconds(resource.RUSAGE_CHILDREN) - before - told["cpu_seconds_of_imports"]
    return Run(told["tokens"], told["seconds"], spent, os.getloadavg()[0])


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def run(program: str, room: str, out: str, workers: str) -> None:
    """Be one of the programs, and tell what it did in the last line."""
    PROGRAMS[program](Path(room), Path(out), int(workers))


class Clock:
    """Begins when a program's imports are done."""

    def __init__(self) -> None:
        self.cpu_seconds_of_imports, self.began = cpu_seconds(resource.RUSAGE_SELF), time.perf_counter()

    def stop(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self.began,
            "cpu_seconds_of_imports": self.cpu_seconds_of_imports,
        }


def tell(times: dict[str, float], tokens: int) -> None:
    print("\n" + json.dumps(times | {"tokens": tokens}))


def run_prepare(room: Path, out: Path, workers: int) -> None:
    from moe_lm.config.data import DataConfig
    from moe_lm.data.prepare import prepare

    clock = Clock()
    source = {"name": "text", "path": str(room / "text")}
    config = DataConfig.model_validate(
        {"sources": [source], "tokenizer": str(room / "tokenizer"), "shards": str(out), "workers": workers}
    )
    manifest = prepare(config).manifests["text"]
    times = clock.stop()
    tell(times, manifest.tokens - 2 * (manifest.documents or 0))  # bos and eos


def run_datasets(room: Path, out: Path, workers: int) -> None:
    from datasets import load_dataset
    from tokenizers import Tokenizer

    clock = Clock()
    tokenizer = Tokenizer.from_file(str(room / "tokenizer" / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = [[*encoding.ids, eos] for encoding in tokenizer.encode_batch_fast(batch["text"])]
        return {"ids": ids, "length": [len(row) for row in ids]}

    files = [str(path) for path in sorted((room / "text").iterdir())]
    read = load_dataset("json", data_files=files, split="train", cache_dir=str(out))
    rows = read.map(encode, batched=True, num_proc=workers, remove_columns=["text"])
    times = clock.stop()
    tell(times, sum(rows["length"]) - len(rows))


def run_datatrove(room: Path, out: Path, workers: int) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    clock = Clock()
    write = DocumentTokenizer(
        output_folder=str(out / "ids"),
        tokenizer_name_or_path=str(room / "tokenizer" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        shuffle_documents=False,  # as the others
        batch_size=1000,  # as datasets.map; the default of 10,000 documents needs more memory
    )
    read = JsonlReader(str(room / "text"))
    LocalPipelineExecutor([read, write], tasks=workers, workers=workers, logging_dir=str(out / "logs")).run()
    times = clock.stop()
    files = list((out / "ids").glob("*.ds"))
    documents = sum(path.with_name(path.name + ".index").stat().st_size // 8 for path in files)
    tell(times, sum(path.stat().st_size // write.token_size for path in files) - documents)


PROGRAMS = {"prepare": run_prepare, "datasets": run_datasets, "datatrove": run_datatrove}


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    counts = {name: {found.tokens for found in of} for name, of in runs.items()}
    if len(tokens := set.union(*counts.values())) != 1:
        sys.exit(f"the programs found different numbers of tokens, so they did not do the same: {counts}")
    (count,) = tokens
    seconds, cpu = (
        {name: statistics.median(getattr(found, kind) for found in of) for name, of in runs.items()}
        for kind in ("seconds", "cpu_seconds")
    )
    of_a_core = count / cpu["prepare, 2 workers"]
    return {
        "tokens": count,
        "programs": {
            name: {
                "tokens_a_second": round(count / seconds[name]),
                "tokens_a_cpu_second": round(count / cpu[name]),
                "cpu_seconds": [round(found.cpu_seconds, 2) for found in of],
                "seconds": [round(found.seconds, 2) for found in of],
                "load_average": [round(found.load, 1) for found in of],
            }
            for name, of in runs.items()
        },
        "times_prepare_with_2_workers_is_faster": {
            name: {
                "by_cpu": round(cpu[name] / cpu["prepare, 2 workers"], 2),
                "by_clock": round(seconds[name] / seconds["prepare, 2 workers"], 2),
            }
            for name in runs
        },
        "predicted_hours": {
            "tokens": TOKENS,
            "hosts": HOSTS,
            "cores_a_host": CORES_A_HOST,
            "hours": round(TOKENS / (of_a_core * HOSTS * CORES_A_HOST) / 3600, 2),
            "assumed": "every core as fast as one here, and storage that keeps up",
        },
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:])
    else:
        main()
