"""The table of devices and networks, and rates given by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.tools.plan.devices import DEVICES, NETWORKS, find_device


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_reaches_less_than_its_data_sheet_promises(name: str) -> None:
    found = DEVICES[name]
    assert found.grouped <= found.dense < found.peak
    assert found.attention < found.dense
    assert found.usable < found.memory
    assert found.source


def test_the_table_has_the_published_figures() -> None:
    h100, h200 = DEVICES["h100"], DEVICES["h200"]
    assert (h100.peak, h200.peak) == (989e12, 989e12)
    assert h100.dense == 0.75 * 792.1e12
    assert h200.copy == pytest.approx(0.85 * 4.8e12)
    assert h100.inside.bandwidth == pytest.approx(350e9, rel=0.01)
    assert NETWORKS["infiniband-400"].bandwidth == 45e9


def test_rates_given_by_hand_replace_those_of_the_table() -> None:
    device = find_device("H100", ["dense=600e12", "between=roce-400", "inside=300e9", "per_node=4"], "infiniband-200")
    assert (device.dense, device.inside.bandwidth, device.per_node) == (600e12, 300e9, 4)
    assert device.between is NETWORKS["infiniband-200"], "--network comes last"


def test_a_device_of_ones_own_is_a_yaml_file_or_a_name_with_its_rates(tmp_path: Path) -> None:
    file = tmp_path / "gaudi.yaml"
    file.write_text("memory: 96e9\npeak: 400e12\ncopy: 2e12\nbetween: ethernet-100\n", encoding="utf-8")
    by_file, by_name = find_device(str(file)), find_device("mine", ["memory=96e9", "peak=400e12", "copy=2e12"])
    assert (by_file.name, by_file.memory, by_file.dense) == ("gaudi", 96e9, by_name.dense)
    assert by_file.between is NETWORKS["ethernet-100"]
    assert "given by hand" in by_name.source


@pytest.mark.parametrize(
    ("name", "rates", "network", "said"),
    [
        (
            "h300",
            (),
            None,
            r"--gpu h300 is not known \(did you mean h200\?\); choose one of a100-40, .*--rate memory=VALUE",
        ),
        ("mine", ("memory=1e9", "peak=1e12"), None, "give its rates by hand: --rate copy=VALUE"),
        ("h100", ("dens=1",), None, r"--rate dens=1 is no rate of a device \(did you mean dense\?\)"),
        ("h100", ("dense",), None, "--rate dense is not KEY=VALUE"),
        ("h100", ("dense=fast",), None, "--rate dense=fast is not a number above 0"),
        ("h100", ("dense=inf",), None, "--rate dense=inf is not a number above 0"),
        ("h100", ("per_node=0.5",), None, "--rate per_node=0.5 is not a whole number of devices"),
        ("h100", (), "token-ring", "--network token-ring is not known; choose one of nvlink3"),
        ("absent.yaml", (), None, "--gpu absent.yaml cannot be read"),
    ],
)
def test_what_is_no_device_is_refused_with_what_to_give(
    name: str, rates: tuple[str, ...], network: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        find_device(name, rates, network)
