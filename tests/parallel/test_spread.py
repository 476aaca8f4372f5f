"""A model larger than one device writes the same tokens, and is never held whole."""

from __future__ import annotations

import gc
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_lm.common.signals import ended_by_exception
from moe_lm.config.generation import SampleConfig
from moe_lm.generate.beams import search
from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import Sampling
from moe_lm.model.kv_cache import ByLayer
from moe_lm.model.transformer import LayerDevices
from moe_lm.parallel.spread import Spread
from tests.generate.conftest import MakeRun
from tests.processes import ROOT
from tests.tiny import LATENT

MODELS = {
    "grouped-query": {"num_hidden_layers": 4, "num_key_value_heads": 1},
    "latent": LATENT | {"num_hidden_layers": 4},
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 3},
    "learned positions": {"position_embedding": "learned", "num_hidden_layers": 3},
}
PROMPTS = [[1, 5, 6, 7], [3] * 20, [4, 5]]
DRAWN = Settings(14, Sampling(temperature=1.5), seed=3)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_layers_on_the_disk_write_the_same_tokens(make_run: MakeRun, name: str, tmp_path: Path) -> None:
    run = make_run(**MODELS[name])
    expected = generate(Session.load(run, device="cpu").model, PROMPTS, DRAWN)
    offload = tmp_path / "offload"
    some = "240KiB" if name == "tied" else "330KiB"  # room for some of the layers
    for cpu in ("0MiB", some, "1GiB"):
        session = Session.load(run, spread=Spread({"cpu": cpu}, offload))
        lies = [parameter.is_meta for parameter in session.model.model.layers.parameters()]
        assert {"0MiB": all(lies), some: any(lies) and not all(lies), "1GiB": not any(lies)}[cpu], cpu
        assert generate(session.model, PROMPTS, DRAWN) == expected
        assert [parameter.is_meta for parameter in session.model.model.layers.parameters()] == lies
        assert bool(list(offload.glob("*/*.dat"))) == any(lies)
        del session
        gc.collect()
        assert not offload.exists() or not list(offload.iterdir())


def test_adapters_and_what_many_ranks_wrote_are_read_alike(make_run: MakeRun) -> None:
    """Both are `open_tensors`, which `tests/interop` and `tests/train/test_lora.py` show equal to loading."""
    run = make_run()
    whole = Session.load(run, device="cpu").model.state_dict()
    spread = Session.load(run, spread=Spread({"cpu": "1GiB"})).model.state_dict()
    assert whole.keys() == spread.keys()
    assert all(torch.equal(whole[name], spread[name]) for name in whole)


@pytest.mark.parametrize("name", ["grouped-query", "latent"])
def test_a_cache_on_several_devices_gives_the_same_tokens(make_run: MakeRun, name: str) -> None:
    """`cpu` and `cpu:0` are two devices by name and one in fact."""
    model = Session.load(make_run(**MODELS[name]), device="cpu").model
    settings = SampleConfig(beams=3, num=3, max_new_tokens=8)
    expected = generate(model, PROMPTS, DRAWN, slots=2), search(model, PROMPTS[0], settings)
    model.layer_devices = LayerDevices(CPU, (CPU, torch.device("cpu:0"), CPU, CPU))
    assert (generate(model, PROMPTS, DRAWN, slots=2), search(model, PROMPTS[0], settings)) == expected


def test_layers_of_their_own_are_indexed_like_one_tensor() -> None:
    one = torch.arange(48.0).view(2, 3, 2, 4)
    several = ByLayer(list(one.clone()))
    for index in [(slice(None), slice(1, 3)), (..., slice(2)), (slice(None), torch.tensor([2, 0]))]:
        assert all(torch.equal(several[index][layer], one[index][layer]) for layer in range(2))
    one[:, 0] = one[:, 2]
    several[:, 0] = several[:, 2]
    one[1, 2, :, :3] = 7.0
    several[1, 2, :, :3] = torch.tensor(7.0)
    assert all(torch.equal(several[layer], one[layer]) for layer in range(2))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["grouped-query", "latent"])
def test_layers_in_host_memory_run_on_the_gpu(make_run: MakeRun, name: str) -> None:
    run = make_run(**MODELS[name])
    expected = generate(Session.load(run, device="cuda").model, PROMPTS, Settings(8))
    model = Session.load(run, spread=Spread({"0": "400KiB", "cpu": "400KiB"})).model
    assert model.device.type == "cuda"
    assert any(parameter.is_meta for parameter in model.parameters())
    assert generate(model, PROMPTS, Settings(8)) == expected


def test_sample_and_chat_take_it(make_run: MakeRun, moe_lm: Callable, tmp_path: Path) -> None:
    run = make_run()
    usual = moe_lm("sample", run, "-p", "import", "--greedy", "--max-new-tokens", 9)
    spread = ["--device-map", "auto", "--max-memory", "cpu=0GiB", "--offload-folder", tmp_path / "offload"]
    done = moe_lm("sample", run, "-p", "import", "--greedy", "--max-new-tokens", 9, *spread)
    assert (done.code, done.out) == (0, usual.out)
    auto = ("--device-map", "auto")
    for options, error in {
        ("--device", "tpu"): "device 'tpu' is not available on this machine",
        (*auto, "--device", "cpu"): "--device cpu names one device and --device-map takes all",
        ("--max-memory", "cpu=1GiB"): "--max-memory belongs to a model on several devices; give --device-map auto too",
        (*auto, "--max-memory", "cpu=much"): "--max-memory cpu=much is not a size; give it like cpu=4GiB",
        (*auto, "--max-memory", "99=1GiB"): "--max-memory 99=1GiB does not name a device of this machine",
    }.items():
        done = moe_lm("chat", run, *options)
        assert (done.code, done.out) == (2, "")
        assert error in done.err
    (tmp_path / "file").touch()
    for memory in ("cpu=0", "cpu=1GiB"):  # and so where nothing lies on the disk
        options = ["--device-map", "auto", "--max-memory", memory, "--offload-folder", tmp_path / "file" / "x"]
        done = moe_lm("sample", run, "-p", "a", *options)
        assert done.code == 1
        assert re.search(r"--offload-folder .* cannot be written \(Not a directory\)", done.err)


def test_sigterm_takes_what_lies_on_the_disk_along(
    run: Path, moe_lm: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which hears it as in moe_lm/__main__.py."""
    offload, seen = tmp_path / "offload", []

    class Terminated(io.StringIO):
        def write(self, text: str) -> int:
            if text.strip():
                seen.append(list(offload.glob("*/*.dat")))
                signal.raise_signal(signal.SIGTERM)
            return super().write(text)

    for verb in (["sample", run, "-p", "import"], ["chat", run]):
        with ended_by_exception():
            monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
            monkeypatch.setattr(sys, "stdout", Terminated())
            options = ["--device-map", "auto", "--max-memory", "cpu=0", "--offload-folder", offload]
            assert moe_lm(*verb, *options, "--temperature", 0).code == 128 + signal.SIGTERM
            gc.collect()
            assert list(offload.iterdir()) == []
    assert len(seen) == 2
    assert all(seen)


PROGRAM = """
import json, resource, sys
from pathlib import Path
from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.parallel.spread import Spread

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

small, large = map(Path, sys.argv[1:3])
generate(Session.load(small, spread=Spread({"cpu": "0MiB"})).model, [[1, 2]], Settings(2))  # imports what is needed
before = peak()
ids = generate(Session.load(large, spread=Spread({"cpu": "0MiB"})).model, [[1, 2, 3]], Settings(3))
print(json.dumps({"grown": peak() - before, "ids": ids}))
"""


def test_memory_is_that_of_a_few_layers(make_run: MakeRun, tmp_path: Path) -> None:
    small = make_run().rename(tmp_path / "small")
    shape = {"hidden_size": 512, "num_hidden_layers": 26, "intermediate_size": 1024, "n_routed_experts": 0}
    large = make_run(**shape, initializer_range=0.02)
    size = sum(file.stat().st_size for file in large.glob("checkpoints/*/model/*"))
    command = [sys.executable, "-c", PROGRAM, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert size > 240e6
    assert result["grown"] < size / 3
    assert result["ids"] == generate(Session.load(large, device="cpu").model, [[1, 2, 3]], Settings(3))
