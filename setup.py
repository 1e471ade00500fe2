"""Puts ``auto_trans.pth``, which setup.cfg cannot name, beside the package."""

import os

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithHook(build_py):
    """Copies the .pth file that installs the MindFormers hook to the root of the wheel, that is site-packages."""

    _pth = "auto_trans.pth"

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            self.copy_file(self._pth, os.path.join(self.build_lib, self._pth), preserve_mode=False)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), os.path.join(self.build_lib, self._pth)]


setup(cmdclass={"build_py": BuildWithHook})
