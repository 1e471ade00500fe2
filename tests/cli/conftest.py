from __future__ import annotations

import subprocess

import pytest


@pytest.fixture
def auto_trans(bin_folder, tmp_path):
    """Runs the real command."""

    def run(*arguments, code=0, **options):
        command = [str(bin_folder / "auto-trans"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, **options)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run
