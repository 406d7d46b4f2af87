"""Tests with frameworks that import deepspeed; none of them reaches the network.

Frameworks are imported on ranks alone, which are used again, so that each is imported once.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

OFFLINE = {
    "ACCELERATE_DISABLE_RICH": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@pytest.fixture(scope="session", autouse=True)
def _nothing_from_the_network(tmp_path_factory):
    """Ranks take these over from this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _frameworks(request):
    """Skip tests of what is not installed; a module names it in ``NEEDS``."""
    missing = [name for name in request.module.NEEDS if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: `tox -e frameworks` has them")
