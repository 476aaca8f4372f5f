"""One of two ranks that save and load together; run twice by test_checkpoint_death.py. Arguments: folder, rank."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.checkpoint import checkpoint, read, write
from moe_lm.checkpoint.recovery import newest_sound
from moe_lm.checkpoint.saver import Saver
from moe_lm.common.errors import MoeLmError
from moe_lm.common.process import end
from moe_lm.config.run import CheckpointConfig
from moe_lm.parallel.logical import Piece, piece_of
from moe_lm.parallel.process_group import Ranks

CONFIG = {"config.yaml": "a: 1\n"}


def main(root: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=2)
    act_together(rank)
    folder = save_and_load(root / "run" / "checkpoints", root, rank)
    refuse_damage(folder, rank)
    see_the_same(root, rank)
    go_on_past_damage(root / "damaged", rank)
    save_in_the_background(root / "background", rank)
    dist.destroy_process_group()


def act_together(rank: int) -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (rank, 2)
    assert ranks.each(lambda: rank + 10, ()) == [10, 11]
    assert ranks.first(lambda: f"of rank {rank}", ()) == "of rank 0"

    def fail() -> None:
        if rank == 1:
            raise MoeLmError("rank 1 has failed")

    expect_error(lambda: ranks.each(fail, (MoeLmError,)), "rank 1 has failed")
    ranks.first(fail, (MoeLmError,))


def save_and_load(checkpoints: Path, root: Path, rank: int) -> Path:
    hashed = []
    folder = write.save(checkpoints, 10, divided(1, 12), CONFIG)
    damage_in = checkpoint.damage_in
    checkpoint.damage_in = lambda path, line: hashed.append(path.name) or damage_in(path, line)  # type: ignore
    for cut in (12, 7, None):
        loaded = divided(0, cut)
        hashed.clear()
        read.load(folder, loaded)
        assert len(hashed) == 4 - rank  # of seven files, each is verified by one rank
        assert_equal(loaded, divided(1, cut))
    checkpoint.damage_in = damage_in
    expect_error(lambda: write.save(checkpoints, 20, divided(1, 12), {"a": root / "absent"}), "absent")
    cut = 7 if rank == 0 else 12  # and nobody has the elements between
    expect_error(lambda: write.save(checkpoints, 20, divided(1, cut), CONFIG), "have written 7 of the 24 elements")
    return folder


def refuse_damage(folder: Path, rank: int) -> None:
    """Whichever rank finds it, both refuse, and touch nothing."""
    for name in (*CONFIG, *(path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*")))):
        content = (folder / name).read_bytes()
        dist.barrier()
        if rank == 0:
            (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier()
        loaded = divided(0, 12)
        expect_error(lambda: read.load(folder, loaded), f"{name} does not have the checksum")  # noqa: B023
        assert not any(view.any() for tensor in loaded.values() for view in piece_of(tensor).views)
        dist.barrier()
        if rank == 0:
            (folder / name).write_bytes(content)
    dist.barrier()


def see_the_same(root: Path, rank: int) -> None:
    """Hosts that do not share the folder of the run are told."""
    checkpoints = root / "run" / "checkpoints"
    assert newest_sound(checkpoints) == (checkpoints / "step-00000010", {})
    elsewhere = root / "another host" / "checkpoints"
    mine = checkpoints if rank == 0 else elsewhere
    expect_error(lambda: newest_sound(mine), "rank 1 does not see .*step-00000010 that rank 0 goes on from")
    expect_error(lambda: write.save(mine, 30, divided(1, 12), CONFIG), "shard-00002.* is only on the host that wrote")
    assert not (mine / "step-00000030.tmp").exists()


def go_on_past_damage(checkpoints: Path, rank: int) -> None:
    """Whichever rank finds it, both take the one before, and one of them moves the damaged one aside."""
    for step in (1, 2, 3):
        folder = write.save(checkpoints, step, divided(step, 12), CONFIG)
        if rank == 0 and step > 1:  # the first file is verified by rank 0, the last by rank 1
            path = sorted(folder.glob("*/*"))[0 if step == 2 else -1]
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        dist.barrier()
    found = newest_sound(checkpoints)
    assert found.folder == checkpoints / "step-00000001"
    assert list(found.damaged) == ["step-00000003", "step-00000002"]
    names = ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]
    assert sorted(path.name for path in checkpoints.iterdir()) == names


def save_in_the_background(checkpoints: Path, rank: int) -> None:
    """Two saves, while the training's own process group is in use; the second fails on one rank alone."""
    config = CheckpointConfig(background=True, keep=1)
    with Saver(checkpoints, config) as saver:
        state = divided(1, 12)
        saver.start(1, state, CONFIG)
        for tensor in state.values():
            for view in piece_of(tensor).views:
                view.zero_()
        for _ in range(100):
            dist.all_reduce(torch.ones(1000))
        saver.wait()
        assert [saved.step for saved in saver.outcomes()] == [1]
        loaded = divided(0, 12)
        read.load(checkpoints / "step-00000001", loaded)
        assert_equal(loaded, divided(1, 12))

        sync = os.fsync
        os.fsync = full if rank == 1 else sync
        saver.start(2, state, CONFIG)
        for _ in range(100):
            dist.all_reduce(torch.ones(1000))
        saver.wait()
        os.fsync = sync
        (saved,) = saver.outcomes()
        assert saved.folder is None
        assert "No space left" in str(saved.error)
        folder = saver.save(3, state, CONFIG)
    dist.barrier()
    assert [path.name for path in checkpoints.iterdir()] == [folder.name] == ["step-00000003"]
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def divided(factor: int, cut: int | None) -> dict[str, Tensor | Piece]:
    """Experts of which rank 0 has the elements before `cut`, unless both have them all, and a norm that both have."""
    state: dict[str, Tensor | Piece] = {}
    for name, sign in (("model", 1), ("exp_avg", -1)):
        experts = sign * factor * torch.arange(24.0).view(4, 3, 2)
        bounds = (0, cut, 24)
        rank = dist.get_rank()
        state[f"{name}.experts"] = experts if cut is None else piece_of(experts).cut(bounds[rank], bounds[rank + 1])
        state[f"{name}.norm"] = torch.full((5,), float(sign * factor))
    return state


def assert_equal(found: dict[str, Tensor | Piece], expected: dict[str, Tensor | Piece]) -> None:
    for name, tensor in expected.items():
        views = zip(piece_of(found[name]).views, piece_of(tensor).views, strict=True)
        assert all(torch.equal(*pair) for pair in views), name


def expect_error(action: Callable[[], object], word: str) -> None:
    with pytest.raises(MoeLmError, match=word):
        action()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    end(0)
