"""What a person meets who types a command: Ctrl-C at once, a wrong folder, a compiler that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [
    ["generate.py"], ["train.py"], ["-m", "checkpoints.convert"], ["-m", "checkpoints.inspect"],
    ["-m", "checkpoints.compare"], ["-m", "checkpoints.show"], ["-m", "nanollm.data"]], ids=lambda words: words[-1])
def test_ctrl_c_while_torch_is_imported(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr == ""
