"""Installing a client: one that fails skips the test, says why, and is done anew the next time."""

import subprocess
import zipfile
from pathlib import Path

import client_venv
import pytest

pytestmark = pytest.mark.clients

NOBODY = "http://127.0.0.1:9/simple"
REQUIREMENT = "loraserve-probe==1.0"
WHEEL = {
    "loraserve_probe.py": "def main():\n    print('installed')\n",
    "loraserve_probe-1.0.dist-info/METADATA": (
        "Metadata-Version: 2.1\nName: loraserve-probe\nVersion: 1.0\n"
    ),
    "loraserve_probe-1.0.dist-info/WHEEL": (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
    "loraserve_probe-1.0.dist-info/entry_points.txt": (
        "[console_scripts]\nloraserve-probe = loraserve_probe:main\n"
    ),
    "loraserve_probe-1.0.dist-info/RECORD": "",
}


def test_failed_install_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_venv, "CLIENTS", tmp_path / "clients")
    monkeypatch.setenv("PIP_INDEX_URL", NOBODY)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(pytest.skip.Exception) as told:
        client_venv.client_scripts("probe", REQUIREMENT)
    assert f"{REQUIREMENT} cannot be installed here:\n" in str(told.value)
    assert "No matching distribution found for loraserve-probe" in str(told.value)
    home = tmp_path / "clients" / "probe"
    assert (home / "bin" / "python").exists()
    left = home / "left_by_the_first_try"
    left.touch()

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "loraserve_probe-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in WHEEL.items():
            wheel.writestr(name, content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    scripts = client_venv.client_scripts("probe", REQUIREMENT)
    assert not left.exists()
    said = subprocess.run([scripts / "loraserve-probe"], capture_output=True, text=True, check=True)
    assert said.stdout == "installed\n"

    left.touch()
    assert client_venv.client_scripts("probe", REQUIREMENT) == scripts
    assert left.exists(), "what is whole is not installed again"
