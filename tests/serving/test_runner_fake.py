# SPDX-License-Identifier: Apache-2.0
"""`gemma.testing.FakeRunner` keeps the contract that it stands in for, bit for bit."""

import pytest
from runner_contract import RunnerContract

from gemma.testing import FakeRunner


class TestFakeRunner(RunnerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def made(cls):
        return FakeRunner()
