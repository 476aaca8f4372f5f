"""What devices and networks reach: a table with its sources, and rates given by hand.

An achieved rate is what large operations of training get, not what a data sheet promises. Where nobody published it,
the figure is an assumption, and its source says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

import yaml

from moe_lm.common.errors import UsageError

GIB = 1 << 30
# Assumptions, the same for all GPUs:
OF_BEST_PRODUCT = 0.75  # of the best product of any shape (MAMF), what products in training's shapes reach
OF_DENSE = 2 / 3  # grouped of dense: H100, width 768, torch 242 TFLOP/s; width 1024, SonicMoE 555 (dense about 600)
OF_BANDWIDTH = 0.85  # of the data sheet's: H200 copies 4.3 of 4.8 TB/s (0.90), H100 3.02 of 3.35 (0.90); kernels less
OF_LINK = 0.78  # of a link's data sheet, in exchanges: 350 of NVLink 4's 450 GB/s
LAUNCH = 7.6e-6  # host seconds a launch: 170 launches of a layer's forward pass take 1.3 ms of eager PyTorch
KERNEL = 2e-6  # seconds that the shortest kernel takes on the device
SYNC = 2e-4  # seconds without work after the host waited for the device: two of them cost 0.3 to 0.5 ms a layer
OF_MEMORY = 0.92  # of a device's memory, what may be planned: the rest is for fragmentation and uneven experts

FLASH_2 = "FlashAttention 2: 35% of the peak on Hopper (arXiv 2407.08608), 50 to 73% on A100 (2307.08691), forward"
SHEET = "data sheet"
FLASH_3 = (
    "FlashAttention 3: at least 1.5 times as fast as FlashAttention 2, forward and backward (arXiv 2407.08608); "
    "where it is not installed, --rate attention=297e12"
)
MAMF = "best product by the MAMF table of stas00/ml-engineering"
ASSUMED = "achieved rates are assumptions"


@dataclass(frozen=True)
class Network:
    """A link: the bytes that one device sends in a second, achieved in large exchanges, and seconds to begin one."""

    name: str
    bandwidth: float
    latency: float
    source: str


@dataclass(frozen=True)
class Device:
    """A device, its node and its networks. FLOP/s and bytes/s are achieved ones, except for `peak`."""

    name: str
    memory: float  # bytes that the driver reports
    peak: float  # FLOP/s in bfloat16 by the data sheet, without sparsity: the denominator of MFU
    dense: float
    grouped: float
    attention: float  # counts only the scores that a causal mask leaves
    single: float  # dense products in float32
    copy: float  # bytes/s, read and written together
    inside: Network  # between the devices of a node
    between: Network  # between nodes, for each device
    per_node: int = 8
    launch: float = LAUNCH
    kernel: float = KERNEL
    sync: float = SYNC
    host: float = 20e9  # bytes/s to host memory, for offload; of 32 GB/s of PCIe 4
    host_update: float = 7e9  # parameters/s that a node's processors update: 28 bytes each at 200 GB/s, an assumption
    source: str = ASSUMED

    @property
    def usable(self) -> float:
        """Bytes that a step may need at its peak."""
        return OF_MEMORY * self.memory


NETWORKS = {
    network.name: network
    for network in (
        Network("nvlink3", OF_LINK * 300e9, 15e-6, "A100 data sheet: 600 GB/s both ways; nccl-tests reach 230 to 250"),
        Network("nvlink4", OF_LINK * 450e9, 15e-6, "H100 data sheet: 900 GB/s both ways; all-to-all reaches about 350"),
        Network("nvlink5", OF_LINK * 900e9, 15e-6, "B200 data sheet: 1.8 TB/s both ways; the share is an assumption"),
        Network("xgmi", OF_LINK * 448e9, 20e-6, "MI300X data sheet: 7 links of 64 GB/s; the share is an assumption"),
        Network("pcie4", 0.7 * 32e9, 20e-6, "PCIe 4 x16: 32 GB/s; the share is an assumption"),
        Network("infiniband-400", 45e9, 25e-6, "400 Gb/s a device; 45 GB/s reached (370 of a node with 8)"),
        Network("infiniband-200", 22e9, 25e-6, "200 Gb/s a device; the share of infiniband-400"),
        Network("roce-400", 40e9, 30e-6, "400 Gb/s a device; 80% is an assumption"),
        Network("ethernet-100", 1.2e9, 50e-6, "100 Gb/s shared by 8 devices, over TCP; 77% is an assumption"),
    )
}


# GiB that the driver reports; TFLOP/s in bfloat16, of the best product of any shape (MAMF), in float32; TB/s; the share
# of the peak that attention reaches; links in and between nodes; bytes/s to host memory. Products that were not
# published are assumed to reach 0.8 of the peak at best, as on Hopper.
# fmt: off
SHEETS: dict[str, tuple[float, float, float, float, float, float, str, str, float, str]] = {
    "a100-40": (39.4, 312, 267.9, 19.5, 1.555, 0.45, "nvlink3", "infiniband-200", 20e9, f"{SHEET}; {MAMF}; {FLASH_2}"),
    "a100-80": (79.2, 312, 267.9, 19.5, 2.039, 0.45, "nvlink3", "infiniband-200", 20e9, f"{SHEET}; {MAMF}; {FLASH_2}"),
    "h100": (79.2, 989, 792.1, 67, 3.35, 0.45, "nvlink4", "infiniband-400", 45e9, f"{SHEET}; {MAMF}; {FLASH_3}"),
    "h200": (139.8, 989, 798, 67, 4.8, 0.45, "nvlink4", "infiniband-400", 45e9, f"{SHEET}; products of 769 to 798 "
             f"TFLOP/s and copies of 4.3 TB/s measured on one; {FLASH_3}"),
    "b200": (178.3, 2250, 1745, 80, 7.67, 0.3, "nvlink5", "infiniband-400", 45e9, f"{SHEET}, but the bandwidth by the "
             f"driver (pytorch/ao #4002); {MAMF}; attention as on Hopper, assumed"),
    "l40s": (44.4, 362, 290, 91.6, 0.864, 0.45, "pcie4", "ethernet-100", 20e9, f"{SHEET}; {ASSUMED}"),
    "rtx4090": (23.6, 165, 132, 82.6, 1.008, 0.45, "pcie4", "ethernet-100", 20e9, f"Ada white paper; {ASSUMED}"),
    "mi300x": (191.9, 1307, 781.9, 163.4, 5.3, 0.25, "xgmi", "infiniband-400", 45e9, f"{SHEET}; {MAMF}; {ASSUMED}"),
}
# fmt: on


def _gpu(name: str) -> Device:
    gib, peak, best, single, bandwidth, flash, inside, between, host, source = SHEETS[name]
    dense = OF_BEST_PRODUCT * best * 1e12
    return Device(
        name,
        memory=gib * GIB,
        peak=peak * 1e12,
        dense=dense,
        grouped=OF_DENSE * dense,
        attention=flash * peak * 1e12,
        single=OF_BEST_PRODUCT * single * 1e12,
        copy=OF_BANDWIDTH * bandwidth * 1e12,
        inside=NETWORKS[inside],
        between=NETWORKS[between],
        host=host,
        source=source,
    )


DEVICES = {name: _gpu(name) for name in SHEETS}

RATES = tuple(field.name for field in fields(Device) if field.name not in ("name", "inside", "between", "source"))
EXAMPLES = {
    "memory": "80e9",
    "copy": "3e12",
    "inside": "350e9",
    "between": "45e9",
    "per_node": "8",
    "launch": "5e-6",
    "kernel": "2e-6",
    "sync": "2e-4",
    "host": "45e9",
    "host_update": "7e9",
}  # of rates that are not FLOP/s
LINKS = ("inside", "between")  # by the name of a network, or in bytes/s
NEEDED = ("memory", "peak", "copy")  # of a device that the table does not have; the rest is assumed


def find_device(name: str, rates: Sequence[str] = (), network: str | None = None) -> Device:
    """A device of the table, or of a YAML file with the fields of `Device`, with the rates that are given by hand.

    A name that the table does not have needs at least `NEEDED`. Raises UsageError for an unknown name or rate.
    """
    given = parsed(rates)
    if name.endswith((".yaml", ".yml")):
        given = {**_read(Path(name)), **given}
        name = str(given.pop("name", Path(name).stem))
    device = DEVICES.get(name.lower()) or _by_hand(name, given)
    return changed(device, given, network)


def changed(device: Device, given: Mapping[str, str], network: str | None) -> Device:
    """The device with other rates, and another network between nodes."""
    changes = {key: _value(key, value) for key, value in given.items()}
    if network is not None:
        changes["between"] = find_network(network)
    return replace(device, **changes)  # type: ignore[arg-type]


def find_network(name: str) -> Network:
    """A network of the table. Raises UsageError with the known ones."""
    if name not in NETWORKS:
        raise UsageError(
            f"--network {name} is not known; choose one of {', '.join(NETWORKS)}, or give --rate between=45e9"
        )
    return NETWORKS[name]


def _by_hand(name: str, given: Mapping[str, str]) -> Device:
    missing = [key for key in NEEDED if key not in given]
    if missing:
        near = get_close_matches(name.lower(), DEVICES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(
            f"--gpu {name} is not known{hint}; choose one of {', '.join(DEVICES)}, cpu for this machine, or a YAML "
            f"file, or give its rates by hand: {' '.join(f'--rate {key}=VALUE' for key in missing)} (bytes, FLOP/s, "
            "bytes/s)"
        )
    peak = _value("peak", given["peak"])
    assert isinstance(peak, float)
    dense = 0.6 * peak
    return Device(
        name,
        memory=0,
        peak=peak,
        dense=dense,
        grouped=OF_DENSE * dense,
        attention=0.3 * peak,
        single=peak / 15,
        copy=0,
        inside=NETWORKS["nvlink4"],
        between=NETWORKS["infiniband-400"],
        source=f"given by hand; {ASSUMED} where not given",
    )


def parsed(rates: Sequence[str]) -> dict[str, str]:
    """Rates of the form KEY=VALUE."""
    pairs = {}
    for item in rates:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--rate {item} is not KEY=VALUE; give it like --rate dense=600e12")
        pairs[key] = value
    return pairs


def _read(path: Path) -> dict[str, str]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(
            f"--gpu {path} cannot be read: {error}; give a YAML file of rates like dense: 600e12"
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f"--gpu {path} holds no rates; write lines like dense: 600e12")
    return {str(key): str(value) for key, value in values.items()}


def _value(key: str, value: str) -> float | int | Network:
    if key in LINKS and value in NETWORKS:
        return NETWORKS[value]
    if key not in (*RATES, *LINKS):
        near = get_close_matches(key, (*RATES, *LINKS), 1)
        raise UsageError(
            f"--rate {key}={value} is no rate of a device{f' (did you mean {near[0]}?)' if near else ''}; "
            f"choose one of {', '.join((*RATES, *LINKS))}"
        )
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        name = f"neither a network ({', '.join(NETWORKS)}) nor" if key in LINKS else "not"
        example = EXAMPLES.get(key, "600e12")
        raise UsageError(f"--rate {key}={value} is {name} a number above 0; give it like --rate {key}={example}")
    if key == "memory" and number < 1 << 20:
        raise UsageError(f"--rate memory={value} is in bytes; 80 GB is --rate memory=80e9")
    if key in LINKS:
        return Network("by hand", number, 25e-6, "given by hand")
    if key != "per_node":
        return number
    if number != int(number):
        raise UsageError(f"--rate per_node={value} is not a whole number of devices; give it like --rate per_node=8")
    return int(number)
