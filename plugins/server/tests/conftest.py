"""One tiny model and one server of it for all tests that change neither."""

from __future__ import annotations

import pytest
import tiny_model
from drivetrain_server import Server
from served import client_of, settings


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """The folder of adapters of that server; there is none in it."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="session")
def server(folder, shelf):
    with Server(settings(folder, template_seconds=1.0, adapters=str(shelf))) as found:
        yield found


@pytest.fixture(scope="session")
def client(server):
    with client_of(server) as found:
        yield found
