from __future__ import annotations

import subprocess
import sys


def test_without_jax_the_remedy_is_named():
    code = "import sys; sys.modules['jax'] = None; import invhvp_jax"
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=path, check=False
    )
    assert done.returncode == 1
    assert "pip install 'invhvp[jax]'" in done.stderr
