"""The lock and the bill of materials are those of the pins, and no test reaches another machine."""

import json
import pathlib
import re
import socket

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pins(name):
    """{package: version} of a file of requirements."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {package.lower().replace("_", "-"): version for package, version in found}


def test_every_pin_is_locked_in_its_version_with_a_hash():
    locked = pins("requirements.lock")
    assert {name: locked.get(name) for name in pins("requirements.txt")} == pins("requirements.txt")
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines) and len(lines) > len(
        pins("requirements.txt")
    )


def test_the_bill_of_materials_is_that_of_the_lock():
    bill = json.loads((ROOT / "docs" / "sbom.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert {part["name"]: part["version"] for part in bill["components"]} == pins("requirements.lock")
    hashes = re.findall(r"sha256:(\w+)", (ROOT / "requirements.lock").read_text())
    assert [part["hashes"][0]["content"] for part in bill["components"]] == hashes


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_no_test_reaches_another_machine(address):
    with pytest.raises(PermissionError, match="no test reaches another machine"), socket.socket() as made:
        made.connect(address)
