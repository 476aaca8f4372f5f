"""The faults of docs/faults.md tried on other ways to save and resume, with the libraries that are installed.

    python eval/studies/faults_of_peers.py [--only dcp deepspeed trainer] [--out eval/results/faults_of_peers.json]

Each fault is done to a run of `peers/worker.py` in a process of its own, and the same command is started again. What is
noted was seen: the exit code, the step that the second run began with, whether its losses are those of an undisturbed
run, and the last line of an error. Rows of an earlier result are kept where they are not tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

HERE = Path(__file__).parent
PEERS = {"dcp": "torch", "deepspeed": "deepspeed", "trainer": "transformers"}
STEPS = 40
KILLS = 12


def heed_signals() -> None:
    """What this script may ignore, because nohup or a shell in the background started it, its runs do not."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Peer:
    """One library, in a folder of its own for every fault."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name, self.scratch = name, scratch
        self.expected = self.losses(self.ran(self.folder("whole"))[1])

    def folder(self, name: str) -> Path:
        folder = self.scratch / f"{self.name}-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, folder: Path, steps: int = STEPS, **more: object) -> subprocess.Popen[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in {**place, "OMP_NUM_THREADS": 1, **more}.items()}
        output = (self.scratch / "output.txt").open("w")
        return subprocess.Popen(
            [sys.executable, str(HERE / "peers" / "worker.py"), self.name, str(folder), str(steps)],
            stdout=output, stderr=output, text=True, env=os.environ | variables,
            preexec_fn=heed_signals,
        )  # fmt: skip

    def ran(self, folder: Path, **more: Any) -> tuple[int, Path]:
        process = self.start(folder, **more)
        try:
            return process.wait(timeout=240), folder
        except subprocess.TimeoutExpired:
            process.kill()
            return 124, folder

    def losses(self, folder: Path) -> dict[int, float]:
        """The last loss of every step: a step that is trained again is written again."""
        file = folder / "losses.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {line["step"]: line["loss"] for line in map(json.loads, lines)}

    def said(self) -> str:
        """The last line of the output that looks like an error."""
        lines = (self.scratch / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line.strip() for line in lines if "Error" in line or "rror:" in line]
        return found[-1].replace(str(self.scratch), "")[:160] if found else ""

    def until(self, process: subprocess.Popen[str], condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)

    def checkpoints(self, folder: Path) -> list[Path]:
        """The folders of checkpoints, the newest last."""
        found = [path for path in folder.iterdir() if path.is_dir() and path.name.split("-")[-1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[-1]))

    def weights(self, checkpoint: Path) -> Path:
        """The largest file of a checkpoint."""
        return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)

    def again(self, folder: Path, **more: Any) -> dict[str, Any]:
        """Start the same command again; what it did."""
        before = (folder / "losses.jsonl").read_text(encoding="utf-8").count("\n") if folder.exists() else 0
        code, _ = self.ran(folder, **more)
        lines = (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()[before:]
        found = [json.loads(line) for line in lines]
        wrong = [line["step"] for line in found if line["loss"] != self.expected.get(line["step"])]
        result: dict[str, Any] = {"exit_code": code, "began_with_step": found[0]["step"] if found else None}
        result["losses_that_differ"] = len(wrong)
        if code:
            result["said"] = self.said()
        return result


def killed_while_saving(peer: Peer) -> dict[str, Any]:
    """Rows 1 and 8: SIGKILL at random instants while a save is under way."""
    draw, failures, lost, unfinished = random.Random(0), [], 0, 0
    for number in range(KILLS):
        folder = peer.folder(f"kill-{number}")
        process = peer.start(folder, steps=1000)
        few = 5 * draw.randint(1, 3)
        peer.until(process, lambda: max(peer.losses(folder), default=0) >= few)  # noqa: B023
        time.sleep(draw.uniform(0, 0.25))
        process.kill()
        process.wait()
        at = max(peer.losses(folder), default=0)
        result = peer.again(folder)
        unfinished += result["exit_code"] != 0
        if result["exit_code"]:
            failures.append(result.get("said", ""))
        elif result["began_with_step"] is not None:
            lost = max(lost, at - result["began_with_step"] + 1)
        shutil.rmtree(folder)
    return {"kills": KILLS, "could_not_go_on": unfinished, "most_steps_lost": lost, "said": sorted(set(failures))[:3]}


def stopped_at(peer: Peer, name: str, steps: int = 20) -> Path:
    """A run that ended after this many steps."""
    folder = peer.folder(name)
    peer.ran(folder, steps=steps)
    return folder


def resumed(peer: Peer) -> dict[str, Any]:
    """Row 3: the same losses as a run that was never stopped."""
    return peer.again(stopped_at(peer, "resumed"))


def flipped_bit(peer: Peer) -> dict[str, Any]:
    """Row 5: one bit in the middle of the largest file of the newest checkpoint."""
    folder = stopped_at(peer, "flipped")
    file = peer.weights(peer.checkpoints(folder)[-1])
    with file.open("r+b") as stream:
        place = file.stat().st_size // 2 | 3  # the byte of a float32 with its exponent
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 4]))
    return peer.again(folder)


def truncated(peer: Peer) -> dict[str, Any]:
    """Row 6: the largest file of the newest checkpoint loses its second half."""
    folder = stopped_at(peer, "truncated")
    file = peer.weights(peer.checkpoints(folder)[-1])
    os.truncate(file, file.stat().st_size // 2)
    return peer.again(folder)


def missing(peer: Peer) -> dict[str, Any]:
    """Row 7: the largest file of the newest checkpoint is gone."""
    folder = stopped_at(peer, "missing")
    peer.weights(peer.checkpoints(folder)[-1]).unlink()
    return peer.again(folder)


def full_disk(peer: Peer) -> dict[str, Any]:
    """Row 9: no room for the third checkpoint."""
    folder = peer.folder("full")
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        return {"not tried": "no file system can be mounted here"}
    try:
        process = peer.start(folder)
        peer.until(process, lambda: max(peer.losses(folder), default=0) >= 11)
        process.send_signal(signal.SIGSTOP)
        with suppress(OSError), (folder / "filling").open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
        os.truncate(folder / "filling", (folder / "filling").stat().st_size - 4_000_000)
        process.send_signal(signal.SIGCONT)
        code = process.wait(timeout=240)
        result: dict[str, Any] = {
            "exit_code": code,
            "last_step": max(peer.losses(folder), default=0),
            "said": peer.said(),
        }
        (folder / "filling").unlink()
        return result | {"again": peer.again(folder)}
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def signalled(number: signal.Signals) -> Callable[[Peer], dict[str, Any]]:
    def tried(peer: Peer) -> dict[str, Any]:
        folder = peer.folder(number.name)
        process = peer.start(folder, steps=100_000)
        peer.until(process, lambda: max(peer.losses(folder), default=0) >= 13)
        process.send_signal(number)
        try:
            code = process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            code = 124
        saved = peer.checkpoints(folder)
        return {
            "exit_code": code,
            "last_step": max(peer.losses(folder)),
            "newest_checkpoint": saved[-1].name if saved else None,
            "traceback": "Traceback" in (peer.scratch / "output.txt").read_text(errors="replace"),
        }

    tried.__doc__ = f"{number.name} in training: is anything saved?"
    return tried


def one_nan(peer: Peer) -> dict[str, Any]:
    """Row 18: the inputs of step 12 are NaN."""
    folder = peer.folder("nan")
    code, _ = peer.ran(folder, POISON="12-12")
    result = {"exit_code": code, "losses_not_a_number": sum(loss != loss for loss in peer.losses(folder).values())}
    if files := list(peer.checkpoints(folder)[-1].glob("*.safetensors")):  # the Trainer's log leaves NaN out
        tensors = load_file(files[0]).values()
        result["tensors_not_finite"] = sum(not bool(tensor.isfinite().all()) for tensor in tensors)
    return result


def ten_nans(peer: Peer) -> dict[str, Any]:
    """Row 20: the inputs of the steps 12 to 40 are NaN."""
    folder = peer.folder("nans")
    code, _ = peer.ran(folder, POISON="12-40")
    return {
        "exit_code": code,
        "last_step": max(peer.losses(folder)),
        "checkpoints": [path.name for path in peer.checkpoints(folder)],
    }


def spike(peer: Peer) -> dict[str, Any]:
    """Row 21: the inputs of step 12 are a thousand times as large."""
    folder = peer.folder("spike")
    code, _ = peer.ran(folder, SPIKE=12)
    losses = peer.losses(folder)
    return {"exit_code": code, "loss_of_the_step": losses.get(12), "loss_after": losses.get(13)}


def carries_code(peer: Peer) -> dict[str, Any]:
    """Row 29: every file of the newest checkpoint that is a pickle runs a command when it is unpickled."""
    folder = stopped_at(peer, "code")
    mark = peer.scratch / f"{peer.name}-executed"
    mark.unlink(missing_ok=True)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {mark}",)

    replaced = []
    for file in sorted(peer.checkpoints(folder)[-1].rglob("*")):
        if (file.is_file() and file.suffix in (".pt", ".pth", ".bin", ".metadata")) or file.name == ".metadata":
            file.write_bytes(pickle.dumps(Evil()))
            replaced.append(file.name)
    result = peer.again(folder)
    return {"pickles": replaced, "code_was_executed": mark.exists()} | result


def two_jobs(peer: Peer) -> dict[str, Any]:
    """Row 32: a second job in the same folder."""
    folder = peer.folder("two")
    first = peer.start(folder, steps=100_000)
    peer.until(first, lambda: max(peer.losses(folder), default=0) >= 6)
    code, _ = peer.ran(folder)
    first.kill()
    first.wait()
    return {"exit_code_of_the_second": code, "said": peer.said() if code else ""}


def another_shape(peer: Peer) -> dict[str, Any]:
    """Row 33: the model is narrower than the checkpoint's."""
    return peer.again(stopped_at(peer, "shape"), WIDTH=512)


FAULTS: dict[str, Callable[[Peer], dict[str, Any]]] = {
    "1, 8": killed_while_saving,
    "3": resumed,
    "5": flipped_bit,
    "6": truncated,
    "7": missing,
    "9": full_disk,
    "13": signalled(signal.SIGTERM),
    "14": signalled(signal.SIGINT),
    "18": one_nan,
    "20": ten_nans,
    "21": spike,
    "29": carries_code,
    "32": two_jobs,
    "33": another_shape,
    "35": signalled(signal.SIGHUP),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rows", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--out", type=Path, default=HERE.parents[0] / "results" / "faults_of_peers.json")
    arguments = parser.parse_args()
    found = arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else "{}"
    result: dict[str, Any] = json.loads(found) | {"date": date.today().isoformat()}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only:
            peer = Peer(name, Path(scratch))
            rows = result.setdefault(name, {})
            rows["version"] = f"{PEERS[name]} {version(PEERS[name])}"
            for row in arguments.rows:
                rows[row] = FAULTS[row](peer)
                print(name, row, json.dumps(rows[row]), flush=True)
                arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
