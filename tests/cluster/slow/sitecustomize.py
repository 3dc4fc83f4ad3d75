"""On PYTHONPATH, every step of training takes longer by `ZLORA_TEST_STEP_S`, so that a test can come in between."""

from __future__ import annotations

import importlib.util
import os
import sys
import time


class _Slow:
    def find_spec(self, name, path=None, target=None):
        if name != "pipeline.train.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module

        def exec_module(module):
            real(module)
            call = module.Stepper.__call__

            def slow(*arguments):
                time.sleep(float(os.environ["ZLORA_TEST_STEP_S"]))
                return call(*arguments)

            module.Stepper.__call__ = slow

        spec.loader.exec_module = exec_module
        return spec


if "ZLORA_TEST_STEP_S" in os.environ:
    sys.meta_path.insert(0, _Slow())
