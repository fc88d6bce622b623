import subprocess
import sys

import pytest

import hf_ifsq


def test_import_is_lazy_and_fast():
    code = (
        "import sys, time; start = time.perf_counter(); import hf_ifsq; print(time.perf_counter() - start); "
        "print(*({'torch', 'transformers', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        duration, imported = output.split("\n")[:2]
        assert imported == ""
        seconds.append(float(duration))
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", hf_ifsq.__all__)
def test_public_names_resolve(name):
    assert getattr(hf_ifsq, name).__name__ == name
    assert name in dir(hf_ifsq)


def test_unknown_name():
    with pytest.raises(AttributeError, match="'hf_ifsq' has no attribute 'IFSQUnknown'"):
        hf_ifsq.IFSQUnknown  # noqa: B018
