"""Writes requirements.lock, every package that a run needs with the sha256 of its file, and docs/sbom.json of them:

python tests/make_lock.py

Hashes are of the files for the Python and the platform that it runs on. The bill of materials is CycloneDX 1.6.
"""

import json
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]


def resolve() -> list[dict[str, Any]]:
    """What pip would install of requirements.txt into an empty environment, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        words = [
            "install",
            "-q",
            "--dry-run",
            "--ignore-installed",
            "--report",
            report,
            "-r",
            ROOT / "requirements.txt",
        ]
        subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True)
        return json.loads(report.read_text())["install"]


def component(row: dict[str, Any]) -> dict[str, Any]:
    """A package of the bill of materials."""
    about, sha256 = row["metadata"], row["download_info"]["archive_info"]["hashes"]["sha256"]
    name, version = about["name"].lower().replace("_", "-"), about["version"]
    license_of = about.get("license_expression") or about.get("license") or ""
    short = [{"license": {"name": license_of}}] if license_of and len(license_of) < 60 else []
    return {
        "type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}",
        "hashes": [{"alg": "SHA-256", "content": sha256}],
    } | ({"licenses": short} if short else {})  # fmt: skip


def main() -> None:
    parts = sorted(map(component, resolve()), key=lambda part: part["name"])
    place = f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"
    lines = [
        f"# Of requirements.txt for {place}, by tests/make_lock.py.",
        "# pip install --require-hashes -r requirements.lock",
    ]
    for part in parts:
        lines.append(f"{part['name']}=={part['version']} --hash=sha256:{part['hashes'][0]['content']}")
    (ROOT / "requirements.lock").write_text("\n".join(lines) + "\n")
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": parts}
    text = json.dumps(bill).replace('"components": [', '"components": [\n').replace('}, {"type"', '},\n{"type"')
    (ROOT / "docs" / "sbom.json").write_text(text + "\n")
    print(f"{len(parts)} packages")


if __name__ == "__main__":
    main()
